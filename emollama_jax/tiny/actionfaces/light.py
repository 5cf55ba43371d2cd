"""Light on a drawn face: shading, soft shadows, highlights, blush, folds of action units and age.

All of it is maps at the picture's size, blurred and multiplied onto the picture; that is far
cheaper than shading the supersampled canvas. Pictures are channel-first here: NumPy is slow on a
last axis of three.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from emollama_jax.data.action_units import AU
from emollama_jax.tiny.actionfaces.canvas import Canvas, offset
from emollama_jax.tiny.actionfaces.geometry import FacePoints, curve
from emollama_jax.tiny.actionfaces.identity import Identity

# How much a shadow darkens, a highlight brightens and a blush reddens each of R, G, B.
_SHADOW = (0.80, 1.0, 1.0)
_HIGHLIGHT = (0.34, 0.31, 0.28)
_BLUSH = (0.0, 0.16, 0.13)


def illuminate(
    picture: np.ndarray,
    mask: np.ndarray,
    points: FacePoints,
    person: Identity,
    units: np.ndarray,
    light: tuple[float, float],
) -> np.ndarray:
    """Lights a flat drawing.

    Args:
        picture: uint8 [S, S, 3], flat colours.
        mask: uint8 [S, S], 255 on skin.
        points: The face.
        person: Whose age makes folds.
        units: float32 [K] action units, which make folds.
        light: Where the light is brighter, (right, down) in about -1..1.

    Returns:
        float32 [3, S, S] in about 0..255.
    """
    size, unit = len(mask), points.view.scale
    skin = mask.astype(np.float32) * (1 / 255)
    shade = 1 + (0.35 + 0.65 * skin) * _shading(points, light, size)

    soft, fine, glow, cheeks = (Canvas(Image.new("L", (size, size), 0), 1) for _ in range(4))
    _soft_shadows(soft, points, person, light[0])
    _folds(fine, points, person, units)
    _highlights(glow, points, units, light[0])
    for name in ("apple_left", "apple_right"):
        cheeks.ellipse(points[name], 0.26 * unit, 0.20 * unit, points.view.roll, 150)
    shadows = ImageChops.add(_blurred(soft, 0.085 * unit), _blurred(fine, max(0.45, 0.022 * unit)))
    dark = np.minimum(np.asarray(shadows, np.float32) * skin * (1 / 255), 0.85)
    bright = np.asarray(_blurred(glow, 0.08 * unit), np.float32) * skin
    blush = 0.25 + 0.5 * person.makeup + 0.35 * float(units[AU[12]])
    red = np.asarray(_blurred(cheeks, 0.14 * unit), np.float32) * skin * (blush / 255)

    lit = np.empty((3, size, size), np.float32)
    for channel in range(3):
        gain = shade * (1 - _SHADOW[channel] * dark) * (1 - _BLUSH[channel] * red)
        lit[channel] = picture[..., channel] * gain + _HIGHLIGHT[channel] * bright
    return lit


def _blurred(canvas: Canvas, radius: float) -> Image.Image:
    return canvas.image.filter(ImageFilter.GaussianBlur(radius))


def _shading(points: FacePoints, light: tuple[float, float], size: int) -> np.ndarray:
    """Returns how the head's roundness brightens each pixel, float32 [S, S] around 0."""
    middle, unit, roll = points["middle"], points.view.scale, points.view.roll
    axis = np.arange(size, dtype=np.float32)
    dx, dy = (axis - middle[0]) / unit, (axis - middle[1]) / unit
    cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
    across = (dx * cos)[None, :] + (dy * sin)[:, None]
    down = (dy * cos)[:, None] - (dx * sin)[None, :]
    slope = np.clip((0.16 * light[0]) * across + (0.16 * light[1]) * down, -0.3, 0.3)
    round_off = np.clip((across / 1.02) ** 2 + (down / 1.5) ** 2 - 0.25, 0, 1.2)
    return (slope - 0.20 * round_off).astype(np.float32)


def _axes(points: FacePoints) -> tuple[np.ndarray, np.ndarray]:
    """Returns one face unit to the face's right and one down, in pixels, float32 [2] each."""
    cos, sin = np.cos(points.view.roll), np.sin(points.view.roll)
    return offset(cos, sin) * points.view.scale, offset(-sin, cos) * points.view.scale


def _soft_shadows(soft: Canvas, points: FacePoints, person: Identity, light_x: float) -> None:
    face, roll, unit = points.landmarks, points.view.roll, points.view.scale
    _, down = _axes(points)
    for first, brow in ((36, 19), (42, 24)):
        eye = face[first : first + 6]
        inner = eye[3] if first == 36 else eye[0]
        soft.fill(
            np.stack([eye[0], 0.5 * (eye[1] + face[brow]), 0.5 * (eye[2] + face[brow]), eye[3]]), 46
        )
        soft.ellipse(0.7 * inner + 0.3 * face[27], 0.10 * unit, 0.12 * unit, roll, 62)
        bag = 0.5 * (eye[4] + eye[5]) + 0.10 * down
        soft.ellipse(bag, 0.2 * unit, 0.05 * unit, roll, int(22 + 50 * person.wrinkles))
    # The side of the nose away from the light.
    wing, toward = (35, 0.10 * unit) if light_x <= 0 else (31, -0.10 * unit)
    bridge = face[28:31]
    side = np.concatenate([bridge, face[wing : wing + 1], bridge[::-1] + offset(toward, 0)])
    soft.fill(side, int(40 + 50 * min(abs(light_x), 1)))
    soft.ellipse(face[33] + 0.05 * down, 0.20 * unit, 0.05 * unit, roll, 85)
    soft.ellipse(face[57] + 0.10 * down, 0.20 * unit, 0.05 * unit, roll, 70)
    chin = face[3:14] + 0.02 * down
    soft.fill(np.concatenate([chin, chin[::-1] + 0.26 * down]), 120)


