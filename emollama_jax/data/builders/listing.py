"""Shared by the readers of official layouts: lists of examples, and finding files.

A reader turns a tree into a `Listing`. It is tolerant where a layout is unambiguous (byte order
marks, line ends, case of endings, spaces, the folder above the named one) and strict where a label
could be wrong: then it names the trap.
"""

import dataclasses
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from emollama_jax import tables
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.media import FRAME_ENDINGS
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

Finder = Callable[[str], pathlib.Path | None]  # an id → its file or folder of frames

FALLBACK = ("gb18030",)  # where a list is not UTF-8: some of MAFW's are in GBK
NAMED = 3  # examples that a message names
DEPTH = 2  # folders below --source in which a set may begin


@dataclasses.dataclass(frozen=True)
class Entry:
    """An example as a list has it, and where its media are once they are found."""

    id: str
    label: int  # in the set's native order
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels
    subject: int = -1  # the person's number; -1 where unknown
    votes: tuple[float, ...] = ()  # of the raters for each class, where the set has them
    media: pathlib.Path = pathlib.Path()  # a file, or a folder of frames
    content: bytes | None = None  # an encoded picture that lies in no file of its own


@dataclasses.dataclass
class Listing:
    """Everything that a reader found in a tree."""

    kind: Kind
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]  # as they are stored
    # Name of a set → its split → (stored split, positions in it; None for all in order).
    views: dict[str, dict[str, tuple[str, list[int] | None]]]
    missing: list[str] = dataclasses.field(default_factory=list)  # files that lists name
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # reason → rows
    notes: list[str] = dataclasses.field(default_factory=list)  # what to look at
    told: list[str] = dataclasses.field(default_factory=list)  # how it was read, what was skipped
    layout: str = ""  # where the media were taken from

    def lines(self) -> list[str]:
        """Notes on the tree for the user, a line each."""
        layout = [f"media: {self.layout}"] if self.layout != "*" else []
        dropped = [f"dropped {rows} rows: {reason}" for reason, rows in self.dropped.items()]
        if self.missing:
            absent = f"{len(self.missing)} files are missing and left out: {brief(self.missing)}"
            dropped.append(absent)
        return [*layout, *self.told, *dropped, *self.notes]


# ---- text files


def read_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number, line) of the lines of a text file that are not blank, without spaces at the ends.

    Raises:
        UserError: unreadable, or in no known encoding.
    """
    lines = re.split(r"\r\n|\n|\r", tables.read_text(path, fallback=FALLBACK))
    return [(number, line.strip(" ")) for number, line in enumerate(lines, 1) if line.strip()]


def read_cells(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """(number, cells without spaces around them) of each row of a table."""
    text = tables.read_text(path, fallback=FALLBACK)
    start = text.lstrip()
    separator = tables.separator_of(re.split(r"[\r\n]", start, maxsplit=1)[0])
    for number, row in tables.cells(path, text, separator):
        yield number, [cell.strip() for cell in row]


def read_columns(
    path: pathlib.Path, columns: Sequence[str], *, row: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, cells by name) of each row of an official table, which has exactly these columns.

    Args:
        path: table file.
        columns: in lower case, in any order.
        row: content of a row, in words, for messages.

    Raises:
        UserError: another header, or a row of another length; the line is named.
    """
    lines = read_cells(path)
    first, written = next(lines, (1, []))
    header = [cell.lower() for cell in written]
    if set(header) >= set(columns):
        tables.check_names(header, f"{path}, line {first}")
    absent = [f"no column {column}" for column in columns if column not in header]
    others = [f"column {name!r} is not among them" for name in header if name not in columns]
    if absent or others:
        raise UserError(
            f"{path}: first line {','.join(written)!r}, wanted {','.join(columns)!r}: "
            f"{(absent + others)[0]}"
        )
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, wanted {len(header)} ({row}): "
                f"{','.join(cells)[:80]!r}"
            )
        yield number, dict(zip(header, cells, strict=True))


