"""DFEW, single-labelled clips in five folds: `EmoLabel_DataSplit/{train,test}(single-labeled)`.

`set_k.csv` has the header `video_name,label`, ids that are not padded and labels 1 … 7. Lists that
others redistribute, with zero-based labels or padded ids, are refused. Clips are videos in
`Clip/original` or frames in `Clip/clip_224x224/<5-digit id>`.
"""

import pathlib
import re

from emollama_jax.data.builders import listing, store
from emollama_jax.data.emotions import label_space
from emollama_jax.errors import UserError

LISTS = "EmoLabel_DataSplit"
HEADER = ["video_name", "label"]
FOLDS = 5


class Dfew(store.Builder):
    """DFEW."""

    name = "dfew"


def read(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree.

    Args:
        source: its root, or a folder above.
        fold: 1 … 5, or None for all folds that it has lists of.
    """
    space, tree = label_space("dfew"), listing.Tree()
    root = listing.find_root(source, tree, [LISTS], title=space.title)
    lists = tree.find(root, LISTS)
    assert lists is not None

    def find_list(split: str, fold: int) -> pathlib.Path | None:
        for lower, name in tree.names(lists).items():
            if re.fullmatch(rf"{split}\s*\(single-labell?ed\)", lower):
                return tree.find(lists / name, f"set_{fold}.csv")
        return None

    def both(fold: int) -> dict[str, pathlib.Path]:
        lists = {split: find_list(split, fold) for split in ("train", "test")}
        return {split: path for split, path in lists.items() if path is not None}

    numbers = listing.wanted_folds(
        fold, FOLDS, lambda k: len(both(k)) == 2, title=space.title, source=source
    )
    folds = {k: {split: _rows(path) for split, path in both(k).items()} for k in numbers}
    clips = tree.find(root, "Clip") or root / "Clip"
    videos, frames = (_by_number(tree, clips, name) for name in ("original", "clip_224x224"))
    return listing.list_folds(
        "dfew",
        space,
        folds,
        {
            "Clip/original/*.mp4": lambda i: videos.get(int(i)),
            "Clip/clip_224x224/* (5 digits)": lambda i: (
                path if (path := frames.get(int(i))) and listing.has_frames(path) else None
            ),
        },
    )


def _rows(path: pathlib.Path) -> list[listing.Row]:
    space = label_space("dfew")
    lines = listing.read_cells(path)
    header = [cell.lower() for cell in next(lines, (0, []))[1]]
    if header != HEADER:
        raise UserError(f"{path}: first line {','.join(header)!r}, wanted {','.join(HEADER)!r}")
    rows = []
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) != 2 or not re.fullmatch(r"\d+(\.\w+)?", cells[0]):
            raise UserError(f"{where}: {','.join(cells)!r}, wanted a clip's number and its label")
        name, label = cells[0].partition(".")[0], cells[1]
        if label == "0":
            raise UserError(
                f"{where}: label 0, but DFEW counts from 1 (happy) to 7 (fear): this is a "
                "redistributed list with zero-based labels; take the official one"
            )
        if name.startswith("0"):
            raise UserError(
                f"{where}: id {name!r} is padded, and official ids are not: redistributed lists "
                "with padded ids have zero-based labels; take the official one"
            )
        try:
            rows.append(listing.Row(name, space.index(label)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return rows


def _by_number(tree: listing.Tree, clips: pathlib.Path, name: str) -> dict[int, pathlib.Path]:
    """Clips by their number, however it is padded."""
    folder = tree.find(clips, name)
    found: dict[int, pathlib.Path] = {}
    if folder is None:
        return found
    for entry in tree.names(folder).values():
        stem, _, ending = entry.partition(".")
        if not stem.isdigit() or (ending and f".{ending.lower()}" not in listing.VIDEO_ENDINGS):
            continue
        if (other := found.setdefault(int(stem), folder / entry)) != folder / entry:
            raise UserError(f"{folder}: {other.name} and {entry} are both clip {int(stem)}")
    return found
