"""Kills, races and full disks: what is done to a verb's processes, and what is wanted of them."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks.hazards.verbs import MARK, OUT, Verb, difference

PATIENCE = 1800.0  # seconds for a verb of seconds, on a machine that is busy with more
PAGE = 4096
GROWING = (".lock", "metrics.jsonl")  # may be empty: nothing was logged yet
GRACE = 20.0  # seconds in which workers of a killed process must end; one may just be starting


@dataclasses.dataclass
class Place:
    """Where a campaign's verbs run.

    Attributes:
        root: folder of all work folders.
        variables: environment of the processes.
        prepared: a finished `prepare`, which `instruct` begins with.
        references: verb → its undisturbed result.
        seconds: verb → how long that took.
        bytes: verb → what that wrote.
    """

    root: pathlib.Path
    variables: Mapping[str, str]
    prepared: pathlib.Path | None = None
    references: dict[str, Mapping[str, bytes]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    def of(self, unit: str) -> "Place":
        """The same place, whose processes are known as one unit's."""
        variables = {**self.variables, MARK: f"{self.variables[MARK]}-{unit}"}
        return dataclasses.replace(self, variables=variables)

    def fresh(self, verb: Verb, name: str) -> pathlib.Path:
        """A new work folder of a verb."""
        work = self.root / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.fill(verb, work)
        return work

    def fill(self, verb: Verb, work: pathlib.Path) -> None:
        """Puts into a work folder what the verb begins with."""
        if verb.name == "instruct":
            shutil.copytree(self.prepared / OUT, work / OUT, dirs_exist_ok=True)

    def begin(self, verb: Verb, work: pathlib.Path) -> subprocess.Popen[str]:
        """Starts a verb; its output goes to a file that every try adds to."""
        with (work / "said").open("a") as said:
            return subprocess.Popen(
                verb.words, cwd=work, env=self.variables, stdout=said, stderr=said, text=True
            )

    def finish(self, verb: Verb, work: pathlib.Path) -> tuple[int, str]:
        """Runs a verb to its end; its status and what it said."""
        before = len(_said(work))
        process = self.begin(verb, work)
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -1, f"no end after {PATIENCE:g} s"
        return status, _said(work)[before:]

    def check(self, verb: Verb, work: pathlib.Path) -> str:
        """What a finished work folder lacks; empty if nothing."""
        try:
            found = verb.result(work)
        except Exception as error:
            return f"unreadable: {type(error).__name__} {error}"
        return difference(found, self.references[verb.name])

    def refer(self, verb: Verb, *, twice: bool) -> None:
        """Makes the reference of a verb, unless it is there.

        Args:
            verb: verb to run.
            twice: measures a second run: the first one may have to compile.
        """
        name = f"reference-{verb.name}"
        mark = self.root / f"{name}.json"
        if mark.exists():
            work, known = self.root / name, json.loads(mark.read_text())
        else:
            work = self.fresh(verb, name)
            for _ in range(1 + twice):
                known = self._measure(verb, work)
            mark.write_text(json.dumps(known))
        self.seconds[verb.name], self.bytes[verb.name] = known["seconds"], known["bytes"]
        self.references[verb.name] = verb.result(work)
        if verb.name == "prepare":
            self.prepared = work

    def _measure(self, verb: Verb, work: pathlib.Path) -> dict[str, float]:
        """An undisturbed run: how long it took, and what it wrote."""
        shutil.rmtree(work / OUT, ignore_errors=True)
        self.fill(verb, work)
        before, start = _bytes(work), time.monotonic()
        status, said = self.finish(verb, work)
        if status:
            raise RuntimeError(f"{verb.name}, undisturbed: status {status}: {said[-2000:]}")
        return {"seconds": time.monotonic() - start, "bytes": _bytes(work) - before}


def _said(work: pathlib.Path) -> str:
    path = work / "said"
    return path.read_text(errors="replace") if path.exists() else ""


def _bytes(folder: pathlib.Path) -> int:
    """Bytes of all files, in the pages of a tmpfs."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


# ---- kills


def kill(place: Place, verb: Verb, *, kills: int, rng: random.Random, name: str) -> dict:
    """One story: a verb is killed some times and then let run to its end.

    Every other moment is uniform over an undisturbed run's time, the others lie behind the first
    change of the output folder, where things are being written. A run that ended before its moment
    does not count and is drawn again.
    """
    work, done, early = place.fresh(verb, name), 0, 0
    while done < kills:
        before = _signature(work / OUT)
        process, seconds = place.begin(verb, work), place.seconds[verb.name]
        if done % 2:
            time.sleep(rng.uniform(0.05, 1.0) * seconds)
        else:
            while process.poll() is None and _signature(work / OUT) == before:
                time.sleep(0.1)
            time.sleep(rng.uniform(0.0, 0.3) * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
            process.wait()
            continue
        early += 1
        shutil.rmtree(work / OUT, ignore_errors=True)
        place.fill(verb, work)
        if early > 10 * kills:
            break
    status, said = place.finish(verb, work)
    if status == 2 and verb.finished and verb.finished in said:
        status = 0  # the last kill came between its last write and its end
    fault = f"status {status}: {said[-300:]}" if status else place.check(verb, work)
    left = orphans(place.variables[MARK])
    if not fault and left:
        fault = f"{len(left)} processes outlived their parent"
    shutil.rmtree(work, ignore_errors=True)
    return {"kills": done, "fault": fault}


def _signature(folder: pathlib.Path) -> tuple[int, int]:
    """Changes when something is written into a folder."""
    if not folder.exists():
        return 0, 0
    times = [path.lstat().st_mtime_ns for path in folder.glob("**/*") if path.exists()]
    return len(times), max(times, default=0)


def orphans(token: str) -> list[int]:
    """A campaign's processes that are left after GRACE; none where the system does not tell."""
    wanted, end = f"{MARK}={token}".encode(), time.monotonic() + GRACE
    while True:
        found = [pid for pid, words in _environments() if wanted in words and pid != os.getpid()]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.25)


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if not zombie:
            yield int(folder.name), words


