"""Draws one face: flat smooth shapes, then light (`light.py`) and camera (`camera.py`).

Shapes are filled Catmull-Rom curves on a canvas of SUPERSAMPLING times the size, which is reduced
once (anti-aliasing).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from emollama_jax.data.action_units import AU
from emollama_jax.tiny.actionfaces import hair
from emollama_jax.tiny.actionfaces.camera import Scene, background, photograph
from emollama_jax.tiny.actionfaces.canvas import Canvas, mix, offset
from emollama_jax.tiny.actionfaces.geometry import FacePoints, convex_hull, curve
from emollama_jax.tiny.actionfaces.identity import Identity
from emollama_jax.tiny.actionfaces.light import illuminate

SUPERSAMPLING = 3

_ANGLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_DISC = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], 1).astype(np.float32)
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class _Part:
    """What every drawing function needs."""

    canvas: Canvas
    points: FacePoints
    person: Identity
    units: np.ndarray

    @property
    def unit(self) -> float:
        """Pixels per face unit."""
        return self.points.view.scale


def render(
    points: FacePoints, person: Identity, units: np.ndarray, scene: Scene, size: int
) -> np.ndarray:
    """Draws a person.

    Args:
        points: The face in the picture.
        person: Gives colours, hair and the rest of the look.
        units: float32 [K] action units, which add folds and teeth to what `points` already show.
        scene: Light, background, occlusion, camera.
        size: Width and height of the picture in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    canvas = Canvas(background(scene, size, SUPERSAMPLING), SUPERSAMPLING)
    skin = Canvas(Image.new("L", (size * SUPERSAMPLING,) * 2, 0), SUPERSAMPLING)
    part = _Part(canvas, points, person, units)

    hair.draw_behind(canvas, points, person)
    _draw_neck_and_clothes(part, scene, skin)
    _draw_head(part, skin)
    _draw_nose(part)
    for eye in (0, 1):
        _draw_eye(part, eye, scene.gaze)
    _draw_facial_hair(part)
    _draw_mouth(part)
    hair.draw_front(canvas, points, person)
    for side in (0, 1):
        _draw_brow(part, side)
    _draw_glasses(part, scene)

    flat = np.asarray(canvas.image.reduce(SUPERSAMPLING))
    mask = np.asarray(skin.image.reduce(SUPERSAMPLING))
    return photograph(
        illuminate(flat, mask, points, person, units, scene.light), points, person, scene
    )


def _draw_neck_and_clothes(part: _Part, scene: Scene, skin: Canvas) -> None:
    person, unit = part.person, part.unit
    neck = part.points["neck"]
    width = (0.56 if person.gender == 1 else 0.66) * (0.9 + 0.1 * person.jaw_width)
    outline = np.array(
        [[-width, -0.5], [-width, 0.3], [-1.0, 0.75], [1.0, 0.75], [width, 0.3], [width, -0.5]]
    )
    shape = curve(neck + unit * outline.astype(np.float32), steps=3)
    part.canvas.fill(shape, mix(person.skin, _BLACK, 0.14))
    skin.fill(shape, 190)
    shoulder = 1.75 if person.gender == 1 else 2.0
    collar = 0.42 + scene.collar
    # The left half of the clothes from the collar to below the picture; the right half mirrors it.
    left = np.array(
        [[-collar * 1.1, 0.34], [-1.1, 0.52], [-shoulder, 0.95], [-shoulder - 0.25, 3.5]],
        np.float32,
    )
    dip = np.array([[-0.3, 0.34 + 0.6 * collar], [0.3, 0.34 + 0.6 * collar]], np.float32)
    right = left[::-1] * offset(-1, 1)
    outline = np.concatenate([curve(left[::-1], steps=3), dip, curve(right[::-1], steps=3)])
    part.canvas.fill(neck + unit * outline, scene.clothes)
    edge = np.concatenate([left[:1], dip, right[-1:]])
    part.canvas.ribbon(
        neck + unit * curve(edge, steps=3), 0.06 * unit, mix(scene.clothes, _BLACK, 0.25)
    )