def named_label(space: LabelSpace, written: str, where: str) -> int:
    """The class of a label that is a word; case does not matter.

    Raises:
        UserError: a number, of which several orders circulate, or no class of the set.
    """
    if re.fullmatch(r"[-+]?\d+(\.\d*)?", written):
        raise UserError(
            f"{where}: label {written!r} is a number, and {space.title}'s ids circulate in several "
            "shuffled orders: use the official list, which names the classes"
        )
    known = {name.casefold(): i for names in (space.classes, space.written)
             for i, name in enumerate(names)}  # fmt: skip
    if written.casefold() not in known:
        raise UserError(
            f"{where}: label {written!r} is not a class of {space.title} "
            f"({', '.join(space.classes)})"
        )
    return known[written.casefold()]


# ---- folders


class Tree:
    """Looks files up without regard to case; every folder is listed once."""

    def __init__(self) -> None:
        self._names: dict[pathlib.Path, dict[str, str]] = {}

    def names(self, folder: pathlib.Path) -> Mapping[str, str]:
        """Lower-case names → names of a folder, empty if there is none.

        Raises:
            UserError: two names that differ in case only.
        """
        if folder not in self._names:
            entries = sorted(os.listdir(folder)) if folder.is_dir() else []
            found: dict[str, str] = {}
            for name in entries:
                if found.setdefault(name.lower(), name) != name:
                    other = found[name.lower()]
                    raise UserError(f"{folder}: {other} and {name} differ in case only: keep one")
            self._names[folder] = found
        return self._names[folder]

    def find(self, folder: pathlib.Path, path: str) -> pathlib.Path | None:
        """The file or folder at a relative path; an exact spelling is not required."""
        for part in path.replace("\\", "/").split("/"):
            name = self.names(folder).get(part.strip().lower())
            if name is None:
                return None
            folder = folder / name
        return folder

    def find_any(
        self, folder: pathlib.Path, stem: str, endings: Sequence[str]
    ) -> pathlib.Path | None:
        """The file of that stem with one of the endings."""
        home, _, name = stem.replace("\\", "/").rpartition("/")
        place = self.find(folder, home) if home else folder
        if place is None:
            return None
        for ending in endings:
            if found := self.names(place).get(name.strip().lower() + ending):
                return place / found
        return None

    def frames(self, folder: pathlib.Path, path: str) -> pathlib.Path | None:
        """A folder at a relative path that holds frames."""
        found = self.find(folder, path)
        return found if found is not None and has_frames(found) else None


