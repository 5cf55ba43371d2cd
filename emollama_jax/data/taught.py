"""Labels of real faces from a teacher network: landmarks, pose, age, gender where a set has none.

    DATA/taught/ferplus/train.npz     one column for each field of `Labels`, and `of`

`python -m tools.face_teacher` writes them. A split's labels are one `.npz` file, since they are
small (0.6 kB a picture) and training reads all of them at once. Rows are in the order of the stored
split and carry its ids; `of` is the fingerprint of the stored set and of the teacher, so that
labels of another preparation are refused. What the teacher does not know (race, CelebA's
attributes) has no column: it stays masked.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int64

from emollama_jax.data.face_labels import AGE_LABELS
from emollama_jax.data.split import Split
from emollama_jax.disk import whole_file
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the teacher says of N pictures; nan and -1 where no face was found."""

    id: np.ndarray  # text [N]
    found: Bool[np.ndarray, " n"]
    landmarks: Float32[np.ndarray, "n 68 2"]  # iBUG order, in the whole picture, -1 … 1
    spread: Float32[np.ndarray, " n"]  # mean distance to the mirrored picture's points, in boxes
    pose: Float32[np.ndarray, "n 3"]  # pitch, yaw, roll in radians
    age: Float32[np.ndarray, " n"]  # years
    male: Float32[np.ndarray, " n"]  # probability
    agr: Int64[np.ndarray, "n 3"]  # age and gender class; race unknown


def classes_of(age: np.ndarray, male: np.ndarray) -> np.ndarray:
    """Age, gender and race class, int64 [N, 3], of ages in years and probabilities of male.

    Race is unknown, and so is all of a row whose age is nan.
    """
    decades = np.clip(np.nan_to_num(age) // 10, 0, len(AGE_LABELS) - 1)
    gender = np.where(male > 0.5, 0, 1)  # `GENDER_LABELS`: Male, Female
    known = ~np.isnan(age)
    columns = [np.where(known, column, UNKNOWN) for column in (decades, gender)]
    return np.stack([*columns, np.full(len(age), UNKNOWN)], axis=1).astype(np.int64)


def labels_path(split: Split) -> epath.Path:
    """File of the stored split's labels, e.g. DATA/taught/ferplus/train.npz."""
    return as_path(split.data_dir) / "taught" / f"{split.place}.npz"


def write_labels(path: pathlib.Path, labels: Labels, of: Mapping[str, str]) -> None:
    """Writes a file that appears whole or not at all.

    Args:
        path: file, as `labels_path` gives it.
        labels: labels of the whole stored split, in its order.
        of: fingerprints, by `data` and `teacher`.
    """
    columns = {field.name: getattr(labels, field.name) for field in dataclasses.fields(Labels)}
    write_columns(path, columns | {"of": np.array(json.dumps(of))})


def write_columns(path: pathlib.Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file that appears whole or not at all."""
    with whole_file(path) as half, half.open("wb") as file:
        np.savez(file, **columns)  # ty: ignore[invalid-argument-type]  # "allow_pickle" is no column


def read_columns(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the output of `write_columns`."""
    with as_path(path).open("rb") as opened, np.load(opened) as file:
        return {name: file[name] for name in file.files}


def read_labels(split: Split) -> Labels:
    """The labels of a split, in the order of its examples.

    Raises:
        UserError: not labelled, or labelled when it was another set.
    """
    path = labels_path(split)
    words = f"{split.name} --data {split.data_dir} --split {split.split}"
    again = f"run `python -m tools.face_teacher {words}`"
    if not path.exists():
        raise UserError(f"{path}: no teacher labels; {again}")
    columns = read_columns(path)
    of = json.loads(str(columns.pop("of")))
    if of["data"] != split.stored.fingerprint:
        other = f"the labels are of another preparation of {split.stored.name}"
        raise UserError(f"{path}: {other}; {again}")
    if split.positions is not None:
        columns = {key: column[split.positions] for key, column in columns.items()}
    return Labels(**columns)