def _draw_head(part: _Part, skin: Canvas) -> None:
    points, person, unit, roll = part.points, part.person, part.unit, part.points.view.roll
    covered = person.hair_style in ("long", "wavy", "curly")
    for name in ("ear_left", "ear_right"):
        if not covered:
            rim, shell = mix(person.skin, (90, 30, 20), 0.1), mix(person.skin, (90, 30, 20), 0.3)
            part.canvas.ellipse(points[name], 0.16 * unit, 0.29 * unit, roll, rim)
            part.canvas.ellipse(points[name], 0.08 * unit, 0.17 * unit, roll, shell)
            skin.ellipse(points[name], 0.16 * unit, 0.29 * unit, roll, 255)
        if person.earrings:
            drop = points[name] + offset(0, 0.36 * unit)
            part.canvas.ellipse(drop, 0.06 * unit, 0.075 * unit, 0.0, (232, 200, 96))
    sides = ("cheek_left", "cheek_right", "temple_left", "temple_right")
    front = [points[name] for name in (*sides, "forehead_left", "forehead", "forehead_right")]
    skull = hair.skull_arc(points, person, 1.0)
    outline = convex_hull(np.concatenate([points.landmarks[:17], front, skull]))
    part.canvas.fill(outline, person.skin)
    skin.fill(outline, 255)


def _draw_nose(part: _Part) -> None:
    face, unit, skin = part.points.landmarks, part.unit, part.person.skin
    dark = mix(skin, (70, 20, 10), 0.42)
    for wing, next_to, toward in ((31, 32, -1.0), (35, 34, 1.0)):
        top = face[wing] + offset(0.01 * toward * unit, -0.14 * unit)
        side = face[wing] + offset(0.045 * toward * unit, -0.03 * unit)
        low = 0.6 * face[wing] + 0.4 * face[next_to] + offset(0, 0.035 * unit)
        part.canvas.ribbon(curve(np.stack([top, side, low])), 0.035 * unit, dark)
        hole = 0.35 * face[wing] + 0.65 * face[next_to]
        part.canvas.ellipse(
            hole, 0.058 * unit, 0.030 * unit, part.points.view.roll, mix(skin, (45, 12, 10), 0.72)
        )
    part.canvas.ribbon(curve(face[32:35]), 0.022 * unit, dark)


def _draw_eye(part: _Part, eye: int, gaze: tuple[float, float]) -> None:
    face, unit, person, canvas = part.points.landmarks, part.unit, part.person, part.canvas
    first = 36 + 6 * eye
    upper = curve(face[first : first + 4], steps=5)
    lower = curve(face[[first, first + 5, first + 4, first + 3]], steps=5)
    opening = float((lower[:, 1] - upper[:, 1]).mean()) / unit
    lash = mix(person.skin, (18, 12, 12), 0.88 if person.gender == 1 or person.makeup else 0.78)
    crease = upper + offset(0, -0.055 * unit)
    if person.makeup:
        shadow = mix(person.skin, (96, 62, 84), 0.22 + 0.25 * person.makeup)
        canvas.fill(np.concatenate([crease + offset(0, -0.03 * unit), upper[::-1]]), shadow)
    canvas.ribbon(crease[2:-1], 0.028 * unit, mix(person.skin, (70, 25, 15), 0.42))
    if opening > 0.025:
        canvas.fill(np.concatenate([upper, lower[::-1]]), (240, 238, 235))
        # The iris keeps its place while the lids move: a raised lid shows the white above it.
        middle = 0.5 * (face[first] + face[first + 3]) + offset(
            gaze[0] * unit, (gaze[1] - 0.022) * unit
        )
        radius = 0.112 * unit * person.eye_size
        for share, colour in (
            (1.0, mix(person.iris, _BLACK, 0.45)),
            (0.84, person.iris),
            (0.45, (10, 8, 8)),
        ):
            canvas.fill(
                _between_curves(middle, share * radius, share * radius, upper, lower), colour
            )
        under_lid = upper + offset(0, 0.028 * unit)
        under_lid[:, 1] = np.minimum(under_lid[:, 1], lower[:, 1])
        canvas.blend(np.concatenate([upper, under_lid[::-1]]), (60, 40, 40), 0.45)
        glint = middle + offset(-0.04 * unit, -0.035 * unit)
        if glint[1] > np.interp(glint[0], upper[:, 0], upper[:, 1]) + 0.03 * unit:
            canvas.ellipse(glint, 0.027 * unit, 0.027 * unit, 0.0, (250, 250, 250))
    canvas.ribbon(lower[:-1], 0.020 * unit, mix(person.skin, (90, 30, 25), 0.5))
    canvas.ribbon(upper, (0.046 + 0.02 * person.makeup) * unit, lash)


