"""A convolutional teacher of real faces: what small towers learn from beside the votes.

A residual network (He et al. 2016, in its form for small pictures) reads a few ten thousand faces
better than a transformer does from scratch. Its answers to every view of a picture, blends of two
pictures included, are what the towers learn (Beyer et al. 2022, "a good teacher is patient and
consistent"). It is dropped afterwards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.tiny.towers.augment import LUMINANCE
from emollama_jax.tiny.towers.pictures import CLASSES


@dataclasses.dataclass(frozen=True)
class TeacherSize:
    """Size of the teacher."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the stages; each but the first halves
    blocks: int = 2  # residual blocks of a stage
    dtype: str = "bfloat16"  # of the products; the weights are float32


class Block(nnx.Module):
    """Two 3×3 convolutions and a way past them."""

    def __init__(self, inner: int, outer: int, stride: int, *, dtype: str, rngs: nnx.Rngs):
        def conv(i: int, kernel: int, stride: int) -> nnx.Conv:
            shape, steps = (kernel, kernel), (stride, stride)
            return nnx.Conv(i, outer, shape, steps, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nnx.BatchNorm:
            return nnx.BatchNorm(outer, momentum=0.95, dtype=dtype, rngs=rngs)

        self.conv1, self.norm1 = conv(inner, 3, stride), norm()
        self.conv2, self.norm2 = conv(outer, 3, 1), norm()
        changes = stride > 1 or inner != outer
        self.past = nnx.List([conv(inner, 1, stride), norm()] if changes else [])

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 o"]:
        y = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        for layer in self.past:
            x = layer(x)
        return jax.nn.relu(x + y)


class Teacher(nnx.Module):
    """Logits of `CLASSES` from a grey face of 48×48."""

    def __init__(self, size: TeacherSize, *, rngs: nnx.Rngs):
        first = size.widths[0]
        self.stem = nnx.Conv(1, first, (3, 3), use_bias=False, dtype=size.dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(first, momentum=0.95, dtype=size.dtype, rngs=rngs)
        blocks, inner = [], first
        for stage, width in enumerate(size.widths):
            for block in range(size.blocks):
                stride = 2 if stage and not block else 1
                blocks.append(Block(inner, width, stride, dtype=size.dtype, rngs=rngs))
                inner = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inner, len(CLASSES), rngs=rngs)

    def __call__(self, pixels: Float[Array, "b 48 48 3"]) -> Float[Array, "b c"]:
        """Logits.

        Args:
            pixels: 0 … 255; each face is brought to mean 0 and deviation 1.
        """
        grey = (pixels * jnp.array(LUMINANCE)).sum(-1, keepdims=True)
        mean = grey.mean((1, 2, 3), keepdims=True)
        x = (grey - mean) / (grey.std((1, 2, 3), keepdims=True) + 8)
        x = jax.nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)).astype(jnp.float32))

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy with the votes; of a blended picture, with the votes blended alike."""
        loss = optax.softmax_cross_entropy(self(batch["picture"]), batch["votes"]).mean()
        return loss, {"emotion": loss}
