"""LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention, LoRA.

Mirrors `transformers` `LlamaForCausalLM`, parameter for parameter; what differs: layers are
stacked and scanned, masks follow from positions alone, and embedding, network and logits are three
calls, so that visual tokens can be merged in between and logits are computed only where they are
read.

One rule replaces padding masks: **a token's position is its slot**. Positions of a row are 0, 1,
2, … from its first token; a key is visible to a query at its own position or a later one. Padding
is on the right, so what is real never sees it. With a cache, a row's next token is written at slot
`length`, over whatever padding lay there. Rows of several examples are the exception, in training
alone: positions count from each example's first token, and it sees no other example (`InRow`).
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from emollama_jax.batch import Batch
from emollama_jax.config import LlamaConfig
from emollama_jax.errors import UserError
from emollama_jax.models.attention import attention, attention_after
from emollama_jax.models.layers import (
    Linear,
    RMSNorm,
    dot,
    param,
    rotary,
    scan,
    small_normal,
    split_keys,
    stack,
)
from emollama_jax.models.remat import policy_of
from emollama_jax.models.rngs import Rngs
from emollama_jax.sharding.points import constrain


@flax.struct.dataclass
class KVCache:
    """Keys (after rotation) and values of every layer; slot = position.

    A slot holds its heads side by side: on a TPU a token then fills whole tiles, is written without
    a copy of the cache, and read without another layout of it (`attention_after`).
    """

    k: jax.Array  # [L, B, S, K·H]
    v: jax.Array  # [L, B, S, K·H]

    def attend(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b t k h"],
        v: Float[Array, "b t k h"],
        *,
        positions: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t n h"], "KVCache"]:
        """Attention of new tokens over one layer's slots, [B, S, K·H], and among themselves.

        Returns:
            What they see, and what is to be kept of them: for all layers at once, see `_write`.
        """
        mixed = attention_after(q, k, v, earlier=(self.k, self.v), count=positions[:, 0])
        return mixed, KVCache.of_tokens(k, v)

    @staticmethod
    def of_tokens(k: Float[Array, "b t k h"], v: Float[Array, "b t k h"]) -> "KVCache":
        """Keys and values of one layer's tokens as slots hold them, [B, T, K·H]."""
        flat = functools.partial(rearrange, pattern="b t k h -> b t (k h)")
        return KVCache(k=flat(k), v=flat(v))


@flax.struct.dataclass
class InRow:
    """Which example of its row a token belongs to, and its place there."""

    segment: jax.Array  # int32 [B, T]; 0 is padding
    position: jax.Array  # int32 [B, T]


def examples_of(batch: Batch) -> InRow | None:
    """The examples in a batch's rows; None where each row is one."""
    return InRow(batch.segment, batch.position) if batch.packed else None


@flax.struct.dataclass
class LlamaOutput:
    """Outputs of a pass."""

    hidden: jax.Array  # [B, T, D], after the final norm
    cache: KVCache | None  # with this pass's keys and values written in; None if none was given


