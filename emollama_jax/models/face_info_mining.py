"""Face Info Mining: global and local face information joins the visual tokens.

EMO-LLaMA (arXiv 2408.11424) names a Face Info Mining module with a global and a local branch and
publishes no equations; these are ours (docs/model.md):

    global   G  = Attention(LN(X), LN(Linear([pool(F); task tokens])))
    local    R  = F sampled at each landmark + index embedding + Linear(Fourier(position))
             Lc = Attention(LN(X + tanh(a)·G), LN(R))
    result   X' = X + tanh(a)·G + tanh(b)·Lc        with a = b = 0 at the start
    tokens   one learned query over each branch's keys → two-layer projector → the LLM's width

With a = b = 0 the visual tokens are exactly LLaMA-VID's. Where no face was found X' = X and both
tokens are one learned "no face" embedding.
"""

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from emollama_jax.config import FaceInfoMiningConfig
from emollama_jax.models.attention import attention
from emollama_jax.models.layers import (
    LayerNorm,
    Linear,
    gelu,
    param,
    small_normal,
    zeros,
)
from emollama_jax.models.rngs import Rngs
from emollama_jax.terms import LANDMARKS


@flax.struct.dataclass
class Mined:
    """Outputs of Face Info Mining for each frame."""

    visual: jax.Array  # [B, P, D], the visual tokens X'
    tokens: jax.Array  # [B, 1 | 2, D of the LLM], (global, local) as far as switched on


def sample_at(
    face_map: Float[Array, "b h w d"], points: Float[Array, "b l 2"]
) -> Float[Array, "b l d"]:
    """Bilinear samples of a map; points outside take the border's value.

    Two small matrix products with hat-function weights: a gather would be slow on a TPU.

    Args:
        face_map: h × w cells, cell centres at FaceXFormer's landmark rule (docs of `to_pixels`).
        points: (x, y), -1 … 1.
    """
    height, width = face_map.shape[1:3]

    def weights(v: Float[Array, "b l"], size: int) -> Float[Array, "b l s"]:
        position = jnp.clip(((v + 1) * size - 1) / 2, 0, size - 1)
        return jax.nn.relu(1 - jnp.abs(position[..., None] - jnp.arange(size)))

    points = points.astype(jnp.float32)
    rows = weights(points[..., 1], height).astype(face_map.dtype)
    columns = weights(points[..., 0], width).astype(face_map.dtype)
    lines = jnp.einsum("blh,bhwd->blwd", rows, face_map)
    return jnp.einsum("blw,blwd->bld", columns, lines)


def fourier(points: Float[Array, "b l 2"], bands: int) -> Float[Array, "b l f"]:
    """sin and cos of π·2^k·(x, y), k < bands: [B, L, 4·bands]."""
    angle = jnp.pi * 2.0 ** jnp.arange(bands) * points.astype(jnp.float32)[..., None]
    angle = rearrange(angle, "b l xy k -> b l (xy k)")
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class CrossAttention(nnx.Module):
    """Multi-head attention of visual queries over face keys, back to the visual width."""

    def __init__(
        self, cfg: FaceInfoMiningConfig, *, width: int, key_width: int, dtype: str, rngs: Rngs
    ):
        inner = cfg.heads * cfg.head_dim

        def linear(i: int, o: int, axes: tuple[str, str]) -> Linear:
            return Linear(i, o, axes=axes, bias=True, dtype=dtype, rngs=rngs)

        self.q_proj = linear(width, inner, ("embed", "heads"))
        self.k_proj = linear(key_width, inner, ("embed", "heads"))
        self.v_proj = linear(key_width, inner, ("embed", "heads"))
        self.o_proj = linear(inner, width, ("heads", "embed"))
        self.heads = cfg.heads

    def __call__(
        self, x: Float[Array, "b p d"], *, keys: Float[Array, "b s e"]
    ) -> Float[Array, "b p d"]:
        q, k, v = (
            rearrange(projected, "b s (n h) -> b s n h", n=self.heads)
            for projected in (self.q_proj(x), self.k_proj(keys), self.v_proj(keys))
        )
        return self.o_proj(rearrange(attention(q, k, v), "b p n h -> b p (n h)"))


