"""From a batch to what the decoder reads: both towers, Face Info Mining and the text, run once.

Generation, streaming and label scoring all start from here, and the towers are compiled once for
all three.
"""

from collections.abc import Mapping
from typing import Protocol

import flax.struct
import jax
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.batch import Batch
from emollama_jax.generate.flagged import flagged
from emollama_jax.models.llama import Llama


class Answerer(Protocol):
    """What generation and scoring need of a model; `EmoLlama` is one."""

    llama: Llama

    def embeds(self, batch: Batch) -> Float[Array, "b t d"]:
        """The prompts' embeddings with visual tokens merged in."""


@flax.struct.dataclass
class Prompt:
    """Prompts as the decoder reads them."""

    embeds: jax.Array  # [B, T, D], right-padded
    length: jax.Array  # int32 [B], 1 … T


def read(model: Answerer, batch: Batch, *, flags: Mapping[str, str] | None = None) -> Prompt:
    """Embeds the prompts of a batch; the model is not changed. `flags` are for XLA on a TPU."""
    return embed.under(flags or {})(*nnx.split(model), batch)


@flagged(static_argnames="graphdef")
def embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Prompt:
    """`read` as a pure function of a split model."""
    return Prompt(embeds=nnx.merge(graphdef, state).embeds(batch), length=batch.length)
