"""Compiled programs on the disk, so that the second command of a kind compiles nothing.

XLA takes seconds for each program, and most of a short command's time. JAX can keep programs in a
folder, but its own store (`jax/_src/lru_cache.py`, seen in 0.10.2) writes in place and never
replaces an entry: one that was cut short by a kill stays broken, with a warning at each start. The
store here writes whole files under their final name only, checks a digest when it reads, drops what
is broken, and deletes what was not used for longest once the folder is too large. So several
processes may share it without a lock.

`EMOLLAMA_CACHE` names another folder, or is `none`. Where `JAX_COMPILATION_CACHE_DIR` is set, JAX
does as told there (a bucket, for instance), and nothing here acts.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import platform
import tempfile

from emollama_jax.errors import UserError

VARIABLE = "EMOLLAMA_CACHE"
LARGEST = 2 << 30  # bytes in the folder
ENDING = ".program"
DIGEST = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Compilations:
    """Programs that this process compiled, and those it found in the folder."""

    compiled: int = 0
    seconds: float = 0.0  # of compiling, and of reading what was found
    found: int = 0

    def since(self, earlier: "Compilations") -> "Compilations":
        return Compilations(
            self.compiled - earlier.compiled,
            self.seconds - earlier.seconds,
            self.found - earlier.found,
        )


_counted = Compilations()
_counting = False


def folder() -> pathlib.Path | None:
    """Folder of compiled programs; None if none are kept, or if JAX was given one itself.

    Raises:
        UserError: a folder that cannot be one.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish == "none" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    if wish:
        root = pathlib.Path(wish).expanduser()
        if root.exists() and not root.is_dir():
            raise UserError(f"{VARIABLE}={wish}: not a folder; set it to a folder, or to none")
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = pathlib.Path(home).expanduser() / "emollama_jax"
    # A program for one processor may stop another one: homes are shared between machines.
    return root.absolute() / f"compiled-{_processor()}"


def is_cold() -> bool:
    """Whether nothing was compiled for this machine yet, as far as is known."""
    place = folder()
    return place is None or not any(place.glob(f"*{ENDING}"))


def start() -> None:
    """Keeps compiled programs from here on. Call it before anything is compiled; imports JAX.

    Raises:
        UserError: as of `folder`.
    """
    count()
    place = folder()
    if place is None:
        return
    import jax

    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _log.warning(
            "%s: cannot cache compiled programs there (%s): every command recompiles; set "
            "%s to another folder, or to none",
            place,
            error.strerror,
            VARIABLE,
        )
        return
    # JAX asks for a folder before it uses any store; the small programs are kept too.
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _install(Store(place))


def count() -> None:
    """Counts compilations from here on, see `counted`."""
    global _counting
    if _counting:
        return
    _counting = True
    import jax

    def on_event(name: str, **_: object) -> None:
        if name == "/jax/compilation_cache/cache_hits":
            _counted.found += 1

    def on_duration(name: str, seconds: float, **_: object) -> None:
        # JAX tells this of programs from the folder too: `counted` takes them off.
        if name == "/jax/core/compile/backend_compile_duration":
            _counted.compiled += 1
            _counted.seconds += seconds

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)


def counted() -> Compilations:
    """Compilations of this process since `count`."""
    return Compilations(_counted.compiled - _counted.found, _counted.seconds, _counted.found)


class Store:
    """Programs by key in a folder: what JAX calls a `CacheInterface`."""

    def __init__(self, place: pathlib.Path, *, largest: int = LARGEST):
        self._path = place  # JAX reads this name
        self._largest = largest

    def get(self, key: str) -> bytes | None:
        """The program; None if it is absent or broken."""
        path = self._path / f"{key}{ENDING}"
        try:
            whole = path.read_bytes()
        except OSError:
            return None
        digest, program = whole[:DIGEST], whole[DIGEST:]
        if hashlib.sha256(program).digest() != digest:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of its last use
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program; a full disk or a folder that is gone is no error."""
        half = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, prefix="half-", delete=False) as file:
                half = file.name
                file.write(hashlib.sha256(value).digest() + value)
            os.replace(half, self._path / f"{key}{ENDING}")
            self._make_room()
        except OSError:
            if half is not None:
                with contextlib.suppress(OSError):
                    os.unlink(half)

    def _make_room(self) -> None:
        files = []
        for path in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process made room
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        size = sum(one[1] for one in files)
        for _, nbytes, path in sorted(files):
            if size <= self._largest:
                return
            path.unlink(missing_ok=True)
            size -= nbytes


def _install(store: Store) -> None:
    """Gives JAX the store. There is no public way to; these names are those of jax 0.10.2."""
    from jax._src import compilation_cache

    compilation_cache.reset_cache()
    with compilation_cache._cache_initialized_mutex:
        compilation_cache._cache = store
        compilation_cache._cache_initialized = True


def _processor() -> str:
    """A short name of this machine's kind of processor."""
    told = [platform.machine(), platform.system()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        told += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
