"""A campaign against lost work: kills, races, full disks, and inputs that nobody would write.

    python benchmarks/campaign.py --out FOLDER            # hours: what docs/reliability.md says
    python benchmarks/campaign.py --out FOLDER --short    # two minutes

Everything is small (a toy model, a few pictures), so that a kill costs seconds. Moments and inputs
follow from --seed, as far as a machine's speed lets them. Every finished unit is a line of
FOLDER/journal.jsonl: stopped at any moment, the same command goes on. FOLDER/report.html and
report.json say what was found; a failing input is kept in words (`hazards/mutations.py`), never as
a file. Exit status 1 if anything failed.

Wanted of each kind:
  kills   the command re-run ends as if nothing had happened: same curve, examples, answers,
          weights, numbers, byte for byte; no process outlives its parent
  races   of two processes in one folder one works, the other says one line and ends with status 2
  disks   one line that names the folder and the bytes, status 2, nothing half-written; with room
          again, the same command ends as if nothing had happened
  inputs  read, or refused in one line; no other exception, nothing over 10 s of a processor
          or 2 GB
"""

import argparse
import dataclasses
import html
import json
import os
import pathlib
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.hazards import fuzz, processes
from benchmarks.hazards.verbs import Verb, environment, make_verbs
from tests.helpers.fake_gemini import Server

