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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_of_a_killed_parent_end(tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
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
