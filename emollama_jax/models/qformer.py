"""Q-Former with text guidance (InstructBLIP; LLaMA-VID's `qformer_pretrain`).

BERT whose sequence is [queries; question]: both attend to each other in every layer; in every n-th
layer, the first included, the queries then attend to the vision tokens; queries and text have
feed-forwards of their own. The result is the queries' part. Mirrors LAVIS `Qformer.py` (post-norm,
erf GELU, additive −10000 on padded text, no token types, no pooler); what differs: layers are
stacked in groups of n and scanned, softmax is in float32. As in the original, the last layer's
text feed-forward is computed and touches nothing: its gradient is zero.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.config import QFormerConfig
from emollama_jax.errors import UserError
from emollama_jax.models.layers import (
    LayerNorm,
    Linear,
    dropout,
    gelu,
    param,
    scan,
    small_normal,
    split_keys,
    stack,
    with_again,
)
from emollama_jax.models.rngs import Rngs
from emollama_jax.sharding.points import constrain

MASKED = -10000.0  # BERT's additive mask


class BertAttention(nnx.Module):
    """Attention, output projection, residual and norm.

    The softmax is written out, other than in `models/attention.py`: BERT drops attention weights.
    """

    def __init__(self, cfg: QFormerConfig, *, key_width: int, rngs: Rngs):
        def linear(i: int, axes: tuple[str, str]) -> Linear:
            return Linear(i, cfg.width, axes=axes, bias=True, dtype=cfg.dtype, rngs=rngs)

        self.cfg = cfg
        self.query = linear(cfg.width, ("embed", "heads"))
        self.key = linear(key_width, ("embed", "heads"))
        self.value = linear(key_width, ("embed", "heads"))
        self.dense = linear(cfg.width, ("heads", "embed"))
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        keys: Float[Array, "f s e"],
        again: Int[Array, "r x"] | None = None,
        bias: Float[Array, "b s"] | None,
        dropout_key: jax.Array | None,
    ) -> Float[Array, "b t d"]:
        """`again`: those of `keys` that further rows of x look at, see `with_again`."""
        rate = self.cfg.dropout
        weights_key, output_key = split_keys(dropout_key, 2)
        k, v = self.key(keys), self.value(keys)
        k, v = with_again(k, again), with_again(v, again)
        q, k, v = (
            rearrange(y, "b s (n h) -> b s n h", n=self.cfg.heads) for y in (self.query(x), k, v)
        )
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(q.shape[-1])
        if bias is not None:
            logits = logits + bias[:, None, None, :]
        weights = dropout(jax.nn.softmax(logits), rate, weights_key).astype(v.dtype)
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, v)
        y = self.dense(rearrange(mixed, "b t n h -> b t (n h)"))
        return self.norm(x + dropout(y, rate, output_key))


class BertFeedForward(nnx.Module):
    """Two Linears, residual and norm."""

    def __init__(self, cfg: QFormerConfig, *, rngs: Rngs):
        self.cfg = cfg
        self.intermediate = Linear(
            cfg.width, cfg.mlp_width, axes=("embed", "mlp"), bias=True, dtype=cfg.dtype, rngs=rngs
        )
        self.output = Linear(
            cfg.mlp_width, cfg.width, axes=("mlp", "embed"), bias=True, dtype=cfg.dtype, rngs=rngs
        )
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], *, dropout_key: jax.Array | None
    ) -> Float[Array, "b t d"]:
        y = self.output(gelu(self.intermediate(x)))
        return self.norm(x + dropout(y, self.cfg.dropout, dropout_key))


class QFormerLayer(nnx.Module):
    """One layer; `crossattention` is None where the queries do not look at the picture."""

    def __init__(self, cfg: QFormerConfig, *, cross: bool, rngs: Rngs):
        self.cfg = cfg
        self.attention = BertAttention(cfg, key_width=cfg.width, rngs=rngs)
        self.crossattention = (
            BertAttention(cfg, key_width=cfg.encoder_width, rngs=rngs) if cross else None
        )
        self.query_ffn = BertFeedForward(cfg, rngs=rngs)
        self.text_ffn = BertFeedForward(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b both d"],
        *,
        encoded: Float[Array, "f s e"],
        again: Int[Array, "r x"] | None,
        bias: Float[Array, "b both"],
        dropout_key: jax.Array | None,
    ) -> Float[Array, "b both d"]:
        keys = split_keys(dropout_key, 4)
        x = self.attention(x, keys=x, bias=bias, dropout_key=keys[0])
        queries, text = jnp.split(x, [self.cfg.queries], axis=1)  # [B, Q, D], [B, L, D]
        if self.crossattention is not None:
            queries = self.crossattention(
                queries, keys=encoded, again=again, bias=None, dropout_key=keys[1]
            )
        queries = self.query_ffn(queries, dropout_key=keys[2])
        return jnp.concatenate([queries, self.text_ffn(text, dropout_key=keys[3])], axis=1)


class QFormerGroup(nnx.Module):
    """The unit that repeats: a layer with cross-attention, then n − 1 without."""

    def __init__(self, cfg: QFormerConfig, *, rngs: Rngs):
        self.cross = QFormerLayer(cfg, cross=True, rngs=rngs)
        self.plain = nnx.List(
            [
                QFormerLayer(cfg, cross=False, rngs=rngs)
                for _ in range(cfg.cross_attention_every - 1)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "b both d"],
        *,
        encoded: Float[Array, "f s e"],
        again: Int[Array, "r x"] | None,
        bias: Float[Array, "b both"],
        dropout_key: jax.Array | None,
    ) -> Float[Array, "b both d"]:
        layers = (self.cross, *self.plain)
        for layer, key in zip(layers, split_keys(dropout_key, len(layers)), strict=True):
            x = layer(x, encoded=encoded, again=again, bias=bias, dropout_key=key)
        return x


class QFormer(nnx.Module):
    """Question and vision tokens to Q query vectors.

    Attributes:
        query: float32 [Q, D]; LLaMA-VID's `vlm_att_query`.

    Raises:
        UserError: groups that do not fill the layers, or a width that heads do not divide.
    """

    def __init__(self, cfg: QFormerConfig, *, rngs: Rngs):
        if cfg.layers % cfg.cross_attention_every or cfg.width % cfg.heads:
            raise UserError(
                f"model.qformer: layers {cfg.layers}, cross_attention_every "
                f"{cfg.cross_attention_every}, width {cfg.width}, heads {cfg.heads}: "
                "cross_attention_every must divide layers, heads width"
            )
        self.cfg = cfg
        width = cfg.width
        self.query = param(small_normal, (cfg.queries, width), ("queries", "embed"), rngs=rngs)
        self.word_embeddings = param(
            small_normal, (cfg.vocab_size, width), ("vocab", "embed"), rngs=rngs
        )
        self.position_embeddings = param(
            small_normal, (cfg.max_positions, width), (None, "embed"), rngs=rngs
        )
        self.norm = LayerNorm(width, eps=cfg.norm_eps, rngs=rngs)
        groups = cfg.layers // cfg.cross_attention_every
        self.groups = stack(lambda rngs: QFormerGroup(cfg, rngs=rngs), groups, rngs=rngs)

    def __call__(
        self,
        encoded: Float[Array, "f s e"],
        *,
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        again: Int[Array, "r x"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "b q d"]:
        """Runs the queries over pictures, each under a question.

        Args:
            encoded: normed vision tokens (`VisualTokens.ln`), the class token included.
            text: BERT ids of the questions, right-padded.
            text_mask: True where `text` is real.
            again: pictures of each of R rows that stand under another question, see `with_again`;
                their keys and values are made once. None: there are none.
            dropout_key: None in evaluation.

        Raises:
            UserError: a question longer than `max_positions`.
        """
        cfg = self.cfg
        length = text.shape[1]
        if length > cfg.max_positions:
            raise UserError(
                f"model.qformer: {length} question tokens, but max_positions is "
                f"{cfg.max_positions}: lower data.question_length"
            )
        embedding_key, layers_key = split_keys(dropout_key, 2)
        table = constrain(self.word_embeddings[...], "table")
        words = jnp.take(table, text, axis=0, mode="fill")  # beyond it: NaN
        words = words + self.position_embeddings[:length]  # [B, L, D]
        queries = jnp.broadcast_to(self.query[...], (text.shape[0], *self.query.shape))
        x = self.norm(jnp.concatenate([queries, words], axis=1))
        x = dropout(x, cfg.dropout, embedding_key).astype(cfg.dtype)
        # The queries are never masked, so no row of the softmax is masked as a whole.
        seen = jnp.pad(text_mask, ((0, 0), (cfg.queries, 0)), constant_values=True)
        bias = jnp.where(seen, 0.0, MASKED)  # [B, Q + L]
        groups = cfg.layers // cfg.cross_attention_every
        keys = None if layers_key is None else jax.random.split(layers_key, groups)

        def step(group: QFormerGroup, x: jax.Array, key: jax.Array | None):
            return group(x, encoded=encoded, again=again, bias=bias, dropout_key=key), None

        x, _ = scan(self.groups, step, x, keys, remat=cfg.remat)
        return x[:, : cfg.queries]
