"""From a person, action units and a head pose to points in the picture.

Face units: 1 is half the width of an average face, the origin lies between the eyes; x to the
image's right, y down, z to the viewer. The 68 points follow the iBUG order (FaceXFormer's): 0-16
jaw from image-left to image-right, 17-26 brows, 27-35 nose, 36-47 eyes, 48-59 outer and 60-67
inner lips. Projection is a weak perspective. Picture coordinates are pixels with integer values
at pixel centres.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from emollama_jax.data.action_units import AU
from emollama_jax.tiny.actionfaces.expressions import DISPLACEMENTS
from emollama_jax.tiny.actionfaces.identity import Identity

_PERSPECTIVE = 0.06

# Image-left half of the mean face; the other half is its mirror image.
_JAW = [
    (-1.00, -0.02, -0.45), (-0.99, 0.25, -0.43), (-0.955, 0.52, -0.40), (-0.895, 0.78, -0.34),
    (-0.79, 1.01, -0.24), (-0.63, 1.20, -0.10), (-0.44, 1.345, 0.06), (-0.23, 1.435, 0.18),
]  # fmt: skip
_BROW = [
    (-0.84, -0.27, 0.12),
    (-0.70, -0.375, 0.27),
    (-0.53, -0.405, 0.38),
    (-0.355, -0.38, 0.45),
    (-0.19, -0.325, 0.5),
]
_EYE = [
    (-0.635, 0.015, 0.22), (-0.52, -0.085, 0.34), (-0.365, -0.09, 0.38), (-0.235, 0.035, 0.34),
    (-0.36, 0.10, 0.37), (-0.51, 0.095, 0.33),
]  # fmt: skip
_BRIDGE = [(0, -0.06, 0.52), (0, 0.14, 0.62), (0, 0.32, 0.73), (0, 0.50, 0.84)]
_NOSTRIL = [(-0.215, 0.585, 0.50), (-0.11, 0.635, 0.58), (0, 0.66, 0.63)]
_OUTER = [(-0.40, 0.985, 0.36), (-0.25, 0.905, 0.48), (-0.09, 0.865, 0.56), (0, 0.885, 0.58)]
_OUTER_LOW = [(0, 1.135, 0.55), (-0.11, 1.125, 0.53), (-0.26, 1.075, 0.46)]
_INNER = [(-0.34, 0.985, 0.40), (-0.13, 0.975, 0.52), (0, 0.985, 0.54)]
_INNER_LOW = [(0, 0.995, 0.53), (-0.13, 0.99, 0.51)]


def _flip(points: list) -> list:
    return [(-x, y, z) for x, y, z in reversed(points)]


def _mean_face() -> np.ndarray:
    jaw = [*_JAW, (0, 1.465, 0.22), *_flip(_JAW)]
    x_eye = [(-x, y, z) for x, y, z in _EYE]
    right_eye = [x_eye[i] for i in (3, 2, 1, 0, 5, 4)]
    outer = [*_OUTER, *_flip(_OUTER[:3]), *_flip(_OUTER_LOW[1:]), *_OUTER_LOW]
    inner = [*_INNER, *_flip(_INNER[:2]), *_flip(_INNER_LOW[1:]), *_INNER_LOW]
    nostril = [*_NOSTRIL, *_flip(_NOSTRIL[:2])]
    points = [*jaw, *_BROW, *_flip(_BROW), *_BRIDGE, *nostril, *_EYE, *right_eye, *outer, *inner]
    return np.array(points, np.float32)


MEAN_FACE = _mean_face()

# Extra points that carry the outline, the hairline and the folds; rows are named in EXTRA.
_EXTRA = {
    "cheek_left": (-0.90, 0.32, -0.02),
    "cheek_right": (0.90, 0.32, -0.02),
    "temple_left": (-0.97, -0.35, -0.22),
    "temple_right": (0.97, -0.35, -0.22),
    "forehead_left": (-0.70, -0.86, 0.22),
    "forehead": (0.0, -0.99, 0.42),
    "forehead_right": (0.70, -0.86, 0.22),
    "box_top": (0.0, -0.78, 0.45),
    "glabella": (0.0, -0.28, 0.52),
    "skull": (0.0, -0.33, -0.35),
    "ear_left": (-1.03, 0.14, -0.52),
    "ear_right": (1.03, 0.14, -0.52),
    "neck": (0.0, 1.35, -0.40),
    "middle": (0.0, 0.20, 0.10),
    "apple_left": (-0.56, 0.46, 0.36),
    "apple_right": (0.56, 0.46, 0.36),
}
EXTRA = {name: row for row, name in enumerate(_EXTRA)}
_EXTRA_POINTS = np.array(list(_EXTRA.values()), np.float32)

_LEFT_EYE, _RIGHT_EYE = np.arange(36, 42), np.arange(42, 48)
_UPPER_LIDS, _LOWER_LIDS = np.array([37, 38, 43, 44]), np.array([41, 40, 47, 46])
_UPPER_LIP, _LOWER_LIP = np.array([61, 62, 63]), np.array([67, 66, 65])
_OUTER_OF_UPPER, _OUTER_OF_LOWER = np.array([50, 51, 52]), np.array([58, 57, 56])


@dataclass(frozen=True)
class View:
    """Where the head is: rotation in radians, scale in pixels per face unit, centre in pixels."""

    pitch: float
    yaw: float
    roll: float
    scale: float
    centre: tuple[float, float]


@dataclass(frozen=True)
class FacePoints:
    """A face in the picture: landmarks float32 [68, 2], extra points float32 [E, 2], view."""

    landmarks: np.ndarray
    extra: np.ndarray
    view: View

    def __getitem__(self, name: str) -> np.ndarray:
        return self.extra[EXTRA[name]]


@lru_cache(maxsize=64)  # a clip's frames show one person
def resting_face(person: Identity) -> tuple[np.ndarray, np.ndarray]:
    """Shapes the mean face into this person's resting face.

    Returns:
        Landmarks float32 [68, 3] and extra points float32 [E, 3] in face units, read-only.
    """
    face, extra = MEAN_FACE.copy(), _EXTRA_POINTS.copy()
    side = np.sign(face[:, 0])

    for eye, direction in ((_LEFT_EYE, -1.0), (_RIGHT_EYE, 1.0)):
        centre = face[eye].mean(0)
        offset = face[eye] - centre
        offset[:, 0] *= person.eye_size
        offset[:, 1] *= person.eye_size * person.eye_height
        offset[:, 1] -= person.eye_tilt * direction * offset[:, 0] / 0.2
        face[eye] = centre + offset
        face[eye, 0] += direction * 0.42 * (person.eye_spacing - 1)
    lid = person.rest_lid
    gap = face[_LOWER_LIDS, 1] - face[_UPPER_LIDS, 1]
    face[_UPPER_LIDS, 1] += lid * gap

    brows = slice(17, 27)
    arch = np.array([0, 0.8, 1.0, 0.5, 0])
    face[brows, 1] += (
        person.rest_brow
        - person.brow_height
        - person.brow_arch * np.concatenate([arch, arch[::-1]])
    )
    face[[20, 21, 22, 23], 1] += 0.3 * person.rest_brow

    face[28:36, 1] = 0.1 + (face[28:36, 1] - 0.1) * person.nose_length
    face[31:36, 0] *= person.nose_width
    mouth = slice(48, 68)
    face[mouth, 0] *= person.mouth_width
    line = 0.985
    lips = np.arange(48, 60)
    face[lips, 1] = line + (face[lips, 1] - line) * person.lip_fullness
    face[[48, 54, 60, 64], 1] = line
    face[mouth, 1] += person.mouth_height + 0.3 * (person.nose_length - 1)
    corner = person.rest_corner
    face[[48, 54, 60, 64], 1] += corner
    face[[49, 53, 55, 59], 1] += 0.4 * corner
    face[[61, 63, 65, 67], 1] += 0.15 * corner

    jaw = np.arange(17)
    low = np.clip((face[jaw, 1] - 0.2) / 0.9, 0, 1)
    face[jaw, 0] *= 1 + (person.jaw_width - 1) * low + 0.05 * (person.cheek_fullness - 0.5) * low
    face[jaw, 1] += 0.36 * (person.chin_length - 1) * np.clip((face[jaw, 1] - 0.9) / 0.56, 0, 1)
    sag = 0.035 * person.wrinkles
    face[[4, 5, 11, 12], 0] += sag * side[[4, 5, 11, 12]]

    for points in (face, extra):
        points[:, 0] *= person.face_width
        points[:, 1] *= person.face_length
        points.setflags(write=False)
    return face, extra


def apply_action_units(face: np.ndarray, units: np.ndarray, asymmetry: np.ndarray) -> np.ndarray:
    """Moves a resting face's points by action units.

    Args:
        face: float32 [68, 3] of `resting_face`.
        units: float32 [K] intensities 0..1.
        asymmetry: float32 [K] a; image-left points move 1 + a, others 1 - a times as far.

    Returns:
        float32 [68, 3].
    """
    side = np.sign(MEAN_FACE[:, 0])
    weights = units[:, None] * (1 - asymmetry[:, None] * side[None, :])  # [K, 68]
    moved = face + np.einsum("kp,kpc->pc", weights, DISPLACEMENTS)
    gap = np.maximum(moved[_LOWER_LIDS, 1] - moved[_UPPER_LIDS, 1], 0.012)
    middle = moved[_UPPER_LIDS, 1] + 0.8 * gap
    blink = float(np.clip(units[AU[45]], 0, 1))
    moved[_UPPER_LIDS, 1] = middle - (1 - blink) * 0.8 * gap - blink * 0.006
    moved[_LOWER_LIDS, 1] = middle + (1 - 0.7 * blink) * 0.2 * gap + blink * 0.006
    # Lips cannot pass through each other: inner lips meet, outer lips stay outside of them.
    overlap = np.maximum(moved[_UPPER_LIP, 1] + 0.004 - moved[_LOWER_LIP, 1], 0)
    moved[_UPPER_LIP, 1] -= 0.5 * overlap
    moved[_LOWER_LIP, 1] += 0.5 * overlap
    moved[_OUTER_OF_UPPER, 1] = np.minimum(moved[_OUTER_OF_UPPER, 1], moved[_UPPER_LIP, 1] - 0.035)
    moved[_OUTER_OF_LOWER, 1] = np.maximum(moved[_OUTER_OF_LOWER, 1], moved[_LOWER_LIP, 1] + 0.05)
    return moved


def rotation(view: View) -> np.ndarray:
    """Returns the head's rotation, float32 [3, 3]: roll · pitch · yaw.

    Positive pitch looks down, positive yaw to the image's right, positive roll tilts clockwise.
    """
    cp, sp = np.cos(view.pitch), np.sin(view.pitch)
    cy, sy = np.cos(view.yaw), np.sin(view.yaw)
    cr, sr = np.cos(view.roll), np.sin(view.roll)
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (roll @ pitch @ yaw).astype(np.float32)


def project(points: np.ndarray, view: View) -> np.ndarray:
    """Projects points float32 [N, 3] in face units to pixels float32 [N, 2]."""
    pivot = np.array([0, 0.35, 0], np.float32)
    turned = (points - pivot) @ rotation(view).T
    depth = 1 + _PERSPECTIVE * turned[:, 2:3]
    return (turned[:, :2] * depth * view.scale + np.array(view.centre)).astype(np.float32)


def place(person: Identity, units: np.ndarray, asymmetry: np.ndarray, view: View) -> FacePoints:
    """Returns this person's face with these action units, seen in this view."""
    face, extra = resting_face(person)
    face = apply_action_units(face, units, asymmetry)
    points = project(np.concatenate([face, extra]), view)
    return FacePoints(points[:68], points[68:], view)