def has_frames(folder: pathlib.Path) -> bool:
    """Whether it is a folder with a picture in it."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(FRAME_ENDINGS) for entry in entries)


def find_root(
    source: pathlib.Path, tree: Tree, markers: Sequence[str], *, title: str, wanted: str = ""
) -> pathlib.Path:
    """The folder under `source` that holds one of the markers (relative paths).

    Args:
        source: folder to search, with the folders below it.
        tree: looks them up.
        markers: any of them will do.
        title: title of the set, for messages.
        wanted: the markers in words; "" names each.

    Raises:
        UserError: no such folder, or several.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder; --source must be the folder of {title}")
    level = [source] if source.is_dir() else []
    for _ in range(DEPTH + 1):
        found = [f for f in level if any(tree.find(f, marker) is not None for marker in markers)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{source}: several trees of {title}: {brief(found)}; name one of them")
        level = [p for f in level for n in tree.names(f).values() if (p := f / n).is_dir()]
    raise UserError(
        f"{source}: no {title} in its official layout "
        f"(wanted {wanted or ' or '.join(markers)} in it)"
    )


# ---- listings


def check_labels(rows: Iterable[Entry], classes: Sequence[str], *, title: str) -> None:
    """Refuses an id that two lines label differently.

    Raises:
        UserError: with the id and both labels.
    """
    labels: dict[str, int] = {}
    for row in rows:
        if labels.setdefault(row.id, row.label) != row.label:
            both = f"{classes[labels[row.id]]} and {classes[row.label]}"
            raise UserError(f"{title}: {row.id} is labelled {both}: one of its lists is wrong")


def repeated(name: str, splits: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Notes about ids that occur twice in a split, or in two splits."""
    notes = []
    for split, rows in splits.items():
        twice = [i for i, times in Counter(row.id for row in rows).items() if times > 1]
        if twice:
            notes.append(f"{name}, {split}: {len(twice)} listed twice: {brief(twice)}")
    ids = {split: {row.id for row in rows} for split, rows in splits.items()}
    names = list(splits)
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            if both := sorted(ids[first] & ids[second]):
                notes.append(f"{name}: {len(both)} in both {first} and {second}: {brief(both)}")
    return notes


def best_layout(
    layouts: Mapping[str, Finder], ids: Iterable[str]
) -> tuple[str, dict[str, pathlib.Path], list[str]]:
    """The layout with the fewest missing files, the first of equal ones.

    Returns:
        Its name, id → media, and the ids without media.
    """
    ids = list(dict.fromkeys(ids))
    best: tuple[str, dict[str, pathlib.Path], list[str]] | None = None
    for layout, finder in layouts.items():
        found = {i: path for i in ids if (path := finder(i)) is not None}
        missing = [i for i in ids if i not in found]
        if best is None or len(missing) < len(best[2]):
            best = layout, found, missing
        if not missing:
            break
    assert best is not None
    return best


def list_splits(
    name: str,
    space: LabelSpace,
    kind: Kind,
    splits: Mapping[str, Sequence[Entry]],
    layouts: Mapping[str, Finder],
) -> Listing:
    """A set whose splits are stored as they are listed."""
    rows = [row for split in splits.values() for row in split]
    check_labels(rows, space.classes, title=space.title)
    layout, media, missing = best_layout(layouts, (row.id for row in rows))
    stored = {
        split: [dataclasses.replace(r, media=media[r.id]) for r in rows if r.id in media]
        for split, rows in splits.items()
    }
    return Listing(
        kind=kind,
        classes=space.classes,
        splits=stored,
        views={name: {split: (split, None) for split in stored}},
        missing=[f"{layout.replace('*', i)}" for i in missing],
        notes=repeated(name, splits),
        layout=layout,
    )


def list_folds(
    name: str,
    space: LabelSpace,
    folds: Mapping[int, Mapping[str, Sequence[Entry]]],
    layouts: Mapping[str, Finder],
) -> Listing:
    """A set whose folds are views of clips that are stored once, as the split "clips"."""
    rows = [row for fold in folds.values() for split in fold.values() for row in split]
    check_labels(rows, space.classes, title=space.title)
    layout, media, missing = best_layout(layouts, (row.id for row in rows))
    unique = {row.id: row for row in rows if row.id in media}
    order = {i: n for n, i in enumerate(sorted(unique))}
    views, notes = {}, []
    for fold, splits in folds.items():
        view = f"{name}/fold{fold}"
        views[view] = {
            split: ("clips", [order[row.id] for row in rows if row.id in order])
            for split, rows in splits.items()
        }
        notes += repeated(view, splits)
    return Listing(
        kind="clip",
        classes=space.classes,
        splits={"clips": [dataclasses.replace(unique[i], media=media[i]) for i in order]},
        views=views,
        missing=[f"{layout.replace('*', i)}" for i in missing],
        notes=notes,
        layout=layout,
    )


def wanted_folds(
    fold: int | None, count: int, exists: Callable[[int], bool], *, title: str, source: pathlib.Path
) -> list[int]:
    """The folds to prepare: the one asked for, or all that the tree has lists of.

    Raises:
        UserError: no such fold, or the tree has no lists.
    """
    if fold is not None and not 1 <= fold <= count:
        raise UserError(f"--fold {fold}: {title} has the folds 1 … {count}")
    folds = [fold] if fold is not None else [k for k in range(1, count + 1) if exists(k)]
    absent = [k for k in folds if not exists(k)] if folds else [1]
    if absent:
        raise UserError(
            f"{source}: no train and test lists of fold {absent[0]} of {title} (set_{absent[0]})"
        )
    return folds


def brief(names: Sequence[object]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
