"""Runs the teacher over a prepared set's pictures and stores what it says, part by part.

Each face is read twice, as it is and mirrored, and the two answers are averaged: that halves the
errors that have a side, and their distance tells where the teacher is unsure or there is no face.

What differs from the library: it reads age and gender in the box of the landmarks, made a fifth
wider; here both networks read the same box. Points are freed of the shift that the library's
padding and resizing give a picture (`networks.shift`).
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from emollama_jax.ahead import ahead
from emollama_jax.data import taught
from emollama_jax.data.builders.stored import Example
from emollama_jax.data.face_crop import Crop, crop_box
from emollama_jax.data.media import read_image
from emollama_jax.data.priors import Prior, Priors
from emollama_jax.data.sets import Report
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.paths import parts_folder
from emollama_jax.terms import LANDMARKS
from emollama_jax.tiny.towers.augment import MIRROR
from tools.face_teacher import networks
from tools.face_teacher.package import Weights
from tools.face_teacher.pose import head_pose

MEASURED = (
    ("landmarks", (LANDMARKS, 2)),
    ("spread", ()),
    ("pose", (3,)),
    ("age", ()),
    ("male", ()),
)
BATCH = 4  # faces of one step: the maps stay in a processor's cache, 1.7 times as fast as 128
PART = 2048  # examples of one resumable part

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Face:
    """The face of one picture, as the networks read it."""

    square: np.ndarray  # float32 [112, 112, 3]
    crop: Crop  # that it was padded and resized from
    width: int  # of the whole picture
    height: int


class Teacher:
    """The two networks, compiled once.

    Args:
        weights: weights of `package.read_weights`.
    """

    def __init__(self, weights: Mapping[str, Weights]):
        self._weights = {model: jax.device_put(dict(w)) for model, w in weights.items()}

        @jax.jit
        def read(weights, faces):
            both = jnp.concatenate([faces, faces[:, :, ::-1]])
            points = networks.landmarks(weights["face_landmark_68"], both)
            age, male = networks.age_gender(weights["age_gender"], both)
            return points, age, male

        self._read = read

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points [2, B, 68, 2] as shares of the square, ages [2, B], probabilities of male [2, B].

        Axis 0 is (as it is, mirrored); a mirrored face's points are those of the mirrored picture.

        Args:
            squares: float32 [B, 112, 112, 3], B ≤ BATCH.
        """
        padded = np.zeros((BATCH, *squares.shape[1:]), np.float32)
        padded[: len(squares)] = squares
        said = jax.device_get(self._read(self._weights, padded))
        return tuple(x.reshape(2, BATCH, *x.shape[1:])[:, : len(squares)] for x in said)


def read_faces(faces: Sequence[Face], teacher: Teacher) -> dict[str, np.ndarray]:
    """Landmarks, spread, pose, age and male of up to BATCH faces, as in `taught.Labels`."""
    (straight, mirrored), ages, males = teacher(np.stack([face.square for face in faces]))
    mirrored = mirrored[:, MIRROR] * [-1, 1] + [1, 0]
    points = zip((straight + mirrored) / 2, faces, strict=True)
    whole = np.stack([whole_picture(*both) for both in points])
    sizes = np.array([[face.width, face.height] for face in faces])
    read = {
        "landmarks": whole,
        "pose": head_pose(whole * sizes[:, None]),
        "spread": np.linalg.norm(straight - mirrored, axis=-1).mean(1),
        "age": ages.mean(0),
        "male": males.mean(0),
    }
    return {name: column.astype(np.float32) for name, column in read.items()}


def whole_picture(points: np.ndarray, face: Face) -> np.ndarray:
    """Shares of the square → -1 … 1 in the picture that the face was cut from."""
    crop = face.crop
    shares = networks.from_square(points, height=crop.height, width=crop.width)
    shares = shares + networks.shift(height=crop.height, width=crop.width)
    edges = np.array([crop.x, crop.y]) + shares * [crop.width, crop.height]
    return 2 * edges / [face.width, face.height] - 1