def face_box(points: FacePoints) -> np.ndarray:
    """Returns the box a face detector would give, float32 [4] = x1, y1, x2, y2 in pixels.

    Like MTCNN's it reaches from the lower forehead to the chin and from cheek to cheek.
    """
    outline = np.concatenate([points.landmarks, points["box_top"][None]])
    low, high = outline.min(0), outline.max(0)
    inset = 0.03 * (high[0] - low[0])
    return np.array([low[0] + inset, low[1], high[0] - inset, high[1]], np.float32)


@lru_cache(maxsize=256)
def _spline(count: int, steps: int, closed: bool) -> np.ndarray:
    """Returns the Catmull-Rom matrix float32 [samples, count] from control points to the curve."""
    t = np.arange(steps) / steps
    basis = 0.5 * np.stack(
        [-(t**3) + 2 * t**2 - t, 3 * t**3 - 5 * t**2 + 2, -3 * t**3 + 4 * t**2 + t, t**3 - t**2],
        axis=1,
    )
    segments = count if closed else count - 1
    matrix = np.zeros((segments * steps + (not closed), count))
    for segment in range(segments):
        for corner in range(4):
            point = segment + corner - 1
            point = point % count if closed else min(max(point, 0), count - 1)
            matrix[segment * steps : (segment + 1) * steps, point] += basis[:, corner]
    if not closed:
        matrix[-1, -1] = 1.0
    return matrix.astype(np.float32)


def curve(points: np.ndarray, *, steps: int = 5) -> np.ndarray:
    """Returns a smooth open curve through the points, float32 [(N-1)·steps + 1, 2]."""
    return _spline(len(points), steps, False) @ points


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Returns the convex hull of points float32 [N, 2], in order (monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))

    def half(sequence: list) -> list:
        chain: list = []
        for x, y in sequence:
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2], chain[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        return chain[:-1]

    return np.array(half(ordered) + half(ordered[::-1]), np.float32)
