"""EVA-ViT (EVA-CLIP's vision tower, as LAVIS / BLIP-2 build it and LLaMA-VID uses it), and DINOv2.

Pre-norm ViT with learned absolute positions and a class token. Kept from the original: erf GELU,
fused q, k, v without a bias for k, no norm after the last block (LLaMA-VID's "layer −2" is the
output of 39 of EVA's 40 blocks). DINOv2 is the same network with a norm there (`last_norm`), once
its LayerScale is folded into the projections. What differs: blocks are stacked and scanned, the
patch convolution is a matrix product over cut patches, softmax is in float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.config import EvaVitConfig
from emollama_jax.errors import UserError
from emollama_jax.models.attention import attention
from emollama_jax.models.layers import (
    LayerNorm,
    Linear,
    gelu,
    kernel_product,
    make_kernel,
    param,
    scan,
    small_normal,
    stack,
    torch_linear,
    zeros,
)
from emollama_jax.models.rngs import Rngs
from emollama_jax.sharding.points import features


def _fused(key: jax.Array, shape: Sequence[int], dtype) -> jax.Array:
    """Initial q, k, v kernel [D, 3, N·H]: each third as a Linear of its own."""
    width, parts, inner = shape
    return torch_linear(key, (width, parts * inner), dtype).reshape(shape)


class FusedAttention(nnx.Module):
    """Self-attention with one kernel for q, k and v, and biases for q and v only.

    Attributes:
        qkv: float32 [D, 3, D], a dimension for (q, k, v), so that heads can be sharded; int8 if
            frozen so.
        qkv_scale: float32 [3, D], of an int8 kernel, or None.
        q_bias, v_bias: float32 [D].
    """

    def __init__(self, cfg: EvaVitConfig, *, rngs: Rngs):
        self.cfg = cfg
        width = cfg.width
        self.qkv, self.qkv_scale = make_kernel(
            _fused, (width, 3, width), ("embed", None, "heads"), frozen=cfg.frozen, rngs=rngs
        )
        self.q_bias = param(zeros, (width,), ("heads",), rngs=rngs)
        self.v_bias = param(zeros, (width,), ("heads",), rngs=rngs)
        self.proj = Linear(
            width,
            width,
            axes=("heads", "embed"),
            bias=True,
            dtype=cfg.dtype,
            rngs=rngs,
            frozen=cfg.frozen,
        )

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        dtype = self.cfg.dtype
        q_bias, v_bias = self.q_bias.astype(dtype), self.v_bias.astype(dtype)
        bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias])
        x = x.astype(dtype)
        qkv = kernel_product(x, self.qkv[...], self.qkv_scale, frozen=self.cfg.frozen) + bias
        q, k, v = rearrange(features(qkv, "heads"), "b p c (n h) -> c b p n h", n=self.cfg.heads)
        mixed = attention(q, k, v, implementation=self.cfg.attention)
        return self.proj(rearrange(mixed, "b p n h -> b p (n h)"))


class EvaBlock(nnx.Module):
    """One pre-norm block."""

    def __init__(self, cfg: EvaVitConfig, *, rngs: Rngs):
        def linear(i: int, o: int, axes: tuple[str, str]) -> Linear:
            how = {"dtype": cfg.dtype, "frozen": cfg.frozen}
            return Linear(i, o, axes=axes, bias=True, rngs=rngs, **how)

        self.norm1 = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.attn = FusedAttention(cfg, rngs=rngs)
        self.norm2 = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.fc1 = linear(cfg.width, cfg.mlp_width, ("embed", "mlp"))
        self.fc2 = linear(cfg.mlp_width, cfg.width, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class EvaVit(nnx.Module):
    """The tower: pixels to the class token and P patches.

    Raises:
        UserError: an image that patches do not tile, or a width that heads do not divide.
    """

    def __init__(self, cfg: EvaVitConfig, *, rngs: Rngs):
        if cfg.image_size % cfg.patch_size or cfg.width % cfg.heads:
            raise UserError(
                f"model.vision: image_size {cfg.image_size}, patch_size {cfg.patch_size}, width "
                f"{cfg.width}, heads {cfg.heads}: patch_size must divide image_size, heads width"
            )
        self.cfg = cfg
        self.patch_embed = Linear(
            3 * cfg.patch_size**2,
            cfg.width,
            axes=(None, "embed"),
            bias=True,
            dtype=cfg.dtype,
            rngs=rngs,
        )
        self.cls_token = param(small_normal, (cfg.width,), ("embed",), rngs=rngs)
        self.pos_embed = param(
            small_normal, (1 + cfg.patches, cfg.width), ("patches", "embed"), rngs=rngs
        )
        self.blocks = stack(lambda rngs: EvaBlock(cfg, rngs=rngs), cfg.depth, rngs=rngs)
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs) if cfg.last_norm else None

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> Float[Array, "b tokens d"]:
        """Already normalised pixels [B, S, S, 3] to [B, 1 + P, D], the class token first."""
        patch = self.cfg.patch_size
        cut = rearrange(pixels, "b (h i) (w j) c -> b (h w) (i j c)", i=patch, j=patch)
        x = self.patch_embed(cut)  # [B, P, D]
        cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed.astype(x.dtype)

        def step(block: EvaBlock, x: jax.Array, _: None):
            return block(x), None

        x, _ = scan(self.blocks, step, x, remat=self.cfg.remat)
        return x if self.norm is None else self.norm(x)
