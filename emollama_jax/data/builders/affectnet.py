"""AffectNet in both vintages, stored once; `affectnet8` and `affectnet7` are views of it.

Older: `Manually_Annotated_file_lists/{training,validation}.csv` and `Manually_Annotated_Images`.
Rows with expression 8 (none), 9 (uncertain), 10 (no face) or without a face box are dropped and
counted. Newer: `train_set|val_set/images/<id>.jpg` with `annotations/<id>_exp.npy`. The official
validation set is the field's test set.
"""

import dataclasses
import pathlib

import numpy as np

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES, LabelSpace
from emollama_jax.data.media import PICTURES
from emollama_jax.data.sets import PICTURE, Testing
from emollama_jax.errors import UserError

LISTS = {"train": "training", "test": "validation"}
FOLDERS = {"train": "train_set", "test": "val_set"}
OLDER, NEWER = "Manually_Annotated_file_lists", "annotations"
COLUMNS = (
    *("subdirectory_filepath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
NUMBERS = ("face_x", "face_y", "face_width", "face_height", "expression")
DROPPED = {8: "none", 9: "uncertain", 10: "no face"}


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree; `fold` is None."""
    del fold
    space = dataclasses.replace(LABEL_SPACES["affectnet8"], title="AffectNet")
    tree = listing.Tree()
    markers = [OLDER, *(f"{folder}/{NEWER}" for folder in FOLDERS.values())]
    root = listing.find_root(source, tree, markers, title=space.title)
    older = tree.find(root, OLDER) is not None
    found = (_older if older else _newer)(root, tree, space)
    stored = found.views.pop("affectnet")
    found.views["affectnet8"] = stored
    found.views["affectnet7"] = {
        split: (split, [n for n, item in enumerate(items) if item.label < 7])
        for split, items in found.splits.items()
    }
    return found


def _older(root: pathlib.Path, tree: listing.Tree, space: LabelSpace) -> listing.Listing:
    splits: dict[str, list[listing.Entry]] = {}
    dropped: dict[str, int] = {}
    for split, name in LISTS.items():
        path = tree.find(root, f"{OLDER}/{name}.csv")
        if path is None:
            raise UserError(f"{root}/{OLDER}: {name}.csv is missing")
        splits[split] = []
        for number, cells in listing.read_columns(path, COLUMNS, row="as its first line says"):
            where = f"{path}, line {number}"
            name, numbers = cells["subdirectory_filepath"], [cells[column] for column in NUMBERS]
            try:
                x, y, width, height, label = (float(value) for value in numbers)
            except ValueError:
                raise UserError(f"{where}: {numbers} are not all numbers") from None
            reason = _reason(label, width, where)
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            box = (x, y, x + width, y + height) if width > 0 and height > 0 else None
            splits[split].append(listing.Entry(name, int(label), box))
    images = tree.find(root, "Manually_Annotated_Images") or root / "Manually_Annotated_Images"
    found = listing.list_splits(
        "affectnet",
        space,
        "image",
        splits,
        {"Manually_Annotated_Images/*": lambda i: tree.find(images, i)},
    )
    found.dropped = dropped
    return found


def _newer(root: pathlib.Path, tree: listing.Tree, space: LabelSpace) -> listing.Listing:
    splits: dict[str, list[listing.Entry]] = {}
    dropped: dict[str, int] = {}
    for split, folder in FOLDERS.items():
        notes = tree.find(root, f"{folder}/{NEWER}")
        if notes is None:
            raise UserError(f"{root}: {folder}/{NEWER} is missing")
        splits[split] = []
        for lower, name in sorted(tree.names(notes).items()):
            if not lower.endswith("_exp.npy"):
                continue
            where = f"{notes / name}"
            try:
                label = float(np.load(notes / name, allow_pickle=False).item())
            except (ValueError, OSError, EOFError):
                raise UserError(f"{where}: not one number in NumPy's format") from None
            reason = _reason(label, 1, where)
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            splits[split].append(listing.Entry(f"{folder}/{name[: -len('_exp.npy')]}", int(label)))

    def find(i: str) -> pathlib.Path | None:
        folder, _, name = i.partition("/")
        return tree.find_any(root, f"{folder}/images/{name}", PICTURES)

    found = listing.list_splits("affectnet", space, "image", splits, {"*.jpg in images/": find})
    found.dropped = dropped
    return found


def _reason(label: float, width: float, where: str) -> str | None:
    """Why a row is dropped, None if it is kept."""
    if label != int(label) or not 0 <= label <= max(DROPPED):
        raise UserError(f"{where}: expression {label:g}, wanted 0 … {max(DROPPED)}")
    if label in DROPPED:
        return f"expression {label:g} ({DROPPED[int(label)]})"
    return "face_width below 0" if width < 0 else None


TESTING = Testing(PICTURE, "the set's face box")
SEVEN, EIGHT = (
    OfficialSet(name, LABEL_SPACES[name], list_tree, place="affectnet", testing=TESTING)
    for name in ("affectnet7", "affectnet8")
)
