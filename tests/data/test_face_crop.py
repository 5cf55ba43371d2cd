"""The face through a clip, and its crop."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data.face_crop import (
    Crop,
    crop_box,
    crop_face,
    from_crop,
    largest,
    to_crop,
    track,
)
from emollama_jax.data.media import read_image
from emollama_jax.errors import UserError


@dataclasses.dataclass
class Faces:
    boxes: np.ndarray


def faces(*boxes):
    return Faces(np.array(boxes, np.float32).reshape(-1, 4))


A, A2, A3 = [10, 10, 50, 50], [12, 10, 52, 50], [14, 10, 54, 50]  # one face that moves
B = [100, 100, 120, 120]  # a smaller one elsewhere
HUGE = [0, 0, 200, 200]


def test_crop_matches_facexformer():
    """Numbers of the original's chain on the same picture, after ImageNet normalisation."""
    skimage = pytest.importorskip("skimage", reason="scikit-image carries astronaut.png")
    picture = read_image(pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png")
    box = np.array([181.0514, 62.1561, 267.7473, 172.0502], np.float32)
    face, crop = crop_face(picture, box, 0.5, 224)
    assert crop == Crop(159, 34, 130, 165)
    assert face.shape == (224, 224, 3) and face.dtype == np.uint8
    x = (face / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x.mean((0, 1)), [0.41222, 0.17013, -0.01876], atol=2e-5)
    np.testing.assert_allclose(x.std((0, 1)), [1.23067, 1.17445, 1.21019], atol=2e-5)


@pytest.mark.parametrize(
    ("box", "margin", "crop"),
    [
        ([10, 20, 30, 60], 0.0, (10, 20, 20, 40)),
        ([10, 20, 30, 60], 0.5, (5, 10, 30, 60)),
        ([10.9, 20.9, 30.9, 60.9], 0.0, (10, 20, 20, 40)),  # truncated, not rounded
        ([2, 3, 42, 43], 0.5, (0, 0, 52, 53)),  # clamped on one side only
        ([-8, -8, 500, 500], 0.5, (0, 0, 100, 80)),
        ([50.2, 50.2, 50.6, 50.6], 0.0, (50, 50, 1, 1)),  # at least a pixel
        ([99.5, 10, 120, 30], 0.0, (99, 10, 1, 20)),
    ],
)
def test_crop_box(box, margin, crop):
    assert crop_box(np.array(box), margin, width=100, height=80) == crop


@pytest.mark.parametrize(
    "box",
    [[100, 0, 120, 20], [-20, 0, 0, 20], [0, 80, 20, 90], [30, 30, 20, 40], [0, 0, np.nan, 5]],
)
def test_crop_box_refuses(box):
    with pytest.raises(UserError, match="box"):
        crop_box(np.array(box), 0.5, width=100, height=80)


def test_crop_ignores_shape():
    """The crop is stretched to a square, pixel values are those of Pillow's bicubic filter."""
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    face, crop = crop_face(picture, np.array([10, 20, 30, 60]), 0.0, 32)
    image = Image.fromarray(picture).crop((10, 20, 30, 60)).resize((32, 32), Image.BICUBIC)
    assert crop == (10, 20, 20, 40)
    np.testing.assert_array_equal(face, np.asarray(image))


def test_points_follow_the_crop():
    crop = Crop(159, 34, 130, 165)
    edges = np.array([[158.5, 33.5], [288.5, 198.5], [223.5, 116]])
    np.testing.assert_allclose(to_crop(edges, crop), [[-1, -1], [1, 1], [0, 0]], atol=1e-6)
    # The original goes through pixels of the 224 crop: px = ((v + 1)·S - 1) / 2.
    v = np.random.default_rng(0).uniform(-1, 1, (68, 2))
    px = ((v + 1) * 224 - 1) / 2
    source = np.array(crop[:2]) + (px + 0.5) * np.array(crop[2:]) / 224 - 0.5
    np.testing.assert_allclose(from_crop(v, crop), source, atol=1e-4)
    np.testing.assert_allclose(to_crop(source, crop), v, atol=1e-6)


def test_largest():
    assert largest(faces()) is None
    assert largest(faces(B, HUGE, A)) == 1


def test_track_follows_overlap_not_size():
    clip = [faces(A, B), faces([*HUGE[:2], 9, 300], A2), faces(B, A3)]
    followed = track(clip)
    np.testing.assert_array_equal(followed.boxes, np.array([A, A2, A3], np.float32))
    assert followed.found.all()


def test_track_starts_with_the_largest():
    np.testing.assert_array_equal(track([faces(B, A), faces(A2)]).boxes, [A, A2])


def test_track_fills_gaps_with_the_nearest():
    clip = [faces(), faces(A), faces(), faces(), faces(), faces(A3), faces()]
    followed = track(clip)
    np.testing.assert_array_equal(followed.boxes, [A, A, A, A, A3, A3, A3])
    assert followed.found.all() and followed.boxes.dtype == np.float32


def test_track_without_a_face():
    followed = track([faces(), faces()])
    assert not followed.found.any() and not followed.boxes.any()
    assert followed.boxes.shape == (2, 4)
    assert track([]).boxes.shape == (0, 4)


def test_track_tells_a_miss_from_a_cut():
    # A bystander where the face was missed for a frame: the face stays.
    np.testing.assert_array_equal(track([faces(A), faces(B), faces(A2)]).boxes, [A, A, A2])
    # The face never comes back: the largest one takes over from the frame of the cut.
    clip = [faces(A), faces(B, [300, 0, 400, 100]), faces([302, 0, 402, 100], B)]
    expected = [A, [300, 0, 400, 100], [302, 0, 402, 100]]
    np.testing.assert_array_equal(track(clip).boxes, expected)
    # Looking ahead ends after `patience` frames.
    np.testing.assert_array_equal(track([faces(A), faces(B), faces(A2)], patience=0).boxes[1], B)


def test_track_smoothing():
    boxes = [[x, 0, x + 10, 10] for x in (0.0, 3.0, 0.0, 3.0)]
    clip = [faces(box) for box in boxes]
    np.testing.assert_array_equal(track(clip).boxes, boxes)
    np.testing.assert_allclose(track(clip, smoothing=3).boxes[:, 0], [1.5, 1, 2, 1.5])
    with pytest.raises(ValueError, match="smoothing 2"):
        track(clip, smoothing=2)
