"""FaceXFormer (Narayan et al. 2024) as released: Swin, multi-scale fusion, two-way decoder, heads.

Mirrors github.com/Kartik-3004/facexformer. What differs in form, not in numbers: all heads answer
for every picture (the original picks rows by a task vector), features are returned instead of kept
by hooks, the 1×1 fusion acts on each stage before it is resized (linear maps commute with bilinear
resizing), and parsing is computed when asked. Heads run in float32: a landmark in bfloat16 would
be off by up to half a pixel of 224.
"""

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.config import FaceXFormerConfig
from emollama_jax.models.attention import attend
from emollama_jax.models.layers import LayerNorm, Linear, dot, gelu, param, zeros
from emollama_jax.models.rngs import Rngs
from emollama_jax.models.swin import Swin

# The decoder's tokens in their order, with the width of each one's head.
TASKS = {
    "landmarks": 136,
    "pose": 3,
    "attribute": 40,
    "visibility": 29,
    "age": 8,
    "gender": 2,
    "race": 5,
}
PARSING_CLASSES = 11

standard_normal = nnx.initializers.normal(1.0)  # torch's nn.Embedding


@flax.struct.dataclass
class FaceXFormerOutput:
    """Everything one forward pass knows about B face crops. Heads are float32."""

    stages: tuple[jax.Array, ...]  # Swin's maps, finest first
    fused: jax.Array  # [B, h, w, D], the face map F
    face_tokens: jax.Array  # [B, h·w, D], F after the decoder
    task_tokens: jax.Array  # [B, 18, D]: `TASKS`, then one for each parsing class
    landmarks: jax.Array  # [B, 68, 2], (x, y) in the crop, -1 … 1, iBUG order (see `to_pixels`)
    headpose: jax.Array  # [B, 3], pitch, yaw, roll in radians
    attributes: jax.Array  # [B, 40], logits, CelebA's order
    visibility: jax.Array  # [B, 29], logits of COFW's points; positive: occluded
    age: jax.Array  # [B, 8], logits
    gender: jax.Array  # [B, 2], logits
    race: jax.Array  # [B, 5], logits


def to_pixels(landmarks: Float[Array, "... 2"], size: int) -> Float[Array, "... 2"]:
    """Centred coordinates to pixels of a size × size crop; pixel centres are whole numbers.

    -1 is the crop's outer edge (-0.5 px), +1 the other one (size - 0.5 px).
    """
    return ((landmarks + 1) * size - 1) / 2


def from_pixels(pixels: Float[Array, "... 2"], size: int) -> Float[Array, "... 2"]:
    """The inverse of `to_pixels`."""
    return (2 * pixels + 1) / size - 1


