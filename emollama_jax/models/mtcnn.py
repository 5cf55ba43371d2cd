"""MTCNN (Zhang et al. 2016) as in facenet-pytorch 2.6.0: networks on the devices, geometry here.

Three small networks: P proposes boxes on an image pyramid, R and O refine them. The arithmetic is
facenet-pytorch's down to its uneven +1s. What differs:

- P reads the pyramid in overlapping tiles of one size, R and O read crops in batches of one size:
  three small programs are compiled, once, whatever the pictures' sizes. What lies beyond a level is
  masked, not approximated.
- Area resizing (pyramid and crops) reads an integral image in int32: exact sums at any size.
- No face gives no boxes. Pictures under 20 pixels have none; those longer than 2,048 are shrunk to
  that (area average) and the boxes scaled back.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32
from PIL import Image

from emollama_jax.ahead import ahead
from emollama_jax.models import mtcnn_search
from emollama_jax.models.layers import Linear, param, torch_linear, zeros
from emollama_jax.models.mtcnn_search import Candidates, Level, Tiles
from emollama_jax.models.parameters import WEIGHTS, fill
from emollama_jax.models.rngs import Rngs, abstract

_Rows = dict[str, np.ndarray]  # a network's inputs, by the names of its arguments
_Outputs = tuple[np.ndarray, ...]
GROUP_PIXELS = 1 << 24  # of the pictures that are searched together: 200 MB of integral images


@dataclasses.dataclass(frozen=True)
class MtcnnConfig:
    """Config of the detection around its networks."""

    min_face: float  # pixels
    factor: float  # between two scales of the pyramid
    thresholds: tuple[float, float, float]  # probability after P, R, O
    overlaps: tuple[float, float, float, float]  # within a scale, across scales, after R, after O
    longest: int  # side in pixels
    rows: tuple[int, int, int]  # tiles, crops and crops that pass P, R and O together, per device


FACENET = MtcnnConfig(
    min_face=20.0,
    factor=0.709,
    thresholds=(0.6, 0.7, 0.7),
    overlaps=(0.5, 0.7, 0.7, 0.7),
    longest=2048,  # 255 · 2048² fits int32
    rows=(32, 64, 16),
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

    def __init__(self, in_width: int, out_width: int, *, size: int, rngs: Rngs):
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

    def __init__(self, width: int, *, rngs: Rngs):
        self.slope = param(nnx.initializers.constant(0.25), (width,), (None,), rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return jnp.where(x > 0, x, x * self.slope)


class PNet(nnx.Module):
    """Proposals: one probability and box per 12×12 cell, cells two pixels apart."""

    def __init__(self, *, rngs: Rngs):
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
            x: tiles, the level's part in the upper left corner.
            sizes: height and width of that part; the probability beyond it is -1.
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

    def __init__(self, *, rngs: Rngs):
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

    def __init__(self, *, rngs: Rngs):
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

    def __init__(self, *, rngs: Rngs):
        self.pnet = PNet(rngs=rngs)
        self.rnet = RNet(rngs=rngs)
        self.onet = ONet(rngs=rngs)


def load_mtcnn() -> Mtcnn:
    """The networks with facenet-pytorch's trained weights, which the package carries."""
    mtcnn = abstract(lambda rngs: Mtcnn(rngs=rngs))
    fill(mtcnn, WEIGHTS / "mtcnn.safetensors")
    return mtcnn


def max_pool(x: Float[Array, "b h w c"], *, window: int) -> Float[Array, "b h2 w2 c"]:
    """Max pooling of stride 2 with PyTorch's `ceil_mode`: the last window may be cut off."""
    hang = [-(-(side - window) // 2) * 2 + window - side for side in x.shape[1:3]]
    padding = ((0, 0), (0, hang[0]), (0, hang[1]), (0, 0))
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), padding
    )


