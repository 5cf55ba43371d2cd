"""What the tiny towers are asked in pretraining: networks with their extra heads, and losses.

Soft-argmax heat maps follow Sun et al. 2018 (integral regression).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.batch import IGNORE
from emollama_jax.config import Config
from emollama_jax.models.eva_vit import EvaVit, normalise
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import LayerNorm, Linear
from emollama_jax.models.llama import Llama
from emollama_jax.models.visual_tokens import merge

LANDMARKS = 68
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


class HeatMaps(nnx.Module):
    """Landmark positions from a map of tokens: a softmax over the cells, then its mean position."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, eps=1e-6, rngs=rngs)
        self.score = Linear(
            width, LANDMARKS, axes=("embed", "mlp"), bias=True, dtype="float32", rngs=rngs
        )

    def __call__(self, tokens: Float[Array, "b p d"]) -> Float[Array, "b 68 2"]:
        side = int(tokens.shape[1] ** 0.5)
        weights = jax.nn.softmax(self.score(self.norm(tokens)) * 4, axis=1)  # [B, P, 68]
        centre = (2 * jnp.arange(side) + 1) / side - 1
        x, y = jnp.meshgrid(centre, centre)
        grid = jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)  # [P, 2]
        # Cells are coarse: the mean may leave them by half a cell at the border.
        return jnp.einsum("bpl,pc->blc", weights, grid) * (side + 1) / side


class VisionLearner(nnx.Module):
    """The vision tower with what it is asked in pretraining."""

    def __init__(self, config: Config, units: int, emotions: int, *, rngs: nnx.Rngs):
        self.cfg = config.model.vision
        self.tower = EvaVit(self.cfg, rngs=rngs)
        self.heat = HeatMaps(self.cfg.width, rngs=rngs)
        self.norm = LayerNorm(self.cfg.width, eps=1e-6, rngs=rngs)
        self.head = Linear(
            self.cfg.width,
            units + emotions,
            axes=("embed", "mlp"),
            bias=True,
            dtype="float32",
            rngs=rngs,
        )
        self.units = units

    def __call__(self, frames: jax.Array) -> dict[str, jax.Array]:
        tokens = self.tower(normalise(frames, self.cfg.image_mean, self.cfg.image_std))[:, 1:]
        y = self.head(self.norm(tokens.mean(1)))
        return {
            "action_units": y[:, : self.units],
            "emotion": y[:, self.units :],
            "landmarks": self.heat(tokens),
        }

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        y = self(batch["picture"])
        labelled = batch["emotion"] >= 0
        nll = optax.softmax_cross_entropy_with_integer_labels(
            y["emotion"], jnp.maximum(batch["emotion"], 0)
        )
        parts = {
            "emotion": jnp.sum(nll * labelled) / jnp.maximum(labelled.sum(), 1),
            "action_units": jnp.mean((y["action_units"] - batch["action_units"]) ** 2),
            "landmarks": jnp.mean(jnp.abs(y["landmarks"] - batch["landmarks"])),
        }
        return parts["emotion"] + 20 * parts["action_units"] + 5 * parts["landmarks"], parts