def _between_curves(
    centre: np.ndarray, width: float, height: float, upper: np.ndarray, lower: np.ndarray
) -> np.ndarray:
    """Returns an ellipse pushed between two curves that run left to right, float32 [24, 2]."""
    shape = _DISC * offset(width, height) + centre
    shape[:, 0] = np.clip(shape[:, 0], upper[0, 0], upper[-1, 0])
    top = np.interp(shape[:, 0], upper[:, 0], upper[:, 1])
    bottom = np.maximum(top, np.interp(shape[:, 0], lower[:, 0], lower[:, 1]))
    shape[:, 1] = np.clip(shape[:, 1], top, bottom)
    return shape


def _draw_brow(part: _Part, side: int) -> None:
    face, unit, person = part.points.landmarks, part.unit, part.person
    path = curve(face[17:22] if side == 0 else face[26:21:-1], steps=4)  # outer end to inner end
    t = np.linspace(0, 1, len(path))
    width = (
        unit
        * person.brow_thickness
        * (0.035 + 0.085 * np.minimum(1.6 * t, 1))
        * (1 - 2.5 * np.maximum(t - 0.9, 0))
    )
    part.canvas.ribbon(path, width, mix(person.brow, person.skin, 0.12))
    part.canvas.ribbon(path[2:-1], 0.55 * width[2:-1], person.brow)


def _draw_mouth(part: _Part) -> None:
    face, unit, person, canvas = part.points.landmarks, part.unit, part.person, part.canvas
    outer_upper, outer_lower = (
        curve(face[48:55], steps=4),
        curve(face[[48, 59, 58, 57, 56, 55, 54]], steps=4),
    )
    inner_upper, inner_lower = (
        curve(face[60:65], steps=4),
        curve(face[[60, 67, 66, 65, 64]], steps=4),
    )
    gap = float((inner_lower[:, 1] - inner_upper[:, 1]).max()) / unit
    opened = gap > 0.035
    if opened:
        canvas.fill(np.concatenate([inner_upper, inner_lower[::-1]]), (62, 18, 22))
        _draw_inside_of_mouth(part, inner_upper, inner_lower, gap)
    canvas.fill(
        np.concatenate([outer_upper, inner_upper[::-1]]), mix(person.lip, (60, 10, 20), 0.14)
    )
    canvas.fill(np.concatenate([outer_lower, inner_lower[::-1]]), person.lip)
    shine = 0.55 * outer_lower[8:17] + 0.45 * inner_lower[4:13]
    canvas.ribbon(
        shine, 0.03 * unit, mix(person.lip, (255, 240, 240), 0.30 if person.lipstick else 0.16)
    )
    seam = mix(person.lip, (35, 8, 10), 0.72)
    if opened:
        canvas.ribbon(inner_upper, 0.02 * unit, seam)
    else:
        canvas.ribbon(0.5 * (inner_upper + inner_lower), 0.036 * unit, seam)
    for corner in (48, 54):
        canvas.ellipse(
            face[corner], 0.032 * unit, 0.026 * unit, 0.0, mix(person.skin, (60, 15, 12), 0.55)
        )


