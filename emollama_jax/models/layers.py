"""Layers that networks share: Linear with an optional adapter, norms, rotary, layer stacks.

Every parameter carries its logical axis names as the metadata `axes` (one name per dimension, see
`sharding/rules.py`), parameters are float32 at birth, computation is in the network's `dtype`,
norms and softmax are in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8, UInt8, UInt32

from emollama_jax.config import LoraConfig, Remat, RopeLlama3Config
from emollama_jax.models import eight_bits
from emollama_jax.models.remat import Policy, checkpointed
from emollama_jax.models.rngs import Module, Rngs, Shapes, stacked
from emollama_jax.sharding.points import SPLIT, features, parts_here
from emollama_jax.sharding.target import target
from emollama_jax.terms import Frozen

Init = Callable[[jax.Array, Sequence[int], Any], jax.Array]

torch_linear = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default
small_normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros


def param(init: Init, shape: Sequence[int], axes: Sequence[str | None], *, rngs: Rngs) -> nnx.Param:
    """A float32 parameter with its logical axis names; abstract where `rngs` is `Shapes`."""
    if isinstance(rngs, Shapes):
        return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), jnp.float32), axes=tuple(axes))
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def make_kernel(
    init: Init,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    frozen: Frozen,
    rngs: Rngs,
) -> tuple[nnx.Param, nnx.Param | None]:
    """A kernel [in, …] and, if it is frozen in 8 bits, its scale, else None.

    The scale is split as the outputs are over `tensor`, and whole along `fsdp`: it is small.
    """
    whole = param(init, shape, axes, rngs=rngs)
    if frozen == "float":
        return whole, None
    of_scale = tuple(axis if axis in SPLIT else None for axis in axes[1:])
    if isinstance(rngs, Shapes):
        scale = jax.ShapeDtypeStruct(tuple(shape[1:]), jnp.float32)
        whole.set_value(jax.ShapeDtypeStruct(tuple(shape), jnp.int8))
    else:
        narrowed, scale = eight_bits.narrow(whole[...])
        whole.set_value(narrowed)
    return whole, nnx.Param(scale, axes=of_scale)


def normalise(
    frames: UInt8[Array, "*b 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b 3"]:
    """uint8 pixels to float32 (x / 255 − mean) / std, channel by channel."""
    x = frames.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


ROWS = 8  # of a TPU's vector register


def dot(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], *, out: str | None = None
) -> Float[Array, "... o"]:
    """`x @ kernel` over flattened tokens, in the dtype `out` (that of x by default).

    The same numbers. On a CPU, XLA gets the kernel's gradient of more than two axes by transposing
    them in memory first, which takes longer than the product.
    """
    return _of_tokens(lambda rows: jnp.matmul(rows, kernel, preferred_element_type=out), x)


def kernel_product(
    x: Float[Array, "... i"],
    kernel: Float[Array, " i *o"] | Int8[Array, " i *o"],
    scale: nnx.Param | None,
    *,
    frozen: Frozen,
) -> Float[Array, "..."]:
    """`x @ kernel` of what `make_kernel` made, in the dtype of x."""
    if scale is not None:
        how = eight_bits.narrows_activations(frozen)
        return _of_tokens(lambda rows: eight_bits.product(rows, kernel, scale[...], how), x)
    kernel = kernel.astype(x.dtype)
    if kernel.ndim == 2:
        return dot(x, kernel)
    return jnp.tensordot(x, kernel, axes=1)


def _of_tokens(
    product: Callable[[Float[Array, "r i"]], Float[Array, " r *o"]], x: Float[Array, "... i"]
) -> Float[Array, "..."]:
    y = whole_registers(product, x.reshape(-1, x.shape[-1]), parts=parts_here(x.shape[0]))
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def whole_registers(
    product: Callable[[Float[Array, "r i"]], Float[Array, " r *o"]],
    rows: Float[Array, "r i"],
    *,
    parts: int,
) -> Float[Array, " r *o"]:
    """`product(rows)`; on a TPU, each device's rows are padded to `ROWS` for it.

    XLA:TPU multiplies and adds a single row without the matrix unit, in 18 times the cycles that
    two rows take; and eight take no more than two (docs/performance_details.md).

    Args:
        product: computes each row by itself.
        rows: those of all devices.
        parts: number of devices that share them.
    """
    here = rows.shape[0] // parts
    if here >= ROWS or target().platform != "tpu":
        return product(rows)
    split = jnp.pad(rows.reshape(parts, here, -1), ((0, 0), (0, ROWS - here), (0, 0)))
    # Else the compiler takes the padding away again.
    padded = jax.lax.optimization_barrier(split.reshape(parts * ROWS, -1))
    y = product(padded)
    return y.reshape(parts, ROWS, *y.shape[1:])[:, :here].reshape(-1, *y.shape[1:])


class Linear(nnx.Module):
    """`x @ kernel + bias`, with PEFT's low-rank update where `lora` asks for it.

    Attributes:
        kernel: float32 [in, out]; the transpose of PyTorch's `weight`. int8 if frozen so.
        kernel_scale: float32 [out], of an int8 kernel (`eight_bits.py`), or None.
        bias: float32 [out], or None.
        lora_A, lora_B: float32 [in, rank] and [rank, out], or None. B starts at zero.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool,
        dtype: str,
        rngs: Rngs,
        lora: LoraConfig | None = None,
        frozen: Frozen = "float",
    ):
        self.kernel, self.kernel_scale = make_kernel(
            torch_linear, (in_width, out_width), axes, frozen=frozen, rngs=rngs
        )
        self.bias = param(zeros, (out_width,), axes[1:], rngs=rngs) if bias else None
        self.dtype = dtype
        self.features = axes[1]
        self.frozen = frozen
        self.lora = lora if lora is not None and lora.rank > 0 else None
        if self.lora is None:
            self.lora_A = self.lora_B = None
        else:
            rank = self.lora.rank
            self.lora_A = param(torch_linear, (in_width, rank), (axes[0], "rank"), rngs=rngs)
            self.lora_B = param(zeros, (rank, out_width), ("rank", axes[1]), rngs=rngs)

    def __call__(
        self, x: Float[Array, "... i"], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "... o"]:
        x = x.astype(self.dtype)
        y = kernel_product(x, self.kernel[...], self.kernel_scale, frozen=self.frozen)
        if self.bias is not None:
            y = y + self.bias.astype(self.dtype)
        if self.lora_A is not None:
            low = dot(dropout(x, self.lora.dropout, dropout_key), self.lora_A.astype(self.dtype))
            high = dot(low, self.lora_B.astype(self.dtype))
            y = y + high * (self.lora.alpha / self.lora.rank)
        return features(y, self.features)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, statistics in float32."""

    def __init__(self, width: int, *, eps: float, rngs: Rngs, axis: str = "embed"):
        self.scale = param(nnx.initializers.ones, (width,), (axis,), rngs=rngs)
        self.bias = param(zeros, (width,), (axis,), rngs=rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        # The two-pass variance: E[x²] - E[x]² loses digits on EVA's large activations.
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), in float32."""

    def __init__(self, width: int, *, eps: float, rngs: Rngs):
        self.scale = param(nnx.initializers.ones, (width,), ("embed",), rngs=rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU of BERT, EVA and Swin, x·Φ(x), by erf as PyTorch computes it.

    `jax.nn.gelu(approximate=False)` takes erfc, three times as slow on a CPU.
    """
    half = jnp.asarray(0.5, x.dtype)
    return half * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Inverted dropout; no key means evaluation."""
    if key is None or rate == 0:
        return x
    keep = hashed_bits(key, x.shape) < jnp.uint32(round((1 - rate) * 2**32))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def hashed_bits(key: jax.Array, shape: Sequence[int]) -> UInt32[Array, "..."]:
    """Random bits for masks, by hashing each element's place with a key.

    `jax.random.bits` (Threefry, 20 rounds) would be most of a layer's instructions, and much of
    the time to compile it for a TPU. Dropout asks for less than cryptography, and as there, an
    element's bits do not depend on how the array is sharded.

    Args:
        key: one key.
        shape: at least one axis; rows (all axes but the last) are counted in 32 bits.
    """
    first, second = jax.random.key_data(key)[:2]
    rows = jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32).reshape(*shape[:-1], 1)
    columns = jnp.arange(shape[-1], dtype=jnp.uint32)
    return _mix(_mix(_mix(rows ^ first) ^ second) ^ _mix(columns + second))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """lowbias32 (Wellons, "Prospecting for Hash Functions", 2018): each bit moves half of all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def with_again(x: Float[Array, "f ..."], again: Int[Array, "b x"] | None) -> Float[Array, "p ..."]:
    """Rows' frames, F = B · M, and behind each row's own, some of them again, P = B · (M + X).

    A product with ones and zeros, of which a gradient is one too: a gather's would be a scatter.
    """
    if again is None or again.shape[1] == 0:
        return x
    frames = x.reshape(again.shape[0], -1, *x.shape[1:])  # [B, M, …]
    chosen = jax.nn.one_hot(again, frames.shape[1], dtype=x.dtype)  # [B, X, M]
    copies = jnp.einsum("bxm,bm...->bx...", chosen, frames, precision="highest")
    return jnp.concatenate([frames, copies], axis=1).reshape(-1, *x.shape[1:])


def split_keys(key: jax.Array | None, n: int) -> Sequence[jax.Array | None]:
    """n dropout keys, or n times None in evaluation."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def rotary(
    x: Float[Array, "b t n h"],
    positions: Int[Array, "#b t"],
    *,
    theta: float,
    scaling: float,
    llama3: RopeLlama3Config | None,
) -> Float[Array, "b t n h"]:
    """Rotary position embedding in LLaMA's half-split layout (`transformers` `rotate_half`).

    Args:
        x: queries or keys.
        positions: position of each token; one row for all where they are the same.
        theta: base of the wavelengths.
        scaling: positions are divided by it (linear interpolation).
        llama3: Llama 3.1's scaling of the wavelengths; None for none.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if llama3 is not None:
        frequency = frequency / stretch(2 * math.pi / frequency, llama3)
    angle = positions.astype(jnp.float32)[..., None] / scaling * frequency  # [B, T, H/2]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def stretch(wavelength: Float[Array, " w"], cfg: RopeLlama3Config) -> Float[Array, " w"]:
    """By what Llama 3.1 multiplies rotary wavelengths: 1 for short ones, `factor` for long ones.

    Between the two the frequency, not the wavelength, is blended.
    """
    low, high = cfg.low_freq_factor, cfg.high_freq_factor
    share = jnp.clip((cfg.original_max_positions / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / cfg.factor + share)


def stack(make: Callable[[Rngs], Module], depth: int, *, rngs: Rngs) -> Module:
    """`depth` layers as one module whose parameters have a leading axis `layers`."""
    layers = stacked(make, depth, rngs=rngs)
    for _, leaf in nnx.iter_graph(layers):
        if isinstance(leaf, nnx.Param):
            leaf.set_metadata("axes", ("layers", *leaf.axes))
    return layers


def scan(
    layers: Module,
    step: Callable[[Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: Remat | Policy,
) -> tuple[Any, Any]:
    """Runs stacked layers one after the other: one layer's code is compiled once.

    Args:
        layers: layers from `stack`.
        step: (layer, carry, x) → (carry, y).
        carry: input of the first layer.
        xs: a tree with a leading layer axis (dropout keys, caches), or None.
        remat: what is kept for the backward pass, see `remat.py`.

    Returns:
        What leaves the last layer, and the stacked ys.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, layer):
        state, x = layer
        return step(nnx.merge(graphdef, state), carry, x)

    return jax.lax.scan(checkpointed(body, remat), carry, (state, xs))