class FaceLearner(nnx.Module):
    """FaceXFormer with its own heads, and heat maps on its fused map."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.cfg = config.model.face
        self.tower = FaceXFormer(self.cfg, rngs=rngs)
        self.heat = HeatMaps(self.cfg.width, rngs=rngs)

    def __call__(self, faces: jax.Array) -> tuple[Any, jax.Array]:
        y = self.tower(normalise(faces, self.cfg.image_mean, self.cfg.image_std))
        return y, self.heat(y.fused.reshape(y.fused.shape[0], -1, y.fused.shape[-1]))

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, heat = self(batch["picture"])
        nll = optax.softmax_cross_entropy_with_integer_labels
        known = ~jnp.isnan(batch["attributes"])
        wanted = jnp.where(known, batch["attributes"], 0)
        bce = optax.sigmoid_binary_cross_entropy(y.attributes, wanted)
        parts = {
            "landmarks": jnp.mean(jnp.abs(y.landmarks - batch["landmarks"])),
            "heat": jnp.mean(jnp.abs(heat - batch["landmarks"])),
            "pose": jnp.mean((y.headpose - batch["pose"]) ** 2),
            "attributes": jnp.sum(bce * known) / known.sum(),
            "age": nll(y.age, batch["agr"][:, 0]).mean(),
            "gender": nll(y.gender, batch["agr"][:, 1]).mean(),
            "race": nll(y.race, batch["agr"][:, 2]).mean(),
        }
        loss = (
            10 * (parts["landmarks"] + parts["heat"])
            + 5 * parts["pose"]
            + parts["attributes"]
            + 0.5 * (parts["age"] + parts["gender"] + parts["race"])
        )
        return loss, parts


def mirror(batch: dict[str, jax.Array], flip: jax.Array) -> dict[str, jax.Array]:
    """Mirrors the pictures where `flip` holds, and every label with them."""
    landmarks = batch["landmarks"][:, MIRROR] * jnp.array([-1.0, 1.0])
    pose = batch["pose"] * jnp.array([1.0, -1.0, -1.0])  # pitch stays; yaw and roll turn
    return batch | {
        "picture": jnp.where(
            flip[:, None, None, None], batch["picture"][:, :, ::-1], batch["picture"]
        ),
        "landmarks": jnp.where(flip[:, None, None], landmarks, batch["landmarks"]),
        "pose": jnp.where(flip[:, None], pose, batch["pose"]),
    }


def shift(batch: dict[str, jax.Array], key: jax.Array, most: int = 4) -> dict[str, jax.Array]:
    """Moves each picture by up to `most` pixels, edges repeated, landmarks with it."""
    picture = batch["picture"]
    size = picture.shape[1]
    by = jax.random.randint(key, (picture.shape[0], 2), -most, most + 1)  # (y, x)
    padded = jnp.pad(picture, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    cut = jax.vmap(lambda p, d: jax.lax.dynamic_slice(p, (d[0], d[1], 0), (size, size, 3)))
    landmarks = batch["landmarks"] + by[:, None, ::-1] * 2 / size
    return batch | {"picture": cut(padded, most - by), "landmarks": landmarks}


def augment(batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Half of the pictures mirrored, all of them shifted."""
    mirrored, moved = jax.random.split(key)
    flip = jax.random.bernoulli(mirrored, 0.5, (batch["picture"].shape[0],))
    return shift(mirror(batch, flip), moved)


class TextLearner(nnx.Module):
    """The LLaMA, answering questions about faces that it is told in action units.

    The base of the real EMO-LLaMA, LLaMA-VID, has learned to read visual tokens; a LLaMA of text
    alone has not. So a Linear writes each frame's true action units into the visual tokens' places.
    """

    def __init__(self, config: Config, units: int, *, rngs: nnx.Rngs):
        cfg = config.model.llama
        plain = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rank=0))
        self.tower = Llama(plain, rngs=rngs)
        self.tokens = config.model.tokens_per_frame
        self.told = Linear(
            units,
            self.tokens * cfg.width,
            axes=("mlp", "embed"),
            bias=True,
            dtype="float32",
            rngs=rngs,
        )

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Float32 logits [B, T, V] of the next token."""
        told = self.told(batch["action_units"])  # [B, M, tokens · D]
        told = rearrange(told, "b m (n d) -> b m n d", n=self.tokens)
        told = told * batch["shown"][:, None, :, None]
        ids = batch["ids"]
        embeds = merge(self.tower.embed(ids), ids, rearrange(told, "b m n d -> b (m n) d"))
        return self.tower.logits(self.tower(embeds).hidden)

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, labels = self(batch)[:, :-1], batch["labels"][:, 1:]
        borne = labels != IGNORE
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        right = (logits.argmax(-1) == labels) & borne
        loss = jnp.sum(nll * borne) / borne.sum()
        return loss, {"loss": loss, "accuracy": right.sum() / borne.sum()}


def blur(batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Action units as a tower would see them, and some of a frame's tokens kept empty.

    What is learned later has to find only one of the places to be understood.
    """
    noise, dropped = jax.random.split(key)
    units = batch["action_units"]
    return batch | {
        "action_units": units + 0.06 * jax.random.normal(noise, units.shape),
        "shown": jax.random.bernoulli(dropped, 0.6, batch["shown"].shape).astype(jnp.float32),
    }