class LlamaLayer(nnx.Module):
    """One decoder layer."""

    def __init__(self, cfg: LlamaConfig, *, rngs: Rngs):
        def linear(name: str, i: int, o: int, axes: tuple[str, str]) -> Linear:
            lora = cfg.lora if name in cfg.lora.targets else None
            how = {"dtype": cfg.dtype, "lora": lora, "frozen": cfg.frozen}
            return Linear(i, o, axes=axes, bias=False, rngs=rngs, **how)

        heads, kv_heads = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.cfg = cfg
        self.input_layernorm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.q_proj = linear("q_proj", cfg.width, heads, ("embed", "heads"))
        self.k_proj = linear("k_proj", cfg.width, kv_heads, ("embed", "kv_heads"))
        self.v_proj = linear("v_proj", cfg.width, kv_heads, ("embed", "kv_heads"))
        self.o_proj = linear("o_proj", heads, cfg.width, ("heads", "embed"))
        self.post_attention_layernorm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.gate_proj = linear("gate_proj", cfg.width, cfg.mlp_width, ("embed", "mlp"))
        self.up_proj = linear("up_proj", cfg.width, cfg.mlp_width, ("embed", "mlp"))
        self.down_proj = linear("down_proj", cfg.mlp_width, cfg.width, ("mlp", "embed"))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"] | None,
        examples: InRow | None = None,
        cache: KVCache | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """x → (x, these tokens' keys and values, [B, T, K·H]).

        Arguments as `Llama`; `cache` is one layer's, [B, S, K·H], None where nothing came before.
        """
        cfg = self.cfg
        keys = split_keys(dropout_key, 7)
        y = self.input_layernorm(x)
        q = rearrange(self.q_proj(y, dropout_key=keys[0]), "b t (n h) -> b t n h", n=cfg.heads)
        k = rearrange(self.k_proj(y, dropout_key=keys[1]), "b t (k h) -> b t k h", k=cfg.kv_heads)
        v = rearrange(self.v_proj(y, dropout_key=keys[2]), "b t (k h) -> b t k h", k=cfg.kv_heads)
        where = jnp.arange(x.shape[1])[None] if positions is None else positions
        where = where if examples is None else examples.position
        rope = {
            "theta": cfg.rope_theta,
            "scaling": cfg.rope_scaling,
            "llama3": cfg.rope_llama3,
        }
        # Rotated: the backward pass reads nothing before that.
        q = checkpoint_name(rotary(q, where, **rope), "q_proj")
        k = checkpoint_name(rotary(k, where, **rope), "k_proj")
        v = checkpoint_name(v, "v_proj")
        if cache is None:
            new = KVCache.of_tokens(k, v)
            mixed = attention(
                q,
                k,
                v,
                causal=True,
                positions=positions,
                segments=None if examples is None else examples.segment,
                implementation=cfg.attention,
            )
        else:
            mixed, new = cache.attend(q, k, v, positions=where)
        mixed = rearrange(mixed, "b t n h -> b t (n h)")
        x = x + checkpoint_name(self.o_proj(mixed, dropout_key=keys[3]), "o_proj")
        y = self.post_attention_layernorm(x)
        gate = checkpoint_name(self.gate_proj(y, dropout_key=keys[4]), "gate_proj")
        up = checkpoint_name(self.up_proj(y, dropout_key=keys[5]), "up_proj")
        y = self.down_proj(swiglu(gate, up), dropout_key=keys[6])
        return x + checkpoint_name(y, "down_proj"), new


