"""Swin Transformer v1 (Liu et al. 2021) as torchvision's `swin_b` computes it, without its head.

Gives the raw residual stream after the last block of each stage, as FaceXFormer takes it: the final
LayerNorm and the classifier have no part in it and are not here. What differs in form, not in
numbers: blocks are scanned in pairs (unshifted, shifted); the patch convolution is a matrix
product; padding joins after the `qkv` product, where torchvision's zero tokens are the bias.
Stochastic depth is left out: it is the identity in evaluation. Kernels start at torch's default
for a Linear, which unlike torchvision's fixed 0.02 suits small widths too.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.config import Remat, SwinConfig
from emollama_jax.errors import UserError
from emollama_jax.models.attention import attend
from emollama_jax.models.layers import (
    LayerNorm,
    Linear,
    gelu,
    param,
    scan,
    small_normal,
    stack,
)
from emollama_jax.models.rngs import Rngs
from emollama_jax.terms import Frozen

APART = -100.0  # Swin's logit offset between tokens that only the cyclic shift made neighbours


def relative_index(window: int) -> Int[np.ndarray, "t s"]:
    """Row of the relative bias table for every (query, key) of a window, tokens row-major."""
    row, column = np.divmod(np.arange(window * window), window)
    rows = row[:, None] - row + window - 1
    columns = column[:, None] - column + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(
    height: int, width: int, *, window: int, shift: tuple[int, int]
) -> Float[np.ndarray, "g t s"]:
    """Logit offsets of a rolled map's windows: 0 between true neighbours, else `APART`.

    Args:
        height, width: sides of the padded map, multiples of `window`.
        window: side of a window.
        shift: shift of the map, (rows, columns).
    """

    def regions(size: int, by: int) -> Int[np.ndarray, " n"]:
        if by == 0:
            return np.zeros(size, int)
        return np.digitize(np.arange(size), [size - window, size - by])

    labels = 3 * regions(height, shift[0])[:, None] + regions(width, shift[1])
    labels = rearrange(labels, "(i r) (j c) -> (i j) (r c)", r=window, c=window)
    return np.where(labels[:, :, None] == labels[:, None, :], 0, APART).astype(np.float32)


class WindowAttention(nnx.Module):
    """Multi-head attention inside windows, with a learned bias for each relative position."""

    def __init__(
        self, width: int, *, heads: int, window: int, dtype: str, frozen: Frozen, rngs: Rngs
    ):
        how = {"bias": True, "dtype": dtype, "frozen": frozen, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, axes=("embed", "heads"), **how)
        self.proj = Linear(width, width, axes=("heads", "embed"), **how)
        self.relative_position_bias_table = param(
            small_normal, ((2 * window - 1) ** 2, heads), (None, None), rngs=rngs
        )
        self.heads = heads
        self.window = window

    def __call__(self, x: Float[Array, "b h w d"], *, shift: int) -> Float[Array, "b h w d"]:
        """Attends in the windows of the map rolled by `shift`; an axis of one window is not."""
        height, width = x.shape[1:3]
        window = self.window
        padded = tuple(-(-size // window) * window for size in (height, width))
        by = tuple(0 if size <= window else shift for size in padded)

        qkv = self.qkv(x)
        if padded != (height, width):
            inside = (np.arange(padded[0]) < height)[:, None] & (np.arange(padded[1]) < width)
            margin = ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0))
            bias = self.qkv.bias.astype(qkv.dtype)
            qkv = jnp.where(inside[..., None], jnp.pad(qkv, margin), bias)
        if any(by):
            qkv = jnp.roll(qkv, (-by[0], -by[1]), axis=(1, 2))
        qkv = rearrange(
            qkv,
            "b (i r) (j c) (x n h) -> x b (i j) (r c) n h",
            r=window,
            c=window,
            x=3,
            n=self.heads,
        )
        table = self.relative_position_bias_table.astype(jnp.float32)
        offset = rearrange(table[relative_index(window)], "t s n -> n t s")
        if any(by):
            offset = offset + shift_mask(*padded, window=window, shift=by)[:, None]  # [G, N, T, S]
        y = attend(*qkv, offset=offset)  # [B, G, T, N, H]
        y = rearrange(
            y, "b (i j) (r c) n h -> b (i r) (j c) (n h)", i=padded[0] // window, r=window
        )
        if any(by):
            y = jnp.roll(y, by, axis=(1, 2))
        return self.proj(y[:, :height, :width])


class Block(nnx.Module):
    """Pre-norm block: window attention, then a two-layer perceptron."""

    def __init__(
        self, cfg: SwinConfig, width: int, *, heads: int, dtype: str, frozen: Frozen, rngs: Rngs
    ):
        mlp, how = cfg.mlp_ratio * width, {"dtype": dtype, "frozen": frozen, "rngs": rngs}
        self.norm1 = LayerNorm(width, eps=cfg.norm_eps, rngs=rngs)
        self.attn = WindowAttention(width, heads=heads, window=cfg.window, **how)
        self.norm2 = LayerNorm(width, eps=cfg.norm_eps, rngs=rngs)
        self.fc1 = Linear(width, mlp, axes=("embed", "mlp"), bias=True, **how)
        self.fc2 = Linear(mlp, width, axes=("mlp", "embed"), bias=True, **how)

    def __call__(self, x: Float[Array, "b h w d"], *, shift: int) -> Float[Array, "b h w d"]:
        x = x + self.attn(self.norm1(x), shift=shift)
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class Pair(nnx.Module):
    """An unshifted and a shifted block: what a stage repeats."""

    def __init__(
        self, cfg: SwinConfig, width: int, *, heads: int, dtype: str, frozen: Frozen, rngs: Rngs
    ):
        how = {"heads": heads, "dtype": dtype, "frozen": frozen, "rngs": rngs}
        self.unshifted, self.shifted = Block(cfg, width, **how), Block(cfg, width, **how)
        self.shift = cfg.window // 2

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        return self.shifted(self.unshifted(x, shift=0), shift=self.shift)


class PatchMerging(nnx.Module):
    """Halves the map and doubles the width; odd sizes are padded with zeros."""

    def __init__(self, cfg: SwinConfig, width: int, *, dtype: str, frozen: Frozen, rngs: Rngs):
        self.norm = LayerNorm(4 * width, eps=cfg.norm_eps, rngs=rngs, axis="mlp")
        how = {"dtype": dtype, "frozen": frozen, "rngs": rngs}
        self.reduction = Linear(4 * width, 2 * width, axes=("mlp", "embed"), bias=False, **how)

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d2"]:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = rearrange(x, "b (h r) (w c) d -> b h w (c r d)", r=2, c=2)
        return self.reduction(self.norm(x))


class Stage(nnx.Module):
    """Patch merging (but in the first stage) and the stage's pairs of blocks."""

    def __init__(
        self,
        cfg: SwinConfig,
        index: int,
        *,
        dtype: str,
        remat: Remat,
        frozen: Frozen,
        rngs: Rngs,
    ):
        width, how = cfg.width * 2**index, {"dtype": dtype, "frozen": frozen}
        self.downsample = None if index == 0 else PatchMerging(cfg, width // 2, rngs=rngs, **how)
        self.pairs = stack(
            lambda rngs: Pair(cfg, width, heads=cfg.heads[index], rngs=rngs, **how),
            cfg.depths[index] // 2,
            rngs=rngs,
        )
        self.remat = remat

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 d2"]:
        if self.downsample is not None:
            x = self.downsample(x)
        x, _ = scan(self.pairs, lambda pair, x, _: (pair(x), None), x, remat=self.remat)
        return x


class Swin(nnx.Module):
    """The backbone.

    Raises:
        UserError: `depths` has an odd number, or another length than `heads`.
    """

    def __init__(
        self,
        cfg: SwinConfig,
        *,
        dtype: str,
        remat: Remat,
        rngs: Rngs,
        frozen: Frozen = "float",
    ):
        if any(depth % 2 for depth in cfg.depths) or len(cfg.depths) != len(cfg.heads):
            raise UserError(
                f"swin: depths {list(cfg.depths)} with heads {list(cfg.heads)}: wanted one even"
                " depth and one number of heads for each stage"
            )
        self.patch_embed = Linear(
            cfg.patch_size**2 * 3,
            cfg.width,
            axes=(None, "embed"),
            bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.patch_norm = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
        self.stages = nnx.List(
            Stage(cfg, index, dtype=dtype, remat=remat, frozen=frozen, rngs=rngs)
            for index in range(len(cfg.depths))
        )
        self.patch_size = cfg.patch_size

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Runs all stages.

        Args:
            pixels: normalised RGB.

        Returns:
            Each stage's output: [B, S/p, S/p, D], then half the map and twice the width.
        """
        patches = rearrange(
            pixels, "b (h r) (w c) k -> b h w (r c k)", r=self.patch_size, c=self.patch_size
        )
        x = self.patch_norm(self.patch_embed(patches))
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return tuple(outputs)