class Branch(nnx.Module):
    """One branch: cross-attention with its gate, and the branch's face token."""

    def __init__(
        self,
        cfg: FaceInfoMiningConfig,
        *,
        width: int,
        key_width: int,
        llm_width: int,
        dtype: str,
        rngs: Rngs,
    ):
        self.norm = LayerNorm(width, eps=cfg.norm_eps, rngs=rngs)
        self.attention = CrossAttention(
            cfg, width=width, key_width=key_width, dtype=dtype, rngs=rngs
        )
        self.gate = param(zeros, (), (), rngs=rngs)
        self.query = param(small_normal, (1, width), ("queries", "embed"), rngs=rngs)
        self.token_attention = CrossAttention(
            cfg, width=width, key_width=key_width, dtype=dtype, rngs=rngs
        )
        self.projector_in = Linear(
            width, llm_width, axes=("embed", "mlp"), bias=True, dtype=dtype, rngs=rngs
        )
        self.projector_out = Linear(
            llm_width, llm_width, axes=("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs
        )

    def gated(
        self, x: Float[Array, "b p d"], *, keys: Float[Array, "b s e"]
    ) -> Float[Array, "b p d"]:
        """tanh(gate) · Attention(LN(x), keys)."""
        mined = self.attention(self.norm(x), keys=keys)
        return jnp.tanh(self.gate[...]).astype(mined.dtype) * mined

    def token(self, keys: Float[Array, "b s e"]) -> Float[Array, "b 1 h"]:
        """The branch's face token at the LLM's width."""
        query = jnp.broadcast_to(self.query[...], (keys.shape[0], *self.query.shape))
        mined = self.token_attention(query, keys=keys)
        return self.projector_out(gelu(self.projector_in(mined)))


class FaceInfoMining(nnx.Module):
    """Both branches, or one of them for ablations (`branches`; "none" builds no FIM at all)."""

    def __init__(
        self,
        cfg: FaceInfoMiningConfig,
        *,
        visual_width: int,
        face_width: int,
        llm_width: int,
        dtype: str,
        rngs: Rngs,
    ):
        def branch(key_width: int) -> Branch:
            return Branch(
                cfg,
                width=visual_width,
                key_width=key_width,
                llm_width=llm_width,
                dtype=dtype,
                rngs=rngs,
            )

        self.cfg = cfg
        self.no_face = param(small_normal, (llm_width,), ("embed",), rngs=rngs)
        if cfg.branches in ("both", "global"):
            self.global_in = Linear(
                face_width, visual_width, axes=("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs
            )
            self.global_norm = LayerNorm(visual_width, eps=cfg.norm_eps, rngs=rngs)
            self.global_branch = branch(visual_width)
        if cfg.branches in ("both", "local"):
            self.landmark = param(small_normal, (LANDMARKS, face_width), (None, "mlp"), rngs=rngs)
            self.position = Linear(
                4 * cfg.fourier_bands,
                face_width,
                axes=("fourier", "mlp"),
                bias=False,
                dtype=dtype,
                rngs=rngs,
            )
            self.local_norm = LayerNorm(face_width, eps=cfg.norm_eps, rngs=rngs, axis="mlp")
            self.local_branch = branch(face_width)

    def global_keys(
        self, face_map: Float[Array, "b h w d"], task_tokens: Float[Array, "b s d"]
    ) -> Float[Array, "b k v"]:
        """LN(Linear([pooled map; task tokens])): [B, pool² + 18, D of the visual tokens]."""
        pool = self.cfg.pool
        cells = rearrange(face_map, "b (p h) (q w) d -> b (p q) (h w) d", p=pool, q=pool).mean(2)
        return self.global_norm(self.global_in(jnp.concatenate([cells, task_tokens], axis=1)))

    def local_keys(
        self, face_map: Float[Array, "b h w d"], landmarks: Float[Array, "b l 2"]
    ) -> Float[Array, "b l d"]:
        """LN(samples + index embedding + position): [B, 68, D of the face]."""
        samples = sample_at(face_map, landmarks)
        where = self.position(fourier(landmarks, self.cfg.fourier_bands))
        return self.local_norm(samples + self.landmark.astype(samples.dtype) + where)

    def __call__(
        self,
        visual: Float[Array, "b p v"],
        *,
        face_map: Float[Array, "b h w d"],
        task_tokens: Float[Array, "b s d"],
        landmarks: Float[Array, "b l 2"],
        found: Bool[Array, " b"],
    ) -> Mined:
        """Mines the face of each frame.

        Args:
            visual: the vision tower's patches X.
            face_map: FaceXFormer's fused map F; h and w are multiples of `pool`.
            task_tokens: FaceXFormer's 18 refined task tokens.
            landmarks: (x, y) in the face crop, -1 … 1.
            found: False where there is no face; all of the above may then hold anything finite.
        """
        mined = jnp.zeros_like(visual)
        tokens = []
        if self.cfg.branches in ("both", "global"):
            keys = self.global_keys(face_map, task_tokens)
            mined = mined + self.global_branch.gated(visual, keys=keys)
            tokens.append(self.global_branch.token(keys))
        if self.cfg.branches in ("both", "local"):
            keys = self.local_keys(face_map, landmarks)
            mined = mined + self.local_branch.gated(visual + mined, keys=keys)
            tokens.append(self.local_branch.token(keys))
        stacked = jnp.concatenate(tokens, axis=1)
        seen = found[:, None, None]
        return Mined(
            visual=jnp.where(seen, visual + mined, visual),
            tokens=jnp.where(seen, stacked, self.no_face.astype(stacked.dtype)),
        )
