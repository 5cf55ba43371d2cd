"""A user's own data: a folder per class, or a table of paths and labels.

    DIR/happy/1.jpg …                  no splits: divided by the rule of `divide`
    DIR/train/happy/… DIR/test/happy/… splits by folder
    list.csv, .tsv, .jsonl, .json      see `own_table`

A file is an example; so is a folder of frames. Class names are lower-cased. Labels that are numbers
are refused: which number is which class is nowhere written. What is no example is counted and told.
"""

import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from emollama_jax.data.builders import listing, own_table
from emollama_jax.data.builders.divide import divide
from emollama_jax.data.builders.own_table import SPLITS, TABLES, UserExample, label_of
from emollama_jax.data.emotions import SYNONYMS, LabelSpace
from emollama_jax.data.media import FRAME_ENDINGS, PICTURES, VIDEOS, is_video, read_image
from emollama_jax.data.sets import Preparation, Report
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

MOVING = (".gif", ".apng", ".webp", ".avif")  # pictures or clips: their content says which
# Every installation reads these; of others a file is tried.
PLAIN = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", *MOVING[:3])
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini")  # beside names that begin with . or __


@dataclasses.dataclass(frozen=True)
class OwnSets:
    """Every set of a user, under the name that the user gives it."""

    names: ClassVar[tuple[str, ...]] = ("own/NAME",)
    testing: ClassVar[None] = None
    folds: ClassVar[int] = 0
    drawn: ClassVar[bool] = False

    def accepts(self, config: str) -> bool:
        return re.fullmatch(r"\w[\w-]*", config) is not None

    def stored(self, name: str) -> str:
        return name

    def label_space(self, name: str, metadata: Mapping[str, Any] | None) -> LabelSpace:
        if metadata is None:
            raise UserError(
                f"{name} is not prepared, so its classes are unknown; run `emollama data "
                f"prepare {name} --source DIR`"
            )
        return _space(name, tuple(metadata["classes"]))

    def prepare(
        self, name: str, data_dir: epath.PathLike, how: Preparation, progress: Report
    ) -> tuple[pathlib.Path, list[str]]:
        from emollama_jax.data.builders import store  # TFDS

        assert how.source is not None
        found = list_own(how.source, name)
        folder = store.prepare(data_dir, name, found, how, name, progress)
        return folder, found.lines()


FAMILY = OwnSets()


def list_own(source: pathlib.Path, name: str) -> listing.Listing:
    """Lists a folder or a table.

    Args:
        source: folder or table.
        name: name of the set, e.g. "own/office".

    Raises:
        UserError: no examples, a label that is a number, pictures mixed with clips.
    """
    if source.is_dir():
        skipped = _Skipped()
        examples = list(_from_folders(source, skipped))
        told = skipped.lines()
    elif source.suffix.lower() in TABLES:
        examples, told = own_table.read_table(source)
    else:
        raise UserError(f"{source}: wanted a folder, or a table {', '.join(TABLES)}")
    if not examples:
        raise UserError("; ".join([f"{source}: no pictures and no clips in it", *told]))
    tree = listing.Tree()
    root = source if source.is_dir() else source.parent
    contents = {e.path: e.content for e in examples if e.content is not None}
    media = {e.path: source if e.path in contents else _media(root, e.path, tree) for e in examples}
    if not any(media.values()):
        raise UserError(
            f"{source}: none of its {len(media)} files is there, e.g. {examples[0].path}: paths "
            f"are relative to {root}"
        )
    kind: Kind = "image" if contents else _kind(source, media)
    if kind == "image" and not contents:
        examples, lost = _readable(examples, media)
        told += lost
    examples, divided = _with_splits(examples)
    classes = tuple(sorted({e.label for e in examples}))
    people = {s: n for n, s in enumerate(sorted({e.subject for e in examples} - {""}))}
    splits: dict[str, list[listing.Entry]] = {}
    for e in sorted(examples, key=lambda e: ("train", "validation", "test").index(str(e.split))):
        subject = people.get(e.subject, -1)
        entry = listing.Entry(e.path, classes.index(e.label), subject=subject, content=e.content)
        splits.setdefault(str(e.split), []).append(entry)
    found = listing.list_splits(name, _space(name, classes), kind, splits, {"*": media.get})
    found.told = [*told, *divided, *_alike(classes)]
    return found


def _space(name: str, classes: tuple[str, ...]) -> LabelSpace:
    """The classes of a user's data; nothing of it is published."""
    return LabelSpace(title=name, classes=classes, written=classes, splits={}, support={})


# ---- folders


class _Skipped:
    """What is no example."""

    def __init__(self) -> None:
        self.named: dict[str, list[str]] = defaultdict(list)  # why → names
        self.litter = 0
        self.empty: list[str] = []  # folders of classes

    def add(self, path: pathlib.Path, source: pathlib.Path) -> None:
        if _hidden(path):
            self.litter += 1
            return
        ending = path.suffix.lower() or "no ending"
        self.named[f"no picture or clip ({ending})"].append(path.relative_to(source).as_posix())

    def lines(self) -> list[str]:
        """A line for each reason."""
        lines = [
            f"skipped {len(names)} {_files(names)}, {why}: {listing.brief(names)}"
            for why, names in sorted(self.named.items())
        ]
        if self.litter:
            what = "file" if self.litter == 1 else "files"
            lines.append(f"skipped {self.litter} hidden {what}, or of the operating system")
        if self.empty:
            lines.append(f"classes without examples: {listing.brief(self.empty)}")
        return lines


def _files(names: Sequence[str]) -> str:
    return "file" if len(names) == 1 else "files"


