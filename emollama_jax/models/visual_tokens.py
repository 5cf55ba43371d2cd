"""LLaMA-VID's two kinds of visual tokens (Li et al. 2024), and their merge into the prompt.

Per frame, one *context* token holds what the question asks of the picture (attention of the
Q-Former's queries over the patches), and n *content* tokens hold the pooled patches. Mirrors
`vlm_attention` and `token_generation` of `llamavid_arch.py`; what differs: both softmax and the
context's sum are in float32, and the class token is left out by the caller, always (the original
drops it only where the number of tokens is odd).
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax import config_content
from emollama_jax.batch import IMAGE_TOKEN, TEXT
from emollama_jax.config import QFormerConfig
from emollama_jax.errors import UserError
from emollama_jax.models.layers import LayerNorm, Linear, gelu, with_again
from emollama_jax.models.rngs import Rngs


def pool(patches: Float[Array, "b p d"], kind: str) -> Float[Array, "b n d"]:
    """Patches, row by row, to content tokens, each the mean of a window."""
    side, window = math.isqrt(patches.shape[1]), config_content.window(kind, patches.shape[1])
    if window == 1:
        return patches
    if window == side:
        return patches.mean(axis=1, keepdims=True)
    picture = rearrange(patches, "b (h w) d -> b h w d", h=side)
    whole = side - side % window
    picture = picture[:, :whole, :whole]
    blocks = rearrange(picture, "b (h i) (w j) d -> b (h w) (i j) d", i=window, j=window)
    return blocks.mean(axis=2)


class VisualTokens(nnx.Module):
    """The projections between the vision tower, the Q-Former and the LLM.

    Attributes:
        ln: norm of the vision tokens that the Q-Former reads (`vlm_att_ln`).
        projector, key_projector, val_projector: layers of the context token (`vlm_att_…`).
        mm_projector_in, mm_projector_out: layers of the content tokens (`mm_projector.0`, `.2`).

    Raises:
        UserError: a Q-Former that reads another width than the vision tower gives.
    """

    def __init__(
        self,
        cfg: QFormerConfig,
        *,
        visual_width: int,
        llm_width: int,
        dtype: str,
        rngs: Rngs,
    ):
        if cfg.encoder_width != visual_width:
            raise UserError(
                f"model.qformer.encoder_width is {cfg.encoder_width}, but model.vision.width is "
                f"{visual_width}: set both to the same value"
            )

        def linear(i: int, o: int, axes: tuple[str, str]) -> Linear:
            return Linear(i, o, axes=axes, bias=True, dtype=dtype, rngs=rngs)

        self.ln = LayerNorm(visual_width, eps=cfg.encoder_norm_eps, rngs=rngs)
        self.projector = linear(cfg.width, visual_width, ("embed", "heads"))
        self.key_projector = linear(visual_width, visual_width, ("embed", "heads"))
        self.val_projector = linear(visual_width, llm_width, ("mlp", "embed"))
        self.mm_projector_in = linear(visual_width, llm_width, ("embed", "mlp"))
        self.mm_projector_out = linear(llm_width, llm_width, ("mlp", "embed"))

    def context(
        self,
        patches: Float[Array, "f p d"],
        queries: Float[Array, "b q e"],
        *,
        again: Int[Array, "r x"] | None = None,
    ) -> Float[Array, "b 1 h"]:
        """The context token: the mean, over the queries, of what each looks at.

        Args:
            patches: vision tokens without the class token, not normed: keys after a projection,
                and the values themselves.
            queries: queries from the Q-Former, of each row's frames and of those `again`.
            again: frames of each row that have another question, see `with_again`.
        """
        q, k = self.projector(queries), with_again(self.key_projector(patches), again)
        logits = jnp.einsum("bqd,bpd->bqp", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(k.shape[-1]))
        values = with_again(patches, again).astype(jnp.float32)
        # The mean over queries commutes with the sum over patches and is Q times cheaper first.
        looked = jnp.einsum("bp,bpd->bd", weights.mean(1), values)
        return self.val_projector(looked[:, None])

    def content(self, patches: Float[Array, "b p d"], *, kind: str) -> Float[Array, "b n h"]:
        """The content tokens: "all", "mean" or "grid:n" of the patches, projected."""
        return self.mm_projector_out(gelu(self.mm_projector_in(pool(patches, kind))))


def merge(
    embeds: Float[Array, "b t d"], places: Int[Array, "b t"], visual: Float[Array, "b v d"]
) -> Float[Array, "b t d"]:
    """Puts visual tokens into their places: where `places` is TEXT, a token stays.

    A row may use fewer than V; a place beyond the V-th becomes NaN, so that it cannot pass unseen.
    """
    index = jnp.maximum(places, 0)[..., None]
    taken = jnp.take_along_axis(visual, index, axis=1, mode="fill")  # [B, T, D]
    return jnp.where((places != TEXT)[..., None], taken.astype(embeds.dtype), embeds)


def merge_in_order(
    embeds: Float[Array, "b t d"], ids: Int[Array, "b t"], visual: Float[Array, "b v d"]
) -> Float[Array, "b t d"]:
    """`merge` of rows whose k-th IMAGE_TOKEN is the place of their k-th visual token."""
    places = ids == IMAGE_TOKEN
    return merge(embeds, jnp.where(places, jnp.cumsum(places, axis=-1) - 1, TEXT), visual)
