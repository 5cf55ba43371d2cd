"""The example that every data set of this project stores, and how a prepared split is opened.

A set lies in DATA_DIR/NAME/CONFIG/VERSION as TFDS writes it: ArrayRecord files,
`dataset_info.json`, `features.json`. TensorFlow is not needed: media stay encoded bytes until the
input pipeline. TFDS's own Image and Video features are not used because they decode with
TensorFlow.

F is the number of frames that per-frame arrays speak of: 1 for a picture, all frames for a clip, 0
where the set knows nothing. Unknown numbers are -1, unknown floats nan.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

TEXTS = ("id", "kind", "items")


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders of this project share."""

    # TFDS would look for checksums of downloads beside the module, with a package
    # (importlib_resources) that it does not install on this Python; these sets download nothing.
    url_infos = None

    # TFDS prints these two messages to the terminal; the commands show their own progress.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def features(action_units: int = 0, votes: int = 0) -> tfds.features.FeaturesDict:
    """Returns the schema.

    Args:
        action_units: K, how many action units the set measures; 0 leaves the field out, since TFDS
            cannot read arrays of width 0.
        votes: how many classes raters voted for; 0 leaves the field out likewise.
    """

    def tensor(*shape: int | None) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=np.float32)

    units = {"action_units": tensor(None, action_units)} if action_units else {}  # [F], 0 … 1
    voted = {"votes": tensor(votes)} if votes else {}  # counts, in the classes' order
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(doc="unique within the set"),
            "kind": tfds.features.Text(doc='"image" or "clip"'),
            "media": tfds.features.Tensor(
                shape=(), dtype=np.object_, doc="an encoded picture or video file, or packed frames"
            ),
            "label": tfds.features.Scalar(np.int64, doc="emotion, in the set's native order"),
            "subject": tfds.features.Scalar(np.int64, doc="the person's number"),
            "boxes": tensor(None, 4),  # [F], x1, y1, x2, y2 in pixels
            "landmarks": tensor(None, 68, 2),  # [F], iBUG order, pixels, integers at pixel centres
            "pose": tensor(None, 3),  # [F], pitch, yaw, roll in radians
            **units,
            **voted,
            "agr": tfds.features.Tensor(shape=(3,), dtype=np.int64, doc="age, gender, race class"),
            "attributes": tensor(40),  # CelebA's, 0, 1 or nan
            "items": tfds.features.Text(doc="JSON list of conversations, the category item first"),
        }
    )


def split_folder(data_dir: epath.PathLike, name: str, version: str) -> epath.Path:
    """Returns where a set lies, for e.g. the name "actionfaces/images"."""
    return as_path(data_dir) / name / version


def open_prepared(
    data_dir: epath.PathLike, name: str, version: str, split: str
) -> Sequence[Mapping[str, Any]]:
    """Opens a prepared split: lazy, random access, picklable.

    Args:
        data_dir: Where sets are prepared.
        name: The set and its config, e.g. "actionfaces/images".
        version: The builder's.
        split: "train", "validation" or "test".

    Returns:
        A sequence of examples as `features` gives them.

    Raises:
        UserError: The set is not prepared or has no such split.
    """
    folder = split_folder(data_dir, name, version)
    if not (folder / "dataset_info.json").exists():
        found = "prepared by another version" if folder.parent.exists() else "not prepared"
        raise UserError(f"{folder}: {name} is {found}; run `emollama data prepare {name}` first")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{name}: there is no split {split!r}; choose one of {known}")
    return Split(builder.as_data_source(split))


class Split(Sequence):
    """A prepared split; TFDS gives text as bytes, this gives it as text."""

    def __init__(self, source: Sequence[Mapping[str, Any]]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):  # TFDS raises ValueError, at which a for loop does not end
            raise IndexError(f"example {index} of a split of {len(self)}")
        example = self._source[index]
        return {**example, **{name: example[name].decode() for name in TEXTS}}
