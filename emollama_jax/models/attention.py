"""Scaled dot-product attention, one function with several implementations.

- `xla`: runs everywhere. Causal attention skips the keys that a block of
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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.config import Attention
from emollama_jax.errors import UserError
from emollama_jax.models.layers import ROWS
from emollama_jax.sharding.points import per_head
from emollama_jax.sharding.target import target
from emollama_jax.terms import Kept

LANES = 128  # of a TPU's vector registers: head widths and blocks of splash are multiples of it
SLOTS_BLOCK = 128  # slots of a cache that are read at a time, token by token
KEPT: Kept = "attention"  # name of what a backward pass may find here, see `remat.py`
SPLASH_BLOCKS = (512, 384, 256, 128)  # queries or keys of a tile; the first that fits is taken


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    causal: bool = False,
    positions: Int[Array, "b t"] | None = None,
    segments: Int[Array, "b t"] | None = None,
    implementation: Attention = "xla",
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention with logits and softmax in float32; K divides N.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: token i sees tokens 0 … i alone; queries and keys are the same tokens.
        positions: with `causal` alone, token i sees none of a later position either, so that
            padding on the left can be put behind what is real; `xla` only: the kernels take rows
            that begin at position 0.
        segments: with `causal` alone, a token sees none of another segment of its row: examples
            share it.
        implementation: see the module.

    Raises:
        UserError: `cudnn` without a GPU, or in float32; `splash` on a GPU.
    """
    with jax.named_scope("attention"):
        platform = target().platform
        if implementation == "auto":
            implementation = "splash" if platform == "tpu" else "xla"
        if implementation == "splash":
            if platform == "gpu":
                raise UserError("attention: splash is for TPUs, found a GPU: use cudnn or xla")
            how = {"causal": causal, "segments": segments, "interpret": platform != "tpu"}
            return _splash(q, k, v, **how)
        if implementation == "cudnn":
            return checkpoint_name(_cudnn(q, k, v, causal=causal, segments=segments), KEPT)
        if causal:
            return checkpoint_name(_causal(q, k, v, positions, segments), KEPT)
        return jax.nn.dot_product_attention(q, k, v)


