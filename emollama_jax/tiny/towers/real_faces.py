"""The faces of a prepared real set as arrays, for pretraining.

Both towers learn from the same cut-out face; where it stands on a larger picture is drawn in
training (`augment.py`). A set's votes are its soft target, else its label; landmarks, age and
gender come from a teacher's file (`python -m tools.face_teacher`) where one lies beside the set.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from emollama_jax.data import taught
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.face_crop import crop_face, to_crop
from emollama_jax.data.media import read_image
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.terms import LANDMARKS
from emollama_jax.tiny.towers.pictures import CLASSES, Crops, Pictures, open_pictures, save_pictures

CHUNK = 2048  # pictures decoded before they are written
# Of the teacher's two looks at a face, in boxes; about half of those above are wrong.
SPREAD = 0.055
UNSURE = 0.2  # probability of male from which to 1 minus it the gender counts as unknown


def real_pictures(
    folder: pathlib.Path,
    split: Split,
    *,
    crops: Crops,
    units: int,
    progress: Callable[[int, int], None],
) -> Pictures:
    """Cuts the faces of a split out once; a folder that is complete is only opened.

    Args:
        folder: folder for the arrays.
        split: split of pictures, not clips.
        crops: sizes of both pictures of a face.
        units: number of action units of drawn faces; a real set has none.
        progress: called with (done, all) pictures.

    Raises:
        UserError: the set is one of clips, or shares no class with `CLASSES`.
    """
    if (folder / "done").exists():
        return open_pictures(folder)
    examples, priors = split.examples, split.priors
    targets, known = class_targets(split.space), teacher_labels(split)
    chunks, rows = [], []
    for number, prior in enumerate(priors):
        if len(prior.found) > 1:
            raise UserError(f"{split.name}: pretraining reads pictures, and this is a set of clips")
        if len(prior.found) and prior.found[0]:
            example = examples[number]
            picture = read_image(example["media"])
            face, crop = crop_face(picture, prior.boxes[0], crops.margin, crops.face_size)
            frame, _ = crop_face(picture, prior.boxes[0], crops.margin, crops.frame_size)
            landmarks, agr = known(number, picture.shape[:2])
            votes = np.asarray(example.get("votes", ()), np.float32)
            if not votes.sum() > 0:
                votes = np.eye(len(targets), dtype=np.float32)[example["label"]]
            rows.append((frame, face, to_crop(landmarks, crop), agr, votes @ targets))
        if len(rows) == CHUNK or (number == len(priors) - 1 and rows):
            chunks.append(_chunk(rows, units))
            rows = []
            progress(number + 1, len(priors))
    save_pictures(folder, chunks)
    return open_pictures(folder)


def teacher_labels(
    split: Split,
) -> Callable[[int, Sequence[int]], tuple[np.ndarray, np.ndarray]]:
    """What the teacher's file says of an example, by its number and its picture's (height, width).

    Landmarks in pixels, nan where its two looks at the face disagree; the AGR classes, -1 where
    unknown. Without a file all is unknown.
    """
    if not taught.labels_path(split).exists():
        nowhere, unknown = np.full((LANDMARKS, 2), np.nan, np.float32), np.full(3, -1, np.int32)
        return lambda number, size: (nowhere, unknown)
    labels = taught.read_labels(split)
    sure = (labels.spread <= SPREAD)[:, None, None]  # nan is not
    landmarks = np.where(sure, labels.landmarks, np.nan)
    agr = labels.agr.copy()
    agr[(labels.male > UNSURE) & (labels.male < 1 - UNSURE), 1] = -1

    def of(number: int, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        height, width = size
        return (landmarks[number] + 1) * np.array([width, height]) / 2 - 0.5, agr[number]

    return of


def class_targets(space: LabelSpace) -> np.ndarray:
    """Float32 [a set's classes, CLASSES]: 1 where they are the same; a class apart has no target.

    Raises:
        UserError: they share none.
    """
    same = np.array([[a == b for b in CLASSES] for a in space.canonical], np.float32)
    if not same.any():
        raise UserError(f"{space.title}: none of its classes is one of {', '.join(CLASSES)}")
    return same


def _chunk(rows: list[tuple], units: int) -> Pictures:
    frames, faces, landmarks, agr, votes = (np.stack(column) for column in zip(*rows, strict=True))
    n = len(rows)
    total = votes.sum(1, keepdims=True)
    votes = np.divide(votes, total, out=np.zeros_like(votes), where=total > 0)
    return Pictures(
        frames=frames,
        faces=faces,
        landmarks=landmarks.astype(np.float32),
        frame_landmarks=landmarks.astype(np.float32),
        pose=np.full((n, 3), np.nan, np.float32),
        agr=agr.astype(np.int32),
        attributes=np.full((n, 40), np.nan, np.float32),
        action_units=np.full((n, units), np.nan, np.float32),
        emotion=np.where(total[:, 0] > 0, votes.argmax(1), -1).astype(np.int32),
        votes=votes.astype(np.float32),
    )
