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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from emollama_jax.models.layers import Linear, param, torch_linear, zeros
from emollama_jax.models.mtcnn_search import Capacity, Found, Level, Rules, pyramid, search
from emollama_jax.models.pretrained import WEIGHTS, load

log = logging.getLogger(__name__)


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
    capacities=(Capacity(1024, 2048, 256), Capacity(16384, 32768, 8192)),
)


@dataclasses.dataclass(frozen=True)
class Faces:
    """The N faces of a picture, the largest box first; N may be 0. Boxes may leave the picture."""

    boxes: Float32[np.ndarray, "n 4"]  # (x1, y1, x2, y2) in pixels
    probabilities: Float32[np.ndarray, " n"]
    landmarks: Float32[np.ndarray, "n 5 2"]  # image-left eye, right eye, nose, mouth corners

    def __len__(self) -> int:
        return len(self.boxes)


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
        self, x: Float[Array, "b h w 3"], *, sizes: Int[Array, "b 2"]
    ) -> tuple[Float[Array, "b y x"], Float[Array, "b y x 4"]]:
        """Probabilities and box shifts of each cell.

        Args:
            x: levels of the pyramid, each in the upper left corner.
            sizes: height and width of each; the probability beyond them is -1.
        """
        x = self.prelu1(self.conv1(x))
        # The pool's last window may hang over the edge (ceil mode): what lies beyond the picture
        # must not win, and where nothing else is in a window, must not spread infinities.
        x = max_pool(jnp.where(_inside(x, sizes - 2), x, -jnp.inf), window=2)
        sizes = (sizes - 1) // 2
        x = jnp.where(_inside(x, sizes), x, 0)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        probability = jax.nn.softmax(self.conv4_1(x))[..., 1:]
        probability = jnp.where(_inside(probability, sizes - 4), probability, -1)
        return probability[..., 0], self.conv4_2(x)


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


def _inside(x: Float[Array, "b h w c"], sizes: Int[Array, "b 2"]) -> Bool[Array, "b h w 1"]:
    """Which positions lie within each item's own height and width."""
    rows = jnp.arange(x.shape[1]) < sizes[:, :1]
    columns = jnp.arange(x.shape[2]) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[..., None]