def cut_out(picture: np.ndarray, box: np.ndarray) -> Face:
    """The face in a box.

    Args:
        picture: uint8 [H, W, 3].
        box: (x1, y1, x2, y2) in pixels.

    Raises:
        UserError: the box fits no picture.
    """
    height, width = picture.shape[:2]
    crop = crop_box(box, 0.0, width=width, height=height)
    part = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    return Face(networks.to_square(part), crop, width, height)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of a pass over a split."""

    examples: int
    without_face: int
    new: int  # examples of this run; the others were there before

    def __str__(self) -> str:
        before = (
            f", {self.examples - self.new:,} of them before" if self.new < self.examples else ""
        )
        return f"{self.examples:,} examples{before}; {self.without_face} without a face"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A stored split of pictures."""

    examples: Sequence[Example]
    priors: Sequence[Prior]
    fingerprint: str  # of the stored set
    path: pathlib.Path  # of its labels


def open_pictures(split: Split) -> Pictures:
    """Opens the stored split behind a split.

    Raises:
        UserError: without face priors, or a set of clips.
    """
    name, examples = split.name, split.stored.examples(split.stored_split)
    if split.kind != "image":
        raise UserError(f"{name}: a set of {split.kind}s, wanted one of pictures, e.g. ferplus")
    priors = Priors(split.priors_folder)
    if len(priors) != len(examples):
        raise UserError(
            f"{name}, split {split.split}: {len(examples)} examples, but face priors of "
            f"{len(priors)}: run `emollama data prepare {name}` again"
        )
    path = pathlib.Path(taught.labels_path(split))
    return Pictures(examples, priors, split.stored.fingerprint, path)


def label_split(
    source: Pictures,
    *,
    teacher: Teacher,
    fingerprint: str,
    progress: Report,
    threads: int,
) -> Summary:
    """Labels a prepared split once; resumes where it was stopped.

    Args:
        source: pictures of `open_pictures`.
        teacher: teacher to ask.
        fingerprint: fingerprint of the teacher; another makes stored labels void.
        progress: called with (done, all) examples.
        threads: number of threads.
    """
    path, total = source.path, len(source.examples)
    of = {"data": source.fingerprint, "teacher": fingerprint}
    if path.exists() and (stored := taught.read_columns(path))["of"] == json.dumps(of):
        progress(total, total)
        return Summary(total, int((~stored["found"]).sum()), 0)
    parts = parts_folder(path.with_suffix(".parts"), of)
    files, new = [], 0
    read = functools.partial(_read, source, teacher)
    for start in range(0, total, PART):
        stop = min(start + PART, total)
        files.append(parts / f"{start:08d}.npz")
        if not files[-1].exists():
            groups = [range(at, min(at + BATCH, stop)) for at in range(start, stop, BATCH)]
            rows = []
            for group in ahead(read, groups, threads=threads, waiting=threads):
                rows.append(group)
                progress(min(start + BATCH * len(rows), stop), total)
            taught.write_columns(files[-1], _joined(rows))
            new += stop - start
        progress(stop, total)
    labels = taught.Labels(**_joined([taught.read_columns(file) for file in files]))
    taught.write_labels(path, labels, of)
    shutil.rmtree(parts)
    return Summary(total, int((~labels.found).sum()), new)


def _read(source: Pictures, teacher: Teacher, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of `taught.Labels` for up to BATCH examples."""
    ids, faces = [], {}
    for row, number in enumerate(numbers):
        example, prior = source.examples[number], source.priors[number]
        ids.append(example["id"])
        try:
            if prior.found.any():
                faces[row] = cut_out(read_image(example["media"]), prior.boxes[0])
        except UserError as error:
            _log.warning("example %s has no labels: %s", example["id"], error)
    found = np.isin(np.arange(len(ids)), list(faces))
    columns = {name: np.full((len(ids), *shape), np.nan, np.float32) for name, shape in MEASURED}
    if faces:
        for name, values in read_faces(list(faces.values()), teacher).items():
            columns[name][found] = values
    agr = taught.classes_of(columns["age"], columns["male"])
    return {"id": np.array(ids), "found": found, **columns, "agr": agr}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
