"""Scaled dot-product attention, one function with several implementations.

- `xla`: runs everywhere. Causal attention without another mask skips the keys that a block of
  queries cannot see and keeps no [T, S] matrix for the backward pass (Dao et al. 2022,
  FlashAttention, here with the blocks laid out by hand); all else is
  `jax.nn.dot_product_attention`.
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
from jaxtyping import Array, Bool, Float, Int

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
    positions: Int[Array, "b t"] | None = None,
    implementation: Attention = "xla",
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention with logits and softmax in float32; K divides N.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the logits; `xla` only.
        mask: True where a query may look; a row that sees nothing attends evenly; `xla` only.
        causal: token i sees tokens 0 … i alone; queries and keys are the same tokens.
        positions: with `causal` alone, token i sees none of a later position either, so that
            padding on the left can be put behind what is real; `xla` only: the kernels take rows
            that begin at position 0.
        implementation: see the module.

    Raises:
        UserError: `cudnn` without a GPU, or in float32; `splash` on a GPU.
    """
    with jax.named_scope("attention"):
        if implementation in ("auto", "splash"):
            kernel = functools.partial(_splash, causal=causal)
            plain = functools.partial(attention, causal=causal, positions=positions)
            if implementation == "auto":
                return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=plain)
            if jax.default_backend() == "gpu":
                raise UserError("attention: splash is for TPUs, found a GPU: use cudnn or xla")
            slow = functools.partial(kernel, interpret=True)
            return jax.lax.platform_dependent(q, k, v, tpu=kernel, cpu=slow)
        if implementation == "cudnn":
            return _cudnn(q, k, v, causal=causal)
        if causal and bias is None and mask is None:
            return _causal(q, k, v, positions)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, is_causal=causal)


# ------------------------------------------------------------------ xla, causal


def _blocks(length: int) -> list[slice]:
    """Four blocks of queries or fewer: 5/8 of the [T, T] products are left, in few kernels."""
    size = max(-(-length // 4), LANES)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, N, H], [B, T, K, H] → [B, K, G, T, H], [B, K, T, H] with G = N / K."""
    batch, length, kv_heads, width = k.shape
    q = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _logits(q: jax.Array, k: jax.Array, rows: slice, positions: jax.Array | None) -> jax.Array:
    """Float32 [B, K, G, t, S] of a block of queries and the keys up to its end."""
    seen = k[:, :, : rows.stop]
    logits = jnp.einsum("bkgth,bksh->bkgts", q, seen, preferred_element_type=jnp.float32)
    visible = jnp.arange(rows.stop) <= jnp.arange(rows.start, rows.stop)[:, None]
    if positions is not None:
        seen, own = positions[:, None, : rows.stop], positions[:, rows, None]
        visible = (visible & (seen <= own))[:, None, None]  # [B, 1, 1, t, S]
    return jnp.where(visible, logits / math.sqrt(q.shape[-1]), -jnp.inf)


@jax.custom_vjp
def _causal(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Arguments and result of `attention`; no [T, T] array outlives a block of queries."""
    return _causal_forward(q, k, v, positions)[0]


def _causal_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array | None
) -> tuple[jax.Array, tuple]:
    """The result, and what the backward pass makes each block's weights from again."""
    qs, ks, vs = _heads_first(q, k, v)
    mixed, normalisers = [], []
    for rows in _blocks(q.shape[1]):
        logits = _logits(qs[:, :, :, rows], ks, rows, positions)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        seen = vs[:, :, : rows.stop]
        block = jnp.einsum(
            "bkgts,bksh->bkgth", weights.astype(v.dtype), seen, preferred_element_type=jnp.float32
        )
        mixed.append(block / total)
        normalisers.append(top + jnp.log(total))
    out = jnp.concatenate(mixed, 3).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, positions, out, jnp.concatenate(normalisers, 3))


def _causal_backward(saved: tuple, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradients of q, k and v; positions have none."""
    q, k, v, positions, out, normaliser = saved
    qs, ks, vs = _heads_first(q, k, v)
    os, gs = _heads_first(out, k, v)[0], _heads_first(grad, k, v)[0]
    # Σ weights · dweights of a row, without the weights: the row of the output times its gradient.
    inner = (os.astype(jnp.float32) * gs.astype(jnp.float32)).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32)
    for rows in _blocks(q.shape[1]):
        block, g = qs[:, :, :, rows], gs[:, :, :, rows]
        weights = jnp.exp(_logits(block, ks, rows, positions) - normaliser[:, :, :, rows])
        dweights = jnp.einsum(
            "bkgth,bksh->bkgts", g, vs[:, :, : rows.stop], preferred_element_type=jnp.float32
        )
        dlogits = weights * (dweights - inner[:, :, :, rows]) / math.sqrt(q.shape[-1])
        dlogits, weights = dlogits.astype(q.dtype), weights.astype(q.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq.append(product("bkgts,bksh->bkgth", dlogits, ks[:, :, : rows.stop]))
        dk = dk.at[:, :, : rows.stop].add(product("bkgts,bkgth->bksh", dlogits, block))
        dv = dv.at[:, :, : rows.stop].add(product("bkgts,bkgth->bksh", weights, g))
    dq = jnp.concatenate(dq, 3).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    dk, dv = (x.transpose(0, 2, 1, 3).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv, None


_causal.defvjp(_causal_forward, _causal_backward)


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