def _draw_inside_of_mouth(part: _Part, upper: np.ndarray, lower: np.ndarray, gap: float) -> None:
    """Draws tongue and teeth; smiles show upper teeth, a depressed lower lip lower ones."""
    unit, units, canvas = part.unit, part.units, part.canvas
    if gap > 0.2:
        tongue = part.points.landmarks[65:68].mean(0) - offset(0, 0.02 * unit)
        canvas.fill(_between_curves(tongue, 0.2 * unit, 0.085 * unit, upper, lower), (168, 74, 78))
    height = lower[:, 1] - upper[:, 1]
    shown = 0.04 + 0.10 * float(units[AU[12]]) + 0.06 * float(units[AU[9]] + units[AU[20]])
    edge = upper.copy()
    edge[:, 1] += np.minimum(shown * unit, 0.75 * height)
    canvas.fill(np.concatenate([upper, edge[::-1]]), (236, 230, 218))
    shown = 0.10 * float(units[AU[16]]) + 0.05 * float(units[AU[20]])
    if shown > 0.02:
        edge = lower.copy()
        edge[:, 1] -= np.minimum(shown * unit, 0.6 * height)
        canvas.fill(np.concatenate([lower, edge[::-1]]), (226, 219, 205))


def _draw_facial_hair(part: _Part) -> None:
    face, unit, person, canvas = part.points.landmarks, part.unit, part.person, part.canvas
    tone = mix(person.brow, person.hair, 0.5)
    tip = face[30]
    if person.beard:
        left, right = 0.55 * face[3] + 0.45 * face[48], 0.55 * face[13] + 0.45 * face[54]
        inner = np.stack([face[3], left, face[48], face[58], face[56], face[54], right, face[13]])
        inner[2:6, 1] += unit * np.array((0.03, 0.10, 0.10, 0.03), np.float32)
        outline = np.concatenate(
            [tip + (face[2:15] - tip) * np.float32(1.03), curve(inner[::-1], steps=3)]
        )
        canvas.blend(outline, tone, 0.55 + 0.4 * person.beard)
    if person.moustache:
        base = 0.45 * face[33] + 0.55 * face[51]
        left, right = 0.5 * (face[31] + face[49]), 0.5 * (face[35] + face[53])
        top = curve(np.stack([face[48], left, base, right, face[54]]), steps=4)
        canvas.blend(np.concatenate([top, face[53:48:-1]]), tone, 0.55 + 0.4 * person.moustache)
    if person.stubble:
        right, left = 0.5 * (face[13] + face[54]), 0.5 * (face[3] + face[48])
        lip_right, lip_left = 0.5 * (face[35] + face[53]), 0.5 * (face[31] + face[49])
        inner = np.stack([face[13], right, lip_right, face[33], lip_left, left, face[3]])
        canvas.blend(np.concatenate([face[2:15], inner]), tone, 0.30 * person.stubble)


def _draw_glasses(part: _Part, scene: Scene) -> None:
    kind = "sun" if scene.occlusion == "sunglasses" else part.person.glasses
    if kind == "none":
        return
    points, unit, canvas = part.points, part.unit, part.canvas
    face, view = points.landmarks, points.view
    frame = (120, 84, 44) if kind == "round" else (28, 26, 30)
    width, height, power = (0.31, 0.31, 2.0) if kind == "round" else (0.36, 0.27, 3.2)
    shape = (
        np.sign(_DISC)
        * np.abs(_DISC) ** np.float32(2 / power)
        * offset(width * np.cos(view.yaw), height)
    )
    cos, sin = np.cos(view.roll), np.sin(view.roll)
    shape = unit * shape @ np.array([[cos, sin], [-sin, cos]], np.float32)
    glass, share = ((20, 20, 24), 0.88) if kind == "sun" else ((225, 235, 245), 0.10)
    rims = [shape + face[first : first + 6].mean(0) + offset(0, 0.03 * unit) for first in (36, 42)]
    for rim in rims:
        canvas.blend(rim, glass, share)
        canvas.ribbon(np.concatenate([rim, rim[:1]]), 0.045 * unit, frame)
    right_edge, left_edge = 0, len(_DISC) // 2
    canvas.ribbon(np.stack([rims[0][right_edge], rims[1][left_edge]]), 0.045 * unit, frame)
    canvas.ribbon(np.stack([rims[0][left_edge], points["ear_left"]]), 0.04 * unit, frame)
    canvas.ribbon(np.stack([rims[1][right_edge], points["ear_right"]]), 0.04 * unit, frame)
