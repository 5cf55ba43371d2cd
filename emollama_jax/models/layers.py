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
from jaxtyping import Array, Float, Int, UInt8, UInt32

from emollama_jax.config import LoraConfig, Remat, RopeLlama3Config
from emollama_jax.models.rngs import Module, Rngs, Shapes, stacked
from emollama_jax.sharding.points import features

Init = Callable[[jax.Array, Sequence[int], Any], jax.Array]

torch_linear = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default
small_normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros


def param(init: Init, shape: Sequence[int], axes: Sequence[str | None], *, rngs: Rngs) -> nnx.Param:
    """A float32 parameter with its logical axis names; abstract where `rngs` is `Shapes`."""
    if isinstance(rngs, Shapes):
        return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), jnp.float32), axes=tuple(axes))
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def normalise(
    frames: UInt8[Array, "*b 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b 3"]:
    """uint8 pixels to float32 (x / 255 − mean) / std, channel by channel."""
    x = frames.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def dot(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """`x @ kernel` over flattened tokens.

    The same numbers. On a CPU, XLA gets the kernel's gradient of more than two axes by transposing
    them in memory first, which takes longer than the product.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Module):
    """`x @ kernel + bias`, with PEFT's low-rank update where `lora` asks for it.

    Attributes:
        kernel: float32 [in, out]; the transpose of PyTorch's `weight`.
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
        init: Init = torch_linear,
        lora: LoraConfig | None = None,
    ):
        self.kernel = param(init, (in_width, out_width), axes, rngs=rngs)
        self.bias = param(zeros, (out_width,), axes[1:], rngs=rngs) if bias else None
        self.dtype = dtype
        self.features = axes[1]
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
        y = dot(x, self.kernel.astype(self.dtype))
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
    remat: Remat,
) -> tuple[Any, Any]:
    """Runs stacked layers one after the other: one layer's code is compiled once.

    Args:
        layers: layers from `stack`.
        step: (layer, carry, x) → (carry, y).
        carry: input of the first layer.
        xs: a tree with a leading layer axis (dropout keys, caches), or None.
        remat: "none" keeps all activations, "dots" keeps matrix products, "full" keeps carries.

    Returns:
        What leaves the last layer, and the stacked ys.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, layer):
        state, x = layer
        return step(nnx.merge(graphdef, state), carry, x)

    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)  # scan keeps the two passes apart
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    return jax.lax.scan(body, carry, (state, xs))
