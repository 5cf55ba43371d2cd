"""What MTCNN computes around its networks: pyramid sums, crops, boxes and their suppression.

Pure functions of static shapes that follow facenet-pytorch's arithmetic; see `mtcnn.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


def integral_image(picture: UInt8[Array, "h w c"]) -> Int[Array, "h+1 w+1 c"]:
    """Sums over all pixels above and to the left, with a row and a column of zeros before them."""

    def add(total, row):
        return total + row, total + row

    rows = jnp.pad(picture.astype(jnp.int32), ((1, 0), (1, 0), (0, 0)))
    down = jax.lax.scan(add, jnp.zeros_like(rows[0]), rows)[1]
    # Two scans over rows: on CPU half the time of `jnp.cumsum`.
    columns = down.swapaxes(0, 1)
    return jax.lax.scan(add, jnp.zeros_like(columns[0]), columns)[1].swapaxes(0, 1)


def area_resize(
    integral: Int[Array, "h w c"],
    rows: tuple[Array, Array],
    columns: tuple[Array, Array],
    *,
    height: int,
    width: int,
) -> Float[Array, "{height} {width} c"]:
    """PyTorch's `interpolate(mode="area")` of a rectangle, as P, R and O read it.

    Args:
        integral: of the picture.
        rows: the rectangle's first row and its number of rows, and how many rows it becomes; the
            result's rows beyond that repeat the last.
        columns: likewise.
        height: of the result, static.
        width: of the result, static.
    """
    top, bottom = _bins(*rows, height)
    left, right = _bins(*columns, width)
    strips = jnp.take(integral, bottom, 0, mode="clip") - jnp.take(integral, top, 0, mode="clip")
    sums = jnp.take(strips, right, 1, mode="clip") - jnp.take(strips, left, 1, mode="clip")
    means = sums.astype(jnp.float32) / (bottom - top)[:, None, None] / (right - left)[:, None]
    return (means - 127.5) * 0.0078125


def _bins(start: Array, extent: Array, out: Array, size: int) -> tuple[Array, Array]:
    """First and past-the-last source index of each output index: floor(i·n/o), ceil((i+1)·n/o)."""
    i = jnp.minimum(jnp.arange(size), out - 1)
    return start + i * extent // out, start + -(-(i + 1) * extent // out)


def keep_best(
    boxes: Float[Array, "k 4"],
    valid: Bool[Array, " k"],
    *,
    threshold: float,
    overlap: Callable[[Array, Array], Array],
) -> Bool[Array, " k"]:
    """Greedy non-maximum suppression of boxes that are sorted best first, the valid ones in front.

    Only the valid boxes are visited, one after the other, so a long list that is nearly empty
    costs little.
    """
    index = jnp.arange(len(boxes))

    def visit(i, keep):
        worse = (overlap(boxes[i], boxes) > threshold) & (index > i)
        return keep & ~(worse & keep[i])

    return jax.lax.fori_loop(0, valid.sum(), visit, valid)


def over_union(box: Float[Array, "4"], boxes: Float[Array, "k 4"]) -> Float[Array, " k"]:
    """Intersection over union."""
    shared = _shared(box, boxes, 0.0)
    return shared / (area(box, 0.0) + area(boxes, 0.0) - shared)


def over_smaller(box: Float[Array, "4"], boxes: Float[Array, "k 4"]) -> Float[Array, " k"]:
    """Intersection over the smaller of the two; a box of one pixel has side 1 here."""
    return _shared(box, boxes, 1.0) / jnp.minimum(area(box, 1.0), area(boxes, 1.0))


def _shared(box: Array, boxes: Array, pixel: float) -> Array:
    sides = jnp.minimum(box[2:], boxes[:, 2:]) - jnp.maximum(box[:2], boxes[:, :2]) + pixel
    sides = jnp.maximum(sides, 0)
    return sides[:, 0] * sides[:, 1]


def area(boxes: Array, pixel: float) -> Array:
    return (boxes[..., 2] - boxes[..., 0] + pixel) * (boxes[..., 3] - boxes[..., 1] + pixel)


def shift(boxes: Array, shift: Array, pixel: float) -> Array:
    """Moves the corners by shares of the sides."""
    sides = boxes[:, 2:] - boxes[:, :2] + pixel
    return boxes + shift * jnp.tile(sides, 2)


def square(boxes: Array) -> Array:
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + sides * 0.5 - longest * 0.5
    return jnp.concatenate([corner, corner + longest], axis=1)


def front(keep: Array, *rows: Array) -> tuple[Array, ...]:
    """Moves what is kept to the front, its order unchanged; returns the mask first."""
    order = jnp.argsort(~keep, stable=True)
    return tuple(x[order] for x in (keep, *rows))


def trunc_crops(
    boxes: Float[Array, "k 4"], *, height: Int[Array, ""], width: Int[Array, ""]
) -> tuple[Int[Array, "k 4"], Bool[Array, " k"]]:
    """The pixels under boxes, cut at the picture's edge: first row, rows, first column, columns.

    Coordinates are 1-based and the last pixel belongs to the box. A box without a pixel gets one
    pixel and False.
    """
    whole = jnp.trunc(boxes).astype(jnp.int32)
    x1, y1 = jnp.maximum(whole[:, :2], 1).T
    x2, y2 = jnp.minimum(whole[:, 2:], jnp.stack([width, height])).T
    columns, rows = x2 - x1 + 1, y2 - y1 + 1
    some = (columns > 0) & (rows > 0)
    crops = jnp.stack([y1 - 1, rows, x1 - 1, columns], axis=1)
    return jnp.where(some[:, None], crops, jnp.array([0, 1, 0, 1])), some
