"""The face through a clip and the crop around it, in plain NumPy and Pillow.

`crop_box` is the rule of FaceXFormer's inference script: margin per side, clamped to the picture,
truncated, neither squared nor padded. What differs: a box without a pixel inside the picture is an
error, and a crop has at least one pixel. Coordinates are those of pixel centres: pixel 0 covers
-0.5 … 0.5, and in a crop -1 and 1 are its outer edges.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float32, Real, UInt8
from PIL import Image

from emollama_jax.errors import UserError


class Faces(Protocol):
    """What a detector found in one picture, e.g. `emollama_jax.models.mtcnn.Faces`."""

    @property
    def boxes(self) -> Float32[np.ndarray, "n 4"]: ...


class Crop(NamedTuple):
    """A rectangle of whole pixels: columns x … x + width - 1, rows y … y + height - 1."""

    x: int
    y: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Track:
    """One face through F frames. `found` is all True, or all False if no frame had a face."""

    boxes: Float32[np.ndarray, "f 4"]  # (x1, y1, x2, y2) in pixels; zeros where not found
    found: Bool[np.ndarray, " f"]


def largest(faces: Faces) -> int | None:
    """The index of the face with the largest box, None if there is no face."""
    return int(np.argmax(_area(faces.boxes))) if len(faces.boxes) else None


def crop_box(box: Real[np.ndarray, "4"], margin: float, *, width: int, height: int) -> Crop:
    """The rectangle around a face that FaceXFormer reads.

    Args:
        box: (x1, y1, x2, y2) in pixels.
        margin: both sides together, as a share of the box: 0.5 adds a quarter on each side.
        width: width of the picture.
        height: height of the picture.

    Raises:
        UserError: the box is not finite, is empty, or has no pixel inside the picture.
    """
    x1, y1, x2, y2 = np.asarray(
        box, np.float32
    )  # float32 as the original: truncation depends on it
    if not (np.isfinite([x1, y1, x2, y2]).all() and x1 < x2 and y1 < y2):
        raise UserError(f"box {_words(box)}: wanted finite x1 < x2 and y1 < y2")
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise UserError(f"box {_words(box)} is outside its picture of {width}×{height} pixels")
    across = np.float32(margin / 2) * (x2 - x1)
    down = np.float32(margin / 2) * (y2 - y1)
    left, top = int(max(x1 - across, 0)), int(max(y1 - down, 0))
    right, bottom = int(min(x2 + across, width)), int(min(y2 + down, height))
    return Crop(left, top, max(right - left, 1), max(bottom - top, 1))


def crop_face(
    picture: UInt8[np.ndarray, "h w 3"], box: Real[np.ndarray, "4"], margin: float, size: int
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], Crop]:
    """Cuts a face out and resizes it, its shape not kept, as FaceXFormer does (Pillow, bicubic).

    Args:
        picture: the frame.
        box: (x1, y1, x2, y2) in pixels.
        margin: as in `crop_box`.
        size: side of the result in pixels.

    Returns:
        The face, and the rectangle that it was cut from.
    """
    crop = crop_box(box, margin, width=picture.shape[1], height=picture.shape[0])
    part = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    face = Image.fromarray(np.ascontiguousarray(part)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    return np.array(face), crop


def to_crop(points: Float[np.ndarray, "... 2"], crop: Crop) -> Float32[np.ndarray, "... 2"]:
    """Pixels of the picture → -1 … 1 in the crop. FaceXFormer's size of the crop cancels out."""
    extent = np.array(crop[2:], np.float64)
    return ((np.asarray(points) + 0.5 - crop[:2]) * 2 / extent - 1).astype(np.float32)


def from_crop(points: Float[np.ndarray, "... 2"], crop: Crop) -> Float32[np.ndarray, "... 2"]:
    """-1 … 1 in the crop → pixels of the picture."""
    extent = np.array(crop[2:], np.float64)
    return (np.array(crop[:2]) + (np.asarray(points) + 1) * extent / 2 - 0.5).astype(np.float32)


def track(frames: Sequence[Faces], *, patience: int = 8, smoothing: int = 1) -> Track:
    """Follows one face through a clip.

    It begins with the largest face of the first frame that has one and continues with the face that
    overlaps most with the last one. Where no face overlaps it looks ahead: if the face comes back
    within `patience` frames, the detector only missed it; otherwise the scene was cut, and the
    largest face is the new one. Frames without the face take the box of the nearest frame with it.

    Args:
        frames: the faces of each frame, F frames.
        patience: number of frames to look ahead.
        smoothing: width in frames of a centred mean over the boxes, against jitter; 1 for none.

    Raises:
        ValueError: smoothing is not a positive odd number.
    """
    if smoothing < 1 or smoothing % 2 == 0:
        raise ValueError(f"smoothing {smoothing}: wanted a positive odd number of frames")
    boxes = np.zeros((len(frames), 4), np.float32)
    seen = []
    for i, faces in enumerate(frames):
        if len(faces.boxes) == 0:
            continue
        choice = largest(faces)
        if seen:
            last = boxes[seen[-1]]
            overlaps = _overlap(faces.boxes, last)
            if overlaps.max() > 0:
                choice = int(overlaps.argmax())
            elif any(_overlap(f.boxes, last).any() for f in frames[i + 1 : i + 1 + patience]):
                continue
        boxes[i] = faces.boxes[choice]
        seen.append(i)
    if not seen:
        return Track(boxes, np.zeros(len(frames), bool))
    distance = np.abs(np.arange(len(frames))[:, None] - np.array(seen))  # [F, frames with it]
    boxes = boxes[np.array(seen)[distance.argmin(axis=1)]]
    return Track(_smooth(boxes, smoothing), np.ones(len(frames), bool))


def _smooth(boxes: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over frames; at the ends over the frames that exist."""
    sums = np.concatenate([np.zeros((1, 4)), np.cumsum(boxes, axis=0, dtype=np.float64)])
    index = np.arange(len(boxes))
    start = np.maximum(index - width // 2, 0)
    stop = np.minimum(index + width // 2 + 1, len(boxes))
    return ((sums[stop] - sums[start]) / (stop - start)[:, None]).astype(np.float32)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [N, 4] with one box."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    return shared / (_area(boxes) + _area(box[None]) - shared)


def _words(box: np.ndarray) -> str:
    return "(" + ", ".join(f"{float(x):g}" for x in box) + ")"
