"""What the tiny towers are asked in pretraining: networks with their extra heads, and losses.

Soft-argmax heat maps follow Sun et al. 2018 (integral regression).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.batch import IGNORE
from emollama_jax.config import Config
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import LayerNorm, Linear, normalise
from emollama_jax.models.llama import Llama
from emollama_jax.models.visual_tokens import merge_in_order
from emollama_jax.terms import LANDMARKS
from emollama_jax.tiny.towers.pictures import CLASSES

TAUGHT = 0.7  # of the emotion's loss, where a teacher answers beside the votes


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


def _emotion(logits: Float[Array, "b c"], batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy with the votes and, where there is one, with the teacher's answer.

    Of a blended picture the teacher's alone holds.
    """
    log = jax.nn.log_softmax(logits)
    voted = batch["votes"].sum(-1) > 0
    told = -(batch["votes"] * log).sum(-1)
    if "taught" not in batch:
        return _mean(told, voted)
    taught = -(batch["taught"] * log).sum(-1)
    share = jnp.where(batch["mixed"], 1.0, jnp.where(voted, TAUGHT, 0.0))
    share = jnp.where(batch["real"], share, 0.0)  # a teacher of real faces knows nothing of drawn
    told = jnp.where(voted, told, 0.0)
    return _mean(share * taught + (1 - share) * told, voted | batch["mixed"])


def _mean(values: jax.Array, known: jax.Array) -> jax.Array:
    """The mean of what is known; 0 where nothing is."""
    known = jnp.broadcast_to(known, values.shape)
    return jnp.sum(jnp.where(known, values, 0.0)) / jnp.maximum(known.sum(), 1)


def _whole(batch: dict[str, jax.Array]) -> jax.Array:
    """Which pictures are no blends."""
    return ~batch.get("mixed", jnp.zeros(batch["votes"].shape[0], bool))


def _distance(found: jax.Array, batch: dict[str, jax.Array], name: str) -> jax.Array:
    """Mean error of what is known, absolute of landmarks, squared of the rest; nan is unknown."""
    wanted, whole = batch[name], _whole(batch)
    known = ~jnp.isnan(wanted) & whole.reshape(-1, *(1,) * (wanted.ndim - 1))
    error = found - jnp.nan_to_num(wanted)
    return _mean(jnp.abs(error) if name == "landmarks" else error**2, known)


class VisionLearner(nnx.Module):
    """The vision tower with what it is asked in pretraining."""

    def __init__(self, config: Config, units: int, *, rngs: nnx.Rngs):
        self.cfg = config.model.vision
        self.tower = EvaVit(self.cfg, rngs=rngs)
        self.heat = HeatMaps(self.cfg.width, rngs=rngs)
        self.norm = LayerNorm(self.cfg.width, eps=1e-6, rngs=rngs)
        self.head = Linear(
            self.cfg.width,
            units + len(CLASSES),
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
        parts = {
            "emotion": _emotion(y["emotion"], batch),
            "action_units": _distance(y["action_units"], batch, "action_units"),
            "landmarks": _distance(y["landmarks"], batch, "landmarks"),
        }
        return parts["emotion"] + 20 * parts["action_units"] + 5 * parts["landmarks"], parts


class FaceLearner(nnx.Module):
    """FaceXFormer with its own heads, heat maps on its fused map, and the emotion.

    The emotion is read from what Face Info Mining reads: the fused map and the task tokens.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.cfg = config.model.face
        self.tower = FaceXFormer(self.cfg, rngs=rngs)
        self.heat = HeatMaps(self.cfg.width, rngs=rngs)
        self.norm = LayerNorm(2 * self.cfg.width, eps=1e-6, rngs=rngs)
        self.head = Linear(
            2 * self.cfg.width,
            len(CLASSES),
            axes=("embed", "mlp"),
            bias=True,
            dtype="float32",
            rngs=rngs,
        )

    def __call__(self, faces: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        y = self.tower(normalise(faces, self.cfg.image_mean, self.cfg.image_std))
        both = jnp.concatenate([y.fused.mean((1, 2)), y.task_tokens.mean(1)], axis=-1)
        heat = self.heat(y.fused.reshape(y.fused.shape[0], -1, y.fused.shape[-1]))
        return y, heat, self.head(self.norm(both))

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, heat, emotion = self(batch["picture"])
        whole = _whole(batch)
        known = ~jnp.isnan(batch["attributes"]) & whole[:, None]
        wanted = jnp.nan_to_num(batch["attributes"])

        def nll(logits: jax.Array, column: int) -> jax.Array:
            label = batch["agr"][:, column]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
            return _mean(each, (label >= 0) & whole)

        parts = {
            "emotion": _emotion(emotion, batch),
            "landmarks": _distance(y.landmarks, batch, "landmarks"),
            "heat": _distance(heat, batch, "landmarks"),
            "pose": _distance(y.headpose, batch, "pose"),
            "attributes": _mean(optax.sigmoid_binary_cross_entropy(y.attributes, wanted), known),
            "age": nll(y.age, 0),
            "gender": nll(y.gender, 1),
            "race": nll(y.race, 2),
        }
        loss = (
            parts["emotion"]
            + 10 * (parts["landmarks"] + parts["heat"])
            + 5 * parts["pose"]
            + parts["attributes"]
            + 0.5 * (parts["age"] + parts["gender"] + parts["race"])
        )
        return loss, parts


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
        told = rearrange(told, "b m n d -> b (m n) d")
        embeds = merge_in_order(self.tower.embed(ids), ids, told)
        return self.tower.logits(self.tower(embeds).hidden)

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, labels = self(batch)[:, :-1], batch["labels"][:, 1:]
        borne = labels != IGNORE
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        right = (logits.argmax(-1) == labels) & borne
        loss = jnp.sum(nll * borne) / borne.sum()
        return loss, {"loss": loss, "accuracy": right.sum() / borne.sum()}


def blur(batch: dict[str, jax.Array], key: jax.Array, frozen: None) -> dict[str, jax.Array]:
    """Action units as a tower would see them, and some of a frame's tokens kept empty.

    What is learned later has to find only one of the places to be understood.
    """
    del frozen
    noise, dropped = jax.random.split(key)
    units = batch["action_units"]
    return batch | {
        "action_units": units + 0.06 * jax.random.normal(noise, units.shape),
        "shown": jax.random.bernoulli(dropped, 0.6, batch["shown"].shape).astype(jnp.float32),
    }
