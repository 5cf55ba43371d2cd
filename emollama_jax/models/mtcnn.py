"""MTCNN (Zhang et al. 2016) as in facenet-pytorch 2.6.0, in static shapes.

Three small networks: P proposes boxes on an image pyramid, R and O refine them. The arithmetic is
facenet-pytorch's down to its uneven +1s. What differs:

- A picture lies in the corner of a canvas of one of few sizes and its own size is data, so that all
  pictures share a handful of compiled programs. What lies beyond it is masked, not approximated.
- Area resizing (pyramid and crops) reads an integral image in int32: exact sums at any size.
- Candidate lists have fixed lengths and masks; if one overflows, the program for longer lists runs.
- No face gives no boxes. Pictures under 20 pixels have none; longer ones than the largest canvas
  are shrunk to it (area average) and the boxes scaled back.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from emollama_jax.models.layers import Linear, param, torch_linear, zeros
from emollama_jax.models.mtcnn_boxes import (
    area,
    area_resize,
    front,
    integral_image,
    keep_best,
    over_smaller,
    over_union,
    shift,
    square,
    trunc_crops,
)
from emollama_jax.models.pretrained import WEIGHTS, load

log = logging.getLogger(__name__)

CELL, STRIDE = 12, 2  # pixels that one output of P sees, and the step between two
R_SIZE, O_SIZE = 24, 48  # of the crops that R and O read
R_CHUNK, O_CHUNK = 64, 16  # crops that pass R and O together


class Capacity(NamedTuple):
    """Lengths of the candidate lists."""

    scale: int  # of P, in each scale
    proposals: int  # that R reads, a multiple of R_CHUNK
    refined: int  # that O reads, a multiple of O_CHUNK


@dataclasses.dataclass(frozen=True)
class MtcnnConfig:
    """What the detection does around its networks."""

    min_face: float  # pixels
    factor: float  # between two scales of the pyramid
    thresholds: tuple[float, float, float]  # probability after P, R, O
    overlaps: tuple[float, float, float, float]  # within a scale, across scales, after R, after O
    canvases: tuple[int, ...]  # sides in pixels, ascending
    capacities: tuple[Capacity, ...]  # ascending


FACENET = MtcnnConfig(
    min_face=20.0,
    factor=0.709,
    thresholds=(0.6, 0.7, 0.7),
    overlaps=(0.5, 0.7, 0.7, 0.7),
    canvases=(128, 256, 512, 768, 1024, 1280, 1536, 2048),  # 255 · 2048² fits int32
    capacities=(Capacity(1024, 2048, 256), Capacity(8192, 16384, 2048)),
)


@dataclasses.dataclass(frozen=True)
class Faces:
    """The N faces of a picture, the largest box first; N may be 0. Boxes may leave the picture."""

    boxes: Float32[np.ndarray, "n 4"]  # (x1, y1, x2, y2) in pixels
    probabilities: Float32[np.ndarray, " n"]
    landmarks: Float32[np.ndarray, "n 5 2"]  # image-left eye, right eye, nose, mouth corners

    def __len__(self) -> int:
        return len(self.boxes)


class Level(NamedTuple):
    """One scale of the pyramid."""

    scale: float
    height: int
    width: int


def pyramid(height: int, width: int, cfg: MtcnnConfig) -> list[Level]:
    """The scales at which a picture is searched; none if its shorter side is below `min_face`."""
    scale = CELL / cfg.min_face
    side = min(height, width) * scale
    levels = []
    while side >= CELL:
        levels.append(Level(scale, int(height * scale + 1), int(width * scale + 1)))
        scale *= cfg.factor
        side *= cfg.factor
    return levels


class Conv(nnx.Module):
    """Valid convolution of stride 1, NHWC."""

    def __init__(self, in_width: int, out_width: int, *, size: int, rngs: nnx.Rngs):
        shape = (size, size, in_width, out_width)
        self.kernel = param(torch_linear, shape, (None,) * 4, rngs=rngs)
        self.bias = param(zeros, (out_width,), (None,), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias


class PReLU(nnx.Module):
    """A learned slope per channel below zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.slope = param(nnx.initializers.constant(0.25), (width,), (None,), rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return jnp.where(x > 0, x, x * self.slope)


class PNet(nnx.Module):
    """Proposals: one probability and box per 12×12 cell, cells two pixels apart."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1, self.prelu1 = Conv(3, 10, size=3, rngs=rngs), PReLU(10, rngs=rngs)
        self.conv2, self.prelu2 = Conv(10, 16, size=3, rngs=rngs), PReLU(16, rngs=rngs)
        self.conv3, self.prelu3 = Conv(16, 32, size=3, rngs=rngs), PReLU(32, rngs=rngs)
        self.conv4_1 = Conv(32, 2, size=1, rngs=rngs)
        self.conv4_2 = Conv(32, 4, size=1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "h w 3"], *, height: Int[Array, ""], width: Int[Array, ""]
    ) -> tuple[Float[Array, "y x"], Float[Array, "y x 4"]]:
        """Probabilities, -1 beyond the picture, and boxes of a scale whose own size is given."""
        y = self.prelu1(self.conv1(x[None]))
        # The pool's last window may hang over the edge (ceil mode): what lies beyond the picture
        # must not win, and where nothing else is in a window, must not spread infinities.
        y = max_pool(jnp.where(_inside(y, height - 2, width - 2), y, -jnp.inf), window=2)
        rows, columns = (height - 1) // 2, (width - 1) // 2
        y = jnp.where(_inside(y, rows, columns), y, 0)
        y = self.prelu3(self.conv3(self.prelu2(self.conv2(y))))
        probability = jax.nn.softmax(self.conv4_1(y))[..., 1:]
        inside = _inside(probability, rows - 4, columns - 4)
        return jnp.where(inside, probability, -1)[0, ..., 0], self.conv4_2(y)[0]


class RNet(nnx.Module):
    """Refinement of crops of 24×24."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1, self.prelu1 = Conv(3, 28, size=3, rngs=rngs), PReLU(28, rngs=rngs)
        self.conv2, self.prelu2 = Conv(28, 48, size=3, rngs=rngs), PReLU(48, rngs=rngs)
        self.conv3, self.prelu3 = Conv(48, 64, size=2, rngs=rngs), PReLU(64, rngs=rngs)
        self.dense4, self.prelu4 = _dense(576, 128, rngs=rngs), PReLU(128, rngs=rngs)
        self.dense5_1 = _dense(128, 2, rngs=rngs)
        self.dense5_2 = _dense(128, 4, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b 24 24 3"]
    ) -> tuple[Float[Array, " b"], Float[Array, "b 4"]]:
        """Probabilities and box shifts."""
        x = max_pool(self.prelu1(self.conv1(x)), window=3)
        x = max_pool(self.prelu2(self.conv2(x)), window=3)
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return jax.nn.softmax(self.dense5_1(x))[:, 1], self.dense5_2(x)


class ONet(nnx.Module):
    """Last refinement, of crops of 48×48, with five landmarks."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1, self.prelu1 = Conv(3, 32, size=3, rngs=rngs), PReLU(32, rngs=rngs)
        self.conv2, self.prelu2 = Conv(32, 64, size=3, rngs=rngs), PReLU(64, rngs=rngs)
        self.conv3, self.prelu3 = Conv(64, 64, size=3, rngs=rngs), PReLU(64, rngs=rngs)
        self.conv4, self.prelu4 = Conv(64, 128, size=2, rngs=rngs), PReLU(128, rngs=rngs)
        self.dense5, self.prelu5 = _dense(1152, 256, rngs=rngs), PReLU(256, rngs=rngs)
        self.dense6_1 = _dense(256, 2, rngs=rngs)
        self.dense6_2 = _dense(256, 4, rngs=rngs)
        self.dense6_3 = _dense(256, 10, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b 48 48 3"]
    ) -> tuple[Float[Array, " b"], Float[Array, "b 4"], Float[Array, "b 10"]]:
        """Probabilities, box shifts and landmarks (five x, then five y) as shares of the box."""
        x = max_pool(self.prelu1(self.conv1(x)), window=3)
        x = max_pool(self.prelu2(self.conv2(x)), window=3)
        x = max_pool(self.prelu3(self.conv3(x)), window=2)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        return jax.nn.softmax(self.dense6_1(x))[:, 1], self.dense6_2(x), self.dense6_3(x)


class Mtcnn(nnx.Module):
    """The three networks: 495,850 parameters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.pnet = PNet(rngs=rngs)
        self.rnet = RNet(rngs=rngs)
        self.onet = ONet(rngs=rngs)


def load_mtcnn() -> Mtcnn:
    """The networks with facenet-pytorch's trained weights, which the package carries."""
    mtcnn = Mtcnn(rngs=nnx.Rngs(0))
    load(mtcnn, WEIGHTS / "mtcnn.safetensors")
    return mtcnn


def max_pool(x: Float[Array, "b h w c"], *, window: int) -> Float[Array, "b h2 w2 c"]:
    """Max pooling of stride 2 with PyTorch's `ceil_mode`: the last window may be cut off."""
    hang = [-(-(side - window) // 2) * 2 + window - side for side in x.shape[1:3]]
    padding = ((0, 0), (0, hang[0]), (0, hang[1]), (0, 0))
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), padding
    )


def _dense(in_width: int, out_width: int, *, rngs: nnx.Rngs) -> Linear:
    return Linear(in_width, out_width, axes=(None, None), bias=True, dtype="float32", rngs=rngs)


def _flatten(x: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
    return x.swapaxes(1, 2).reshape(len(x), -1)  # [B, W·H·C]: columns first, as the original


def _inside(x: Float[Array, "b h w c"], height: Array, width: Array) -> Bool[Array, "h w 1"]:
    rows, columns = jnp.arange(x.shape[1]), jnp.arange(x.shape[2])
    return ((rows < height)[:, None] & (columns < width))[..., None]


class Found(NamedTuple):
    """What `_search` gives: rows of a fixed length, the largest valid box first."""

    boxes: Float[Array, "k 4"]
    probability: Float[Array, " k"]
    landmarks: Float[Array, "k 5 2"]
    valid: Bool[Array, " k"]
    load: Int[Array, "3"]  # candidates that asked for a place in each list of `Capacity`


class Detector:
    """Finds the faces of pictures.

    Args:
        mtcnn: the networks; None loads the package's.
        cfg: of the search.
    """

    def __init__(self, mtcnn: Mtcnn | None = None, cfg: MtcnnConfig = FACENET):
        if 255 * cfg.canvases[-1] ** 2 >= 2**31:
            raise ValueError(f"canvas {cfg.canvases[-1]}: 255 · side² exceeds int32, wanted ≤ 2901")
        self.cfg = cfg
        self._graphdef, self._state = nnx.split(mtcnn or load_mtcnn())

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Faces:
        """Finds the faces of one picture, RGB, of any size."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"picture {picture.dtype} {picture.shape}, wanted uint8 [height, width, 3]"
            )
        height, width = picture.shape[:2]
        small = _shrink(picture, self.cfg.canvases[-1])
        faces = self._find(small)
        scale = np.array([width / small.shape[1], height / small.shape[0]], np.float32)
        return Faces(faces.boxes * np.tile(scale, 2), faces.probabilities, faces.landmarks * scale)

    def _find(self, picture: np.ndarray) -> Faces:
        cfg = self.cfg
        height, width = picture.shape[:2]
        levels = pyramid(height, width, cfg)
        if not levels:
            return Faces(np.zeros((0, 4), "f4"), np.zeros(0, "f4"), np.zeros((0, 5, 2), "f4"))
        canvas = np.zeros((_fit(height, cfg), _fit(width, cfg), 3), np.uint8)
        canvas[:height, :width] = picture
        sizes = np.zeros((len(pyramid(*canvas.shape[:2], cfg)), 2), np.int32)
        sizes[: len(levels)] = [level[1:] for level in levels]
        size = np.array([height, width], np.int32)
        for capacity in cfg.capacities:
            found = jax.device_get(
                _search(self._graphdef, self._state, canvas, size, sizes, cfg, capacity)
            )
            if (found.load <= capacity).all():
                break
        else:
            log.warning(
                "picture of %d×%d: %s face candidates, room for %s; the least probable are dropped",
                width, height, tuple(found.load), tuple(capacity),
            )  # fmt: skip
        n = found.valid.sum()
        return Faces(found.boxes[:n], found.probability[:n], found.landmarks[:n])


def _fit(side: int, cfg: MtcnnConfig) -> int:
    return next(canvas for canvas in cfg.canvases if canvas >= side)


def _shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """Averages a picture down to a longest side; smaller ones are untouched."""
    height, width = picture.shape[:2]
    share = longest / max(height, width)
    if share >= 1:
        return picture
    size = (max(round(width * share), 1), max(round(height * share), 1))
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize(size, Image.Resampling.BOX))


@functools.partial(jax.jit, static_argnames=("graphdef", "cfg", "capacity"))
def _search(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    canvas: UInt8[Array, "h w 3"],
    size: Int[Array, "2"],
    sizes: Int[Array, "l 2"],
    cfg: MtcnnConfig,
    capacity: Capacity,
) -> Found:
    """The whole search on one canvas.

    Args:
        graphdef: of Mtcnn.
        state: of Mtcnn.
        canvas: the picture in its upper left corner.
        size: height and width of the picture.
        sizes: height and width of the picture at each level; zeros for levels it does not have.
        cfg: of the search.
        capacity: lengths of the candidate lists.
    """
    # The default precision of TPUs and of TF32 moves candidates across the thresholds.
    with jax.default_matmul_precision("highest"):
        mtcnn = nnx.merge(graphdef, state)
        integral = integral_image(canvas)
        boxes, valid, load = _propose(mtcnn.pnet, integral, size, sizes, cfg, capacity)
        height, width = size

        crops, some = trunc_crops(boxes, height=height, width=width)
        valid, boxes, crops = front(valid & some, boxes, crops)
        outputs = _read(mtcnn.rnet, integral, crops, valid.sum(), size=R_SIZE, chunk=R_CHUNK)
        score = jnp.where(valid & (outputs[0] > cfg.thresholds[1]), outputs[0], -1)
        order = jnp.argsort(-score, stable=True)
        score, boxes, shifts = (x[order] for x in (score, boxes, outputs[1]))
        valid = keep_best(boxes, score >= 0, threshold=cfg.overlaps[2], overlap=over_union)
        boxes = square(shift(boxes, shifts, 1.0))

        crops, some = trunc_crops(boxes, height=height, width=width)
        valid, boxes, crops = front(valid & some, boxes, crops)
        refined = valid.sum()
        valid, boxes, crops = (x[: capacity.refined] for x in (valid, boxes, crops))
        outputs = _read(mtcnn.onet, integral, crops, valid.sum(), size=O_SIZE, chunk=O_CHUNK)
        found = _finish(valid, boxes, *outputs, cfg)
        return found._replace(load=jnp.stack([*load, refined]))


def _propose(
    pnet: PNet,
    integral: Int[Array, "h+1 w+1 3"],
    size: Int[Array, "2"],
    sizes: Int[Array, "l 2"],
    cfg: MtcnnConfig,
    capacity: Capacity,
) -> tuple[Float[Array, "k 4"], Bool[Array, " k"], tuple[Int[Array, ""], Int[Array, ""]]]:
    """Squares that P proposes on all scales, which are valid, and the loads of the two lists."""
    (height, width), best = size, []
    levels = pyramid(integral.shape[0] - 1, integral.shape[1] - 1, cfg)
    for level, (h, w) in zip(levels, sizes, strict=True):
        # A level that the picture does not have is computed as one pixel and masked by P.
        pixels = area_resize(
            integral,
            (jnp.int32(0), height, jnp.maximum(h, 1)),
            (jnp.int32(0), width, jnp.maximum(w, 1)),
            height=level.height,
            width=level.width,
        )
        probability, shifts = pnet(pixels, height=h, width=w)
        wanted = (probability >= cfg.thresholds[0]).sum()
        columns = probability.shape[1]
        missing = max(capacity.scale - probability.size, 0)
        probability, index = jax.lax.top_k(  # equal probabilities stay in the order of the cells
            jnp.pad(probability.ravel(), (0, missing), constant_values=-1), capacity.scale
        )
        index = jnp.minimum(index, len(shifts) * columns - 1)
        low, high = _cell_edges(level.scale, max(shifts.shape[:2]))
        y, x = index // columns, index % columns
        boxes = jnp.stack([low[x], low[y], high[x], high[y]], axis=1)
        best.append((probability, boxes, shifts.reshape(-1, 4)[index], wanted))
    probability, boxes, shifts, wanted = (jnp.stack(x) for x in zip(*best, strict=True))  # [L, K]
    keep = jax.vmap(functools.partial(keep_best, threshold=cfg.overlaps[0], overlap=over_union))(
        boxes, probability >= cfg.thresholds[0]
    )
    probability = jnp.where(keep, probability, -1).ravel()
    probability, index = jax.lax.top_k(probability, min(capacity.proposals, probability.size))
    boxes, shifts = boxes.reshape(-1, 4)[index], shifts.reshape(-1, 4)[index]
    valid = keep_best(boxes, probability >= 0, threshold=cfg.overlaps[1], overlap=over_union)
    return square(shift(boxes, shifts, 0.0)), valid, (wanted.max(), keep.sum())


def _cell_edges(scale: float, cells: int) -> tuple[Array, Array]:
    """Where P's cells begin and end in the picture, along one axis."""
    # On the host: XLA turns a division by a constant into a product, which may round across an
    # integer before the floor.
    first = STRIDE * np.arange(cells, dtype=np.float32)
    low, high = (np.floor((first + edge) / np.float32(scale)) for edge in (1, CELL))
    return jnp.asarray(low), jnp.asarray(high)


def _read(
    network: Callable[[Array], tuple[Array, ...]],
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

    shapes = jax.eval_shape(network, jnp.zeros((len(crops), size, size, 3)))
    outputs = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
    return jax.lax.fori_loop(0, -(-count // chunk), step, outputs)


def _finish(
    valid: Bool[Array, " k"],
    boxes: Float[Array, "k 4"],
    probability: Float[Array, " k"],
    shifts: Float[Array, "k 4"],
    points: Float[Array, "k 10"],
    cfg: MtcnnConfig,
) -> Found:
    """What O leaves, sorted by area; `load` is the caller's."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    points = points.reshape(-1, 2, 5).swapaxes(1, 2)  # [K, 5, (x, y)]
    landmarks = sides[:, None] * points + boxes[:, None, :2] - 1
    score = jnp.where(valid & (probability > cfg.thresholds[2]), probability, -1)
    # Ascending and then reversed, as the original's NumPy: of equal ones the last comes first.
    order = jnp.argsort(score, stable=True)[::-1]
    score, boxes, landmarks = (x[order] for x in (score, shift(boxes, shifts, 1.0), landmarks))
    valid = keep_best(boxes, score >= 0, threshold=cfg.overlaps[3], overlap=over_smaller)
    order = jnp.argsort(jnp.where(valid, area(boxes, 0.0), -jnp.inf), stable=True)[::-1]
    boxes, score, landmarks, valid = (x[order] for x in (boxes, score, landmarks, valid))
    return Found(boxes, score, landmarks, valid, jnp.zeros(3, jnp.int32))
