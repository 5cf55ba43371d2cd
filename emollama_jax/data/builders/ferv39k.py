"""FERV39k: `4_setups/All_scenes/{train_All,test_All}.csv`, lines `Action/Sad/0010 Sad`.

Clips are folders of frames, `2_ClipsforFaceCrop/<Scene>/<Emotion>/<4-digit id>`, or video files of
that name. A line's label and the emotion in its path must agree.
"""

import pathlib
import re

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.media import VIDEOS
from emollama_jax.data.sets import CENTRES, Testing
from emollama_jax.errors import UserError

LISTS = {"train": "train_All.csv", "test": "test_All.csv"}
_LINE = r"(.+/[^/]+/[^/\s,]+)(?:\s+|\s*,\s*)([^\s,]+)"  # scenes may hold a space
SETUP, CLIPS = "4_setups/All_scenes", "2_ClipsforFaceCrop"
SPACE = LABEL_SPACES["ferv39k"]


def list_tree(source: pathlib.Path, fold: int | None) -> listing.Listing:
    """Lists a tree; `fold` is None."""
    del fold
    tree = listing.Tree()
    root = listing.find_root(source, tree, [SETUP], title=SPACE.title)
    splits: dict[str, list[listing.Entry]] = {}
    for split, name in LISTS.items():
        path = tree.find(root, f"{SETUP}/{name}")
        if path is None:
            raise UserError(f"{root}/{SETUP}: {name} is missing")
        splits[split] = []
        for number, line in listing.read_lines(path):
            where = f"{path}, line {number}"
            match = re.fullmatch(_LINE, line.strip().replace("\\", "/"))
            if match is None:
                raise UserError(
                    f"{where}: {line!r}, wanted e.g. 'Action/Sad/0010 Sad', two columns"
                )
            clip, written = match[1].strip("/ "), match[2]
            label = listing.named_label(SPACE, written, where)
            emotion = clip.split("/")[-2]
            if listing.named_label(SPACE, emotion, where) != label:
                raise UserError(f"{where}: {clip} is in folder {emotion} but labelled {written}")
            splits[split].append(listing.Entry(clip, label))
    clips = tree.find(root, CLIPS) or root / CLIPS
    return listing.list_splits(
        "ferv39k",
        SPACE,
        "clip",
        splits,
        {
            f"{CLIPS}/*/": lambda i: tree.frames(clips, i),
            f"{CLIPS}/*.mp4": lambda i: tree.find_any(clips, i, VIDEOS),
        },
    )


FAMILY = OfficialSet("ferv39k", SPACE, list_tree, testing=Testing(CENTRES, "the set's face frames"))
