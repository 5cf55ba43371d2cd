"""Worker processes that end when their parent does, however it ends.

A parent that is killed (SIGKILL, out of memory) says goodbye to nobody, and its workers would wait
for work, or go on writing, for ever.
"""

import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

LOOK = 0.25  # seconds between looks at the parent


def pool(processes: int) -> ProcessPoolExecutor:
    """A pool of fresh processes; they share no lock and no thread with this one.

    Args:
        processes: number of them.
    """
    return ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=end_with_parent,
        initargs=(os.getpid(),),
    )


def end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent, also where the parent is gone already.

    Args:
        parent: its process id. A process whose parent died has another one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
