"""Runs a module whose writers are told of little room, where no small disk can be mounted.

    python -m benchmarks.hazards.little_room BYTES MODULE WORDS…

Worker processes import this module, too, so they are told the same.
"""

import runpy
import sys

from emollama_jax import disk

_room = int(sys.argv[1])
disk.free = lambda folder: _room

if __name__ == "__main__":
    _, _, module, *words = sys.argv
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
