"""MTCNN's search around its networks: pyramid, crops, boxes and their suppression.

Pure functions of static shapes that follow facenet-pytorch's arithmetic; see `mtcnn.py`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

Network = Callable[..., tuple[Array, ...]]

CELL, STRIDE = 12, 2  # pixels that one output of P sees, and the step between two
R_SIZE, O_SIZE = 24, 48  # of the crops that R and O read
R_CHUNK, O_CHUNK = 32, 8  # crops that pass R and O together
# Levels that pass P together: fewer programs to compile for a fifth more arithmetic.
GROUPS = (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, None))


class Capacity(NamedTuple):
    """Lengths of the candidate lists."""

    scale: int  # of P, in each scale
    proposals: int  # that R reads
    refined: int  # that O reads


class Rules(NamedTuple):
    """What the search compares with."""

    thresholds: Float[Array, "3"]  # probability after P, R, O
    overlaps: Float[Array, "4"]  # within a scale, across scales, after R, after O


class Found(NamedTuple):
    """What `search` gives: rows of a fixed length, the largest valid box first."""

    boxes: Float[Array, "k 4"]
    probability: Float[Array, " k"]
    landmarks: Float[Array, "k 5 2"]
    valid: Bool[Array, " k"]
    load: Int[Array, "3"]  # candidates that asked for a place in each list of `Capacity`


class Level(NamedTuple):
    """One scale of the pyramid, in pixels."""

    scale: float
    height: int
    width: int


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


def cell_edges(scale: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Where P's cells of one scale begin and end in the picture, along one axis; float32."""
    # On the host: XLA turns a division by a constant into a product, which may round across an
    # integer before the floor.
    first = STRIDE * np.arange(cells, dtype=np.float32)
    low, high = (np.floor((first + edge) / np.float32(scale)) for edge in (1, CELL))
    return low, high


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
    rows: tuple[Array, Array, Array],
    columns: tuple[Array, Array, Array],
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


def search(
    canvas: UInt8[Array, "h w 3"],
    *,
    networks: tuple[Network, Network, Network],
    size: Int[Array, "2"],
    sizes: Int[Array, "l 2"],
    rules: Rules,
    levels: Sequence[Level],
    capacity: Capacity,
) -> Found:
    """The whole search on one canvas.

    Args:
        canvas: the picture in its upper left corner.
        networks: P, R and O.
        size: height and width of the picture.
        sizes: height and width of the picture at each level; zeros for levels it does not have.
        rules: thresholds.
        levels: the pyramid of the canvas.
        capacity: lengths of the candidate lists.
    """
    pnet, rnet, onet = networks
    height, width = size
    integral = integral_image(canvas)
    boxes, valid, load = _propose(
        pnet, integral, size=size, sizes=sizes, rules=rules, levels=levels, capacity=capacity
    )

    crops, some = trunc_crops(boxes, height=height, width=width)
    valid, boxes, crops = front(valid & some, boxes, crops)
    probability, shifts = _read(rnet, integral, crops, valid.sum(), size=R_SIZE, chunk=R_CHUNK)
    score = jnp.where(valid & (probability > rules.thresholds[1]), probability, -1)
    order = jnp.argsort(-score, stable=True)
    score, boxes, shifts = score[order], boxes[order], shifts[order]
    valid = keep_best(boxes, score >= 0, threshold=rules.overlaps[2], overlap=over_union)
    boxes = square(shift(boxes, shifts, 1.0))

    crops, some = trunc_crops(boxes, height=height, width=width)
    valid, boxes, crops = front(valid & some, boxes, crops)
    load = jnp.stack([*load, valid.sum()])
    valid, boxes, crops = (x[: capacity.refined] for x in (valid, boxes, crops))
    outputs = _read(onet, integral, crops, valid.sum(), size=O_SIZE, chunk=O_CHUNK)
    return _finish(valid, boxes, *outputs, rules=rules, load=load)


