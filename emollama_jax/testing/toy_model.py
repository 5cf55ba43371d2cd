"""A model of EmoLlama's shape that trains in milliseconds, with its data and config.

It has a frozen part and trained ones, stacked layers with adapters, dropout, and the two methods
that training asks for: `hidden` and `llama.logits`.
"""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emollama_jax.batch import IGNORE, Batch, one_a_row
from emollama_jax.config import Config, EmoLlamaConfig, MeshConfig, load
from emollama_jax.models.layers import Linear, RMSNorm, param, scan, small_normal, split_keys, stack
from emollama_jax.sharding.distributed import Share

LENGTH = 70  # more than one chunk of the loss
VOCAB = 48
WIDTH = 16
TINY = load("tiny", ["data.packed=null"])


class Decoder(nnx.Module):
    """Stand-in for the LLM: each token sees the mean of those before it."""

    def __init__(self, cfg: EmoLlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg.llama
        width, vocab, lora = cfg.llama.width, cfg.llama.vocab_size, cfg.llama.lora
        self.embed_tokens = param(small_normal, (vocab, width), ("vocab", "embed"), rngs=rngs)

        def layer(rngs: nnx.Rngs) -> Linear:
            return Linear(
                width,
                width,
                axes=("embed", "heads"),
                bias=True,
                dtype="float32",
                rngs=rngs,
                lora=lora,
            )

        self.layers = stack(layer, cfg.llama.layers, rngs=rngs)
        self.norm = RMSNorm(width, eps=1e-6, rngs=rngs)
        axes = ("embed", "vocab")
        self.lm_head = (
            None
            if cfg.llama.tied
            else Linear(width, vocab, axes=axes, bias=False, dtype="float32", rngs=rngs)
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.embed_tokens[...].T if self.lm_head is None else self.lm_head(hidden)


class Toy(nnx.Module):
    """Stand-in for `EmoLlama`."""

    def __init__(self, cfg: EmoLlamaConfig, *, rngs: nnx.Rngs):
        width = cfg.llama.width

        def linear(name: str) -> Linear:
            return Linear(3, width, axes=(name, "embed"), bias=True, dtype="float32", rngs=rngs)

        self.vision = nnx.List([linear("fourier"), linear("queries")])
        self.fim = linear("patches")
        self.llama = Decoder(cfg, rngs=rngs)

    def hidden(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        pixels = batch.frames.astype(jnp.float32).mean((1, 2, 3)) / 255  # [B, 3]
        seen = self.vision[0](pixels) + self.vision[1](pixels) + self.fim(pixels)
        x = self.llama.embed_tokens[jnp.maximum(batch.ids, 0)].astype(jnp.float32)
        x = x + seen[:, None]
        seen_so_far = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
        keys = jnp.stack(split_keys(dropout_key, self.llama.cfg.layers))

        def step(layer: Linear, x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            return x + jnp.tanh(layer(x, dropout_key=key)), None

        x, _ = scan(self.llama.layers, step, x + seen_so_far, keys, remat="none")
        return self.llama.norm(x)


def make_batch(rng: np.random.Generator, *, examples: int, frames: int) -> Batch:
    """Prompts of different lengths whose answers lie in the second half."""
    ids = rng.integers(0, VOCAB, (examples, LENGTH), np.int32)
    ids[:, 3:5] = -200
    length = rng.integers(LENGTH - 20, LENGTH, examples, np.int32)
    where = np.arange(LENGTH)
    answer = (where >= LENGTH // 2) & (where < length[:, None])
    return one_a_row(
        frames=rng.integers(0, 256, (examples, frames, 4, 4, 3), np.uint8),
        faces=np.zeros((examples, frames, 4, 4, 3), np.uint8),
        face_found=np.ones((examples, frames), bool),
        landmarks=np.zeros((examples, frames, 68, 2), np.float32),
        ids=ids,
        labels=np.where(answer, ids, IGNORE).astype(np.int32),
        length=length,
        questions=np.zeros((examples, 1, 4), np.int32),
        question_mask=np.ones((examples, 1, 4), bool),
        weight=rng.integers(1, 3, examples).astype(np.float32),
        index=np.arange(examples, dtype=np.int32),
    )


class ToyData(grain.DatasetIterator):
    """Batches by step, images and clips mixed; like the real iterator, its state is the step."""

    def __init__(self, cfg: Config, part: Share | None = None):
        """Starts at step 0; `part` is not looked at: on several hosts, all would draw the same."""
        super().__init__()
        self.cfg = cfg
        self.step = 0

    def __next__(self) -> Batch:
        rng = np.random.Generator(np.random.PCG64([self.cfg.train.seed, self.step]))
        self.step += 1
        if self.step % 3 == 0:
            return make_batch(rng, examples=self.cfg.train.clip_batch, frames=2)
        return make_batch(rng, examples=self.cfg.train.image_batch, frames=1)

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def toy_config(*, dropout: float = 0.1, **train) -> Config:
    """The tiny config, sized for the toy.

    Args:
        dropout: dropout of the adapters.
        **train: fields of `train`, e.g. `steps=4`.
    """
    lora = dataclasses.replace(TINY.model.llama.lora, rank=2, dropout=dropout)
    llama = dataclasses.replace(
        TINY.model.llama, vocab_size=VOCAB, width=WIDTH, layers=3, lora=lora
    )
    settings = {
        "steps": 8,
        "image_batch": 8,
        "clip_batch": 8,
        "trainable": ("llama/.*lora_[AB]", "fim/.*", "llama/norm/scale"),
        "learning_rate": 1e-2,
        "projector_learning_rate": 5e-3,
        "projector": ("fim/.*",),
        "warmup": 0.25,
        "weight_decay": 0.1,
        "save_every": 3,
        "keep": 2,
        "log_every": 1,
    }
    return dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, llama=llama),
        train=dataclasses.replace(TINY.train, **settings | train),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        weights="none",
    )