def _dense(in_width: int, out_width: int, *, rngs: Rngs) -> Linear:
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
        cfg: config of the search.
        mesh: mesh of one axis, over which batches are split; None for one device.
    """

    def __init__(
        self,
        mtcnn: Mtcnn | None = None,
        cfg: MtcnnConfig = FACENET,
        *,
        mesh: Mesh | None = None,
    ):
        if 255 * cfg.longest**2 >= 2**31:
            raise ValueError(f"longest {cfg.longest}: 255 · side² exceeds int32, wanted ≤ 2901")
        self.cfg = cfg
        graphdef, state = nnx.split(mtcnn or load_mtcnn())
        whole = split = None
        if mesh:
            whole = NamedSharding(mesh, PartitionSpec())
            split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        state = jax.device_put(state, whole)

        def network(name: str, rows: int) -> Callable[[Iterable[_Rows]], list[_Outputs]]:
            def read(batch: _Rows) -> tuple[Array, ...]:
                return _read(name, graphdef, state, jax.device_put(batch, split))

            return functools.partial(_in_batches, read, rows * (mesh.size if mesh else 1))

        self._pnet, self._rnet, self._onet = map(network, ("pnet", "rnet", "onet"), cfg.rows)

    def __call__(self, picture: np.ndarray) -> Faces:
        """Finds the faces of one picture, RGB, uint8 [H, W, 3], of any size."""
        return self.many([picture])[0]

    def many(self, pictures: Sequence[np.ndarray]) -> list[Faces]:
        """Finds the faces of pictures, RGB, uint8 [H, W, 3], of any sizes."""
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"picture {picture.dtype} {picture.shape}, wanted uint8 [height, width, 3]"
                )
        faces: list[Faces] = []
        for group in _groups(pictures):
            faces += self._search(group)
        return faces

    def _search(self, pictures: Sequence[np.ndarray]) -> list[Faces]:
        cfg = self.cfg
        scenes = [_Scene.of(_shrink(picture, cfg.longest), cfg) for picture in pictures]
        tiles: list[Tiles] = []

        def cut() -> Iterator[_Rows]:
            threads = os.cpu_count() or 1  # NumPy's work goes on while the devices are busy
            for found in ahead(_Scene.tiles, scenes, threads=threads, waiting=threads):
                tiles.append(found._replace(pixels=found.pixels[:0]))
                yield {"x": found.pixels, "sizes": found.sizes}

        said = self._pnet(cut())

        candidates = [
            mtcnn_search.propose(
                cut_out,
                scene.levels,
                *outputs,
                threshold=cfg.thresholds[0],
                overlaps=cfg.overlaps[:2],
            )
            for scene, cut_out, outputs in zip(scenes, tiles, said, strict=True)
        ]
        return self._finish(pictures, scenes, self._refine(scenes, candidates))

    def _refine(
        self, scenes: Sequence["_Scene"], candidates: Sequence[Candidates]
    ) -> list[Candidates]:
        """What R leaves, as squares."""
        cfg = self.cfg
        crops = [s.crops(c.boxes) for s, c in zip(scenes, candidates, strict=True)]
        read = self._rnet(
            {"x": s.resized(crop, mtcnn_search.R_SIZE)}
            for s, (crop, _) in zip(scenes, crops, strict=True)
        )
        refined = []
        for found, (_, some), (score, shifts) in zip(candidates, crops, read, strict=True):
            good = score > np.float32(cfg.thresholds[1])
            new = mtcnn_search.best_first(
                Candidates(found.boxes[some][good], score[good], shifts[good])
            )
            kept = mtcnn_search.keep_best(
                new.boxes, threshold=cfg.overlaps[2], overlap=mtcnn_search.over_union
            )
            new = new[kept]
            refined.append(
                new._replace(
                    boxes=mtcnn_search.square(mtcnn_search.shift(new.boxes, new.shifts, 1))
                )
            )
        return refined

    def _finish(
        self,
        pictures: Sequence[np.ndarray],
        scenes: Sequence["_Scene"],
        candidates: Sequence[Candidates],
    ) -> list[Faces]:
        """What O leaves, the largest first, in the pictures' own pixels."""
        cfg = self.cfg
        crops = [s.crops(c.boxes) for s, c in zip(scenes, candidates, strict=True)]
        read = self._onet(
            {"x": s.resized(crop, mtcnn_search.O_SIZE)}
            for s, (crop, _) in zip(scenes, crops, strict=True)
        )
        faces = []
        for picture, scene, found, (_, some), (score, shifts, points) in zip(
            pictures, scenes, candidates, crops, read, strict=True
        ):
            boxes = found.boxes[some]
            sides = boxes[:, 2:] - boxes[:, :2] + np.float32(1)
            points = points.reshape(-1, 2, 5).swapaxes(1, 2)  # [K, 5, (x, y)]
            landmarks = sides[:, None] * points + boxes[:, None, :2] - np.float32(1)
            (good,) = np.nonzero(score > np.float32(cfg.thresholds[2]))
            # Ascending and then reversed, as the original: of equal ones the last comes first.
            good = good[np.argsort(score[good], kind="stable")[::-1]]
            boxes = mtcnn_search.shift(boxes, shifts, 1)[good]
            kept = mtcnn_search.keep_best(
                boxes, threshold=cfg.overlaps[3], overlap=mtcnn_search.over_smaller
            )
            kept = kept[np.argsort(mtcnn_search.area(boxes[kept], 0), kind="stable")[::-1]]
            scale = np.array(picture.shape[1::-1], np.float32) / np.float32(scene.size[::-1])
            faces.append(
                Faces(
                    boxes[kept] * np.tile(scale, 2),
                    score[good][kept],
                    landmarks[good][kept] * scale,
                )
            )
        return faces