@functools.partial(jax.checkpoint, prevent_cse=False)  # layers are scanned
def swiglu(gate: Float[Array, "b t m"], up: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
    """silu(gate) · up; the backward pass keeps the two, not three more arrays of their size."""
    return jax.nn.silu(gate) * up


def _write(cache: KVCache, new: KVCache, positions: Int[Array, "b t"] | None) -> KVCache:
    """Writes each row's new keys and values, [L, B, T, K·H], to its positions.

    All layers at once: a cache that went through the layers' loop to be written there would be
    copied as a whole for every token.
    """
    if positions is None:
        return jax.tree.map(
            lambda slots, new: jax.lax.dynamic_update_slice_in_dim(
                slots, new.astype(slots.dtype), 0, axis=2
            ),
            cache,
            new,
        )
    rows = jnp.arange(positions.shape[0])[:, None]
    # A scatter: rows that a mapped slice update wrote would first be copied to another layout.
    return jax.tree.map(
        lambda slots, new: slots.at[:, rows, positions].set(
            new.astype(slots.dtype), mode="drop", unique_indices=True
        ),
        cache,
        new,
    )


class Llama(nnx.Module):
    """The decoder with its embedding and its head; of a tied one, the embedding is the head.

    Raises:
        UserError: heads that kv_heads do not divide, a head width without halves to rotate, or
            scalings of the angles that do not fit.
    """

    def __init__(self, cfg: LlamaConfig, *, rngs: Rngs):
        if cfg.heads % cfg.kv_heads or cfg.head_dim % 2:
            raise UserError(
                f"model.llama: heads {cfg.heads}, kv_heads {cfg.kv_heads}, head_dim "
                f"{cfg.head_dim}: kv_heads must divide heads and head_dim must be even"
            )
        llama3 = cfg.rope_llama3
        if llama3 is not None and cfg.rope_scaling != 1:
            raise UserError(
                f"model.llama.rope_scaling is {cfg.rope_scaling:g} beside rope_llama3, wanted 1: "
                "angles have one scaling"
            )
        if llama3 is not None and llama3.high_freq_factor <= llama3.low_freq_factor:
            raise UserError(
                f"model.llama.rope_llama3.high_freq_factor is {llama3.high_freq_factor:g}, wanted "
                f"more than low_freq_factor {llama3.low_freq_factor:g}"
            )
        self.cfg = cfg
        self.policy = policy_of(cfg)
        self.embed_tokens = param(
            small_normal, (cfg.vocab_rows, cfg.width), ("vocab", "embed"), rngs=rngs
        )
        self.layers = stack(lambda rngs: LlamaLayer(cfg, rngs=rngs), cfg.layers, rngs=rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.by_token: Llama | None = None  # see `llama_by_token`
        self.lm_head = (
            None
            if cfg.tied
            else Linear(
                cfg.width,
                cfg.vocab_rows,
                axes=("embed", "vocab"),
                bias=False,
                dtype=cfg.dtype,
                rngs=rngs,
            )
        )

    @property
    def writer(self) -> "Llama":
        """What decodes token by token: `by_token` where there is one, else this."""
        return self if self.by_token is None else self.by_token

    def take(self, cache: KVCache) -> Any:
        """A cache that was written in a prefill, in the layout that this decoder reads."""
        return cache

    def bounded(self, cache: Any, used: Int[Array, ""]) -> Any:
        """The cache for a pass that needs no slot from `used` on, where that spares anything."""
        return cache

    def rows(self, cache: Any, which: Int[Array, " r"]) -> KVCache:
        """Some rows of a cache in this decoder's layout: [L, R, S, K·H]."""
        return jax.tree.map(lambda x: x[:, which], cache)

    def stored(self, cache: Any, new: KVCache, which: Int[Array, " r"]) -> Any:
        """A cache in this decoder's layout, in which rows begin with what was written elsewhere.

        Args:
            cache: [L, B, S, K·H].
            new: [L, R, C, K·H], C at most S.
            which: the row of each.
        """

        def store(slots: jax.Array, new: jax.Array) -> jax.Array:
            for i in range(new.shape[1]):
                part = new[:, i : i + 1].astype(slots.dtype)
                slots = jax.lax.dynamic_update_slice(slots, part, (0, which[i], 0, 0))
            return slots

        return jax.tree.map(store, cache, new)

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embeds ids; negative ones (places of visual tokens) get row 0 until `merge` fills them.

        An id beyond the vocabulary gives NaN, so that it cannot pass unseen.
        """
        known = ids < self.cfg.vocab_size  # and not a row of padding
        index = jnp.where(known, jnp.maximum(ids, 0), self.cfg.vocab_rows)
        rows = jnp.take(constrain(self.embed_tokens[...], "table"), index, axis=0, mode="fill")
        return rows.astype(self.cfg.dtype)

    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"] | None = None,
        examples: InRow | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> LlamaOutput:
        """Runs the decoder.

        Args:
            embeds: input of the first layer.
            positions: position of each token, consecutive along a row; with a cache also its slot,
                and the last one must be below S (a write beyond the end would be lost,
                unseen). None: 0, 1, 2, … in every row, with nothing before them: the tokens attend
                among themselves, by the fastest implementation, and a cache is only written.
            examples: those that share each row, without `positions` and a cache; None: one a row.
            cache: earlier keys and values; None to attend among `embeds` only.
            dropout_key: key of LoRA's dropout; None in evaluation.

        Raises:
            UserError: more tokens or slots than `max_positions` × `rope_scaling`.
        """
        cfg = self.cfg
        tokens = embeds.shape[1] if cache is None else cache.k.shape[2]
        if tokens > cfg.reach:
            raise UserError(
                f"model.llama: {tokens} tokens, but positions reach {cfg.reach} (max_positions × "
                "rope_scaling): shorten data.text_length, data.clip_text_length, "
                "data.packed.tokens or generate.max_new_tokens, or raise model.llama.rope_scaling"
            )
        keys = None if dropout_key is None else jax.random.split(dropout_key, cfg.layers)

        def step(layer: LlamaLayer, x: jax.Array, xs: tuple[KVCache | None, jax.Array | None]):
            earlier, key = xs
            where = {"positions": positions, "examples": examples}
            x, new = layer(x, **where, cache=earlier, dropout_key=key)
            return x, None if cache is None else new

        earlier = None if positions is None else cache
        embeds = embeds.astype(cfg.dtype)
        x, new = scan(self.layers, step, embeds, (earlier, keys), remat=self.policy)
        after = None if cache is None else _write(cache, new, positions)
        return LlamaOutput(hidden=self.norm(x), cache=after)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of the next token; `hidden` may be any choice of positions.

        V is `vocab_rows`; the padding's logits are −∞: it has no probability and is never chosen.
        """
        logits = self._products(hidden)
        if self.cfg.vocab_rows == self.cfg.vocab_size:
            return logits
        return jnp.where(jnp.arange(self.cfg.vocab_rows) < self.cfg.vocab_size, logits, -jnp.inf)

    def _products(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """With the head's kernel, in float32."""
        kernel = self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]
        kernel = kernel.astype(self.cfg.dtype)
        # The product's float32 sums are kept: logits in bfloat16 would cost the loss digits.
        return dot(hidden.astype(self.cfg.dtype), kernel, out="float32")