class Attention(nnx.Module):
    """Multi-head attention whose inner width may be smaller than the tokens'."""

    def __init__(self, cfg: FaceXFormerConfig, *, inner: int, rngs: Rngs):
        def linear(i: int, o: int, axes: tuple[str, str]) -> Linear:
            return Linear(i, o, axes=axes, bias=True, dtype=cfg.dtype, rngs=rngs)

        self.q_proj = linear(cfg.width, inner, ("embed", "heads"))
        self.k_proj = linear(cfg.width, inner, ("embed", "heads"))
        self.v_proj = linear(cfg.width, inner, ("embed", "heads"))
        self.out_proj = linear(inner, cfg.width, ("heads", "embed"))
        self.heads = cfg.decoder_heads

    def __call__(
        self, q: Float[Array, "b t d"], *, k: Float[Array, "b s d"], v: Float[Array, "b s d"]
    ) -> Float[Array, "b t d"]:
        q, k, v = (
            rearrange(projected, "b s (n h) -> b s n h", n=self.heads)
            for projected in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        return self.out_proj(rearrange(attend(q, k, v), "b t n h -> b t (n h)"))


class TwoWayBlock(nnx.Module):
    """Tokens attend to themselves and to the face; the face attends to the tokens (SAM's block)."""

    def __init__(self, cfg: FaceXFormerConfig, *, rngs: Rngs):
        def norm() -> LayerNorm:
            return LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)

        inner = cfg.width // cfg.attention_downsample
        mlp = cfg.decoder_mlp_width
        self.self_attn = Attention(cfg, inner=cfg.width, rngs=rngs)
        self.norm1 = norm()
        self.cross_attn_token_to_image = Attention(cfg, inner=inner, rngs=rngs)
        self.norm2 = norm()
        self.lin1 = Linear(
            cfg.width, mlp, axes=("embed", "mlp"), bias=True, dtype=cfg.dtype, rngs=rngs
        )
        self.lin2 = Linear(
            mlp, cfg.width, axes=("mlp", "embed"), bias=True, dtype=cfg.dtype, rngs=rngs
        )
        self.norm3 = norm()
        self.cross_attn_image_to_token = Attention(cfg, inner=inner, rngs=rngs)
        self.norm4 = norm()

    def first(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Self-attention of the first block: it replaces the tokens, and has no positions."""
        return self.norm1(self.self_attn(tokens, k=tokens, v=tokens))

    def later(
        self, tokens: Float[Array, "b t d"], *, token_pe: Float[Array, "t d"]
    ) -> Float[Array, "b t d"]:
        """Self-attention of every later block."""
        placed = tokens + token_pe
        return self.norm1(tokens + self.self_attn(placed, k=placed, v=tokens))

    def cross(
        self,
        tokens: Float[Array, "b t d"],
        *,
        face: Float[Array, "b s d"],
        token_pe: Float[Array, "t d"],
        face_pe: Float[Array, "s d"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """The rest of a block. Returns the tokens and the face."""
        placed = face + face_pe
        tokens = self.norm2(
            tokens + self.cross_attn_token_to_image(tokens + token_pe, k=placed, v=face)
        )
        tokens = self.norm3(tokens + self.lin2(jax.nn.relu(self.lin1(tokens))))
        face = self.norm4(
            face + self.cross_attn_image_to_token(placed, k=tokens + token_pe, v=tokens)
        )
        return tokens, face


class TwoWayTransformer(nnx.Module):
    """The decoder: two-way blocks, then a last look of the tokens at the face."""

    def __init__(self, cfg: FaceXFormerConfig, *, rngs: Rngs):
        self.layers = nnx.List(TwoWayBlock(cfg, rngs=rngs) for _ in range(cfg.decoder_depth))
        self.final_attn_token_to_image = Attention(
            cfg, inner=cfg.width // cfg.attention_downsample, rngs=rngs
        )
        self.norm_final_attn = LayerNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)

    def __call__(
        self,
        face: Float[Array, "b s d"],
        *,
        token_pe: Float[Array, "t d"],
        face_pe: Float[Array, "s d"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """Decodes.

        Args:
            face: the fused map's cells, row-major.
            token_pe: the learned tokens: the first queries and all queries' positions.
            face_pe: the cells' positions.

        Returns:
            Task tokens and face tokens.
        """
        tokens = jnp.broadcast_to(token_pe, (face.shape[0], *token_pe.shape))
        for index, layer in enumerate(self.layers):
            tokens = layer.first(tokens) if index == 0 else layer.later(tokens, token_pe=token_pe)
            tokens, face = layer.cross(tokens, face=face, token_pe=token_pe, face_pe=face_pe)
        look = self.final_attn_token_to_image(tokens + token_pe, k=face + face_pe, v=face)
        return self.norm_final_attn(tokens + look), face


class Head(nnx.Module):
    """Three-layer perceptron with ReLU, in float32."""

    def __init__(self, width: int, out_width: int, *, rngs: Rngs):
        def linear(o: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(width, o, axes=axes, bias=True, dtype="float32", rngs=rngs)

        self.layers = nnx.List(
            [
                linear(width, ("embed", "mlp")),
                linear(width, ("mlp", "embed")),
                linear(out_width, ("embed", None)),
            ]
        )

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... o"]:
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))


class Upscale(nnx.Module):
    """Transposed convolution, 2×2 with stride 2: each cell becomes four, none overlap.

    Attributes:
        kernel: float32 [in, 2, 2, out].
    """

    def __init__(self, in_width: int, out_width: int, *, dtype: str, rngs: Rngs):
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0)
        self.kernel = param(
            init, (in_width, 2, 2, out_width), ("embed", None, None, None), rngs=rngs
        )
        self.bias = param(zeros, (out_width,), (None,), rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 o"]:
        kernel = self.kernel.astype(self.dtype)
        y = jnp.einsum("bhwd,drco->bhrwco", x.astype(self.dtype), kernel)
        y = rearrange(y, "b h r w c o -> b (h r) (w c) o")
        return y + self.bias.astype(self.dtype)


class FaceXFormer(nnx.Module):
    """The whole network. `remat` acts on Swin alone: the decoder's activations are few.

    Attributes:
        pe: float32 [2, D/2], the random Fourier frequencies of the face tokens' positions. A buffer
            in PyTorch: it is saved with the weights, gets no gradient, and must not be decayed.
    """

    def __init__(self, cfg: FaceXFormerConfig, *, rngs: Rngs):
        stages = len(cfg.swin.depths)
        self.cfg = cfg
        how = {"dtype": cfg.dtype, "remat": cfg.remat, "frozen": cfg.frozen}
        self.swin = Swin(cfg.swin, rngs=rngs, **how)
        self.linear_c = nnx.List(
            Linear(
                cfg.swin.width * 2**index,
                cfg.width,
                axes=("mlp", "embed"),
                bias=True,
                dtype=cfg.dtype,
                rngs=rngs,
            )
            for index in range(stages)
        )
        self.linear_fuse = Linear(
            stages * cfg.width,
            cfg.width,
            axes=("mlp", "embed"),
            bias=False,
            dtype=cfg.dtype,
            rngs=rngs,
        )
        self.pe = param(standard_normal, (2, cfg.width // 2), (None, None), rngs=rngs)
        self.tokens = nnx.Dict(
            {
                name: param(standard_normal, (1, cfg.width), (None, "embed"), rngs=rngs)
                for name in TASKS
            }
        )
        self.mask_tokens = param(
            standard_normal, (PARSING_CLASSES, cfg.width), (None, "embed"), rngs=rngs
        )
        self.transformer = TwoWayTransformer(cfg, rngs=rngs)
        self.heads = nnx.Dict(
            {name: Head(cfg.width, out, rngs=rngs) for name, out in TASKS.items()}
        )
        first, second = cfg.upscale_widths
        self.upscale1 = Upscale(cfg.width, first, dtype=cfg.dtype, rngs=rngs)
        self.upscale_norm = LayerNorm(first, eps=cfg.parsing_norm_eps, rngs=rngs)
        self.upscale2 = Upscale(first, second, dtype=cfg.dtype, rngs=rngs)
        self.hypernetwork = Head(cfg.width, second, rngs=rngs)

    def fuse(self, stages: tuple[Float[Array, "b _ _ _"], ...]) -> Float[Array, "b h w d"]:
        """One map at the finest stage's size out of all stages; the coarsest comes first."""
        size = stages[0].shape[1:3]
        kernels = self.linear_fuse.kernel.astype(self.cfg.dtype)
        kernels = kernels.reshape(len(stages), self.cfg.width, self.cfg.width)[::-1]

        def part(stage: jax.Array, linear: Linear, kernel: jax.Array) -> jax.Array:
            y = dot(linear(stage), kernel)
            return jax.image.resize(y, (y.shape[0], *size, y.shape[-1]), "bilinear")

        return sum(map(part, stages, self.linear_c, kernels))

    def positions(self, height: int, width: int) -> Float[Array, "s d"]:
        """Fourier features of the cells' centres, row-major (Tancik et al. 2020)."""
        y = (2 * jnp.arange(height) + 1) / height - 1
        x = (2 * jnp.arange(width) + 1) / width - 1
        centres = jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)  # [S, 2], x first
        frequencies = jax.lax.stop_gradient(self.pe[...]).astype(jnp.float32)
        angle = 2 * jnp.pi * jnp.matmul(centres, frequencies, precision="highest")
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def __call__(self, pixels: Float[Array, "b s s 3"]) -> FaceXFormerOutput:
        """All priors but parsing.

        Args:
            pixels: face crops, RGB normalised with `image_mean` and `image_std`.
        """
        dtype = self.cfg.dtype
        stages = self.swin(pixels)
        fused = self.fuse(stages)
        names = [self.tokens[name][...] for name in TASKS]
        tokens, face = self.transformer(
            rearrange(fused, "b h w d -> b (h w) d"),
            token_pe=jnp.concatenate([*names, self.mask_tokens[...]]).astype(dtype),
            face_pe=self.positions(*fused.shape[1:3]).astype(dtype),
        )
        said = {name: self.heads[name](tokens[:, i]) for i, name in enumerate(TASKS)}
        return FaceXFormerOutput(
            stages=stages,
            fused=fused,
            face_tokens=face,
            task_tokens=tokens,
            landmarks=rearrange(said["landmarks"], "b (l c) -> b l c", c=2),
            headpose=said["pose"],
            attributes=said["attribute"],
            visibility=said["visibility"],
            age=said["age"],
            gender=said["gender"],
            race=said["race"],
        )

    def parsing(self, output: FaceXFormerOutput) -> Float[Array, "b 11 s s"]:
        """Logits of the parsing classes, four times as fine as the fused map."""
        face = output.face_tokens.reshape(output.fused.shape)
        fine = self.upscale_norm(self.upscale1(face))
        fine = gelu(self.upscale2(gelu(fine)))
        filters = self.hypernetwork(output.task_tokens[:, len(TASKS) :])  # [B, 11, O]
        return jnp.einsum("bko,bhwo->bkhw", filters, fine.astype(jnp.float32))
