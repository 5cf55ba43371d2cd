"""Pictures of the report as inline SVG: a curve over steps, faces with landmarks, filmstrips.

Drawn by hand: text stays text, colours follow the page's light or dark style (`report.css`), and
nothing is loaded from elsewhere.
"""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from emollama_jax.evaluate.metrics import Calibration

# iBUG's 68 points as lines: (first, last, closed).
_LINES = (
    (0, 16, False),  # jaw
    (17, 21, False),
    (22, 26, False),  # brows
    (27, 30, False),
    (31, 35, False),  # nose
    (36, 41, True),
    (42, 47, True),  # eyes
    (48, 59, True),
    (60, 67, True),  # mouth
)
_WIDTH, _HEIGHT = 1000, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 64, 24, 40


def curve(
    steps: Sequence[int], values: Sequence[float], *, label: str, marks: Sequence[tuple[int, str]]
) -> str:
    """A value over training steps: every step faintly, the running mean boldly.

    Args:
        steps: ascending.
        values: one a step, 0 or more; where one is not finite, the line has a gap.
        label: label of the values.
        marks: (step, text) of vertical lines, e.g. an interruption.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    finite = np.isfinite(y)
    if not finite.any():
        return f'<p class="note">{escape(label)}: no finite value in {len(steps)} steps.</p>'
    y_ticks = ticks(0.0, float(y[finite].max()))
    x_ticks = ticks(float(x[0]), float(x[-1]), count=8)
    low, high = x[0], max(x[-1], x[0] + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _RIGHT) * (step - low) / (high - low)
        return _LEFT + across, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / y_ticks[-1]

    def line(points: np.ndarray, style: str) -> str:
        path = "".join(
            f"{'L' if i and finite[i - 1] else 'M'}{px:.1f} {py:.1f}"
            for i, (px, py) in enumerate(map(at, x, points))
            if finite[i]
        )
        return f'<path class="{style}" d="{path}"/>'

    smooth = running_mean(y, finite, reach=max(1, len(y) // 60))
    parts = []
    for tick in y_ticks:
        px, py = at(low, tick)
        parts.append(f'<path class="grid" d="M{px} {py:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{px - 8}" y="{py + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        px, py = at(tick, 0)
        if low <= tick <= high:
            parts.append(f'<text x="{px:.1f}" y="{py + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_LEFT}" y="12">{escape(label)}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">optimizer step</text>'
    )
    parts += [_mark(at(step, 0)[0], text) for step, text in marks]
    parts += [line(y, "raw"), line(smooth, "smooth")]
    last = int(np.flatnonzero(finite)[-1])
    px, py = at(x[last], smooth[last])
    parts.append(f'<circle class="end" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>')
    parts.append(f'<text x="{px + 9:.1f}" y="{py + 4:.1f}">{smooth[last]:.3g}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _mark(x: float, text: str) -> str:
    """A vertical line with its text, which is to its left at the right edge."""
    right = x > _WIDTH * 0.75
    return (
        f'<path class="mark" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        f'<text class="marked" x="{x + (-7 if right else 7):.1f}" y="{_TOP + 12}" '
        f'text-anchor="{"end" if right else "start"}">{escape(text)}</text>'
    )


_SQUARE, _MARGIN = 360, 52  # pixels of the reliability diagram's plot and around it


def reliability(calibration: Calibration, *, alt: str) -> str:
    """Share of right answers over stated probability; the area of a dot is its bin's count.

    On the dashed diagonal a model is as often right as it says.
    """

    def at(x: float, y: float) -> tuple[float, float]:
        return _MARGIN + _SQUARE * x, 16 + _SQUARE * (1 - y)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(tick, tick)
        parts.append(f'<path class="grid" d="M{_MARGIN} {y:.1f}H{_MARGIN + _SQUARE}"/>')
        parts.append(f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_SQUARE + 34}" text-anchor="middle">{tick:g}</text>')
    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts.append(f'<path class="mark" d="M{x0} {y0}L{x1} {y1}"/>')
    filled = np.flatnonzero(calibration.count)
    points = [at(calibration.confidence[k], calibration.accuracy[k]) for k in filled]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts.append(f'<path class="smooth" d="M{path}"/>')
    for k, (x, y) in zip(filled, points, strict=True):
        radius = 3 + 11 * math.sqrt(calibration.count[k] / calibration.count.sum())
        parts.append(
            f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" opacity=".75">'
            f"<title>{calibration.count[k]:,} answers: stated "
            f"{calibration.confidence[k]:.2f}, right {calibration.accuracy[k]:.2f}</title></circle>"
        )
    parts.append(
        f'<text x="{_MARGIN + _SQUARE / 2}" y="{_SQUARE + 54}" text-anchor="middle">'
        "probability that the model gives its answer</text>"
    )
    parts.append(f'<text x="{_MARGIN - 40}" y="10">share of right answers</text>')
    return (
        f'<svg class="chart square" viewBox="0 0 {_SQUARE + 2 * _MARGIN} {_SQUARE + 60}" '
        f'role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    )


def running_mean(
    values: Float[np.ndarray, " n"], finite: Bool[np.ndarray, " n"], *, reach: int
) -> Float[np.ndarray, " n"]:
    """Mean of the finite values at most `reach` steps before or after; nan where there are none."""
    window = np.ones(2 * reach + 1)
    total = np.convolve(np.where(finite, values, 0), window)[reach : reach + len(values)]
    count = np.convolve(finite, window)[reach : reach + len(values)]
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers, at least two, that cover low … high."""
    rough = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]


def faces(
    frames: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    landmarks: Sequence[Float[np.ndarray, "68 2"] | None],
    *,
    alt: str,
    boxes: Sequence[Sequence[float]] = (),
) -> str:
    """Frames side by side with their landmarks.

    Args:
        frames: frames of one size.
        landmarks: landmarks of each frame, pixels with integers at pixel centres; None without a
            face.
        alt: alternative text of the picture.
        boxes: face boxes of a picture: left, top, right, bottom, pixels.
    """
    height, width = frames[0].shape[:2]
    gap = round(width / 24) if len(frames) > 1 else 0
    unit = width / 96  # line widths are those of a 96-pixel picture
    parts = []
    for n, (frame, points) in enumerate(zip(frames, landmarks, strict=True)):
        parts.append(f'<g transform="translate({n * (width + gap)} 0)">')
        parts.append(f'<image width="{width}" height="{height}" href="{jpeg(frame)}"/>')
        if points is not None:
            parts.append(_mesh(points, unit))
        for left, top, right, bottom in boxes:
            parts.append(
                f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                f'height="{bottom - top:.1f}" style="stroke-width:{unit:.2f}"/>'
            )
        parts.append("</g>")
    total = len(frames) * (width + gap) - gap
    return (
        f'<svg viewBox="0 0 {total} {height}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(parts)}</svg>"
    )


def _mesh(points: Float[np.ndarray, "68 2"], unit: float) -> str:
    path = ""
    for first, last, closed in _LINES:
        line = "L".join(f"{x + 0.5:.1f} {y + 0.5:.1f}" for x, y in points[first : last + 1])
        path += f"M{line}{'Z' if closed else ''}"
    style = f'style="stroke-width:{0.5 * unit:.2f}"'
    return f'<path class="mesh" {style} d="{path}"/>'


def jpeg(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