def attention_after(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    *,
    earlier: tuple[Float[Array, "b s kh"], Float[Array, "b s kh"]],
    count: Int[Array, " b"],
) -> Float[Array, "b t n h"]:
    """Attention of new tokens over keys and values that are there already, and among themselves.

    The two are not put together in memory: one softmax goes over both. Products and softmax are
    float32.

    Args:
        q: queries of the new tokens.
        k: their keys.
        v: their values.
        earlier: keys and values, only read, heads side by side.
        count: number of earlier tokens seen in each row; token i also sees new tokens 0 … i.
    """
    with jax.named_scope("attention"):
        tokens, kv_heads, width = k.shape[1:]
        own = rearrange(jnp.arange(q.shape[2] * tokens) % tokens, "(k r) -> k r", k=kv_heads)
        rows = rearrange(q, "b t (k g) h -> b k (g t) h", k=kv_heads)
        split = functools.partial(rearrange, pattern="b s (j d) -> b s j d")
        parts = _parts_of_heads(kv_heads, rows=rows.shape[2])
        if parts < kv_heads:
            rows, own = _side_by_side(rows, parts), _in_registers(own.reshape(parts, -1), 1)
        else:
            rows, own = _in_registers(rows, 2), _in_registers(own, 1)

        def logits(keys: jax.Array, seen: jax.Array) -> jax.Array:
            products = _product("bjrd,bsjd->bjrs", rows, keys) / math.sqrt(width)
            return jnp.where(seen, products, -jnp.inf)

        old_k, old_v, new_k, new_v = (
            split(x.reshape(*x.shape[:2], -1), j=parts) for x in (*earlier, k, v)
        )
        places = jnp.arange(old_k.shape[1])
        old = logits(old_k, (places < count[:, None])[:, None, None])
        new = logits(new_k, jnp.arange(tokens) <= own[..., None])
        top = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
        old, new = jnp.exp(old - top), jnp.exp(new - top)
        total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
        mixed = _product("bjrs,bsjd->bjrd", old.astype(v.dtype), old_v)
        mixed += _product("bjrs,bsjd->bjrd", new.astype(v.dtype), new_v)
        mixed = _of_own_heads(mixed / total, kv_heads, count=q.shape[2] // kv_heads * tokens)
        return rearrange(mixed, "b k (g t) h -> b t (k g) h", t=tokens).astype(q.dtype)


def _parts_of_heads(kv_heads: int, *, rows: int) -> int:
    """In how many parts `attention_after` takes the heads: each by itself, or on a TPU side by side
    as far as they are on one device, where that makes no more rows than a product takes at once.

    A head's few queries would meet a slice of each slot, 1/K of its tiles, for which the compiler
    lays out the whole cache anew: 13.7 Mcycles against 3.2 for four layers of 8 rows, 2,176 slots
    and 32 heads on v5e.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = dict(mesh.shape).get("tensor", 1) if not mesh.empty else 1
    if target().platform != "tpu" or kv_heads % parts or kv_heads // parts * rows > LANES:
        return kv_heads
    return parts


def _side_by_side(rows: Float[Array, "b k r h"], parts: int) -> Float[Array, "b j p d"]:
    """Queries against all heads of their part, zeros where a head is not their own."""
    rows = rearrange(rows, "b (j k) r h -> b j k r h", j=parts)
    own = jnp.eye(rows.shape[2], dtype=rows.dtype)
    return _in_registers(
        rearrange(jnp.einsum("bjkrh,ki->bjkrih", rows, own), "b j k r i h -> b j (k r) (i h)"), 2
    )


def _of_own_heads(
    mixed: Float[Array, "b j p d"], kv_heads: int, *, count: int
) -> Float[Array, "b k r h"]:
    """What each of a head's `count` queries has of its own head, padding taken away."""
    parts = mixed.shape[1]
    heads = kv_heads // parts
    mixed = rearrange(
        mixed[:, :, : heads * count], "b j (k r) (i h) -> b j k r i h", k=heads, i=heads
    )
    own = jnp.eye(heads, dtype=mixed.dtype)
    return rearrange(jnp.einsum("bjkrih,ki->bjkrh", mixed, own), "b j k r h -> b (j k) r h")


def _in_registers(rows: jax.Array, axis: int) -> jax.Array:
    """On a TPU, rows along an axis padded to `ROWS`: see `layers.whole_registers`."""
    missing = ROWS - rows.shape[axis]
    if missing <= 0 or target().platform != "tpu":
        return rows
    padded = jnp.pad(rows, [(0, missing if i == axis else 0) for i in range(rows.ndim)])
    return jax.lax.optimization_barrier(padded)


def attention_up_to(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    *,
    last: Int[Array, "b t"],
    used: Int[Array, ""],
) -> Float[Array, "b t n h"]:
    """Attention of tokens over slots that hold their own keys and values too.

    Heads stand before slots: so neither product has to transpose them. Products and softmax are
    float32. Slots are read in blocks, as far as `used`; a block that a row sees nothing of leaves
    the row's numbers as they are, to the last bit.

    Args:
        q: queries.
        k: keys by slot.
        v: values by slot.
        last: the last slot that each query sees.
        used: slots to read; rows that see more than these are not needed.
    """
    with jax.named_scope("attention"):
        slots, block = k.shape[2], min(SLOTS_BLOCK, k.shape[2])
        queries = rearrange(q, "b t (k g) h -> b k (g t) h", k=k.shape[1])
        ends = jnp.tile(last, q.shape[2] // k.shape[1])[:, None, :, None]

        def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, mixed = carry
            first = number * block
            start = jnp.minimum(first, slots - block)  # the last block may begin earlier
            keys = jax.lax.dynamic_slice_in_dim(k, start, block, axis=2)
            values = jax.lax.dynamic_slice_in_dim(v, start, block, axis=2)
            places = start + jnp.arange(block)
            logits = _product("bkrh,bksh->bkrs", queries, keys) / math.sqrt(q.shape[-1])
            logits = jnp.where((places >= first) & (places <= ends), logits, -jnp.inf)
            highest = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights, kept = jnp.exp(logits - highest), jnp.exp(top - highest)
            new = _product("bkrs,bksh->bkrh", weights.astype(v.dtype), values)
            total = total * kept + weights.sum(-1, keepdims=True)
            return highest, total, mixed * kept + new

        zeros = jnp.zeros((*queries.shape[:-1], 1), jnp.float32)
        start = zeros - jnp.inf, zeros, jnp.zeros(queries.shape, jnp.float32)
        blocks = -(-jnp.minimum(used, slots) // block)
        _, total, mixed = jax.lax.fori_loop(0, blocks, step, start)
        return rearrange(mixed / total, "b k (g t) h -> b t (k g) h", t=q.shape[1]).astype(q.dtype)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


# ------------------------------------------------------------------ xla, causal


def _blocks(length: int) -> list[slice]:
    """Four blocks of queries or fewer: 5/8 of the [T, T] products are left, in few kernels."""
    size = max(-(-length // 4), LANES)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


@jax.custom_vjp
def _causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
) -> jax.Array:
    """Arguments and result of `attention`; no [T, T] array outlives a block of queries."""
    return _causal_forward(q, k, v, positions, segments)[0]


def _causal_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
) -> tuple[jax.Array, tuple]:
    """The result, and what the backward pass makes each block's weights from again."""
    out, normalisers = _each(_example_forward, (q, k, v, positions, segments))
    normalisers = jax.tree.map(lambda x: checkpoint_name(x, KEPT), normalisers)
    return out, (q, k, v, positions, segments, normalisers)


def _causal_backward(saved: tuple, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradients of q, k and v; positions and segments have none."""
    return *_each(_example_backward, (*saved, grad)), None, None


_causal.defvjp(_causal_forward, _causal_backward)


def _each(run: Callable, arrays: tuple) -> tuple[jax.Array, ...]:
    """`run` for every example.

    On a CPU one after the other: an example's [t, S] arrays stay in the caches, and all of it takes
    half the time. Where several devices share the examples, a loop would take them apart.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1):
        return jax.lax.map(run, arrays)
    return jax.vmap(run)(arrays)


def _by_head(x: Float[Array, "t n h"], kv_heads: int) -> Float[Array, "k g t h"]:
    """Heads first, in groups that share a key; keys and values are groups of one."""
    return rearrange(x, "t (k g) h -> k g t h", k=kv_heads)


def _of_block(x: Float[Array, "k g t h"], rows: slice) -> Float[Array, "k gt h"]:
    """A block's queries, those of a group one after the other: products of three axes."""
    return rearrange(x[:, :, rows], "k g t h -> k (g t) h")


def _seen(
    rows: slice,
    group: int,
    positions: jax.Array | None,
    segments: jax.Array | None,
    *,
    keys: int,
) -> Bool[Array, "gt s"] | Bool[Array, "s gt"]:
    """Which keys up to a block's end each of its queries sees; `keys` is their axis."""
    seen = jnp.bool_(True)
    for x, sees in (
        (jnp.arange(rows.stop), jnp.less_equal),
        (positions, jnp.less_equal),
        (segments, jnp.equal),
    ):
        if x is not None:
            own = jnp.tile(x[rows], group)
            seen &= sees(jnp.expand_dims(x[: rows.stop], 1 - keys), jnp.expand_dims(own, keys))
    return seen


def _example_forward(
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None],
) -> tuple[Float[Array, "t n h"], tuple[Float[Array, "k _"], ...]]:
    """One example's result, and the logarithms of the softmax' denominators, block by block."""
    q, k, v, positions, segments = arrays
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    qs, ks, vs = _by_head(q, kv_heads), _by_head(k, kv_heads)[:, 0], _by_head(v, kv_heads)[:, 0]
    mixed, normalisers = [], []
    for rows in _blocks(q.shape[0]):
        logits = _product("kth,ksh->kts", _of_block(qs, rows), ks[:, : rows.stop])
        seen = _seen(rows, group, positions, segments, keys=1)
        logits = jnp.where(seen, logits / math.sqrt(q.shape[-1]), -jnp.inf)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        block = _product("kts,ksh->kth", weights.astype(v.dtype), vs[:, : rows.stop]) / total
        mixed.append(rearrange(block, "k (g t) h -> t (k g) h", g=group))
        normalisers.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(mixed).astype(q.dtype), tuple(normalisers)


def _example_backward(arrays: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One example's gradients.

    Logits stand with keys first, [K, S, G·t]: so none of the three products that read their
    gradient and the weights has to transpose them.
    """
    q, k, v, positions, segments, normalisers, grad = arrays
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    qs, ks, vs, gs = (_by_head(x, kv_heads) for x in (q, k, v, grad))
    ks, vs, scale = ks[:, 0], vs[:, 0], 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = [], jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32)
    for rows, normaliser in zip(_blocks(q.shape[0]), normalisers, strict=True):
        block, g = _of_block(qs, rows), _of_block(gs, rows)
        logits = _product("ksh,kth->kst", ks[:, : rows.stop], block) * scale
        seen = _seen(rows, group, positions, segments, keys=0)
        logits = jnp.where(seen, logits, -jnp.inf)
        weights = jnp.exp(logits - normaliser[:, None])
        dweights = _product("ksh,kth->kst", vs[:, : rows.stop], g)
        inner = (weights * dweights).sum(1, keepdims=True)
        dlogits = (weights * (dweights - inner) * scale).astype(q.dtype)
        of_queries = _product("ksh,kst->kht", ks[:, : rows.stop], dlogits)
        dq.append(rearrange(of_queries, "k h (g t) -> t (k g) h", g=group))
        dk = dk.at[:, : rows.stop].add(_product("kst,kth->ksh", dlogits, block))
        dv = dv.at[:, : rows.stop].add(_product("kst,kth->ksh", weights.astype(v.dtype), g))
    dk, dv = (rearrange(x, "k s h -> s k h") for x in (dk, dv))
    return jnp.concatenate(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


# ------------------------------------------------------------------ splash


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segments: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas kernel, on each device's own examples and heads: GSPMD cannot split it."""
    run = functools.partial(_splash_local, causal=causal, interpret=interpret)
    given = (q, k, v) if segments is None else (q, k, v, segments)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = per_head(q.shape[0], k.shape[2])
        specs = (spec,) * 3 + (PartitionSpec(spec[0]),) * (len(given) - 3)
        run = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
    return run(*given)


def _splash_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    causal: bool,
    interpret: bool,
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
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, padded - length)))
    elif not causal and padded > length:
        segments = jnp.broadcast_to(jnp.arange(padded) >= length, (q.shape[0], padded))

    def laid_out(x: jax.Array) -> jax.Array:
        rest = ((0, 0), (0, 0), (0, padded - length), (0, -width % LANES))
        return jnp.pad(x.transpose(0, 2, 1, 3), rest)  # [B, N, T, H]

    scaled = (q.astype(jnp.float32) / math.sqrt(width)).astype(q.dtype)

    def of_example(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        if ids is None:
            return kernel(q, k, v)
        ids = ids.astype(jnp.int32)
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))

    out = jax.vmap(of_example)(laid_out(scaled), laid_out(k), laid_out(v), segments)
    return out[:, :, :length, :width].transpose(0, 2, 1, 3)


# ------------------------------------------------------------------ cudnn


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, segments: jax.Array | None
) -> jax.Array:
    if jax.default_backend() != "gpu":
        raise UserError(
            f"attention: cudnn needs an NVIDIA GPU, found {jax.default_backend()}: use xla, or "
            "splash on a TPU"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"attention: cudnn computes in bfloat16, found {q.dtype}: use xla")
    mask = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
    )


def attend(
    q: Float[Array, "... t n h"],
    k: Float[Array, "... s n h"],
    v: Float[Array, "... s n h"],
    *,
    offset: Float[Array, "... n t s"] | None = None,
) -> Float[Array, "... t n h"]:
    """Scaled dot-product attention over any leading axes, logits and softmax in float32.

    `attention` knows no windows, and its grouped heads cost twice the time where heads and
    sequences are as small as a window's.

    Args:
        q, k, v: queries, keys and values.
        offset: added to the logits; leading axes broadcast.
    """
    logits = jnp.einsum("...tnh,...snh->...nts", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if offset is not None:
        logits = logits + offset
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...nts,...snh->...tnh", weights, v)