# ---- races


def race(place: Place, verb: Verb, *, rng: random.Random, name: str) -> dict:
    """Two processes of one verb in one folder: one does the work, the other says one line."""
    work = place.fresh(verb, name)
    first = place.begin(verb, work)
    time.sleep(rng.uniform(0, 0.2) * place.seconds[verb.name])
    with (work / "second").open("w") as said:
        second = subprocess.Popen(
            verb.words, cwd=work, env=place.variables, stdout=said, stderr=said
        )
    statuses = [process.wait(PATIENCE) for process in (first, second)]
    texts = [_said(work), (work / "second").read_text(errors="replace")]
    faults = [
        f"status {status}: {text[-300:]}"
        for status, text in zip(statuses, texts, strict=True)
        if status and (status != 2 or not _one_line(verb, text))
    ]
    if min(statuses):
        faults.append(f"neither did the work: {statuses}")
    fault = "; ".join(faults) or place.check(verb, work)
    shutil.rmtree(work, ignore_errors=True)
    return {"refused": statuses.count(2), "fault": fault}


def _one_line(verb: Verb, text: str) -> bool:
    lines = [line for line in text.splitlines() if line.startswith(verb.line)]
    return len(lines) == 1 and "Traceback" not in text


# ---- full disks


@contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[Callable[[], None]]:
    """A tmpfs in a folder; what is yielded makes it large. Needs the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield lambda: _mount("-o", "remount,size=1g", str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def can_mount(folder: pathlib.Path) -> bool:
    """Whether a small tmpfs may be mounted here."""
    try:
        with small_disk(folder / "mounted", 2**16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill_disk(place: Place, verb: Verb, *, share: float, mounts: bool, name: str) -> dict:
    """A verb on a disk with room for a share of what it writes, then with room for all.

    Args:
        place: place of the campaign.
        verb: verb to run.
        share: share of the bytes that an undisturbed run wrote.
        mounts: a small tmpfs; otherwise the package is told of as little room.
        name: name of the work folder.
    """
    work = place.fresh(verb, name)
    size = max(int(share * place.bytes[verb.name]), 4 * PAGE)
    already = _bytes(work / OUT) if (work / OUT).exists() else 0
    if not mounts:
        return _told_of_little_room(place, verb, work, size + already)
    shutil.rmtree(work / OUT, ignore_errors=True)
    with small_disk(work / OUT, size + already) as enlarge:
        place.fill(verb, work)
        status, said = place.finish(verb, work)
        fault = _fault_of_full(verb, work, status, said)
        enlarge()
        if not fault:
            status, said = place.finish(verb, work)
            fault = f"again: status {status}: {said[-300:]}" if status else place.check(verb, work)
    shutil.rmtree(work, ignore_errors=True)
    return {"fault": fault}


def _told_of_little_room(place: Place, verb: Verb, work: pathlib.Path, size: int) -> dict:
    python, option, *rest = verb.words
    told = [python, option, "benchmarks.hazards.little_room", str(size), *rest]
    status, said = place.finish(dataclasses.replace(verb, words=told), work)
    fault = _fault_of_full(verb, work, status, said)
    if not fault:
        status, said = place.finish(verb, work)
        fault = f"again: status {status}: {said[-300:]}" if status else place.check(verb, work)
    shutil.rmtree(work, ignore_errors=True)
    return {"fault": fault}


def _fault_of_full(verb: Verb, work: pathlib.Path, status: int, said: str) -> str:
    """What is wrong with a refusal for lack of room; it may also have had enough."""
    if status == 0:
        return ""
    lines = [line for line in said.splitlines() if line.startswith(verb.line)]
    if status != 2 or len(lines) != 1 or "Traceback" in said:
        return f"status {status}, {len(said.splitlines())} lines: {said[-300:]}"
    if OUT not in lines[0] or "bytes" not in lines[0]:
        return f"the line names no folder or no bytes: {lines[0]}"
    halves: Sequence[pathlib.Path] = [
        path
        for path in (work / OUT).rglob("*")
        if path.name.endswith((".partial", ".part", "checkpoint-tmp"))
        or (path.is_file() and not path.stat().st_size and path.name not in GROWING)
    ]
    return f"left {halves[0].relative_to(work)}" if halves else ""
