"""DFEW, single-labelled clips in five folds, in both layouts that its authors released.

`EmoLabel_DataSplit/{train,test}(single-labeled)/set_k.csv` with `Clip/…`, or
`label/single_{train,test}set_k.csv` with `data/…`. A list has the columns `video_name,label`, ids
that are not padded and labels 1 … 7; lists that others redistribute, with zero-based labels or
padded ids, are refused. Clips are the videos in `Clip/original`, the frames in `Clip/clip_224x224`
or `Clip/clip_224x224_16f` (interpolated to 16), or those in `data`; any other folder in `Clip`
that holds them serves too. The archives' own folders (`…/clip_224x224_part_1/`) may be left.
"""

import pathlib
import re
from collections.abc import Iterable

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.media import VIDEOS
from emollama_jax.data.sets import CENTRES, SCENE, Testing
from emollama_jax.errors import UserError

LISTS, FLAT = "EmoLabel_DataSplit", "label"
COLUMNS = ("video_name", "label")
ROW = "a clip's number and its label"
CLIPS = {  # in `Clip`, in the order in which they are preferred → how a clip is called there
    "original": "Clip/original/*.mp4",
    "clip_224x224": "Clip/clip_224x224/* (5 digits)",
    "clip_224x224_16f": "Clip/clip_224x224_16f/* (5 digits)",
}
FOLDS = 5
SPACE = LABEL_SPACES["dfew"]


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree.

    Args:
        source: its root, or a folder above.
        fold: 1 … 5, or None for all folds that it has lists of.
    """
    tree = listing.Tree()
    flat = [f"{FLAT}/single_trainset_{k}.csv" for k in range(1, FOLDS + 1)]
    wanted = f"{LISTS}, or {flat[0]} …"
    root = listing.find_root(source, tree, [LISTS, *flat], title=SPACE.title, wanted=wanted)

    def find_lists(split: str, fold: int) -> list[pathlib.Path]:
        lists = tree.find(root, LISTS)
        homes = [] if lists is None else [lists / n for n in tree.names(lists).values()]
        named = rf"{split}\s*\(single[-_ ]labell?ed\)"
        found = [
            tree.find(home, f"set_{fold}.csv")
            for home in homes
            if re.fullmatch(named, home.name.lower())
        ]
        found.append(tree.find(root, f"{FLAT}/single_{split}set_{fold}.csv"))
        return [path for path in found if path is not None]

    def rows(split: str, fold: int) -> list[listing.Entry]:
        first, *others = find_lists(split, fold)
        found = _rows(first)
        for other in others:
            if sorted(found, key=repr) != sorted(_rows(other), key=repr):
                raise UserError(f"{first} and {other} differ: one of the two is wrong")
        return found

    numbers = listing.wanted_folds(
        fold,
        FOLDS,
        lambda k: all(find_lists(split, k) for split in ("train", "test")),
        title=SPACE.title,
        source=source,
    )
    folds = {k: {split: rows(split, k) for split in ("train", "test")} for k in numbers}
    return listing.list_folds("dfew", SPACE, folds, _layouts(root, tree))


def _rows(path: pathlib.Path) -> list[listing.Entry]:
    rows = []
    for number, cells in listing.read_columns(path, COLUMNS, row=ROW):
        where = f"{path}, line {number}"
        written, label = cells["video_name"], cells["label"]
        if not re.fullmatch(r"\d+(\.\w+)?", written):
            raise UserError(f"{where}: video_name {written!r}, wanted a clip's number, e.g. 1")
        name = written.partition(".")[0]
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
            rows.append(listing.Entry(name, SPACE.index(label)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return rows


def _layouts(root: pathlib.Path, tree: listing.Tree) -> dict[str, listing.Finder]:
    """Every folder that holds clips → how to find one."""
    homes = {"data/* (5 digits)": tree.find(root, "data")}
    if (clips := tree.find(root, "Clip")) is not None:
        names = tree.names(clips)
        order = [*(n for n in CLIPS if n in names), *(n for n in names if n not in CLIPS)]
        homes = {CLIPS.get(n, f"Clip/{names[n]}/*"): clips / names[n] for n in order} | homes
    found = {place: _by_number(tree, home) for place, home in homes.items() if home is not None}
    layouts = {place: _finder(clips) for place, clips in found.items() if clips}
    return layouts or {CLIPS["original"]: lambda _: None}


def _finder(clips: dict[int, pathlib.Path]) -> listing.Finder:
    def find(name: str) -> pathlib.Path | None:
        path = clips.get(int(name))
        return None if path is None or (path.is_dir() and not listing.has_frames(path)) else path

    return find


def _by_number(tree: listing.Tree, folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Clips by their number, however it is padded; also those in folders of archives' parts."""
    found: dict[int, pathlib.Path] = {}
    for path in _entries(tree, folder):
        stem, _, ending = path.name.partition(".")
        if not stem.isdigit() or (ending and f".{ending.lower()}" not in VIDEOS):
            continue
        if (other := found.setdefault(int(stem), path)) != path:
            both = f"{other.relative_to(folder)} and {path.relative_to(folder)}"
            raise UserError(f"{folder}: {both} are both clip {int(stem)}")
    return found


def _entries(tree: listing.Tree, folder: pathlib.Path) -> Iterable[pathlib.Path]:
    for name in tree.names(folder).values():
        yield folder / name
        if not name.partition(".")[0].isdigit():
            yield from (folder / name / inner for inner in tree.names(folder / name).values())


FAMILY = OfficialSet("dfew", SPACE, list_tree, FOLDS, testing=Testing(CENTRES, SCENE))
