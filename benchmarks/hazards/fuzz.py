"""Mutated inputs, one after the other in a process that its parent watches.

The child says when it begins an input and how it ended. A line that does not come is a hang; a
child that goes is a crash; both are that input's. What is raised other than a `UserError` is a
fault of ours. Everything follows from the seed.

    python -m benchmarks.hazards.fuzz SEED START STOP
"""

import json
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.hazards.mutations import Recipe, shrink
from benchmarks.hazards.readers import kinds

HANG = 10.0  # seconds of a processor for one input
PATIENCE = 300.0  # seconds of a clock: a machine may be busy with more
LARGEST = 2 << 30  # bytes that a process may hold


def recipe_of(seed: int, number: int) -> Recipe:
    """The input of a number."""
    rng, every = random.Random(f"{seed} {number}"), kinds()
    name = sorted(every)[number % len(every)]
    return every[name].draw(rng, name)


def outcome(recipe: Recipe, folder: pathlib.Path) -> str:
    """ "read", "refused", or the exception that nobody expects."""
    from emollama_jax.dispatch import disk_error
    from emollama_jax.errors import UserError

    kind = kinds()[recipe.kind]
    try:
        data = kind.make(recipe)
    except RecursionError:
        return "not made"
    folder.mkdir()
    try:
        kind.read(data, folder)
    except UserError as error:
        return "refused" if str(error) else "a refusal without words"
    except Exception as error:
        if disk_error(error) is not None:  # as the command line turns it into one line
            return "refused"
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "read"


def _as(found: str, place: pathlib.Path) -> Callable[[Recipe], bool]:
    """Whether an input ends like that."""
    return lambda recipe: outcome(recipe, place)[:40] == found[:40]


def child(seed: int, start: int, stop: int) -> None:
    """Reads inputs and says how each ended, a JSON line each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what readers print goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as home:
        place = pathlib.Path(home) / "input"
        for number in range(start, stop):
            print(json.dumps({"begin": number}), file=out, flush=True)
            recipe, began = recipe_of(seed, number), time.process_time()
            found = outcome(recipe, place)
            line = {"end": number, "kind": recipe.kind, "found": found}
            if found not in ("read", "refused", "not made"):
                line["words"] = shrink(recipe, _as(found, place)).words()
            line["seconds"] = time.process_time() - began
            line["bytes"] = _peak()
            print(json.dumps(line), file=out, flush=True)


def _peak() -> int:
    """The most memory that this program held, bytes; `ru_maxrss` counts its parent's before it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def feed(seed: int, start: int, stop: int, variables: Mapping[str, str]) -> dict[str, Any]:
    """Reads the inputs of some numbers in children; what went wrong, in words.

    Returns:
        Numbers by outcome, the largest time and memory, and faults.
    """
    counts: dict[str, int] = {}
    faults: list[str] = []
    slowest, largest, at = 0.0, 0, start
    while at < stop:
        for line in _watched(seed, at, stop, variables):
            if "begin" in line:
                at = line["begin"]
                continue
            at = line["end"] + 1
            found = line["found"]
            known = found in ("read", "refused", "not made")
            counts[found if known else "fault"] = counts.get(found if known else "fault", 0) + 1
            slowest, largest = max(slowest, line["seconds"]), max(largest, line["bytes"])
            if not known:
                faults.append(f"{found}: {line['words']}")
            elif line["seconds"] > HANG or line["bytes"] > LARGEST:
                words = recipe_of(seed, line["end"]).words()
                faults.append(f"{line['seconds']:.0f} s, {line['bytes']:,} bytes: {words}")
        else:
            if at < stop:  # the child went in the middle of an input
                counts["fault"] = counts.get("fault", 0) + 1
                faults.append(f"a hang or a crash: {recipe_of(seed, at).words()}")
                at += 1
    return {
        "counts": counts, "faults": faults, "seconds": round(slowest, 2), "bytes": largest,
    }  # fmt: skip


def _watched(
    seed: int, start: int, stop: int, variables: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Lines of a child until it ends, or says nothing for too long."""
    words: Sequence[str] = [sys.executable, "-m", __spec__.name, *map(str, (seed, start, stop))]
    process = subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as said:
            for line in said:
                lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while line := lines.get(timeout=PATIENCE):
            yield json.loads(line)
    except queue.Empty:
        pass
    finally:
        process.kill()
        process.wait()
        reader.join()


if __name__ == "__main__":
    child(*map(int, sys.argv[1:]))
