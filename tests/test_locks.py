"""One process at a time: in a folder on a disk, in a journal's file, in a bucket's folder."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from emollama_jax import locks
from emollama_jax.errors import UserError
from emollama_jax.locks import hold, hold_new, lock_file
from tests.helpers.fake_gcs import Bucket

ROOT = pathlib.Path(__file__).parent.parent
HOLDER = """
import sys, time
from emollama_jax.locks import hold
with hold(sys.argv[1], instead="choose another"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_of_the_first(holder, tmp_path):
    with pytest.raises(UserError) as caught, hold(tmp_path / "run", instead="choose another --out"):
        pass
    said = str(caught.value)
    assert said.startswith(
        f"{tmp_path}/run: in use by process {holder.pid} on {socket.gethostname()}"
    )
    assert said.endswith(": wait for it to end, or choose another --out") and "\n" not in said
    assert holder.poll() is None
    with hold(tmp_path / "other", instead=""):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait(30)
    with (
        hold(tmp_path / "run", instead=""),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
    ):
        hold(tmp_path / "run", instead="").__enter__()
    with hold(tmp_path / "run", instead=""):  # released
        pass


def test_a_torn_note_of_the_holder_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1')
    with hold(tmp_path, instead=""):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_file_is_locked_until_it_is_closed(tmp_path):
    first = lock_file(tmp_path / "a" / "journal", busy="busy")
    with pytest.raises(UserError, match=r"^busy$"):
        lock_file(tmp_path / "a" / "journal", busy="busy")
    os.close(first)
    os.close(lock_file(tmp_path / "a" / "journal", busy="busy"))


def test_a_disk_without_locks_warns_and_other_errors_are_raised(tmp_path, monkeypatch, caplog):
    def fails(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fails(errno.ENOLCK)
    os.close(lock_file(tmp_path / "x", busy=""))
    assert "does not support locks" in caplog.text
    fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        lock_file(tmp_path / "x", busy="")


def test_what_is_not_there_yet_is_made_once(tmp_path):
    out = tmp_path / "weights"
    with (
        hold_new(out, instead="choose another --out"),
        pytest.raises(UserError, match="weights: another process is writing it: wait for it to"),
    ):
        hold_new(out, instead="choose another --out").__enter__()
    assert os.listdir(tmp_path) == []
    with hold_new(out, instead=""):  # released
        assert not out.exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_again(tmp_path, monkeypatch):
    real, seen = locks.lock_file, []

    def lock_file(path, *, busy):
        file = real(path, busy=busy)
        if not seen:  # another process just ended, and removed it
            path.unlink()
        seen.append(file)
        return file

    monkeypatch.setattr(locks, "lock_file", lock_file)
    with hold_new(tmp_path / "weights", instead=""):
        assert len(seen) == 2 and (tmp_path / ".weights.lock").exists()


# ------------------------------------------------------------------ buckets


@pytest.fixture
def bucket(monkeypatch):
    """A bucket in this process's memory, with quick renewals."""
    monkeypatch.setattr(locks, "RENEW", 0.05)
    monkeypatch.setattr(locks, "WATCH", 0.5)
    monkeypatch.setattr(locks, "as_path", lambda path: path)
    storage = fsspec.filesystem("memory")
    yield storage
    storage.store.clear()


RUN = "memory://bucket/run"
NAME = "/bucket/run/lock.json"


def foreign(**changes):
    return {
        "host": "elsewhere",
        "boot": "b",
        "pid": 7,
        "since": "2026-01-01 10:00:00",
        "command": "emollama train tiny",
        "token": "t",
    } | changes


def test_a_bucket_is_held_renewed_and_released(bucket):
    with hold(RUN, instead="choose another"):
        first = json.loads(bucket.cat_file(NAME))
        assert first["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*: wait for it"):
            hold(RUN, instead="choose another").__enter__()
        assert json.loads(bucket.cat_file(NAME))["renewed"] >= 1
    assert not bucket.exists(NAME)


def test_a_living_holder_elsewhere_is_left_alone(bucket):
    over = threading.Event()
    holder = foreign()
    bucket.pipe_file(NAME, json.dumps(holder).encode())
    thread = threading.Thread(target=locks._renew, args=(bucket, NAME, holder, over))
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere since 2026-01-01 10:00:00"):
            hold(RUN, instead="").__enter__()
    finally:
        over.set()
        thread.join()
    assert json.loads(bucket.cat_file(NAME))["token"] == "t"


def test_a_dead_holder_elsewhere_is_watched_and_replaced(bucket, caplog):
    bucket.pipe_file(NAME, json.dumps(foreign()).encode())
    start = time.monotonic()
    with hold(RUN, instead=""):
        assert json.loads(bucket.cat_file(NAME))["pid"] == os.getpid()
    assert time.monotonic() - start > locks.WATCH
    assert "process 7 on elsewhere" in caplog.text and "died" in caplog.text


def test_a_dead_holder_on_this_machine_is_replaced_at_once(bucket):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = foreign(host=socket.gethostname(), boot=locks._boot(), pid=dead.pid)
    bucket.pipe_file(NAME, json.dumps(here).encode())
    start = time.monotonic()
    with hold(RUN, instead=""):
        assert time.monotonic() - start < locks.WATCH


def test_a_lock_that_was_lost_is_not_removed(bucket, caplog):
    with hold(RUN, instead=""):
        bucket.pipe_file(NAME, json.dumps(foreign()).encode())
        time.sleep(0.3)
    assert json.loads(bucket.cat_file(NAME))["token"] == "t"
    assert "taken over by process 7" in caplog.text


GCS = """
import json, pytest
from emollama_jax import locks
from emollama_jax.errors import UserError
locks.RENEW, locks.WATCH = 0.1, 1.0
with locks.hold("gs://bucket/run", instead="x"):
    with pytest.raises(UserError, match="in use by process"):
        locks.hold("gs://bucket/run", instead="x").__enter__()
with locks.hold("gs://bucket/run", instead="x"):
    pass
"""


def test_google_cloud_storage_creates_a_lock_only_once(tmp_path):
    with Bucket() as server:
        done = subprocess.run(
            [sys.executable, "-c", GCS],
            env=os.environ | server.environment | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "run/lock.json" not in server.objects
        assert any("ifGenerationMatch=0" in line for line in server.asked)
