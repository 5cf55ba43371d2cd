"""One process at a time in a folder or a file.

On a disk, the lock is the kernel's (`flock`): it ends with its process, however that ends, so none
is ever stale. The file `.lock`, which stays, only says who holds it.

A bucket has no such locks. There `lock.json` is created only if it is absent, and renewed while its
process lives. A process that finds one watches it: if it is renewed, its process lives; if not, it
died. No clocks are compared, since hosts' clocks differ.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path, is_remote

FILE, OBJECT = ".lock", "lock.json"
RENEW = 20.0  # seconds between renewals of a bucket's lock
WATCH = 3 * RENEW  # without a renewal, after which its process is taken for dead

_log = logging.getLogger(__name__)


def lock_file(path: pathlib.Path, *, busy: str) -> int:
    """Opens a file for reading and appending, and locks it until it is closed.

    Args:
        path: file to lock; created if missing.
        busy: message if another process holds it.

    Returns:
        The descriptor; child processes that are spawned do not get it.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(busy) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            os.close(file)
            raise
        _log.warning("%s: this disk does not support locks: run one process at a time", path)
    except BaseException:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def hold(folder: epath.PathLike, *, instead: str) -> Iterator[None]:
    """Keeps other processes out of a folder.

    Args:
        folder: on a disk or in a bucket; made where it is missing.
        instead: advice to the second process, e.g. "choose another --out".

    Raises:
        UserError: another process holds it, and which.
    """
    folder = as_path(folder)
    with _hold_object(folder, instead) if is_remote(folder) else _hold_file(folder, instead):
        yield


@contextlib.contextmanager
def hold_new(path: str | os.PathLike, *, instead: str) -> Iterator[None]:
    """Keeps other processes from making the same file or folder, which is not there yet.

    The lock is a file beside it, `.NAME.lock`, removed in the end.

    Args:
        path: on a disk.
        instead: advice to the second process.

    Raises:
        UserError: another process is making it.
    """
    path = pathlib.Path(path)
    lock = path.with_name(f".{path.name}{FILE}")
    busy = f"{path}: another process is writing it: wait for it to end, or {instead}"
    while True:
        file = lock_file(lock, busy=busy)
        if os.fstat(file).st_nlink:
            break
        os.close(file)  # it was removed between its opening and its locking
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


@contextlib.contextmanager
def _hold_file(folder: epath.Path, instead: str) -> Iterator[None]:
    path = pathlib.Path(folder) / FILE
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):  # there is none yet, or it is just being written
        holder = {}
    file = lock_file(path, busy=_busy(folder, holder, instead))
    try:
        os.ftruncate(file, 0)
        os.write(file, json.dumps(_me()).encode())
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _hold_object(folder: epath.Path, instead: str) -> Iterator[None]:
    storage, name = fsspec.core.url_to_fs(f"{os.fspath(folder).rstrip('/')}/{OBJECT}")
    me, taken = _me(), False
    while not _create(storage, name, me):
        holder = _read(storage, name)
        if holder is None:
            continue  # it was released just now
        if not _died(holder):
            _log.warning("%s: waiting %g s to see if it is alive", _where(folder, holder), WATCH)
            if _renewed(storage, name, holder):
                raise UserError(_busy(folder, holder, instead))
        _log.warning("%s: that process died; its lock is removed", _where(folder, holder))
        if _read(storage, name) == holder:
            storage.rm_file(name)
        taken = True
    if taken:  # others may have done the same at the same moment: the last one to write has it
        time.sleep(min(RENEW / 10, 2))
        holder = _read(storage, name) or {}
        if holder.get("token") != me["token"]:
            raise UserError(_busy(folder, holder, instead))
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(storage, name, me, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if (_read(storage, name) or {}).get("token") == me["token"]:
            storage.rm_file(name)


def _create(storage: Any, name: str, holder: dict[str, Any]) -> bool:
    try:
        storage.pipe_file(name, json.dumps(holder).encode(), mode="create")
    except FileExistsError:
        return False
    return True


def _read(storage: Any, name: str) -> dict[str, Any] | None:
    storage.invalidate_cache()
    try:
        return json.loads(storage.cat_file(name))
    except FileNotFoundError:
        return None


def _renew(storage: Any, name: str, holder: dict[str, Any], over: threading.Event) -> None:
    count = 0
    while not over.wait(RENEW):
        try:
            found = _read(storage, name)
            if found is not None and found["token"] != holder["token"]:
                _log.error("%s: taken over by process %s on %s", name, found["pid"], found["host"])
                return
            count += 1
            storage.pipe_file(name, json.dumps(holder | {"renewed": count}).encode())
        except Exception as error:  # a bucket that fails now and then must not end a run
            _log.warning("%s: cannot renew the lock: %s", name, error)


def _renewed(storage: Any, name: str, holder: dict[str, Any]) -> bool:
    """Whether the lock changes while it is watched; released counts as not."""
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(RENEW / 4)
        found = _read(storage, name)
        if found != holder:
            return found is not None
    return False


def _died(holder: dict[str, Any]) -> bool:
    """Whether a holder on this very machine is gone; of others, nothing is known."""
    if holder["host"] != socket.gethostname() or holder["boot"] != _boot():
        return False
    return not pathlib.Path(f"/proc/{holder['pid']}").exists() and os.path.isdir("/proc/self")


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "token": secrets.token_hex(8),
    }


def _boot() -> str:
    """Tells machines of one name apart; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _where(folder: epath.Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{folder}: in use by another process"
    return (
        f"{folder}: in use by process {holder['pid']} on {holder['host']} since {holder['since']} "
        f"({holder['command']})"
    )


def _busy(folder: epath.Path, holder: dict[str, Any], instead: str) -> str:
    return f"{_where(folder, holder)}: wait for it to end, or {instead}"
