"""Frozen kernels in 8 bits: whole numbers with a scale for each output channel, made once.

    kernel ≈ whole · scale,  whole in −127 … 127,  scale = max |kernel of the channel| / 127

The product takes one of two ways. Where the chip's matrix unit gains by it, activations become
whole numbers too, a scale for each token, and both are multiplied as int8 × int8 → int32 (W8A8
with dynamic scales, Yao et al. 2022, ZeroQuant, arXiv 2206.01861). Elsewhere the weights alone are
narrow, and become the network's dtype beside the product.

The gradient for the activations is that of the kernel's values in the network's dtype, as if they
had not been rounded (straight through); the kernel has none: it is frozen. Adapters, norms,
embeddings and biases stay as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from emollama_jax.sharding.target import target
from emollama_jax.terms import Frozen

LARGEST = 127
SCALE = "_scale"  # a kernel's path and this is its scale's
# Cycles of an int8 × int8 → int32 product as a share of bfloat16's, by the chip's name in JAX: the
# compiler's estimate of a matmul 8192×4096×4096, jax 0.10.2 with libtpu 0.0.42.1
# (docs/performance_details.md).
CYCLES = {
    "TPU v4": 1.08,
    "TPU v5 lite": 0.50,
    "TPU v5": 0.50,
    "TPU v6 lite": 0.75,
    "TPU7x": 1.15,
}


def narrow(
    kernel: Float[Array, "..."], *, axis: int = 0
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """A kernel as whole numbers and float32 scales.

    Args:
        kernel: kernel.
        axis: its inputs, over which a scale is shared; the scale lacks this axis.
    """
    kernel = kernel.astype(jnp.float32)
    scale = _scale(jnp.abs(kernel).max(axis, keepdims=True))
    whole = jnp.round(kernel / scale).astype(jnp.int8)
    return whole, jnp.squeeze(scale, axis)


def wide(
    whole: Int8[Array, "..."], scale: Float[Array, "..."], *, axis: int = 0
) -> Float[Array, "..."]:
    """The float32 values that `narrow` stands for."""
    return whole.astype(jnp.float32) * jnp.expand_dims(scale, axis)


def narrows_activations(frozen: Frozen) -> bool:
    """Whether products take activations as whole numbers too: "int8" asks the chip."""
    if frozen == "int8":
        return CYCLES.get(target().kind, 1.0) < 1
    return frozen == "int8_products"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    rows: Float[Array, "r i"],
    whole: Int8[Array, " i *o"],
    scale: Float[Array, "*o"],
    activations: bool,
) -> Float[Array, " r *o"]:
    """`rows @ kernel` in the dtype of the rows.

    Args:
        rows: activations of tokens.
        whole: kernel of `narrow`.
        scale: its scales.
        activations: whether they become whole numbers too.
    """
    over_inputs = (((1,), (0,)), ((), ()))
    if not activations:
        y = jax.lax.dot_general(
            rows, whole.astype(rows.dtype), over_inputs, preferred_element_type=jnp.float32
        )
        return (y * scale).astype(rows.dtype)
    values = rows.astype(jnp.float32)
    of_token = _scale(jnp.abs(values).max(1, keepdims=True))  # [R, 1]
    narrowed = jnp.round(values / of_token).astype(jnp.int8)
    y = jax.lax.dot_general(narrowed, whole, over_inputs, preferred_element_type=jnp.int32)
    of_token = of_token.reshape(-1, *[1] * (y.ndim - 1))
    return (y.astype(jnp.float32) * of_token * scale).astype(rows.dtype)


def _forward(rows: jax.Array, whole: jax.Array, scale: jax.Array, activations: bool):
    return product(rows, whole, scale, activations), (whole, scale)


def _backward(activations: bool, saved: tuple[jax.Array, jax.Array], grad: jax.Array):
    whole, scale = saved
    over_outputs = (tuple(range(1, grad.ndim)),) * 2
    scaled = (grad.astype(jnp.float32) * scale).astype(grad.dtype)
    rows = jax.lax.dot_general(scaled, whole.astype(grad.dtype), (over_outputs, ((), ())))
    return rows, None, None


product.defvjp(_forward, _backward)


def _scale(largest: jax.Array) -> jax.Array:
    """A channel of zeros has the scale 1."""
    return jnp.where(largest > 0, largest / LARGEST, 1.0)