class _Scene(NamedTuple):
    """A picture as the search reads it."""

    integral: Int32[np.ndarray, "h+1 w+1 3"]
    levels: list[Level]

    @classmethod
    def of(cls, picture: np.ndarray, cfg: MtcnnConfig) -> "_Scene":
        levels = mtcnn_search.pyramid(*picture.shape[:2], min_face=cfg.min_face, factor=cfg.factor)
        return cls(mtcnn_search.integral_image(picture), levels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.integral.shape[0] - 1, self.integral.shape[1] - 1

    def tiles(self) -> Tiles:
        return mtcnn_search.cut_tiles(self.integral, self.levels)

    def crops(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The crops of the boxes that have a pixel, and which those are."""
        crops, some = mtcnn_search.trunc_crops(boxes, height=self.size[0], width=self.size[1])
        return crops[some], some

    def resized(self, crops: np.ndarray, size: int) -> np.ndarray:
        return mtcnn_search.area_resize(self.integral, crops, (size, size))


def _groups(pictures: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Pictures in their order, with about `GROUP_PIXELS` together."""
    group: list[np.ndarray] = []
    for picture in pictures:
        group.append(picture)
        if sum(one.shape[0] * one.shape[1] for one in group) >= GROUP_PIXELS:
            yield group
            group = []
    if group:
        yield group


def _in_batches(
    read: Callable[[_Rows], tuple[Array, ...]], size: int, blocks: Iterable[_Rows]
) -> list[_Outputs]:
    """What a network says of each picture's rows, which it reads `size` at a time.

    Args:
        read: arrays of `size` rows → outputs of as many.
        size: rows of a batch.
        blocks: each picture's inputs, with any number of rows.
    """
    outputs, counts, waiting, held = [], [], [], 0
    for block in blocks:
        counts.append(len(block["x"]))
        waiting.append(block)
        held += counts[-1]
        if held >= size:
            rows = _joined(waiting)
            full = held - held % size
            outputs += [read(_cut(rows, start, size)) for start in range(0, full, size)]
            waiting, held = [{name: x[full:] for name, x in rows.items()}], held - full
    if held or not outputs:  # where there is no row at all, padding alone gives the shapes
        outputs.append(read(_cut(_joined(waiting), 0, size)))
    whole = [np.concatenate(parts) for parts in zip(*jax.device_get(outputs), strict=True)]
    edges = np.cumsum([0, *counts])
    return [tuple(x[a:b] for x in whole) for a, b in itertools.pairwise(edges)]


def _joined(blocks: Sequence[_Rows]) -> _Rows:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _cut(rows: _Rows, start: int, size: int) -> _Rows:
    """`size` rows, with zeros where there are fewer."""
    parts = {name: x[start : start + size] for name, x in rows.items()}
    missing = size - len(parts["x"])
    return {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in parts.items()}


def _shrink(picture: np.ndarray, longest: int) -> np.ndarray:
    """Averages a picture down to a longest side; smaller ones are untouched."""
    height, width = picture.shape[:2]
    share = longest / max(height, width)
    if share >= 1:
        return picture
    size = max(round(width * share), 1), max(round(height * share), 1)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize(size, Image.Resampling.BOX))


@functools.partial(jax.jit, static_argnames=("name", "graphdef"))
def _read(name: str, graphdef: nnx.GraphDef, state: nnx.State, rows: dict[str, Array]):
    """What one of the networks says of some rows."""
    # The default precision of TPUs and of TF32 moves candidates across the thresholds.
    with jax.default_matmul_precision("highest"):
        return getattr(nnx.merge(graphdef, state), name)(**rows)
