"""face-api's two face networks, FaceLandmark68Net and AgeGenderNet, in JAX.

Small convolutional networks on a face of 112 × 112 pixels, most of their convolutions separable
(depthwise 3×3, then 1×1). FaceLandmark68Net is four dense blocks, in which each convolution sees
the sum of what came before; AgeGenderNet is a small Xception (Chollet 2017). They are functions of
the weights under their names in the package; widths come from the weights' shapes.

What differs: depthwise convolutions and maxima are written as nine shifted maps, of which XLA's CPU
compiler makes one loop; with its own depthwise convolution a face takes 16 times as long.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emollama_jax.terms import LANDMARKS

SIZE = 112  # pixels of the square that both networks read
MEAN_RGB = (122.782, 117.001, 104.298)

Weights = Mapping[str, Array]
Maps = Float[Array, "b h w c"]


def landmarks(weights: Weights, faces: Float[Array, "b s s 3"]) -> Float[Array, "b 68 2"]:
    """Points as shares of the square: (0, 0) is its upper left corner, (1, 1) the lower right.

    Args:
        weights: weights of `face_landmark_68`.
        faces: float32 RGB, 0 … 255.
    """
    x = _normalise(faces)
    for number in range(4):
        x = _dense_block(weights, f"dense{number}", x)
    points = _linear(weights, "fc", x.mean((1, 2)))
    return points.reshape(-1, LANDMARKS, 2)


def age_gender(
    weights: Weights, faces: Float[Array, "b s s 3"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Age in years, and the probability of "male".

    Args:
        weights: weights of `age_gender`.
        faces: float32 RGB, 0 … 255.
    """
    x = jax.nn.relu(_convolution(weights, "entry_flow/conv_in", _normalise(faces), stride=2))
    # The first block's input is activated already: once more changes nothing.
    x = _reduction(weights, "entry_flow/reduction_block_0", x)
    x = _reduction(weights, "entry_flow/reduction_block_1", x)
    for block in ("middle_flow/main_block_0", "middle_flow/main_block_1"):
        y = x
        for number in range(3):
            y = _separable(weights, f"{block}/separable_conv{number}", jax.nn.relu(y))
        x = x + y
    x = _reduction(weights, "exit_flow/reduction_block", x)
    x = jax.nn.relu(_separable(weights, "exit_flow/separable_conv", x))
    x = x.mean((1, 2))
    gender = jax.nn.softmax(_linear(weights, "fc/gender", x))
    return _linear(weights, "fc/age", x)[:, 0], gender[:, 0]


def to_square(face: np.ndarray) -> np.ndarray:
    """A face as the networks read it, float32 [112, 112, 3]: padded to a square, then resized.

    The picture lies in the middle, black around it. Resizing is linear without half pixels, as
    TensorFlow.js does it by default: pixel i of the square shows position i · side / 112.

    Args:
        face: uint8 [H, W, 3].
    """
    height, width = face.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((side, side, 3), np.float32)
    padded[top : top + height, left : left + width] = face
    at = np.arange(SIZE, dtype=np.float32) * np.float32(side / SIZE)
    low = at.astype(int)
    high, share = np.minimum(low + 1, side - 1), at - low
    tall = padded[low] + (padded[high] - padded[low]) * share[:, None, None]
    return tall[:, low] + (tall[:, high] - tall[:, low]) * share[:, None]


def from_square(points: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Shares of the square → shares of the face that was padded to it, as the library gives them.

    Args:
        points: float [..., 2].
        height, width: sides of the face in pixels.
    """
    extent = np.array([width, height]) / max(height, width)
    return (points - (1 - extent) / 2) / extent


def shift(*, height: int, width: int) -> np.ndarray:
    """What the library takes from a point on its way to the square and back, as shares, [2].

    Centre i of the square shows position i · side / 112 of the padded face, whose pixel centres are
    whole numbers there: everything moves to the upper left, by 0.29 pixels of a face of 48. And an
    odd row or column of padding lies behind the face, but is counted half before it.

    Args:
        height, width: sides of the face in pixels.
    """
    extent, side = np.array([width, height]), max(height, width)
    padding = (side - extent) / 2
    return (0.5 * (1 - side / SIZE) + padding - padding // 1) / extent


def _normalise(faces: Maps) -> Maps:
    return (faces - jnp.array(MEAN_RGB)) / 255


def _dense_block(weights: Weights, name: str, x: Maps) -> Maps:
    """Halves the map; each later convolution sees the sum of all before."""
    first = _convolution if f"{name}/conv0/filters" in weights else _separable
    total = jax.nn.relu(first(weights, f"{name}/conv0", x, stride=2))
    seen = total
    for number in (1, 2, 3):
        total = total + _separable(weights, f"{name}/conv{number}", seen)
        seen = jax.nn.relu(total)
    return seen


def _reduction(weights: Weights, name: str, x: Maps) -> Maps:
    """Halves the map by a maximum, beside a 1×1 convolution with stride 2."""
    y = x
    for number in (0, 1):
        y = _separable(weights, f"{name}/separable_conv{number}", jax.nn.relu(y))
    y = functools.reduce(jnp.maximum, (part for _, part in _windows(y, 2, outside=-jnp.inf)))
    filters = weights[f"{name}/expansion_conv/filters"][0, 0]
    return y + _product(x[:, ::2, ::2], filters) + weights[f"{name}/expansion_conv/bias"]


def _convolution(weights: Weights, name: str, x: Maps, *, stride: int) -> Maps:
    y = jax.lax.conv_general_dilated(
        x,
        weights[f"{name}/filters"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return y + weights[f"{name}/bias"]


def _separable(weights: Weights, name: str, x: Maps, *, stride: int = 1) -> Maps:
    filters = weights[f"{name}/depthwise_filter"][..., 0]  # [3, 3, C]
    y = functools.reduce(
        jnp.add, (part * filters[at] for at, part in _windows(x, stride, outside=0))
    )
    return _product(y, weights[f"{name}/pointwise_filter"][0, 0]) + weights[f"{name}/bias"]


def _windows(x: Maps, stride: int, *, outside: float) -> Iterator[tuple[tuple[int, int], Maps]]:
    """What each place of a 3×3 window sees: ((row, column), maps), under TensorFlow's "same".

    Args:
        x: an even number of rows and columns, or stride 1.
        stride: 1, or 2; then the window reaches over the lower and right edge alone.
        outside: value around the map.
    """
    height, width = x.shape[1:3]
    before = 1 if stride == 1 else 0
    around = ((0, 0), (before, 1), (before, 1), (0, 0))
    x = jnp.pad(x, around, constant_values=outside)
    for row, column in itertools.product(range(3), range(3)):
        part = x[:, row : row + height : stride, column : column + width : stride]
        yield (row, column), part


def _product(x: Float[Array, "... c"], kernel: Float[Array, "c d"]) -> Float[Array, "... d"]:
    return jnp.matmul(x, kernel, precision="highest")


def _linear(weights: Weights, name: str, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
    return _product(x, weights[f"{name}/weights"]) + weights[f"{name}/bias"]