def _propose(
    pnet: Network,
    integral: Int[Array, "h+1 w+1 3"],
    *,
    size: Int[Array, "2"],
    sizes: Int[Array, "l 2"],
    rules: Rules,
    levels: Sequence[Level],
    capacity: Capacity,
) -> tuple[Float[Array, "k 4"], Bool[Array, " k"], tuple[Int[Array, ""], Int[Array, ""]]]:
    """Squares that P proposes on all scales, which are valid, and the loads of the two lists."""
    (height, width), best = size, []
    for group in GROUPS:
        # A group is computed as a batch of its largest level's size. A level that the picture does
        # not have is read as one pixel and masked by P.
        if not levels[group]:
            continue
        first, outs = levels[group][0], jnp.maximum(sizes[group], 1)
        pixels = jax.vmap(
            lambda out, first=first: area_resize(
                integral,
                (jnp.int32(0), height, out[0]),
                (jnp.int32(0), width, out[1]),
                height=first.height,
                width=first.width,
            )
        )(outs)
        probability, shifts = pnet(pixels, sizes=sizes[group])
        columns = shifts.shape[2]
        edges = [cell_edges(level.scale, max(shifts.shape[1:3])) for level in levels[group]]
        low, high = (jnp.asarray(np.stack(x)) for x in zip(*edges, strict=True))

        def pick(probability, shifts, low, high, columns=columns):
            wanted = (probability >= rules.thresholds[0]).sum()
            probability, index = _best(probability, capacity.scale)
            y, x = index // columns, index % columns
            boxes = jnp.stack([low[x], low[y], high[x], high[y]], axis=1)
            return probability, boxes, shifts.reshape(-1, 4)[index], wanted

        best.append(jax.vmap(pick)(probability, shifts, low, high))
    probability, boxes, shifts, wanted = (
        jnp.concatenate(x)
        for x in zip(*best, strict=True)  # [L, K, …]
    )
    keep = jax.vmap(lambda b, v: keep_best(b, v, threshold=rules.overlaps[0], overlap=over_union))(
        boxes, probability >= rules.thresholds[0]
    )
    probability, index = _best(jnp.where(keep, probability, -1), capacity.proposals)
    boxes, shifts = boxes.reshape(-1, 4)[index], shifts.reshape(-1, 4)[index]
    valid = keep_best(boxes, probability >= 0, threshold=rules.overlaps[1], overlap=over_union)
    return square(shift(boxes, shifts, 0.0)), valid, (wanted.max(), keep.sum())


def _best(probability: Float[Array, "..."], count: int) -> tuple[Array, Array]:
    """The `count` largest, equal ones in their order, and where they are; -1 if there are fewer."""
    missing = max(count - probability.size, 0)
    padded = jnp.pad(probability.ravel(), (0, missing), constant_values=-1)
    best, index = jax.lax.top_k(padded, count)
    return best, jnp.minimum(index, probability.size - 1)


def _read(
    network: Network,
    integral: Int[Array, "h+1 w+1 3"],
    crops: Int[Array, "k 4"],
    count: Int[Array, ""],
    *,
    size: int,
    chunk: int,
) -> tuple[Array, ...]:
    """What R or O says of the first `count` crops, in chunks; zeros for the others."""

    def cut(crop: Array) -> Array:
        rows, columns = (crop[0], crop[1], size), (crop[2], crop[3], size)
        return area_resize(integral, rows, columns, height=size, width=size)

    def step(i: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        part = jax.lax.dynamic_slice_in_dim(crops, i * chunk, chunk)
        new = network(jax.vmap(cut)(part))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, x, i * chunk, 0)
            for whole, x in zip(outputs, new, strict=True)
        )

    length = len(crops)
    crops = jnp.pad(crops, ((0, -length % chunk), (0, 0)), constant_values=1)
    shapes = jax.eval_shape(network, jnp.zeros((len(crops), size, size, 3)))
    outputs = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
    outputs = jax.lax.fori_loop(0, -(-count // chunk), step, outputs)
    return tuple(x[:length] for x in outputs)


def _finish(
    valid: Bool[Array, " k"],
    boxes: Float[Array, "k 4"],
    probability: Float[Array, " k"],
    shifts: Float[Array, "k 4"],
    points: Float[Array, "k 10"],
    *,
    rules: Rules,
    load: Int[Array, "3"],
) -> Found:
    """What O leaves, sorted by area."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    points = points.reshape(-1, 2, 5).swapaxes(1, 2)  # [K, 5, (x, y)]
    landmarks = sides[:, None] * points + boxes[:, None, :2] - 1
    score = jnp.where(valid & (probability > rules.thresholds[2]), probability, -1)
    # Ascending and then reversed, as the original's NumPy: of equal ones the last comes first.
    order = jnp.argsort(score, stable=True)[::-1]
    score, boxes, landmarks = (x[order] for x in (score, shift(boxes, shifts, 1.0), landmarks))
    valid = keep_best(boxes, score >= 0, threshold=rules.overlaps[3], overlap=over_smaller)
    order = jnp.argsort(jnp.where(valid, area(boxes, 0.0), -jnp.inf), stable=True)[::-1]
    boxes, score, landmarks, valid = (x[order] for x in (boxes, score, landmarks, valid))
    return Found(boxes, score, landmarks, valid, load)