BATCH = 250  # inputs of one unit
STORY = 4  # kills of one story


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Sizes of a campaign."""

    kills: int  # of each verb
    races: int  # in all
    disks: int  # in all
    inputs: int
    verbs: tuple[str, ...] = ("train", "prepare", "instruct", "convert", "eval")
    faces: bool = True
    items: int = 60
    rows: int = 2000
    steps: int = 24


WHOLE = Amounts(kills=40, races=20, disks=20, inputs=10_000)
SHORT = Amounts(
    kills=1, races=1, disks=2, inputs=130, verbs=("eval", "prepare", "train"), faces=False,
    items=30, rows=300, steps=12,
)  # fmt: skip


class Journal:
    """What is done, one line each."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
            for line in whole.splitlines():
                read = json.loads(line)
                self.done[read["unit"]] = read
            path.write_text(whole + "\n" if whole else "")

    def unit(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does a unit of work, unless it is done."""
        if name in self.done:
            return
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:  # of the campaign's own: told, and not the end of it
            found = {"fault": f"{type(error).__name__}: {error}"}
        line = {"unit": name, **found, "took": round(time.monotonic() - start, 1)}
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.done[name] = line
        fault = line.get("fault") or "; ".join(line.get("faults", ()))
        print(
            f"{name}: {'FAILED: ' + fault[:300] if fault else 'held'} ({line['took']} s)",
            flush=True,
        )


def units(
    amounts: Amounts, place: processes.Place, verbs: list[Verb], seed: int
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All units of work by name, in their order."""
    for story in range(-(-amounts.kills // STORY)):
        for verb in verbs:
            name, kills = f"kills-{verb.name}-{story}", min(STORY, amounts.kills - STORY * story)
            rng = random.Random(f"{seed} {name}")
            yield (
                name,
                lambda v=verb, k=kills, r=rng, n=name: processes.kill(
                    place.of(n), v, kills=k, rng=r, name=n
                ),
            )
    for number in range(amounts.races):
        verb = verbs[number % len(verbs)]
        name = f"race-{verb.name}-{number}"
        rng = random.Random(f"{seed} {name}")
        yield name, lambda v=verb, r=rng, n=name: processes.race(place.of(n), v, rng=r, name=n)
    mounts = processes.can_mount(place.root)
    for number in range(amounts.disks):
        verb = verbs[number % len(verbs)]
        share = (0.02, 0.3, 0.6, 0.9)[number // len(verbs) % 4]
        how = "small-disk" if mounts else "little-room"
        name = f"{how}-{verb.name}-{share:g}"
        yield (
            name,
            lambda v=verb, s=share, n=name: processes.fill_disk(
                place.of(n), v, share=s, mounts=mounts, name=n
            ),
        )
    for start in range(0, amounts.inputs, BATCH):
        stop = min(start + BATCH, amounts.inputs)
        yield f"inputs-{start}", lambda a=start, b=stop: fuzz.feed(seed, a, b, place.variables)


def run(out: pathlib.Path, amounts: Amounts, *, seed: int, at_once: int = 1) -> dict[str, Any]:
    """Runs or resumes a campaign; its summary.

    Args:
        out: folder for everything.
        amounts: sizes.
        seed: seed of moments and inputs.
        at_once: number of units that run side by side.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "journal.jsonl")
    programs = pathlib.Path(os.environ.get("EMOLLAMA_CACHE") or out / "programs")
    place = processes.Place(out / "work", environment(programs, uuid.uuid4().hex))
    with Server(delay=0.01).running() as server:
        every = make_verbs(
            out / "inputs",
            server.url,
            faces=amounts.faces,
            items=amounts.items,
            rows=amounts.rows,
            steps=amounts.steps,
        )
        verbs = [verb for verb in every if verb.name in amounts.verbs]
        work = list(units(amounts, place, verbs, seed))
        if any(name not in journal.done for name, _ in work if not name.startswith("inputs")):
            # Together, so that their times are those of a machine that runs as many units.
            with ThreadPoolExecutor(at_once) as pool:
                list(
                    pool.map(
                        lambda verb: place.refer(verb, twice=amounts.faces),
                        [verb for verb in verbs if verb.name != "instruct"],
                    )
                )
            for verb in verbs:
                if verb.name == "instruct":  # which begins with what `prepare` made
                    place.refer(verb, twice=amounts.faces)
                print(f"{verb.name}, undisturbed: {place.seconds[verb.name]:.1f} s", flush=True)
        random.Random(seed).shuffle(work)  # a campaign that is stopped has done some of each
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda unit: journal.unit(*unit), work))
    found = summary([journal.done[name] for name, _ in work])
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "report.html").write_text(page(found))
    return found


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of each kind and verb, and every fault."""
    rows: dict[str, dict[str, Any]] = {}
    faults = []
    for line in lines:
        kind, _, rest = line["unit"].partition("-")
        kind = {"small": "small disk", "little": "little room"}.get(kind, kind)
        verb = rest.removeprefix("disk-").removeprefix("room-").partition("-")[0]
        name = kind if kind == "inputs" else f"{kind}, {verb}"
        row = rows.setdefault(
            name, {"units": 0, "done": 0, "failed": 0, "seconds": 0.0, "bytes": 0}
        )
        wrong = [line["fault"]] if line.get("fault") else line.get("faults", [])
        row["units"] += 1
        row["done"] += line.get("kills", sum(line["counts"].values()) if "counts" in line else 1)
        row["failed"] += len(wrong)
        row["seconds"] = max(row["seconds"], line.get("seconds", line["took"]))
        row["bytes"] = max(row["bytes"], line.get("bytes", 0))
        for outcome, number in line.get("counts", {}).items():
            row[outcome] = row.get(outcome, 0) + number
        faults += [f"{line['unit']}: {fault}" for fault in wrong]
    return {"rows": rows, "faults": faults}


def page(found: dict[str, Any]) -> str:
    """The report as a page."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{row['done']:,}<td>{row['failed']}<td>{row['seconds']:.1f}"
        f"<td>{row['bytes'] / 1e6:,.0f}"
        for name, row in found["rows"].items()
    )
    faults = "".join(f"<li><code>{html.escape(fault)}</code>" for fault in found["faults"])
    return (
        "<!doctype html><meta charset=utf-8><title>Campaign</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:.2em 1em;text-align:right}td:first-child{text-align:left}</style>"
        "<h1>Campaign</h1><table><tr><th>what<th>done<th>failed<th>longest unit or input, s"
        f"<th>largest process, MB{rows}</table><h2>Faults</h2><ul>{faults or '<li>none'}</ul>\n"
    )


def main(args: list[str] | None = None) -> int:
    """Runs the command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder; resumed if there")
    parser.add_argument("--short", action="store_true", help="two minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="units that run side by side")
    for name in ("kills", "races", "disks", "inputs"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} instead of the usual number")
    given = parser.parse_args(args)
    amounts = SHORT if given.short else WHOLE
    changed = {name: getattr(given, name) for name in ("kills", "races", "disks", "inputs")}
    changed = {name: value for name, value in changed.items() if value is not None}
    amounts = dataclasses.replace(amounts, **changed)
    found = run(given.out, amounts, seed=given.seed, at_once=given.at_once)
    for name, row in found["rows"].items():
        print(f"{name:24} {row['done']:6} done, {row['failed']} failed")
    print(f"{given.out / 'report.html'}")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
