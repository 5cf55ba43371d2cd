"""`emollama data inspect`: what is in a prepared set, beside what is published, and what is wrong.

Counts come from the index that preparation wrote, so that media are read for the contact sheet
only. Faults are told in lines of their own: an example that stands twice in a split or in two
splits, by its name or by the content of its media, and folds that share a test clip.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from emollama_jax.data.builders.listing import brief
from emollama_jax.data.builders.stored import Index
from emollama_jax.data.media import read_image, read_video
from emollama_jax.data.sets import parse
from emollama_jax.data.split import Split, prepared
from emollama_jax.errors import UserError

TILE = 120  # pixels
STRIP = 10  # frames shown of a clip
COLUMNS = 10
DIFFERS = "≠"


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """How many examples of each class a split has, and how many it should have."""

    name: str
    split: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    published: tuple[int, ...] | None  # of each class; None where nothing is published
    published_total: int | None

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def differs(self) -> bool:
        """Whether any count is not the published one."""
        classes = self.published is not None and self.published != self.counts
        return classes or self.published_total not in (None, self.total)

    def lines(self) -> list[str]:
        """A line for each class, then the whole split's."""
        wanted = self.published or (None,) * len(self.counts)
        rows = [
            _line(label, count, self.total, expected)
            for label, count, expected in zip(self.classes, self.counts, wanted, strict=True)
        ]
        whole = _line("all", self.total, self.total, self.published_total)
        return [*rows, f"{whole}  {self.name}, {self.split}"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    splits: tuple[SplitCounts, ...]
    notes: tuple[str, ...]  # how it was read, and what preparation left out
    faults: tuple[str, ...]

    @property
    def first(self) -> SplitCounts:
        return self.splits[0]

    def lines(self) -> list[str]:
        """For the terminal."""
        tables = [line for counts in self.splits for line in [*counts.lines(), ""]]
        differ = [f"{s.name}, {s.split}" for s in self.splits if s.differs]
        verdict = f"{DIFFERS} counts differ from the published ones: {'; '.join(differ)}"
        compared = any(s.published_total is not None for s in self.splits)
        same = ["all counts are the published ones"] if compared else []
        faults = [f"✗ {fault}" for fault in self.faults]
        return [*tables, *self.notes, *([verdict] if differ else same), *faults]


def inspect(folder: epath.PathLike, name: str, split: str | None = None) -> Inspection:
    """Counts and checks a prepared set.

    Args:
        folder: `data.dir`.
        name: a set, or one of its folds; a set with folds means all that are prepared.
        split: one alone, or all.

    Raises:
        UserError: no such set, not prepared, or no such split.
    """
    views = prepared(folder, name)
    if split is not None and (unknown := [v for v, given in views.items() if split not in given]):
        given = ", ".join(views[unknown[0]])
        raise UserError(f"{name}: there is no split {split!r}; choose one of {given}")
    splits = [Split(folder, view, given) for view in views for given in views[view]]
    counted = tuple(_count(one) for one in splits if split in (None, one.split))
    metadata = splits[0].stored.metadata or {}
    notes = list(metadata.get("told", ()))
    notes += [f"dropped {rows}: {why}" for why, rows in dict(metadata.get("dropped", {})).items()]
    if metadata.get("missing"):
        notes.append(f"missing files, left out: {metadata['missing']}")
    return Inspection(counted, tuple(notes), tuple(_faults(splits)))


def _count(split: Split) -> SplitCounts:
    space, name = split.space, parse(split.name)
    key = split.split if name.fold is None else f"{name.config}/{split.split}"
    return SplitCounts(
        name=split.name,
        split=split.split,
        classes=space.classes,
        counts=tuple(np.bincount(split.index.labels, minlength=len(space.classes)).tolist()),
        published=space.support.get(key),
        published_total=space.splits.get(key),
    )


def _faults(splits: Sequence[Split]) -> list[str]:
    """Examples that are where they should not be, a line for each kind and pair of splits."""
    faults = []
    for n, first in enumerate(splits):
        faults += _within(first)
        for second in splits[n + 1 :]:
            if second.name == first.name:
                faults += _between(first, second)
    tests = {
        split.name: set(split.index.ids)
        for split in splits
        if split.split == "test" and parse(split.name).fold is not None
    }
    for first, second in itertools.combinations(tests, 2):
        if shared := sorted(tests[first] & tests[second]):
            faults.append(
                f"wrong fold: {first} and {second} share {len(shared)} test clips, but folds "
                f"must share none: {brief(shared)}"
            )
    return faults


def _within(split: Split) -> list[str]:
    """What is in a split twice."""
    index, where = split.index, f"{split.name}, {split.split}"
    faults, first = [], _first_ids(index)
    if twice := sorted(name for name, times in Counter(index.ids).items() if times > 1):
        faults.append(f"{where}: {len(twice)} duplicated, listed twice: {brief(twice)}")
    alike: dict[str, str] = {}
    for name, content in zip(index.ids, index.digests, strict=True):
        if name != first[content]:
            alike.setdefault(content, f"{first[content]} = {name}")
    if alike:
        pairs = brief([*alike.values()])
        faults.append(
            f"{where}: {len(alike)} duplicated, the same content under two names: {pairs}"
        )
    return faults


def _between(first: Split, second: Split) -> list[str]:
    """What is in two splits of a set."""
    faults = []
    if both := sorted({*first.index.ids} & {*second.index.ids}):
        names = f"{first.split} and {second.split}"
        faults.append(f"{first.name}: {len(both)} in both splits, {names}: {brief(both)}")
    here, there = _first_ids(first.index), _first_ids(second.index)
    pairs = [f"{here[d]} = {there[d]}" for d in here if there.get(d, here[d]) != here[d]]
    if pairs:
        faults.append(
            f"{first.name}: {len(pairs)} in both splits, the same content in {first.split} and "
            f"{second.split}: {brief(pairs)}"
        )
    return faults


def _first_ids(index: Index) -> dict[str, str]:
    """Content → the first example that has it."""
    return dict(reversed([*zip(index.digests, index.ids, strict=True)]))


def _line(label: str, count: int, total: int, expected: int | None) -> str:
    share = count / total if total else 0.0
    if expected is None:
        return f"{label:<15}{count:>8}{share:>8.1%}"
    mark = DIFFERS if count != expected else " "
    return f"{label:<15}{count:>8}{share:>8.1%}   published {expected:>7} {mark}"


def contact_sheet(split: Split, *, most: int = 80) -> Image.Image:
    """Examples spread over a split with their labels: pictures side by side, clips as strips."""
    data, classes = split.examples, split.space.classes
    strip = split.kind == "clip"
    most = most // 4 if strip else most
    shown = np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int)).tolist()
    tiles = [_tile(data[i], classes[int(data[i]["label"])], strip=strip) for i in shown]
    columns = 1 if strip else COLUMNS
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def _tile(example: Mapping[str, Any], label: str, *, strip: bool) -> Image.Image:
    count = STRIP if strip else 1
    try:
        if strip:
            clip = list(read_video(example["media"]))
            frames = [clip[i] for i in np.linspace(0, len(clip) - 1, STRIP).astype(int)]
            label = f"{label}, {len(clip)} frames"
        else:
            frames = [read_image(example["media"])]
    except UserError:
        frames, label = [], f"{label}, unreadable: {example['id']}"
    tile = Image.new("RGB", (TILE * count, TILE + 16), "white")
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        picture.thumbnail((TILE - 4, TILE - 4))
        scale = (TILE - 4) / max(picture.size)
        size = [max(round(side * scale), 1) for side in picture.size]
        tile.paste(picture.resize(size, Image.Resampling.BICUBIC), (i * TILE + 2, 2))
    ImageDraw.Draw(tile).text((4, TILE), label, fill="black")
    return tile