class Detector:
    """Finds the faces of pictures: of one, or of many in batches over the devices of a mesh.

    Args:
        mtcnn: the networks; None loads the package's.
        cfg: of the search.
        mesh: of one axis, over which `many` splits its batches; None for one device.
        batch: pictures of a canvas's size that each device searches at a time in `many`.
    """

    def __init__(
        self,
        mtcnn: Mtcnn | None = None,
        cfg: MtcnnConfig = FACENET,
        *,
        mesh: Mesh | None = None,
        batch: int = 8,
    ):
        if 255 * cfg.canvases[-1] ** 2 >= 2**31:
            raise ValueError(f"canvas {cfg.canvases[-1]}: 255 · side² exceeds int32, wanted ≤ 2901")
        self.cfg = cfg
        self._graphdef, self._state = nnx.split(mtcnn or load_mtcnn())
        self._mesh, self._rows = mesh, batch * (mesh.size if mesh else 1)

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> Faces:
        """Finds the faces of one picture, RGB, of any size."""
        return self._finish(picture, self._alone(self._task(picture), self.cfg.capacities))

    def many(self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> list[Faces]:
        """Finds the faces of pictures of any sizes; those of one canvas are searched together."""
        tasks = [self._task(picture) for picture in pictures]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, task in enumerate(tasks):
            if task is not None:
                groups.setdefault(task.canvas.shape, []).append(number)
        faces: list[Faces] = [_NOBODY] * len(tasks)
        for numbers in groups.values():
            for start in range(0, len(numbers), self._rows):
                part = numbers[start : start + self._rows]
                found = self._together([tasks[i] for i in part])
                for i, one in zip(part, found, strict=True):
                    faces[i] = self._finish(pictures[i], one)
        return faces

    def _task(self, picture: np.ndarray) -> "_Task | None":
        """A picture on its canvas; None if it is too small to hold a face."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"picture {picture.dtype} {picture.shape}, wanted uint8 [height, width, 3]"
            )
        cfg = self.cfg
        picture = _shrink(picture, cfg.canvases[-1])
        height, width = picture.shape[:2]
        levels = pyramid(height, width, min_face=cfg.min_face, factor=cfg.factor)
        if not levels:
            return None
        canvas = np.zeros((_fit(height, cfg), _fit(width, cfg), 3), np.uint8)
        canvas[:height, :width] = picture
        room = pyramid(*canvas.shape[:2], min_face=cfg.min_face, factor=cfg.factor)
        sizes = np.zeros((len(room), 2), np.int32)
        sizes[: len(levels)] = [level[1:] for level in levels]
        return _Task(canvas, np.array([height, width], np.int32), sizes, tuple(room))

    def _alone(self, task: "_Task | None", capacities: Sequence[Capacity]) -> Found | None:
        """The search of one picture, with longer lists until they hold all candidates."""
        if task is None:
            return None
        for capacity in capacities:
            found = jax.device_get(
                _search(
                    self._graphdef,
                    self._state,
                    task.canvas,
                    task.size,
                    task.sizes,
                    self._rules(),
                    task.levels,
                    capacity,
                )
            )
            if (found.load <= capacity).all():
                break
        else:
            height, width = task.size
            log.warning(
                "picture of %d×%d: %s face candidates, room for %s; the least probable are dropped",
                *(width, height, tuple(found.load.tolist()), tuple(capacity)),
            )
        return found

    def _together(self, tasks: Sequence["_Task"]) -> list[Found | None]:
        """The search of pictures on one canvas size, those with many candidates once more alone."""
        first, *longer = self.cfg.capacities
        blank = _Task(np.zeros_like(tasks[0].canvas), *tasks[0][1:])
        rows = [*tasks, *[blank] * (self._rows - len(tasks))]
        found = jax.device_get(
            _search_many(
                self._graphdef,
                self._state,
                *(np.stack([row[field] for row in rows]) for field in range(3)),
                self._rules(),
                tasks[0].levels,
                first,
                self._mesh,
            )
        )
        each = [Found(*(x[i] for x in found)) for i in range(len(tasks))]
        return [
            self._alone(task, longer) if longer and np.any(one.load > np.array(first)) else one
            for task, one in zip(tasks, each, strict=True)
        ]

    def _finish(self, picture: np.ndarray, found: Found | None) -> Faces:
        """Rows of a fixed length → the faces, in the picture's own pixels."""
        if found is None:
            return _NOBODY
        n = found.valid.sum()
        height, width = picture.shape[:2]
        shrunk = _shrunk(height, width, self.cfg.canvases[-1])
        scale = np.array([width / shrunk[1], height / shrunk[0]], np.float32)
        return Faces(
            found.boxes[:n] * np.tile(scale, 2),
            found.probability[:n],
            found.landmarks[:n] * scale,
        )

    def _rules(self) -> Rules:
        cfg = self.cfg
        return Rules(np.array(cfg.thresholds, np.float32), np.array(cfg.overlaps, np.float32))


class _Task(NamedTuple):
    """A picture as the search takes it."""

    canvas: UInt8[np.ndarray, "h w 3"]
    size: Int[np.ndarray, "2"]
    sizes: Int[np.ndarray, "l 2"]
    levels: tuple[Level, ...]


_NOBODY = Faces(np.zeros((0, 4), "f4"), np.zeros(0, "f4"), np.zeros((0, 5, 2), "f4"))


def _fit(side: int, cfg: MtcnnConfig) -> int:
    return next(canvas for canvas in cfg.canvases if canvas >= side)


def _shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """Averages a picture down to a longest side; smaller ones are untouched."""
    height, width = _shrunk(*picture.shape[:2], longest)
    if (height, width) == picture.shape[:2]:
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _shrunk(height: int, width: int, longest: int) -> tuple[int, int]:
    share = longest / max(height, width)
    if share >= 1:
        return height, width
    return max(round(height * share), 1), max(round(width * share), 1)


@functools.partial(jax.jit, static_argnames=("graphdef", "levels", "capacity"))
def _search(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    canvas: UInt8[Array, "h w 3"],
    size: Int[Array, "2"],
    sizes: Int[Array, "l 2"],
    rules: Rules,
    levels: tuple[Level, ...],
    capacity: Capacity,
) -> Found:
    mtcnn = nnx.merge(graphdef, state)
    # The default precision of TPUs and of TF32 moves candidates across the thresholds.
    with jax.default_matmul_precision("highest"):
        return search(
            canvas,
            networks=(mtcnn.pnet, mtcnn.rnet, mtcnn.onet),
            size=size,
            sizes=sizes,
            rules=rules,
            levels=levels,
            capacity=capacity,
        )


@functools.partial(jax.jit, static_argnames=("graphdef", "levels", "capacity", "mesh"))
def _search_many(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    canvases: UInt8[Array, "b h w 3"],
    size: Int[Array, "b 2"],
    sizes: Int[Array, "b l 2"],
    rules: Rules,
    levels: tuple[Level, ...],
    capacity: Capacity,
    mesh: Mesh | None,
) -> Found:
    """`_search` of a batch, each device its share of the rows, without a word between them."""

    def share(state, rules, *rows):
        # On a CPU one after the other: a batch waits for its slowest search and gains nothing.
        step = None if jax.default_backend() == "cpu" else len(rows[0])
        return jax.lax.map(
            lambda row: _search(graphdef, state, *row, rules, levels, capacity),
            rows,
            batch_size=step,
        )

    if mesh is None:
        return share(state, rules, canvases, size, sizes)
    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(whole, whole, split, split, split),
        out_specs=split,
        check_vma=False,  # the search's loops start from constants, which vary over no axis
    )(state, rules, canvases, size, sizes)