def _hidden(path: pathlib.Path) -> bool:
    return path.name.startswith((".", "__")) or path.name.lower() in LITTER


def _from_folders(source: pathlib.Path, skipped: _Skipped) -> Iterator[UserExample]:
    homes = []
    for path in sorted(source.iterdir()):
        if path.is_dir() and not _hidden(path):
            homes.append(path)
        else:
            skipped.add(path, source)
    lists = [p.name for p in sorted(source.iterdir()) if p.suffix.lower() in TABLES]
    if not homes and lists:
        raise UserError(f"{source}: no class folders; for its table, --source {source / lists[0]}")
    named = {home.name.lower() for home in homes} & SPLITS.keys()
    if named and len(named) < len(homes):
        other = next(home.name for home in homes if home.name.lower() not in SPLITS)
        raise UserError(
            f"{source}: {other} is beside {sorted(named)[0]}: wanted split folders that hold "
            "class folders, or class folders only"
        )
    for home in homes:
        kinds = [home]
        if named:
            kinds = []
            for path in sorted(home.iterdir()):
                if path.is_dir() and not _hidden(path):
                    kinds.append(path)
                else:
                    skipped.add(path, source)
        for kind in kinds:
            yield from _of_class(
                kind, SPLITS[home.name.lower()] if named else None, source, skipped
            )


def _of_class(
    kind: pathlib.Path, split: str | None, source: pathlib.Path, skipped: _Skipped
) -> Iterator[UserExample]:
    label, count = label_of(kind.name, str(kind)), 0
    for path in sorted(kind.iterdir()):
        if _hidden(path) or not (path.is_dir() or path.suffix.lower() in PICTURES + VIDEOS):
            skipped.add(path, source)
            continue
        if path.is_dir():
            if not listing.has_frames(path):
                raise UserError(
                    f"{path}: a folder without frames ({', '.join(FRAME_ENDINGS)}) among the "
                    f"examples of {label}: wanted files or folders of frames"
                )
            for inner in sorted(path.iterdir()):
                if inner.suffix.lower() not in FRAME_ENDINGS:
                    skipped.add(inner, source)
        count += 1
        yield UserExample(path.relative_to(source).as_posix(), label, split, str(path))
    if not count:
        skipped.empty.append(kind.relative_to(source).as_posix())


# ---- media


def _media(root: pathlib.Path, path: str, tree: listing.Tree) -> pathlib.Path | None:
    """The file or folder of frames at a path, which may be absolute."""
    direct = root / path
    try:
        if direct.is_file() or listing.has_frames(direct):
            return direct
    except (OSError, ValueError):  # a name too long for the disk, or with a NUL: no file has it
        return None
    if pathlib.PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        return None
    found = tree.find(root, path)
    usable = found is not None and (found.is_file() or listing.has_frames(found))
    return found if usable else None


def _kind(source: pathlib.Path, media: dict[str, pathlib.Path | None]) -> Kind:
    """Pictures or clips: by the ending, or by the content where the ending says nothing."""
    first: dict[Kind, str] = {}
    for path, file in media.items():
        ending = pathlib.PurePosixPath(path).suffix.lower()
        if ending in VIDEOS:
            kind: Kind = "clip"
        elif ending in PICTURES and ending not in MOVING:
            kind = "image"
        elif file is None:
            continue  # reported as missing
        else:
            try:
                kind = "clip" if file.is_dir() or is_video(file) else "image"
            except UserError:
                continue  # broken: found, counted and named when its faces are read
        first.setdefault(kind, path)
    if len(first) > 1:
        raise UserError(
            f"{source}: pictures ({first['image']}) and clips ({first['clip']}) in one set: "
            "prepare them as two, each with its own name"
        )
    return next(iter(first), "image")


def _readable(
    examples: Sequence[UserExample], media: dict[str, pathlib.Path | None]
) -> tuple[list[UserExample], list[str]]:
    """Without pictures that this installation cannot read, whose ending is not an everyday one."""
    rare: dict[str, list[pathlib.Path]] = defaultdict(list)
    for file in media.values():
        if file is not None and file.suffix.lower() not in PLAIN:
            rare[file.suffix.lower()].append(file)
    bad: dict[pathlib.Path, str] = {}
    for files in rare.values():
        if _trouble(files[0]):  # else there is a decoder; broken files are found with the faces
            bad |= {file: why for file in files if (why := _trouble(file))}
    lost = [path for path, file in media.items() if file in bad]
    kept = [e for e in examples if media[e.path] not in bad]
    if not lost:
        return kept, []
    why = next(iter(bad.values()))
    what = f"{len(lost)} {_files(lost)} that cannot be read here"
    line = f"skipped {what}: {listing.brief(lost)} ({why})"
    if not kept:
        raise UserError(line)
    return kept, [line]


def _trouble(file: pathlib.Path) -> str:
    try:
        read_image(file)
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")
    return ""


# ---- splits and classes


def _with_splits(examples: Sequence[UserExample]) -> tuple[list[UserExample], list[str]]:
    """The examples with their splits, divided here where the data name none."""
    if all(e.split is not None for e in examples):
        return list(examples), []
    splits, line = divide(
        [e.path for e in examples], [e.label for e in examples], [e.subject for e in examples]
    )
    return [dataclasses.replace(e, split=s) for e, s in zip(examples, splits, strict=True)], [line]


def _alike(classes: Sequence[str]) -> list[str]:
    """Classes that are two words for one emotion."""
    words: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        words[SYNONYMS.get(name, name)].append(name)
    return [
        f"{' and '.join(names)} are two classes, and usually one emotion: rename one to join them"
        for names in words.values()
        if len(names) > 1
    ]
