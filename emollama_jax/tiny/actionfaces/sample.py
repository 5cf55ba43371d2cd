"""One picture or clip of the embedded data set, from (seed, split, index) alone."""

from dataclasses import dataclass, replace

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.data.describe import describe
from emollama_jax.errors import UserError
from emollama_jax.tiny.actionfaces.attributes import attributes
from emollama_jax.tiny.actionfaces.camera import sample_scene
from emollama_jax.tiny.actionfaces.courses import FPS, sample_course
from emollama_jax.tiny.actionfaces.draw import render
from emollama_jax.tiny.actionfaces.expressions import (
    CLASS_SHARES,
    sample_mix,
    sample_noise,
    sample_strength,
)
from emollama_jax.tiny.actionfaces.geometry import View, face_box, place
from emollama_jax.tiny.actionfaces.identity import Identity, identities_of, make_identity

SPLITS = ("train", "validation", "test")
_KINDS = {"image": 0, "clip": 1}


@dataclass(frozen=True)
class Sample:
    """One picture with everything that is known about it.

    Attributes:
        picture: uint8 [S, S, 3].
        emotion: Index into EMOTIONS.
        identity: The person's number.
        landmarks: float32 [68, 2], iBUG order, pixels with integers at pixel centres.
        box: float32 [4], x1, y1, x2, y2 in pixels.
        pose: float32 [3], pitch, yaw, roll in radians.
        age: Class 0..7, decades.
        gender: 0 male, 1 female.
        race: Class 0..4: White, Black, Asian, Indian, Others.
        action_units: float32 [K], order of ACTION_UNITS, 0..1.
        attributes: float32 [40], CelebA order, 0, 1 or nan where the drawing does not decide.
        description: One or two sentences about brows, eyes, mouth and the emotion.
    """

    picture: np.ndarray
    emotion: int
    identity: int
    landmarks: np.ndarray
    box: np.ndarray
    pose: np.ndarray
    age: int
    gender: int
    race: int
    action_units: np.ndarray
    attributes: np.ndarray
    description: str


@dataclass(frozen=True)
class ClipSample:
    """One clip; as `Sample`, with a leading axis [F] on all that changes.

    Attributes:
        frames: uint8 [F, S, S, 3].
        fps: Frames per second.
        attributes: float32 [40] of the frame with the strongest expression.
        timing: Where the expression lies, see `courses.Course`.
    """

    frames: np.ndarray
    fps: float
    emotion: int
    identity: int
    landmarks: np.ndarray
    boxes: np.ndarray
    pose: np.ndarray
    age: int
    gender: int
    race: int
    action_units: np.ndarray
    attributes: np.ndarray
    timing: str
    description: str


def _start(
    kind: str, split: str, index: int, seed: int
) -> tuple[np.random.Generator, Identity, int]:
    """Returns the example's random stream, its person and its emotion."""
    if split not in SPLITS:
        raise UserError(f"actionfaces: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), _KINDS[kind], index]))
    people = identities_of(split)
    person = make_identity(people[int(rng.integers(len(people)))])
    return rng, person, int(rng.choice(len(EMOTIONS), p=CLASS_SHARES[split]))


def _sample_view(rng: np.random.Generator, size: int) -> View:
    """Draws where the head is; faces take about 45 to 70 % of the picture's width."""
    return View(
        pitch=float(np.clip(rng.normal(0, 0.09), -0.26, 0.26)),
        yaw=float(np.clip(rng.normal(0, 0.17), -0.52, 0.52)),
        roll=float(np.clip(rng.normal(0, 0.06), -0.21, 0.21)),
        scale=float(rng.uniform(0.26, 0.335) * size),
        centre=(
            float(size * (0.5 + np.clip(rng.normal(0, 0.03), -0.08, 0.08))),
            float(size * (0.5 + np.clip(rng.normal(0, 0.025), -0.06, 0.06))),
        ),
    )


def _asymmetry(rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.normal(0, 0.07, len(ACTION_UNITS)), -0.18, 0.18).astype(np.float32)


def sample_image(split: str, index: int, *, seed: int = 0, size: int = 96) -> Sample:
    """Draws picture `index` of a split; any index is valid.

    Args:
        split: "train", "validation" or "test"; the splits share no person.
        index: Number of the picture.
        seed: Another seed gives another data set of the same people.
        size: Width and height in pixels.
    """
    rng, person, emotion = _start("image", split, index, seed)
    mix = sample_mix(emotion, person, sample_strength(rng), rng)
    units = np.maximum(mix, sample_noise(rng))
    view = _sample_view(rng, size)
    points = place(person, units, _asymmetry(rng), view)
    scene = sample_scene(rng)
    picture = render(points, person, units, scene, size)
    return Sample(
        picture=picture,
        emotion=emotion,
        identity=person.number,
        landmarks=points.landmarks,
        box=face_box(points),
        pose=np.array([view.pitch, view.yaw, view.roll], np.float32),
        age=person.age,
        gender=person.gender,
        race=person.race,
        action_units=units,
        attributes=attributes(person, units, scene),
        description=describe(units, emotion, "image", rng),
    )


def sample_clip(split: str, index: int, *, seed: int = 0, size: int = 96) -> ClipSample:
    """Draws clip `index` of a split, 8 to 24 frames; arguments as in `sample_image`."""
    rng, person, emotion = _start("clip", split, index, seed)
    course = sample_course(emotion, person, rng)
    first = _sample_view(rng, size)
    asymmetry = _asymmetry(rng)
    scene = sample_scene(rng)
    # A camera's film is less noisy than its pictures, and the video codec takes the place of JPEG.
    scene = replace(scene, jpeg=0, noise=0.4 * scene.noise, blur=min(scene.blur, 0.5))
    count = len(course.units)
    time = np.arange(count)[:, None]
    drift = np.sin(rng.uniform(0.08, 0.32, 5) * time + rng.uniform(0, 6, 5)) * rng.uniform(
        0, 1, 5
    )  # [F, 5]
    frames, points = [], []
    for frame in range(count):
        pitch, yaw, roll, x, y = drift[frame]
        view = replace(
            first,
            pitch=first.pitch + 0.06 * pitch,
            yaw=first.yaw + 0.12 * yaw,
            roll=first.roll + 0.05 * roll,
            centre=(first.centre[0] + 0.03 * size * x, first.centre[1] + 0.02 * size * y),
        )
        points.append(place(person, course.units[frame], asymmetry, view))
        shot = replace(scene, noise_seed=frame)
        frames.append(render(points[-1], person, course.units[frame], shot, size))
    apex = int(course.units.sum(1).argmax())
    return ClipSample(
        frames=np.stack(frames),
        fps=FPS,
        emotion=emotion,
        identity=person.number,
        landmarks=np.stack([point.landmarks for point in points]),
        boxes=np.stack([face_box(point) for point in points]),
        pose=np.array([(p.view.pitch, p.view.yaw, p.view.roll) for p in points], np.float32),
        age=person.age,
        gender=person.gender,
        race=person.race,
        action_units=course.units,
        attributes=attributes(person, course.units[apex], scene),
        timing=course.timing,
        description=describe(course.units, emotion, "clip", rng),
    )
