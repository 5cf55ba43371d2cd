"""MTCNN's search around its networks: pyramid, tiles, crops, boxes and their suppression.

Plain NumPy that follows facenet-pytorch's float32 arithmetic; the networks run on the devices, see
`mtcnn.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

CELL, STRIDE = 12, 2  # pixels that one output of P sees, and the step between two
TILE_CELLS = 32  # along a side of a tile
TILE = STRIDE * TILE_CELLS + CELL - STRIDE  # pixels that P sees of it
R_SIZE, O_SIZE = 24, 48  # of the crops that R and O read

Overlap = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Level(NamedTuple):
    """One scale of the pyramid, in pixels."""

    scale: float
    height: int
    width: int


class Tiles(NamedTuple):
    """The tiles of a picture's whole pyramid."""

    pixels: Float32[np.ndarray, "k t t 3"]  # zeros beyond the level
    sizes: Int32[np.ndarray, "k 2"]  # height and width of the level from the tile's corner on
    levels: Int32[np.ndarray, " k"]  # number of each tile's level
    corners: Int32[np.ndarray, "k 2"]  # row and column of its first cell


class Candidates(NamedTuple):
    """Boxes on their way through the networks, the most probable first."""

    boxes: Float32[np.ndarray, "k 4"]
    probability: Float32[np.ndarray, " k"]
    shifts: Float32[np.ndarray, "k 4"]

    def __getitem__(self, rows) -> "Candidates":
        return Candidates(*(x[rows] for x in tuple(self)))


def pyramid(height: int, width: int, *, min_face: float, factor: float) -> list[Level]:
    """The scales at which a picture is searched; none if its shorter side is below `min_face`."""
    scale = CELL / min_face
    side = min(height, width) * scale
    levels = []
    while side >= CELL:
        levels.append(Level(scale, int(height * scale + 1), int(width * scale + 1)))
        scale *= factor
        side *= factor
    return levels


