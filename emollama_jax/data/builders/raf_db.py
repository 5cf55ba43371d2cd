"""RAF-DB, basic emotions: `EmoLabel/list_patition_label.txt` (the misspelling is theirs).

Lines are `train_00001.jpg 5`, labels 1 … 7; the split is the name's prefix. Pictures lie in
`Image/aligned/<stem>_aligned.jpg` or `Image/original/<name>`; aligned ones come first, since the
field's numbers are of them.
"""

import pathlib

from emollama_jax.data.builders import listing, store
from emollama_jax.data.emotions import label_space
from emollama_jax.errors import UserError

LIST = "EmoLabel/list_patition_label.txt"


class RafDb(store.Builder):
    """RAF-DB."""

    name = "raf_db"


def read(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree; `fold` is None."""
    del fold
    space, tree = label_space("raf_db"), listing.Tree()
    root = listing.find_root(source, tree, [LIST], title=space.title)
    path = tree.find(root, LIST)
    assert path is not None
    splits: dict[str, list[listing.Row]] = {"train": [], "test": []}
    for number, line in listing.read_lines(path):
        where = f"{path}, line {number}"
        name, _, label = line.replace("\t", " ").rpartition(" ")
        stem = pathlib.PurePosixPath(name.strip()).stem.removesuffix("_aligned")
        split = stem.partition("_")[0].lower()
        if split not in splits:
            raise UserError(f"{where}: {line!r}, wanted e.g. 'train_00001.jpg 5' or 'test_…'")
        try:
            splits[split].append(listing.Row(stem, space.index(label)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    images = tree.find(root, "Image") or root / "Image"
    endings = listing.PICTURE_ENDINGS
    return listing.list_splits(
        "raf_db",
        space,
        "image",
        splits,
        {
            "Image/aligned/*_aligned.jpg": lambda i: tree.find_any(
                images, f"aligned/{i}_aligned", endings
            ),
            "Image/original/*.jpg": lambda i: tree.find_any(images, f"original/{i}", endings),
        },
    )
