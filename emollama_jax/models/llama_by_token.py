"""LLaMA laid out for a CPU, where many answers grow token by token (docs/performance_details.md).

The mathematics is `LlamaLayer`'s and `Llama`'s; only the arrays differ:

- each layer's kernels are arrays of their own: a slice of a stack is copied for every token;
- kernels are [out, in], on the left of their products, which read them in order; adapters are
  merged into them;
- each layer's cache is an array of its own, heads before slots, written in place, then read.

Prompts still run over the stack, whose program holds one layer's code: the kernels here are a
second copy.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.models import eight_bits
from emollama_jax.models.attention import attention_up_to
from emollama_jax.models.layers import Linear, RMSNorm
from emollama_jax.models.llama import KVCache, Llama, LlamaOutput
from emollama_jax.models.parameters import ADAPTERS

LEAST, MOST = 64, 4096  # MiB of the layers' kernels that are worth a second copy


@flax.struct.dataclass
class LayerCache:
    """Keys (after rotation) and values of one layer; slot = position."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    used: jax.Array | None = None  # int32 [], slots to read; None: as far as the last position

    def attend(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b t k h"],
        v: Float[Array, "b t k h"],
        *,
        positions: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t n h"], "LayerCache"]:
        """As `KVCache.attend`; the result has the new keys and values in it."""

        def row(slots: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:  # [K, S, H]
            new = new.swapaxes(0, 1).astype(slots.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=1)

        write = jax.vmap(row)
        after = LayerCache(k=write(self.k, k, positions[:, 0]), v=write(self.v, v, positions[:, 0]))
        used = positions.max() + 1 if self.used is None else self.used
        return attention_up_to(q, after.k, after.v, last=positions, used=used), after


class LeftLinear(nnx.Module):
    """A float32 `Linear` for few rows: no bias, the kernel [out, in], the adapter merged."""

    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel

    def __call__(
        self, x: Float[Array, "... i"], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "... o"]:
        """As `Linear`; no dropout is drawn."""
        columns = jnp.einsum("oi,ri->or", self.kernel[...], x.reshape(-1, x.shape[-1]))
        # Else XLA turns the product around, the kernel on the right, to spare the transpose.
        columns = jax.lax.optimization_barrier(columns)
        return columns.T.reshape(*x.shape[:-1], -1)


class LlamaByToken(Llama):
    """What the decode loop takes for a `Llama`; embedding and last norm are the same leaves.

    Attributes:
        layers: one `LlamaLayer`, each of whose parameters is a tuple of L arrays.
    """

    def __init__(self, llama: Llama):
        self.cfg = llama.cfg
        self.embed_tokens, self.norm = llama.embed_tokens, llama.norm
        self.layers = nnx.merge(*nnx.split(llama.layers))
        for name, child in vars(llama.layers).items():
            if isinstance(child, Linear):
                kernels = tuple(map(_turned, _merged(child)))
                setattr(self.layers, name, LeftLinear(nnx.Param(kernels)))
            elif isinstance(child, RMSNorm):
                getattr(self.layers, name).scale = nnx.Param(tuple(child.scale[...]))
        head = llama.lm_head
        self.head = LeftLinear(
            llama.embed_tokens if head is None else nnx.Param(_turned(_merged(head)))
        )

    def take(self, cache: KVCache) -> list[LayerCache]:
        """What `Llama` has written."""
        heads = self.cfg.kv_heads
        k, v = (rearrange(x, "l b s (k h) -> l b k s h", k=heads) for x in (cache.k, cache.v))
        return [LayerCache(k=k[i], v=v[i]) for i in range(self.cfg.layers)]

    def bounded(self, cache: Sequence[LayerCache], used: Int[Array, ""]) -> list[LayerCache]:
        """As `Llama.bounded`."""
        return [one.replace(used=used) for one in cache]

    def rows(self, cache: Sequence[LayerCache], which: Int[Array, " r"]) -> KVCache:
        """As `Llama.rows`."""

        def turned(layers: Sequence[jax.Array]) -> jax.Array:
            return rearrange(jnp.stack([x[which] for x in layers]), "l r k s h -> l r s (k h)")

        return KVCache(k=turned([one.k for one in cache]), v=turned([one.v for one in cache]))

    def stored(
        self, cache: Sequence[LayerCache], new: KVCache, which: Int[Array, " r"]
    ) -> list[LayerCache]:
        """As `Llama.stored`."""

        def store(slots: jax.Array, new: jax.Array) -> jax.Array:
            for i in range(len(new)):
                slots = jax.lax.dynamic_update_slice(slots, new[i : i + 1], (which[i], 0, 0, 0))
            return slots

        layers = zip(cache, self.take(new), strict=True)
        return [jax.tree.map(store, old, layer) for old, layer in layers]

    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        cache: Sequence[LayerCache],
    ) -> LlamaOutput:
        """As `Llama`; `cache` is of `take`, then of the call before."""
        graphdef, state = nnx.split(self.layers)
        leaves, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, tuple))
        x, after = embeds, []
        for parameters, earlier in zip(zip(*leaves, strict=True), cache, strict=True):
            layer = nnx.merge(graphdef, tree.unflatten(parameters))
            x, written = layer(x, positions=positions, cache=earlier, dropout_key=None)
            after.append(written)
        return LlamaOutput(hidden=self.norm(x), cache=after)

    def _products(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        return self.head(hidden)


def laid_out(llama: Llama, *, least: int | None = None) -> Llama:
    """The decoder as many answers are drawn from it.

    In bfloat16, adapters are in bfloat16 too: else each token would convert them again. In float32
    on one CPU, `by_token` stands beside it, unless the kernels fit the caches anyway, or a second
    copy of them might not fit the memory.

    Args:
        llama: the decoder.
        least: MiB of kernels that are worth a second copy; `LEAST` by default.
    """
    if llama.cfg.dtype != "float32":
        return _narrow(llama)
    kernels = [child.kernel for child in vars(llama.layers).values() if isinstance(child, Linear)]
    mebibytes = sum(4 * kernel.size for kernel in kernels) / 2**20
    least = LEAST if least is None else least
    fits = least <= mebibytes <= MOST
    if not fits or jax.default_backend() != "cpu" or kernels[0].sharding.num_devices > 1:
        return llama
    both = nnx.merge(*nnx.split(llama))
    both.by_token = nnx.data(LlamaByToken(both))
    return both


def _narrow(llama: Llama) -> Llama:
    """With adapters in the dtype in which they are multiplied."""

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_one = any(getattr(part, "key", None) in ADAPTERS for part in path)
        return leaf.astype(llama.cfg.dtype) if is_one else leaf

    graphdef, state = nnx.split(llama)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(cast, state))


def _merged(linear: Linear) -> Float[np.ndarray, "*l i o"]:
    """The kernel, its adapter added."""
    kernel = linear.kernel[...]
    if linear.kernel_scale is not None:
        kernel = eight_bits.wide(kernel, linear.kernel_scale[...], axis=-2)
    if linear.lora is not None:
        update = linear.lora_A[...] @ linear.lora_B[...]
        kernel = kernel + update * (linear.lora.alpha / linear.lora.rank)
    return np.asarray(kernel, np.float32)


def _turned(kernel: Float[np.ndarray, "i o"]) -> Float[Array, "o i"]:
    return jnp.asarray(np.ascontiguousarray(kernel.T))
