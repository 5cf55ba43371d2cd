"""What pretraining does to its pictures: mirrored, moved, turned, scaled, relit, blurred, covered.

A few ten thousand faces are few, and a set's own framing is no property of a face: FERPlus cuts
faces out tightly, a photograph shows them small. Every picture is drawn anew each time it is seen,
inside the compiled step, and every label that says where something is moves with it.

Coordinates run from -1 to 1 between the outer edges of a picture, x before y.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

Batch = dict[str, jax.Array]

# Left and right change places in a mirrored picture (iBUG 68 order).
MIRROR = np.array(
    [
        *range(16, -1, -1),  # jaw
        *range(26, 16, -1),  # brows
        *(27, 28, 29, 30, 35, 34, 33, 32, 31),  # nose
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),  # eyes
        *(54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55),  # outer lips
        *(64, 63, 62, 61, 60, 67, 66, 65),  # inner lips
    ]
)
LUMINANCE = (0.299, 0.587, 0.114)
CORE = 48  # pixels of the side of what a teacher is shown


class Strength(NamedTuple):
    """How far augmentation goes. Shares are of the pictures."""

    turn: float = 0.25  # radians to either side, at most; where the head's pose is a label, none
    scale: tuple[float, float] = (0.85, 1.2)
    shift: float = 0.1  # of half the picture's side, at most
    small: float = 0.5  # share of the pictures whose face is shown smaller, on a larger picture
    smallest: float = 0.35  # scale of those, at least
    covered: float = 0.4  # share that a rectangle covers
    blurred: float = 0.3
    grey: float = 0.3


@flax.struct.dataclass
class Placement:
    """An affine map of B pictures: p → scale · turned(mirrored(p)) + shift."""

    flip: Bool[Array, " b"]
    angle: Float[Array, " b"]
    scale: Float[Array, " b"]
    shift: Float[Array, "b 2"]

    def forward(self, points: Float[Array, "b n 2"]) -> Float[Array, "b n 2"]:
        """Points of the source in the new picture."""
        points = points * jnp.where(self.flip[:, None, None], jnp.array([-1.0, 1.0]), 1.0)
        turned = turn(points, self.angle)
        return turned * self.scale[:, None, None] + self.shift[:, None]

    def backward(self, points: Float[Array, "b n 2"]) -> Float[Array, "b n 2"]:
        """Where in the source the points of the new picture come from."""
        points = turn((points - self.shift[:, None]) / self.scale[:, None, None], -self.angle)
        return points * jnp.where(self.flip[:, None, None], jnp.array([-1.0, 1.0]), 1.0)


def turn(points: Float[Array, "b n 2"], angle: Float[Array, " b"]) -> Float[Array, "b n 2"]:
    """Points turned about the middle, from x towards y."""
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def place(key: jax.Array, turns: Bool[Array, " b"], strength: Strength) -> Placement:
    """Draws where the face goes within its own picture.

    Args:
        key: random key.
        turns: whether a picture may be turned.
        strength: strength of the changes.
    """
    keys = jax.random.split(key, 4)
    n = turns.shape[0]
    low, high = strength.scale
    return Placement(
        flip=jax.random.bernoulli(keys[0], 0.5, (n,)),
        angle=jnp.where(turns, strength.turn * jax.random.uniform(keys[1], (n,), minval=-1), 0.0),
        scale=jax.random.uniform(keys[2], (n,), minval=low, maxval=high),
        shift=strength.shift * jax.random.uniform(keys[3], (n, 2), minval=-1),
    )


def within(key: jax.Array, placement: Placement, strength: Strength) -> Placement:
    """The same faces, some of them small somewhere on a larger picture."""
    keys = jax.random.split(key, 3)
    n = placement.flip.shape[0]
    small = jax.random.bernoulli(keys[0], strength.small, (n,))
    drawn = jax.random.uniform(keys[1], (n,), minval=strength.smallest)
    scale = jnp.where(small, drawn, 1.0)
    free = (1 - scale)[:, None] * jax.random.uniform(keys[2], (n, 2), minval=-1)
    return placement.replace(
        scale=placement.scale * scale, shift=placement.shift * scale[:, None] + free
    )


def grid(size: int) -> Float[Array, "p 2"]:
    """The pixel centres of a size × size picture, row by row."""
    at = (2 * jnp.arange(size) + 1) / size - 1
    x, y = jnp.meshgrid(at, at)
    return jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)


def sample(
    pictures: UInt8[Array, "b h w 3"], placement: Placement, size: int
) -> tuple[Float[Array, "b {size} {size} 3"], Bool[Array, "b {size} {size} 1"]]:
    """The placed pictures, bilinear, edges repeated.

    Returns:
        Pixels 0 … 255, and which of them lie inside the source.
    """
    n, height, width, _ = pictures.shape
    wanted = jnp.broadcast_to(grid(size), (n, size * size, 2))
    at = placement.backward(wanted)  # [B, P, 2]
    inside = (jnp.abs(at) <= 1).all(-1)
    x = jnp.clip(((at[..., 0] + 1) * width - 1) / 2, 0, width - 1)
    y = jnp.clip(((at[..., 1] + 1) * height - 1) / 2, 0, height - 1)
    left, top = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
    right, bottom = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)
    flat = pictures.reshape(n, height * width, 3)

    def pixel(row: jax.Array, column: jax.Array) -> jax.Array:
        index = (row * width + column)[..., None]
        return jnp.take_along_axis(flat, index, axis=1).astype(jnp.float32)

    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = pixel(top, left) * (1 - across) + pixel(top, right) * across
    lower = pixel(bottom, left) * (1 - across) + pixel(bottom, right) * across
    out = upper * (1 - down) + lower * down
    return out.reshape(n, size, size, 3), inside.reshape(n, size, size, 1)


def background(key: jax.Array, n: int, size: int) -> Float[Array, "n {size} {size} 3"]:
    """Something that is no face: blurred patches of colour, or one colour."""
    keys = jax.random.split(key, 3)
    coarse = jax.random.uniform(keys[0], (n, 5, 5, 3), maxval=255)
    patches = jax.image.resize(coarse, (n, size, size, 3), "bilinear")
    plain = jax.random.bernoulli(keys[1], 0.4, (n, 1, 1, 1))
    colour = jax.random.uniform(keys[2], (n, 1, 1, 3), maxval=255)
    return jnp.where(plain, colour, patches)


def surround(
    pixels: Float[Array, "b s s 3"], inside: Bool[Array, "b s s 1"], key: jax.Array
) -> Float[Array, "b s s 3"]:
    """What lies outside of the source: its own edge repeated, or a background."""
    chosen, drawn = jax.random.split(key)
    n, size = pixels.shape[:2]
    edge = jax.random.bernoulli(chosen, 0.4, (n, 1, 1, 1))
    return jnp.where(inside | edge, pixels, background(drawn, n, size))


def light(
    pixels: Float[Array, "b s s 3"], key: jax.Array, strength: Strength
) -> Float[Array, "b s s 3"]:
    """Brightness, contrast, tint, greyness, blur, noise and a covering rectangle; 0 … 255."""
    n, size = pixels.shape[:2]
    keys = iter(jax.random.split(key, 16))

    def draw(shape: tuple[int, ...] = (n, 1, 1, 1)) -> jax.Array:
        return jax.random.uniform(next(keys), shape)

    def share(p: float) -> jax.Array:
        return jax.random.bernoulli(next(keys), p, (n, 1, 1, 1))

    luminance = (pixels * jnp.array(LUMINANCE)).sum(-1, keepdims=True)
    x = jnp.where(share(strength.grey), luminance, pixels) / 255
    x = jnp.clip(x, 1e-3, 1) ** jnp.exp(0.4 * (2 * draw() - 1))  # gamma
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * (0.6 + 0.8 * draw()) + mean + 0.15 * (2 * draw() - 1)
    x = x * (1 + jnp.where(share(0.5), 0.15 * (2 * draw((n, 1, 1, 3)) - 1), 0.0))
    x = jnp.where(share(strength.blurred), soften(x), x)
    x = x + jnp.where(share(0.4), 0.04, 0.0) * jax.random.normal(next(keys), x.shape)
    at = grid(size).reshape(1, size, size, 2)
    middle, half = 2 * draw((n, 1, 1, 2)) - 1, 0.15 + 0.35 * draw((n, 1, 1, 2))
    cover = (jnp.abs(at - middle) < half).all(-1, keepdims=True) & share(strength.covered)
    return jnp.clip(jnp.where(cover, draw((n, 1, 1, 3)), x), 0, 1) * 255


def soften(x: Float[Array, "b s s 3"]) -> Float[Array, "b s s 3"]:
    """Blurred with the binomial filter of five pixels, both ways."""
    for axis in (1, 2):
        padded = jnp.pad(x, [(2, 2) if i == axis else (0, 0) for i in range(4)], mode="edge")
        size = x.shape[axis]
        x = sum(
            w / 16 * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i, w in enumerate((1, 4, 6, 4, 1))
        )
    return x


def augment(batch: Batch, key: jax.Array, *, size: int, strength: Strength) -> Batch:
    """A batch seen anew.

    Args:
        batch: `picture` uint8 [B, H, W, 3]; `landmarks` float32 [B, 68, 2] in it; `pose` float32
            [B, 3], nan where unknown.
        key: random key.
        size: side of the new pictures, pixels.
        strength: strength of the changes.

    Returns:
        The batch with `picture` float32 [B, size, size, 3], 0 … 255, its landmarks and pose moved
        along, and `core` [B, 48, 48, 3]: the face as it fills its own picture, neither covered
        nor relit, which a teacher is shown.
    """
    keys = jax.random.split(key, 4)
    posed = ~jnp.isnan(batch["pose"]).any(-1)
    core = place(keys[0], ~posed, strength)
    shown = within(keys[1], core, strength)
    pixels, inside = sample(batch["picture"], shown, size)
    pixels = light(surround(pixels, inside, keys[2]), keys[3], strength)
    flip = jnp.where(core.flip[:, None], jnp.array([1.0, -1.0, -1.0]), 1.0)
    landmarks = shown.forward(batch["landmarks"])
    return batch | {
        "picture": pixels,
        "core": sample(batch["picture"], core, CORE)[0],
        "landmarks": jnp.where(core.flip[:, None, None], landmarks[:, MIRROR], landmarks),
        "pose": batch["pose"] * flip,  # pitch stays; yaw and roll turn
    }


def mix(batch: Batch, key: jax.Array, mixed: Bool[Array, " b"], names: Sequence[str]) -> Batch:
    """Blends the named arrays where `mixed` holds with those of the picture before.

    Where a picture is a blend, `mixed` says so in the batch: labels of place do not hold for it.
    """
    share = jax.random.uniform(key, (mixed.shape[0],))
    kept = jnp.where(mixed, 0.5 + 0.5 * share, 1.0)
    blended = {}
    for name in names:
        x = batch[name]
        k = kept.reshape(-1, *(1,) * (x.ndim - 1))
        blended[name] = k * x + (1 - k) * jnp.roll(x, 1, axis=0)
    return batch | blended | {"mixed": mixed}
