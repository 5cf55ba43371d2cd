"""RAF-DB, basic emotions, in the official layout or in Kaggle's folders.

Official: `EmoLabel/list_patition_label.txt` (the misspelling is theirs), lines `train_00001.jpg 5`,
labels 1 … 7; the split is the name's prefix. Pictures lie in `Image/aligned/<stem>_aligned.jpg` or
`Image/original/<name>`; aligned ones come first, since the field's numbers are of them.

Kaggle: `DATASET/{train,test}/{1 … 7}/train_00001_aligned.jpg` with `train_labels.csv` and
`test_labels.csv` (columns `image,label`) beside it. The folders' numbers are RAF-DB's; each
picture is checked against its list, and a list that is missing is told. Folders of class words are
read too.
"""

import pathlib
import re
from collections.abc import Iterator

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS
from emollama_jax.data.media import PICTURES
from emollama_jax.data.sets import PICTURE, Testing
from emollama_jax.errors import UserError

LIST = "EmoLabel/list_patition_label.txt"
EXAMPLE = "train_00001.jpg 5"
KAGGLE = "DATASET"
WANTED = f"{LIST}, or Kaggle's {KAGGLE}/train/1 …"
COLUMNS = ("image", "label")
SPLITS = ("train", "test")
SPACE = LABEL_SPACES["raf_db"]


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree; `fold` is None."""
    del fold
    tree = listing.Tree()
    folders = [f"{split}/{n}" for split in SPLITS for n in _folder_names()]
    markers = [LIST, *(f"{KAGGLE}/{folder}" for folder in folders), *folders]
    root = listing.find_root(source, tree, markers, title=SPACE.title, wanted=WANTED)
    path = tree.find(root, LIST)
    return _kaggle(root, tree) if path is None else _official(root, path, tree)


def _official(root: pathlib.Path, path: pathlib.Path, tree: listing.Tree) -> listing.Listing:
    splits: dict[str, list[listing.Entry]] = {split: [] for split in SPLITS}
    for number, line in listing.read_lines(path):
        where = f"{path}, line {number}"
        columns = line.split()
        if len(columns) != 2:
            raise UserError(
                f"{where}: {len(columns)} columns, wanted 2, e.g. {EXAMPLE!r}: {line!r}"
            )
        stem = pathlib.PurePosixPath(columns[0]).stem.removesuffix("_aligned")
        split = stem.partition("_")[0].lower()
        if split not in splits:
            raise UserError(f"{where}: {line!r}, wanted e.g. {EXAMPLE!r} or 'test_…'")
        splits[split].append(listing.Entry(stem, _label(columns[1], where)))
    images = tree.find(root, "Image") or root / "Image"
    return listing.list_splits(
        "raf_db",
        SPACE,
        "image",
        splits,
        {
            "Image/aligned/*_aligned.jpg": lambda i: tree.find_any(
                images, f"aligned/{i}_aligned", PICTURES
            ),
            "Image/original/*.jpg": lambda i: tree.find_any(images, f"original/{i}", PICTURES),
        },
    )


def _label(written: str, where: str) -> int:
    try:
        return SPACE.index(written)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ---- Kaggle's folders


def _folder_names() -> dict[str, int]:
    """What a class's folder may be called → the class."""
    words = {word: SPACE.classes.index(common) for word, common in SYNONYMS.items()
             if common in SPACE.classes}  # fmt: skip
    words |= {name: c for c, name in enumerate(SPACE.classes)}
    return {written: c for c, written in enumerate(SPACE.written)} | words


def _kaggle(root: pathlib.Path, tree: listing.Tree) -> listing.Listing:
    home = tree.find(root, KAGGLE) or root
    names = _folder_names()
    splits: dict[str, list[listing.Entry]] = {}
    media: dict[str, pathlib.Path] = {}
    told, unlisted, missing = [], [], []
    for split in SPLITS:
        folder = tree.find(home, split)
        if folder is None:
            raise UserError(f"{home}: {split} is missing: {SPACE.title} has train and test")
        rows = splits[split] = []
        for label, path in _pictures(folder, tree, names):
            stem = path.stem.removesuffix("_aligned")
            if not re.fullmatch(rf"{split}_\d+", stem, re.IGNORECASE):
                raise UserError(
                    f"{path}: no picture of {SPACE.title}'s {split}, whose names are "
                    f"{split}_00001_aligned.jpg …: prepare other pictures as own/NAME"
                )
            if (other := media.setdefault(stem, path)) != path:
                raise UserError(f"{other} and {path} are one picture with two labels")
            rows.append(listing.Entry(stem, label))
        listed = _listed(root, home, split, tree)
        if listed is None:
            told.append(
                f"{split}_labels.csv is missing: the labels of {split} are those of its folders, "
                "unchecked"
            )
            continue
        for row in rows:
            if listed.get(row.id, row.label) != row.label:
                raise UserError(
                    f"{media[row.id]}: in the folder of {SPACE.classes[row.label]}, but "
                    f"{split}_labels.csv says {SPACE.classes[listed[row.id]]}: one of the two is "
                    "wrong"
                )
        unlisted += [row.id for row in rows if row.id not in listed]
        missing += [f"{KAGGLE}/{split}/*/{i}_aligned.jpg" for i in listed if i not in media]
        told.append(f"labels of {split} agree with {split}_labels.csv")
    layout = f"{KAGGLE}/{{train,test}}/*" if home != root else "{train,test}/*"
    found = listing.list_splits("raf_db", SPACE, "image", splits, {layout: media.get})
    found.told, found.missing = told, missing
    if unlisted:
        found.notes.append(f"{len(unlisted)} in no list: {listing.brief(unlisted)}")
    return found


def _pictures(
    folder: pathlib.Path, tree: listing.Tree, names: dict[str, int]
) -> Iterator[tuple[int, pathlib.Path]]:
    """(class, picture) of everything in the folders of a split."""
    for written in tree.names(folder).values():
        home = folder / written
        if not home.is_dir():
            continue
        if written.lower() not in names:
            raise UserError(f"{home}: no class of RAF-DB, whose folders are 1 … 7 or class words")
        for name in tree.names(home).values():
            if pathlib.PurePosixPath(name).suffix.lower() in PICTURES and name[0] != ".":
                yield names[written.lower()], home / name


def _listed(
    root: pathlib.Path, home: pathlib.Path, split: str, tree: listing.Tree
) -> dict[str, int] | None:
    """Picture → class, as `<split>_labels.csv` has them; None if there is none."""
    name = f"{split}_labels.csv"
    path = tree.find(root, name) or tree.find(home, name)
    above = root.parent / name  # where --source names DATASET itself
    if path is None and root.name.lower() == KAGGLE.lower() and above.is_file():
        path = above
    if path is None:
        return None
    labels: dict[str, int] = {}
    for number, cells in listing.read_columns(path, COLUMNS, row="a picture and its label"):
        where = f"{path}, line {number}"
        stem = pathlib.PurePosixPath(cells["image"]).stem.removesuffix("_aligned")
        label = _label(cells["label"], where)
        if labels.setdefault(stem, label) != label:
            raise UserError(f"{where}: {stem} is listed twice, with two labels")
    return labels


ALIGNED = "the set's aligned faces; the face crop is FaceXFormer's, of MTCNN's box"
FAMILY = OfficialSet("raf_db", SPACE, list_tree, testing=Testing(PICTURE, ALIGNED))
