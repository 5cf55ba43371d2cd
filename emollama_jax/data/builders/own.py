"""A user's own data: a folder per class, or a table of paths and labels.

    DIR/happy/1.jpg …                  everything is the split "train"
    DIR/train/happy/… DIR/test/happy/… splits by folder
    list.csv, list.jsonl               columns (or keys) path, label and, if there are splits, split

A file is an example; so is a folder of frames. Class names are lower-cased. Labels that are numbers
are refused: which number is which class is nowhere written.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from emollama_jax.data.builders import listing, store
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.media import is_video
from emollama_jax.errors import UserError

NAME = "own"
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
COLUMNS = {
    "path": ("path", "file", "filename", "image", "video", "media"),
    "label": ("label", "emotion", "class", "expression"),
    "split": ("split", "set", "partition"),
}
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
MEDIA = listing.PICTURE_ENDINGS + listing.VIDEO_ENDINGS


class Own(store.Builder):
    """A user's own data; the config is its name."""

    name = NAME

    def __init__(self, *, config_name: str, **kwargs: Any):
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns of configs that no class lists
        try:
            super().__init__(config=tfds.core.BuilderConfig(name=config_name), **kwargs)
        finally:
            logging.set_verbosity(verbosity)


def read(source: pathlib.Path, name: str) -> listing.Listing:
    """Lists a folder or a table.

    Args:
        source: which of the two.
        name: of the set, e.g. "own/office".

    Raises:
        UserError: no examples, a label that is a number, pictures mixed with clips.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; --source names your data")
    if source.is_dir():
        rows = list(_from_folders(source))
    elif source.suffix.lower() in TABLES:
        rows = list(_from_table(source))
    else:
        raise UserError(f"{source}: wanted a folder, or a table {', '.join(TABLES)}")
    if not rows:
        raise UserError(f"{source}: no pictures and no clips in it")
    classes = tuple(sorted({label for _, label, _, _ in rows}))
    tree = listing.Tree()
    root = source if source.is_dir() else source.parent
    splits: dict[str, list[listing.Row]] = {}
    for path, label, split, _ in rows:
        splits.setdefault(split, []).append(listing.Row(path, classes.index(label)))
    order = [split for split in ("train", "validation", "test") if split in splits]
    return listing.list_splits(
        name,
        space(name, classes),
        _kind(root, rows, tree),
        {split: splits[split] for split in order},
        {"*": lambda path: _media(root, path, tree)},
    )


def space(name: str, classes: tuple[str, ...]) -> LabelSpace:
    """The classes of a user's data; nothing of it is published."""
    return LabelSpace(title=name, classes=classes, written=classes, splits={}, support={})


_Row = tuple[str, str, str, str]  # path, label, split, where it is written


def _from_folders(source: pathlib.Path) -> Iterator[_Row]:
    homes = [p for p in sorted(source.iterdir()) if p.is_dir() and not _hidden(p)]
    named = {home.name.lower() for home in homes} & SPLITS.keys()
    if named and len(named) < len(homes):
        other = next(home.name for home in homes if home.name.lower() not in SPLITS)
        raise UserError(
            f"{source}: {other} lies beside {sorted(named)[0]}: wanted folders of splits with "
            "folders of classes in them, or folders of classes alone"
        )
    for home in homes:
        split = SPLITS[home.name.lower()] if named else "train"
        kinds = [p for p in sorted(home.iterdir()) if p.is_dir()] if named else [home]
        for kind in (p for p in kinds if not _hidden(p)):
            label = _label(kind.name, str(kind))
            for path in sorted(kind.iterdir()):
                if not _hidden(path) and (path.suffix.lower() in MEDIA or path.is_dir()):
                    if path.is_dir() and not listing.has_frames(path):
                        raise UserError(
                            f"{path}: a folder without .jpg or .png frames among the examples of "
                            f"{label}: wanted files or folders of frames"
                        )
                    yield path.relative_to(source).as_posix(), label, split, str(path)


def _from_table(path: pathlib.Path) -> Iterator[_Row]:
    for where, row in _records(path):
        known = {key.strip().lower(): value for key, value in row.items()}
        cells = {}
        for column, names in COLUMNS.items():
            found = [name for name in names if name in known]
            if not found and column != "split":
                raise UserError(
                    f"{where}: no column {column} (found: {', '.join(known) or 'nothing'})"
                )
            cells[column] = str(known[found[0]]).strip() if found else "train"
        split = SPLITS.get(cells["split"].lower())
        if split is None:
            raise UserError(f"{where}: split {cells['split']!r}, wanted train, validation or test")
        if not cells["path"]:
            raise UserError(f"{where}: the path is empty")
        yield cells["path"].replace("\\", "/"), _label(cells["label"], where), split, where


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    if path.suffix.lower() == ".jsonl":
        for number, line in listing.read_lines(path):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: wanted an object with path and label")
            yield where, row
        return
    lines = listing.read_cells(path, TABLES[path.suffix.lower()])
    _, header = next(lines, (0, []))
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} columns, and the first line names {len(header)}: "
                f"{', '.join(header)}"
            )
        yield where, dict(zip(header, cells, strict=True))


def _label(written: str, where: str) -> str:
    label = " ".join(written.split()).lower()
    if not label:
        raise UserError(f"{where}: the label is empty")
    if label.replace(".", "").lstrip("+-").isdigit():
        raise UserError(
            f"{where}: label {written!r} is a number: write the class's name, since several number "
            "orders are in use"
        )
    return label


def _media(root: pathlib.Path, path: str, tree: listing.Tree) -> pathlib.Path | None:
    """The file or folder of frames at a path, which may be absolute."""
    direct = root / path
    if direct.is_file() or listing.has_frames(direct):
        return direct
    if pathlib.PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        return None
    found = tree.find(root, path)
    usable = found is not None and (found.is_file() or listing.has_frames(found))
    return found if usable else None


def _kind(root: pathlib.Path, rows: list[_Row], tree: listing.Tree) -> listing.Kind:
    """Pictures or clips: by the ending, or by the content where the ending says nothing."""
    first: dict[listing.Kind, str] = {}
    for path, _, _, _ in rows:
        ending = pathlib.PurePosixPath(path).suffix.lower()
        if ending in listing.VIDEO_ENDINGS:
            kind: listing.Kind = "clip"
        elif ending in listing.PICTURE_ENDINGS and ending != ".gif":
            kind = "image"
        else:
            media = _media(root, path, tree)
            if media is None:
                continue  # reported as missing
            kind = "clip" if media.is_dir() or is_video(media) else "image"
        first.setdefault(kind, path)
    if len(first) > 1:
        raise UserError(
            f"{root}: pictures ({first['image']}) and clips ({first['clip']}) in one set: prepare "
            "them as two, each with its own name"
        )
    return next(iter(first), "image")


def _hidden(path: pathlib.Path) -> bool:
    return path.name.startswith((".", "__"))