def _folds(fine: Canvas, points: FacePoints, person: Identity, units: np.ndarray) -> None:
    """Draws folds as dark lines; each line's darkness grows with its action units and with age."""
    face, old = points.landmarks, person.wrinkles
    across, down = _axes(points)
    thin = max(1.0, 0.028 * points.view.scale)
    unit = {number: float(units[position]) for number, position in AU.items()}

    def fold(path: list[np.ndarray], width: float, strength: float) -> None:
        grey = int(min(strength, 1.0) * 118)
        if grey > 5:
            fine.line(
                curve(np.stack(path), steps=4) if len(path) > 2 else np.stack(path),
                width * thin,
                grey,
            )

    for wing, corner, sign in ((31, 48, -1.0), (35, 54, 1.0)):
        # Nasolabial fold.
        start = face[wing] + across * (0.05 * sign) - down * 0.05
        end = face[corner] + across * (0.10 * sign) + down * (0.02 + 0.10 * (1 - unit[12]))
        bend = 0.5 * (start + end) + across * ((0.03 + 0.05 * unit[12]) * sign)
        fold(
            [start, bend, end],
            1.4,
            0.12 + 0.45 * old + 0.75 * unit[12] + 0.5 * unit[9] + 0.2 * unit[20],
        )
        # The line from a pulled-down corner to the chin.
        end = face[corner] + across * (0.05 * sign) + down * 0.20
        fold([face[corner] + across * (0.02 * sign), end], 1.2, 0.9 * unit[15] + 0.30 * old)
        # The bracket beside stretched lips.
        start = face[corner] + across * (0.10 * sign) - down * 0.07
        fold(
            [start, face[corner] + across * (0.13 * sign), start + down * 0.14], 1.0, 0.8 * unit[20]
        )
    for corner, sign in ((36, -1.0), (45, 1.0)):  # crow's feet
        for angle in (-0.07, 0.02, 0.11):
            start = face[corner] + across * (0.06 * sign) + down * (0.3 * angle)
            fold(
                [start, start + across * (0.13 * sign) + down * angle],
                1.0,
                0.85 * unit[6] + 0.4 * old,
            )
    for first in (36, 42):  # under the lower lid
        lid = list(face[[first + 3, first + 4, first + 5, first]] + 0.075 * down)
        fold(lid, 1.0, 0.12 + 0.65 * unit[6] + 0.4 * unit[7] + 0.35 * old)
    for inner, sign in ((21, 1.0), (22, -1.0)):  # between the brows
        start = face[inner] + across * (0.06 * sign) - down * 0.06
        fold(
            [start, start + down * 0.17 + across * (0.012 * sign)], 1.2, 0.95 * unit[4] + 0.22 * old
        )
    for share in (0.05, 0.3, 0.55):  # across the root of the nose
        centre = (1 - share) * face[27] + share * face[28]
        wide = across * 0.11
        fold(
            [centre - wide + down * 0.025, centre, centre + wide + down * 0.025],
            1.0,
            0.95 * unit[9],
        )
    raised = 0.5 * (unit[1] + unit[2])
    sides = 0.85 * raised + 0.30 * old
    middle = sides + 0.75 * max(unit[1] - unit[2], 0)
    lift = points["forehead"] - points["glabella"]
    for height in (0.40, 0.55):  # across the forehead
        for brow, strength in (
            ((18, 19, 20), sides),
            ((20, 21, 22, 23), middle),
            ((23, 24, 25), sides),
        ):
            arc = face[list(brow)]
            fold(list(0.6 * arc + 0.4 * arc.mean(0) + lift * height), 1.0, strength)
    fold(list(face[50:53] - 0.035 * down), 1.0, 0.8 * unit[23])  # above and below tightened lips
    fold(list(face[56:59] + 0.05 * down), 1.4, 0.8 * unit[23])


def _highlights(glow: Canvas, points: FacePoints, units: np.ndarray, light_x: float) -> None:
    face, roll, unit = points.landmarks, points.view.roll, points.view.scale
    glow.line(face[27:30], 0.08 * unit, 70)
    glow.ellipse(face[30] - offset(0, 0.03 * unit), 0.08 * unit, 0.07 * unit, roll, 95)
    forehead = (
        0.55 * points["forehead"]
        + 0.45 * points["glabella"]
        + offset(0.22 * unit * np.sign(light_x), 0)
    )
    glow.ellipse(forehead, 0.42 * unit, 0.17 * unit, roll, 55)
    raised = float(units[AU[6]] + 0.5 * units[AU[12]])
    for name in ("apple_left", "apple_right"):
        centre = points[name] - offset(0, (0.10 + 0.05 * raised) * unit)
        glow.ellipse(centre, 0.19 * unit, 0.10 * unit, roll, int(45 + 40 * min(raised, 1)))
    glow.ellipse(0.4 * face[57] + 0.6 * face[8], 0.16 * unit, 0.09 * unit, roll, 45)
