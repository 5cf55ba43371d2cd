"""MAFW, single labels in five folds: `…/single/no_caption/set_k/{train,test}.txt`.

Lines are `00025.mp4 anger`. The `with_caption` lists (tab-separated: file, label, Chinese text,
English text; some in GBK) serve where the others are absent, and where both are there they must
agree, since lists with shuffled ids circulate. Clips are `data/clips/*.mp4`, or frames in
`data/frames/<id>`.
"""

import os
import pathlib

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.media import VIDEOS
from emollama_jax.data.sets import CENTRES, SCENE, Testing
from emollama_jax.errors import UserError

FOLDS = 5
PLAIN, CAPTIONED = "no_caption", "with_caption"
SPACE = LABEL_SPACES["mafw"]


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree.

    Args:
        source: its root, or a folder above.
        fold: 1 … 5, or None for all folds that it has lists of.
    """
    tree = listing.Tree()
    root = listing.find_root(source, tree, ["data/clips", "data/frames"], title=SPACE.title)
    single = _single(source, root)

    def find_list(style: str, split: str, fold: int) -> pathlib.Path | None:
        return tree.find(single, f"{style}/set_{fold}/{split}.txt")

    def either(split: str, fold: int) -> pathlib.Path | None:
        return find_list(PLAIN, split, fold) or find_list(CAPTIONED, split, fold)

    folds: dict[int, dict[str, list[listing.Entry]]] = {}
    for k in listing.wanted_folds(
        fold,
        FOLDS,
        lambda k: all(either(split, k) for split in ("train", "test")),
        title=SPACE.title,
        source=source,
    ):
        folds[k] = {}
        for split in ("train", "test"):
            path = either(split, k)
            assert path is not None
            folds[k][split] = _rows(path)
            captioned = find_list(CAPTIONED, split, k)
            if captioned and captioned != path:
                _compare(path, folds[k][split], captioned)
    data = tree.find(root, "data") or root / "data"
    return listing.list_folds(
        "mafw",
        SPACE,
        folds,
        {
            "data/clips/*.mp4": lambda i: tree.find_any(data, f"clips/{i}", VIDEOS),
            "data/frames/*/": lambda i: tree.frames(data, f"frames/{i}"),
        },
    )


def _single(source: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """The folder `single` of the split lists; folders of media are not searched."""
    for home in dict.fromkeys((root, source)):
        for folder, inner, _ in os.walk(home):
            inner[:] = sorted(name for name in inner if name.lower() not in ("clips", "frames"))
            lower = {name.lower() for name in inner}
            if os.path.basename(folder).lower() == "single" and lower & {PLAIN, CAPTIONED}:
                return pathlib.Path(folder)
    raise UserError(f"{source}: no split lists of MAFW (wanted …/single/{PLAIN}/set_1/train.txt)")


def _rows(path: pathlib.Path) -> list[listing.Entry]:
    rows = []
    captioned = path.parent.parent.name.lower() == CAPTIONED
    wanted, example = (4, "00025.mp4⇥anger⇥…⇥…") if captioned else (2, "00025.mp4 anger")
    for number, line in listing.read_lines(path):
        where = f"{path}, line {number}"
        cells = line.split("\t") if captioned else line.split()
        if len(cells) != wanted:
            raise UserError(
                f"{where}: {len(cells)} columns, wanted {wanted}, e.g. {example!r}: {line[:80]!r}"
            )
        label = listing.named_label(SPACE, cells[1].strip(), where)
        rows.append(listing.Entry(pathlib.PurePosixPath(cells[0].strip()).stem, label))
    return rows


def _compare(path: pathlib.Path, rows: list[listing.Entry], captioned: pathlib.Path) -> None:
    """Refuses lists with and without captions that label a clip differently."""
    labels = {row.id: row.label for row in rows}
    wrong = [r.id for r in _rows(captioned) if labels.get(r.id, r.label) != r.label]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} clips are labelled differently in {captioned} "
            f"({listing.brief(wrong)}): one of the two has shuffled ids; take the official lists"
        )


FAMILY = OfficialSet("mafw", SPACE, list_tree, FOLDS, testing=Testing(CENTRES, SCENE))
