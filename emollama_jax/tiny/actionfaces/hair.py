"""Hair: what lies behind the head and what lies on it."""

import numpy as np

from emollama_jax.tiny.actionfaces.canvas import Canvas, mix
from emollama_jax.tiny.actionfaces.geometry import FacePoints, curve, project
from emollama_jax.tiny.actionfaces.identity import Identity

# Image-left to image-right hairlines in face units, per family of styles.
_HAIRLINES = {
    "plain": [
        (-1.0, 0.02, -0.32), (-0.96, -0.36, -0.05), (-0.80, -0.70, 0.18),
        (-0.42, -0.88, 0.38), (0, -0.93, 0.44), (0.42, -0.88, 0.38),
        (0.80, -0.70, 0.18), (0.96, -0.36, -0.05), (1.0, 0.02, -0.32),
    ],
    "side": [
        (-1.0, 0.02, -0.32), (-0.95, -0.30, -0.05), (-0.78, -0.56, 0.20),
        (-0.40, -0.66, 0.42), (0.05, -0.78, 0.46), (0.42, -0.95, 0.38),
        (0.80, -0.74, 0.18), (0.96, -0.36, -0.05), (1.0, 0.02, -0.32),
    ],
    "fringe": [
        (-1.0, 0.05, -0.32), (-0.95, -0.25, -0.02), (-0.82, -0.52, 0.20),
        (-0.42, -0.60, 0.45), (0, -0.57, 0.50), (0.42, -0.61, 0.45),
        (0.82, -0.52, 0.20), (0.95, -0.25, -0.02), (1.0, 0.05, -0.32),
    ],
    "middle": [
        (-1.04, 0.35, -0.25), (-0.97, -0.18, 0.0), (-0.84, -0.55, 0.20),
        (-0.40, -0.86, 0.40), (0, -1.02, 0.40), (0.40, -0.86, 0.40),
        (0.84, -0.55, 0.20), (0.97, -0.18, 0.0), (1.04, 0.35, -0.25),
    ],
}  # fmt: skip
_FAMILY = {
    "buzz": "plain",
    "short": "plain",
    "side_part": "side",
    "fringe": "fringe",
    "long": "middle",
    "wavy": "side",
    "curly": "plain",
    "bun": "plain",
}
_HAIRLINE_ARRAYS = {name: np.array(points, np.float32) for name, points in _HAIRLINES.items()}


def skull_arc(points: FacePoints, person: Identity, volume: float) -> np.ndarray:
    """Returns the skull's outline from left ear over crown to right ear, float32 [17, 2]."""
    angle = np.linspace(np.pi * 1.06, -np.pi * 0.06, 17)
    offset = np.stack(
        [1.0 * volume * person.face_width * np.cos(angle), -1.1 * volume * np.sin(angle)], 1
    )
    return _around(points, "skull", offset)


def _around(points: FacePoints, name: str, offset: np.ndarray) -> np.ndarray:
    """Places offsets in face units around a point; they follow the head's roll but not its turn."""
    cos, sin = np.cos(points.view.roll), np.sin(points.view.roll)
    turned = offset @ np.array([[cos, sin], [-sin, cos]])
    return (points[name] + points.view.scale * turned).astype(np.float32)


def _bumpy(count: int, number: int, height: float) -> np.ndarray:
    phase = (number % 17) / 17 * 2 * np.pi
    wave = np.arange(count)
    return 1 + height * (np.sin(1.9 * wave + phase) + 0.6 * np.sin(3.1 * wave + 2 * phase))


def draw_behind(canvas: Canvas, points: FacePoints, person: Identity) -> None:
    """Draws the hair that the head covers."""
    back = mix(person.hair, (0, 0, 0), 0.30)
    volume = 1.0 + person.hair_volume
    if person.hair_style in ("long", "wavy"):
        low = 1.75 + 0.5 * ((person.number * 7) % 10) / 10
        side = np.array(
            [
                (-0.78, -0.95),
                (-1.06, -0.3),
                (-1.14, 0.6),
                (-1.16, 1.2),
                (-1.05, low),
                (-0.6, low + 0.1),
            ],
            np.float32,
        )
        side[:, 0] *= volume
        if person.hair_style == "wavy":
            side[:, 0] *= _bumpy(len(side), person.number, 0.05)
        outline = np.concatenate([side[::-1], side * (-1, 1)])
        outline[:, 1] += 0.33
        canvas.fill(curve(_around(points, "skull", outline), steps=4), back)
    elif person.hair_style == "curly":
        angle = np.linspace(0, 2 * np.pi, 26, endpoint=False)
        radius = (1.12 + 1.5 * person.hair_volume) * _bumpy(26, person.number, 0.025)
        offset = np.stack([radius * np.cos(angle), -0.15 + 1.12 * radius * np.sin(angle)], 1)
        canvas.fill(curve(_around(points, "skull", offset), steps=2), back)
    elif person.hair_style == "bun":
        offset = np.array([[0.0, -1.28]])
        canvas.ellipse(
            _around(points, "skull", offset)[0], *(0.42 * points.view.scale,) * 2, 0.0, back
        )


def draw_front(canvas: Canvas, points: FacePoints, person: Identity) -> None:
    """Draws the hair on the head, with a few lighter and darker strands."""
    style = person.hair_style
    if style == "bald":
        return
    line = _HAIRLINE_ARRAYS[_FAMILY[style]].copy()
    if style in ("side_part", "wavy") and person.number % 2:
        line[:, 0] *= -1
        line = line[::-1]
    line[:, 0] *= person.face_width
    line[1:-1, 1] -= person.hairline * np.array((0.2, 0.8, 1.0, 0.7, 1.0, 0.8, 0.2))
    line[:, 1] *= person.face_length
    inner = project(line, points.view)
    volume = {"buzz": 1.02, "bun": 1.04, "curly": 1.10 + person.hair_volume}.get(
        style, 1.04 + person.hair_volume
    )
    outer = skull_arc(points, person, volume)
    if style not in ("buzz", "bun"):
        centre, height = points["skull"], 0.02 if style == "curly" else 0.009
        outer = (
            centre + (outer - centre) * _bumpy(len(outer), person.number, height)[:, None]
        ).astype(np.float32)
    outer, inner = curve(outer, steps=2), curve(inner, steps=4)
    share = 0.45 if style == "buzz" else 0.0
    tone = mix(person.hair, person.skin, share)
    canvas.fill(np.concatenate([outer, inner[::-1]]), tone)
    if style in ("buzz", "curly"):
        return
    count = len(inner)
    for strand in range(3, count - 3, 3):
        start = outer[int((0.25 + 0.5 * strand / count) * (len(outer) - 1))]
        end = inner[strand]
        middle = 0.5 * (start + end) + 0.08 * (end - points["skull"])
        light = (255, 250, 240) if strand % 2 else (0, 0, 0)
        path = curve(np.stack([start, middle, 0.94 * end + 0.06 * start]), steps=3)
        canvas.ribbon(path, 0.035 * points.view.scale, mix(tone, light, 0.13))
