"""Worker processes end with their parent, also when it is killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PARENT = """
import time
from emollama_jax.workers import pool

def work(seconds):
    import os
    print(os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with pool(2) as workers:
        list(workers.map(work, [60, 60]))
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


GRAIN = """
import os, pathlib, sys, time

def main():
    from emollama_jax.data.pipeline import make_train_iterator
    from emollama_jax.testing.toy_sets import Store, make_config, small_bpe

    path = pathlib.Path(sys.argv[1])
    path.write_text(small_bpe())
    cfg = make_config(str(path), "data.workers=1")
    batches = make_train_iterator(cfg, Store().splits(cfg))
    next(batches)
    for _ in range(2):  # its one worker, twice
        print(children(), flush=True)
    time.sleep(60)

def children():
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            own = (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
        except OSError:  # it ended just now
            continue
        if own and b"spawn_main" in words:
            return folder.name

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("script", "number"),
    [(PARENT, signal.SIGKILL), (PARENT, signal.SIGTERM), (GRAIN, signal.SIGKILL)],
    ids=["pool, SIGKILL", "pool, SIGTERM", "Grain, SIGKILL"],
)
def test_workers_of_a_killed_parent_end(tmp_path, script, number):
    if script is GRAIN and not pathlib.Path("/proc/self/stat").exists():
        pytest.skip("this system does not list processes in /proc")
    path = tmp_path / "parent.py"
    path.write_text(script)
    parent = subprocess.Popen(
        [sys.executable, str(path), str(tmp_path / "bpe.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent, parent.stdout:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(alive, workers)) and parent.pid not in workers
        parent.send_signal(number)
        parent.wait(30)
        end = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, workers))
