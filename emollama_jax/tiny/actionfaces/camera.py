"""Background, occlusion, and what a camera does: blur, noise, colour, JPEG."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from emollama_jax.tiny.actionfaces.canvas import Canvas, mix
from emollama_jax.tiny.actionfaces.geometry import FacePoints, curve
from emollama_jax.tiny.actionfaces.identity import Identity

OCCLUSIONS = ("none", "hand", "microphone", "scarf", "sunglasses")
_OCCLUSION_WEIGHTS = np.array([0.915, 0.03, 0.02, 0.02, 0.015])


@dataclass(frozen=True)
class Scene:
    """Everything of a picture that is neither the person nor the face's points."""

    seed: int
    light: tuple[float, float]
    gaze: tuple[float, float]
    clothes: tuple[float, float, float]
    collar: float
    occlusion: str
    side: int
    blur: float
    noise: float
    brightness: float
    contrast: float
    cast: tuple[float, float, float]
    jpeg: int
    noise_seed: int = 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws light, background, occlusion and camera."""
    warm = rng.normal(0, 0.035)
    return Scene(
        seed=int(rng.integers(2**31)),
        light=(float(rng.uniform(-1.3, 1.3)), float(rng.uniform(-0.9, 0.4))),
        gaze=(
            float(np.clip(rng.normal(0, 0.022), -0.05, 0.05)),
            float(np.clip(rng.normal(0, 0.008), -0.02, 0.02)),
        ),
        clothes=tuple((rng.uniform(45, 185) + rng.uniform(-45, 45, 3)).tolist()),
        collar=float(rng.uniform(0, 0.25)),
        occlusion=OCCLUSIONS[int(rng.choice(len(OCCLUSIONS), p=_OCCLUSION_WEIGHTS))],
        side=int(rng.choice((-1, 1))),
        blur=float(rng.uniform(0.25, 0.7)) if rng.random() < 0.4 else 0.0,
        noise=float(rng.uniform(1.0, 5.5)),
        brightness=float(np.clip(rng.normal(1.0, 0.11), 0.72, 1.28)),
        contrast=float(np.clip(rng.normal(1.0, 0.10), 0.72, 1.25)),
        cast=(1 + warm, 1.0, 1 - warm),
        jpeg=int(rng.integers(60, 96)) if rng.random() < 0.6 else 0,
    )


def background(scene: Scene, size: int, factor: int) -> Image.Image:
    """Draws a blurred background, RGB of size·factor; the caller may draw on it."""
    return _background(scene.seed, size * factor).copy()


@lru_cache(maxsize=1)  # a clip's frames share theirs
def _background(seed: int, size: int) -> Image.Image:
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    base = rng.uniform(45, 215) + rng.uniform(-38, 38, 3)
    corners = np.clip(
        base + rng.normal(0, 25, (2, 2, 1)) + rng.normal(0, 9, (2, 2, 3)), 0, 255
    ).astype(np.uint8)
    coarse = 24
    image = Image.fromarray(corners).resize((coarse, coarse), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.uniform(0, coarse, 2)
        w, h = rng.uniform(1.5, 8, 2)
        shade = base + rng.normal(0, 38) + rng.normal(0, 22, 3)
        colour = tuple(np.clip(shade, 0, 255).astype(int).tolist())
        if rng.random() < 0.5:
            pen.ellipse((x - w, y - h, x + w, y + h), fill=colour)
        else:
            pen.rectangle((x - w, y - 3 * h, x + w, y + 3 * h), fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
    return image.resize((size, size), Image.Resampling.BILINEAR)


def photograph(
    picture: np.ndarray, points: FacePoints, person: Identity, scene: Scene
) -> np.ndarray:
    """Puts the occluder before the face and takes the picture.

    Args:
        picture: float32 [3, S, S], about 0..255.
        points: The face, to know where to put a hand.
        person: Whose skin the hand has.
        scene: What to do.

    Returns:
        uint8 [S, S, 3].
    """
    rng = np.random.Generator(np.random.PCG64([scene.seed, 2, scene.noise_seed]))
    if scene.occlusion in ("hand", "microphone", "scarf") or scene.blur:
        image = Image.fromarray(_to_bytes(picture))
        if scene.occlusion in ("hand", "microphone", "scarf"):
            image = _occlude(image, points, person, scene)
        if scene.blur:
            image = image.filter(ImageFilter.GaussianBlur(scene.blur))
        picture = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), np.float32)
    noisy = scene.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    lift = 118 * (1 - scene.contrast) * scene.brightness
    for channel in range(3):
        noisy[channel] += (
            picture[channel] * (scene.contrast * scene.brightness * scene.cast[channel]) + lift
        )
    taken = _to_bytes(noisy)
    if not scene.jpeg:
        return taken
    buffer = io.BytesIO()
    Image.fromarray(taken).save(buffer, "JPEG", quality=scene.jpeg)
    return np.array(Image.open(buffer))


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    """Rounds float32 [3, S, S] to uint8 [S, S, 3]."""
    return np.ascontiguousarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _occlude(image: Image.Image, points: FacePoints, person: Identity, scene: Scene) -> Image.Image:
    factor = 2
    size = image.size[0]
    canvas = Canvas(image.resize((size * factor,) * 2, Image.Resampling.BILINEAR), factor)
    unit, side, face = points.view.scale, scene.side, points.landmarks
    jaw = face[4 if side < 0 else 12]
    if scene.occlusion == "hand":
        edge = mix(person.skin, (60, 20, 10), 0.40)
        palm = jaw + unit * np.array((0.18 * side, 0.42), np.float32)
        canvas.ellipse(
            palm, 0.42 * unit, 0.5 * unit, 0.3 * side, mix(person.skin, (60, 20, 10), 0.12)
        )
        for finger in range(4):
            base = palm + unit * np.array((side * (0.30 - 0.19 * finger), -0.30), np.float32)
            tip = base + unit * np.array(
                (side * (0.10 - 0.03 * finger), -0.48 + 0.07 * abs(finger - 1)), np.float32
            )
            canvas.ribbon(np.stack([base, tip]), 0.205 * unit, edge)
            canvas.ellipse(tip, 0.10 * unit, 0.10 * unit, 0.0, edge)
            canvas.ribbon(np.stack([base, tip]), 0.165 * unit, person.skin)
            canvas.ellipse(tip, 0.08 * unit, 0.08 * unit, 0.0, person.skin)
    elif scene.occlusion == "microphone":
        ball = face[8] + unit * np.array((0.25 * side, -0.02), np.float32)
        canvas.ribbon(
            np.stack([ball, ball + unit * np.array((0.5 * side, 2.0), np.float32)]),
            0.26 * unit,
            (34, 34, 38),
        )
        canvas.ellipse(ball, 0.25 * unit, 0.27 * unit, 0.0, (72, 72, 78))
        canvas.ellipse(
            ball + unit * np.array((-0.08, -0.09), np.float32),
            0.08 * unit,
            0.08 * unit,
            0.0,
            (150, 150, 156),
        )
    else:
        top = face[4:13] * 0.9 + 0.1 * face[57]
        sides = unit * np.array(((-0.5, 0.1), (0.5, 0.1)), np.float32)
        edge = np.concatenate([face[3:4] + sides[:1], top, face[13:14] + sides[1:]])
        bottom = np.array([[size + 9, size + 9], [-9, size + 9]], np.float32)
        canvas.fill(np.concatenate([curve(edge, steps=3), bottom]), scene.clothes)
        canvas.ribbon(curve(edge, steps=3), 0.06 * unit, mix(scene.clothes, (0, 0, 0), 0.25))
    return canvas.image.reduce(factor)
