"""Scaled dot-product attention, one function with several implementations.

- `xla`: `jax.nn.dot_product_attention`, which runs everywhere.
- `splash`: the Pallas kernel for TPUs that JAX carries; elsewhere the same kernel is interpreted,
  slowly, so that a config that names it still runs.
- `auto`: `splash` where the program is compiled for a TPU, `xla` elsewhere.
- `cudnn`: NVIDIA's fused kernel through `jax.nn.dot_product_attention`.

Logits and softmax are float32 in all of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emollama_jax.config import Attention
from emollama_jax.errors import UserError
from emollama_jax.sharding.points import per_head

LANES = 128  # of a TPU's vector registers: head widths and blocks of splash are multiples of it
SPLASH_BLOCKS = (512, 384, 256, 128)  # queries or keys of a tile; the first that fits is taken


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    bias: Float[Array, "#b #n #t s"] | None = None,
    mask: Bool[Array, "#b #n #t s"] | None = None,
    causal: bool = False,
    implementation: Attention = "xla",
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention with logits and softmax in float32; K divides N.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the logits; `xla` only.
        mask: True where a query may look; a row that sees nothing attends evenly; `xla` only, or
            what `auto` gives `xla` in place of `causal`.
        causal: token i sees tokens 0 … i alone; queries and keys are the same tokens.
        implementation: see the module.

    Raises:
        UserError: `cudnn` without a GPU, or in float32; `splash` on a GPU.
    """
    with jax.named_scope("attention"):
        if implementation in ("auto", "splash"):
            kernel = functools.partial(_splash, causal=causal)
            plain = functools.partial(attention, mask=mask, causal=causal and mask is None)
            if implementation == "auto":
                return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=plain)
            if jax.default_backend() == "gpu":
                raise UserError("attention: splash is for TPUs, found a GPU: use cudnn or xla")
            slow = functools.partial(kernel, interpret=True)
            return jax.lax.platform_dependent(q, k, v, tpu=kernel, cpu=slow)
        if implementation == "cudnn":
            return _cudnn(q, k, v, causal=causal)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, is_causal=causal)


# ------------------------------------------------------------------ splash


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, interpret: bool = False
) -> jax.Array:
    """The Pallas kernel, on each device's own examples and heads: GSPMD cannot split it."""
    run = functools.partial(_splash_local, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = per_head(q.shape[0], k.shape[2])
        run = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(q, k, v)


def _splash_local(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    """Tokens are padded to whole blocks, head widths to whole registers.

    Padding stands on the right: causal queries never see it. Without that, segment ids keep it
    apart; its own rows see each other, so that none is empty.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = q.shape[1:]
    padded = -(-length // LANES) * LANES
    size = next(size for size in SPLASH_BLOCKS if padded % size == 0)
    kind = splash.CausalMask if causal else splash.FullMask
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([kind((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if not causal and padded > length:
        of_token = (jnp.arange(padded) >= length).astype(jnp.int32)
        segments = splash.SegmentIds(q=of_token, kv=of_token)

    def laid_out(x: jax.Array) -> jax.Array:
        rest = ((0, 0), (0, 0), (0, padded - length), (0, -width % LANES))
        return jnp.pad(x.transpose(0, 2, 1, 3), rest)  # [B, N, T, H]

    scaled = (q.astype(jnp.float32) / math.sqrt(width)).astype(q.dtype)
    out = jax.vmap(functools.partial(kernel, segment_ids=segments))(
        laid_out(scaled), laid_out(k), laid_out(v)
    )
    return out[:, :, :length, :width].transpose(0, 2, 1, 3)


# ------------------------------------------------------------------ cudnn


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    if jax.default_backend() != "gpu":
        raise UserError(
            f"attention: cudnn needs an NVIDIA GPU, found {jax.default_backend()}: use xla, or "
            "splash on a TPU"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"attention: cudnn computes in bfloat16, found {q.dtype}: use xla")
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