def integral_image(picture: UInt8[np.ndarray, "h w c"]) -> Int32[np.ndarray, "h+1 w+1 c"]:
    """Sums over all pixels above and to the left, with a row and a column of zeros before them."""
    height, width, channels = picture.shape
    sums = np.zeros((height + 1, width + 1, channels), np.int32)
    np.cumsum(picture, axis=0, dtype=np.int32, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return sums


def area_resize(
    integral: Int32[np.ndarray, "h w c"], crops: Int[np.ndarray, "k 4"], size: tuple[int, int]
) -> Float32[np.ndarray, "k y x c"]:
    """PyTorch's `interpolate(mode="area")` of rectangles, as P, R and O read it.

    Args:
        integral: integral image of the picture.
        crops: first row, rows, first column, columns of each rectangle.
        size: height and width of the result.
    """
    top, bottom = _bins(crops[:, 0], crops[:, 1], size[0])
    left, right = _bins(crops[:, 2], crops[:, 3], size[1])
    width, flat = integral.shape[1], integral.reshape(-1, integral.shape[2])

    def corner(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return flat.take(rows[:, :, None] * width + columns[:, None], axis=0)  # [K, y, x, C]

    sums = corner(bottom, right)
    sums -= corner(top, right)
    sums -= corner(bottom, left)
    sums += corner(top, left)
    means = sums.astype(np.float32)
    means /= (bottom - top).astype(np.float32)[:, :, None, None]
    means /= (right - left).astype(np.float32)[:, None, :, None]
    means -= np.float32(127.5)
    means *= np.float32(0.0078125)
    return means


def _bins(start: np.ndarray, extent: np.ndarray, out: int) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last source index of each output index: floor(i·n/o), ceil((i+1)·n/o)."""
    i = np.arange(out)
    start, extent = start[:, None], extent[:, None]
    return start + i * extent // out, start - (-(i + 1) * extent // out)


def cut_tiles(integral: Int32[np.ndarray, "h w 3"], levels: list[Level]) -> Tiles:
    """The pyramid in tiles of one size, which overlap so that each cell of P is in one of them."""
    whole = np.array([[0, integral.shape[0] - 1, 0, integral.shape[1] - 1]])
    pixels, sizes, numbers, corners = [], [], [], []
    for number, (_, height, width) in enumerate(levels):
        level = area_resize(integral, whole, (height, width))[0]
        for y in range(0, _cells(height), TILE_CELLS):
            for x in range(0, _cells(width), TILE_CELLS):
                top, left = STRIDE * y, STRIDE * x
                part = level[top : top + TILE, left : left + TILE]
                tile = np.zeros((TILE, TILE, 3), np.float32)
                tile[: part.shape[0], : part.shape[1]] = part
                pixels.append(tile)
                sizes.append(part.shape[:2])
                numbers.append(number)
                corners.append((y, x))
    return Tiles(
        np.array(pixels, np.float32).reshape(-1, TILE, TILE, 3),
        np.array(sizes, np.int32).reshape(-1, 2),
        np.array(numbers, np.int32),
        np.array(corners, np.int32).reshape(-1, 2),
    )


def _cells(side: int) -> int:
    """P's outputs along a side; its pooling keeps a last window that is cut off."""
    return (side - 1) // 2 - 4


def cell_edges(scale: float, cells: np.ndarray) -> np.ndarray:
    """First and last pixel of P's cells of one scale, along one axis; float32."""
    first = np.float32(STRIDE) * cells.astype(np.float32)
    return np.stack([np.floor((first + edge) / np.float32(scale)) for edge in (1, CELL)])


def propose(
    tiles: Tiles,
    levels: list[Level],
    probability: Float32[np.ndarray, "k y x"],
    shifts: Float32[np.ndarray, "k y x 4"],
    *,
    threshold: float,
    overlaps: tuple[float, float],
) -> Candidates:
    """P's proposals: suppressed within each scale, then across scales, and made square."""
    tile, y, x = np.nonzero(probability >= np.float32(threshold))
    score, moves = probability[tile, y, x], shifts[tile, y, x]
    y, x = y + tiles.corners[tile, 0], x + tiles.corners[tile, 1]
    kept = [Candidates(np.zeros((0, 4), np.float32), score[:0], moves[:0])]
    for number, level in enumerate(levels):
        (mine,) = np.nonzero(tiles.levels[tile] == number)
        # Equal ones keep the order of their cells, whatever tiles they came in.
        mine = mine[np.lexsort((x[mine], y[mine], -score[mine]))]
        (top, bottom), (left, right) = (cell_edges(level.scale, at[mine]) for at in (y, x))
        boxes = np.stack([left, top, right, bottom], axis=1)
        found = Candidates(boxes, score[mine], moves[mine])
        kept.append(found[keep_best(boxes, threshold=overlaps[0], overlap=over_union)])
    whole = best_first(Candidates(*map(np.concatenate, zip(*kept, strict=True))))
    whole = whole[keep_best(whole.boxes, threshold=overlaps[1], overlap=over_union)]
    return whole._replace(boxes=square(shift(whole.boxes, whole.shifts, 0)))


def best_first(candidates: Candidates) -> Candidates:
    """Sorted by probability; equal ones keep their order."""
    return candidates[np.argsort(-candidates.probability, kind="stable")]


def keep_best(
    boxes: Float32[np.ndarray, "k 4"], *, threshold: float, overlap: Overlap
) -> Int[np.ndarray, " n"]:
    """Greedy non-maximum suppression of boxes sorted best first; returns what is kept."""
    left, kept = np.arange(len(boxes)), []
    while len(left):
        kept.append(left[0])
        over = overlap(boxes[left[0]], boxes[left[1:]]) > np.float32(threshold)
        left = left[1:][~over]
    return np.array(kept, np.intp)


def over_union(box: Float32[np.ndarray, "4"], boxes: Float32[np.ndarray, "k 4"]) -> np.ndarray:
    """Intersection over union."""
    shared = _shared(box, boxes, 0)
    return shared / (area(box, 0) + area(boxes, 0) - shared)


def over_smaller(box: Float32[np.ndarray, "4"], boxes: Float32[np.ndarray, "k 4"]) -> np.ndarray:
    """Intersection over the smaller of the two; a box of one pixel has side 1 here."""
    return _shared(box, boxes, 1) / np.minimum(area(box, 1), area(boxes, 1))


def _shared(box: np.ndarray, boxes: np.ndarray, pixel: int) -> np.ndarray:
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    sides = np.maximum(sides + np.float32(pixel), 0)
    return sides[:, 0] * sides[:, 1]


def area(boxes: Float32[np.ndarray, "... 4"], pixel: int) -> Float32[np.ndarray, "..."]:
    sides = boxes[..., 2:] - boxes[..., :2] + np.float32(pixel)
    return sides[..., 0] * sides[..., 1]


def shift(boxes: np.ndarray, shifts: np.ndarray, pixel: int) -> Float32[np.ndarray, "k 4"]:
    """Moves the corners by shares of the sides."""
    sides = boxes[:, 2:] - boxes[:, :2] + np.float32(pixel)
    return boxes + shifts * np.tile(sides, 2)


def square(boxes: Float32[np.ndarray, "k 4"]) -> Float32[np.ndarray, "k 4"]:
    """Squares of the longer side around the same centre."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True, initial=0)
    corner = boxes[:, :2] + sides * np.float32(0.5) - longest * np.float32(0.5)
    return np.concatenate([corner, corner + longest], axis=1)


def trunc_crops(
    boxes: Float32[np.ndarray, "k 4"], *, height: int, width: int
) -> tuple[Int[np.ndarray, "k 4"], Bool[np.ndarray, " k"]]:
    """The pixels under boxes, cut at the picture's edge: first row, rows, first column, columns.

    Coordinates are 1-based and the last pixel belongs to the box. Returns also which boxes have a
    pixel at all.
    """
    whole = np.trunc(boxes).astype(np.int64)
    x1, y1 = np.maximum(whole[:, :2], 1).T
    x2, y2 = np.minimum(whole[:, 2:], [width, height]).T
    columns, rows = x2 - x1 + 1, y2 - y1 + 1
    return np.stack([y1 - 1, rows, x1 - 1, columns], axis=1), (columns > 0) & (rows > 0)
