"""FERPlus: `FER2013Train|Valid|Test/label.csv` with the pictures beside it.

Lines hold a file name, the box "(0, 0, 48, 48)", eight vote counts, unknown and NF; the label is
the class with the most votes of the eight, the first of equal ones. The other file,
`fer2013new.csv`, disagrees with these on 1,602 rows and is refused.
"""

import pathlib
import re

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.media import PICTURES
from emollama_jax.data.sets import PICTURE, Testing
from emollama_jax.errors import UserError

SPLITS = {"train": "FER2013Train", "validation": "FER2013Valid", "test": "FER2013Test"}
TRAP = "fer2013new.csv"
COLUMNS = 12
CLASSES = 8
SPACE = LABEL_SPACES["ferplus"]


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree; `fold` is None."""
    del fold
    tree = listing.Tree()
    lists = [f"{folder}/label.csv" for folder in SPLITS.values()]
    try:
        root = listing.find_root(source, tree, lists, title=SPACE.title)
    except UserError:
        if source.name.lower() == TRAP or any(source.rglob(TRAP)):
            raise UserError(_trap(source)) from None
        raise
    splits: dict[str, list[listing.Entry]] = {}
    homes, dropped = {}, 0
    for split, folder in SPLITS.items():
        path = tree.find(root, f"{folder}/label.csv")
        if path is None:
            raise UserError(f"{root}: {folder}/label.csv is missing: {SPACE.title} has three")
        splits[split] = []
        for number, cells in listing.read_cells(path):
            where = f"{path}, line {number}"
            if "usage" in [cell.lower() for cell in cells[:2]]:
                raise UserError(_trap(path))
            row = _row(cells, where)
            if row is None:
                dropped += 1
                continue
            splits[split].append(row)
            homes[row.id] = path.parent
    found = listing.list_splits(
        "ferplus",
        SPACE,
        "image",
        splits,
        {"FER2013*/*.png": lambda i: tree.find_any(homes[i], i, PICTURES)},
    )
    found.dropped = {"no vote for any of the eight classes": dropped} if dropped else {}
    return found


def _row(cells: list[str], where: str) -> listing.Entry | None:
    wanted = "name, box, eight vote counts, unknown, NF"
    if len(cells) != COLUMNS:
        raise UserError(f"{where}: {len(cells)} columns, wanted {COLUMNS}: {wanted}")
    box = re.findall(r"-?\d+", cells[1])
    if len(box) != 4:
        raise UserError(f"{where}: box {cells[1]!r}, wanted '(0, 0, 48, 48)'")
    if strange := [v for v in cells[2:] if not re.fullmatch(r"\d+(\.\d*)?", v)]:
        raise UserError(f"{where}: vote count {strange[0]!r} is not a number; wanted {wanted}")
    votes = [float(v) for v in cells[2:]]
    best = max(votes[:CLASSES])
    if best == 0:
        return None
    x1, y1, x2, y2 = map(float, box)
    stem = pathlib.PurePosixPath(cells[0]).stem
    label = votes.index(best)
    return listing.Entry(stem, label, (x1, y1, x2, y2), votes=tuple(votes[:CLASSES]))


def _trap(path: pathlib.Path) -> str:
    return (
        f"{path}: {TRAP} is not FERPlus's label.csv, its votes disagree on 1,602 rows: make "
        "FER2013Train, FER2013Valid and FER2013Test with label.csv and the pictures in them"
    )


FAMILY = OfficialSet(
    "ferplus",
    SPACE,
    list_tree,
    testing=Testing(PICTURE, "FER2013's 48 × 48 faces as they are"),
)
