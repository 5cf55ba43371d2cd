"""A Pillow picture drawn on in picture coordinates, at a multiple of its size.

Coordinates are pixels of the picture, integers at pixel centres."""

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, ...] | int

_ANGLE = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], 1).astype(np.float32)


def offset(x: float, y: float) -> np.ndarray:
    """Returns the vector float32 [2]."""
    return np.array((x, y), np.float32)


def mix(first: Colour, second: Colour, share: float) -> tuple[float, ...]:
    """Returns `first` with a share of `second` (0..1)."""
    return tuple((1 - share) * a + share * b for a, b in zip(first, second, strict=True))


def _ink(colour: Colour) -> int | tuple[int, ...]:
    return colour if isinstance(colour, int) else tuple(int(channel + 0.5) for channel in colour)


class Canvas:
    """Filled shapes and strokes on an image that is `factor` times as large as the picture."""

    def __init__(self, image: Image.Image, factor: int):
        self.image = image
        self.factor = factor
        self._pen = ImageDraw.Draw(image)

    def _flat(self, points: np.ndarray) -> list[float]:
        return (points * self.factor + 0.5 * (self.factor - 1)).ravel().tolist()

    def fill(self, points: np.ndarray, colour: Colour) -> None:
        """Fills the polygon float32 [N, 2]."""
        self._pen.polygon(self._flat(points), fill=_ink(colour))

    def blend(self, points: np.ndarray, colour: Colour, share: float) -> None:
        """Fills the polygon with a share (0..1) of a colour over what is there."""
        shape = points * self.factor + 0.5 * (self.factor - 1)
        low = np.maximum(np.floor(shape.min(0)).astype(int) - 1, 0)
        high = np.minimum(np.ceil(shape.max(0)).astype(int) + 2, self.image.size)
        if (high <= low).any():
            return
        mask = Image.new("L", tuple((high - low).tolist()), 0)
        ImageDraw.Draw(mask).polygon((shape - low).ravel().tolist(), fill=int(255 * share))
        self._pen.bitmap(tuple(low.tolist()), mask, fill=_ink(colour))

    def ribbon(self, path: np.ndarray, width: np.ndarray | float, colour: Colour) -> None:
        """Fills a band along a path float32 [N, 2]; `width` is pixels, one or [N]."""
        along = np.empty_like(path)
        along[1:-1] = path[2:] - path[:-2]
        along[0], along[-1] = path[1] - path[0], path[-1] - path[-2]
        scale = 0.5 * width / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)
        normal = along[:, ::-1] * scale[:, None]
        normal[:, 0] *= -1
        self.fill(np.concatenate([path + normal, (path - normal)[::-1]]), colour)

    def line(self, path: np.ndarray, width: float, colour: Colour) -> None:
        """Draws a plain line; for maps that are blurred afterwards."""
        self._pen.line(
            self._flat(path), fill=_ink(colour), width=max(1, round(width * self.factor))
        )

    def ellipse(
        self, centre: np.ndarray, width: float, height: float, roll: float, colour: Colour
    ) -> None:
        """Fills an ellipse with half axes `width`, `height` in pixels, turned by `roll` radians."""
        cos, sin = np.cos(roll), np.sin(roll)
        axes = np.array([[width * cos, width * sin], [-height * sin, height * cos]], np.float32)
        self.fill(_CIRCLE @ axes + centre, colour)
