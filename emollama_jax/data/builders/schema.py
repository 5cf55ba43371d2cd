"""The example that every data set of this project stores, and what their TFDS builders share.

A set lies in DATA_DIR/NAME/CONFIG/VERSION as TFDS writes it: ArrayRecord files,
`dataset_info.json`, `features.json`. TensorFlow is not needed: media stay encoded bytes until the
input pipeline. TFDS's own Image and Video features are not used because they decode with
TensorFlow.

F is the number of frames that per-frame arrays speak of: 1 for a picture, all frames for a clip, 0
where the set knows nothing. Unknown numbers are -1, unknown floats nan.
"""

import tempfile

import numpy as np
import tensorflow_datasets as tfds

from emollama_jax.data.builders.stored import VERSION
from emollama_jax.terms import LANDMARKS


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders of this project share; a builder takes TFDS's `data_dir` and `config`."""

    VERSION = tfds.core.Version(VERSION)
    # TFDS would look for checksums of downloads beside the module, with a package
    # (importlib_resources) that it does not install on this Python; these sets download nothing.
    url_infos = None

    # TFDS prints these two messages to the terminal; the commands show their own progress.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass

    def write(self) -> None:
        """Writes the set."""
        tfds.disable_progress_bar()  # TFDS's own bars would tear those of the command
        # TFDS wants a folder for downloads; there are none.
        with tempfile.TemporaryDirectory() as downloads:
            self.download_and_prepare(download_dir=downloads)


def features(action_units: int = 0, votes: int = 0) -> tfds.features.FeaturesDict:
    """Returns the schema.

    Args:
        action_units: K, how many action units the set measures; 0 leaves the field out, since TFDS
            cannot read arrays of width 0.
        votes: number of classes that raters voted for; 0 leaves the field out likewise.
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
            "landmarks": tensor(
                None, LANDMARKS, 2
            ),  # [F], iBUG order, pixels, integers at pixel centres
            "pose": tensor(None, 3),  # [F], pitch, yaw, roll in radians
            **units,
            **voted,
            "agr": tfds.features.Tensor(shape=(3,), dtype=np.int64, doc="age, gender, race class"),
            "attributes": tensor(40),  # CelebA's, 0, 1 or nan
            "items": tfds.features.Text(doc="JSON list of conversations, the category item first"),
        }
    )
