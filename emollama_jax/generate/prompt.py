"""From a batch to what the decoder reads: both towers, Face Info Mining and the text, run once.

Generation, streaming and label scoring all start from here, and the towers are compiled once for
all three. Where one picture is asked about several times, the same is done in three parts: `look`
once, `ask` for each question, `lay` for each prompt.
"""

from collections.abc import Mapping
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from emollama_jax.batch import Batch
from emollama_jax.generate.flagged import flagged
from emollama_jax.models.emollama import Mined, Sight
from emollama_jax.models.llama import Llama
from emollama_jax.models.visual_tokens import merge_in_order


class VisionLanguageModel(Protocol):
    """What generation and scoring need of a model; `EmoLlama` is one."""

    llama: Llama

    def embeds(self, batch: Batch) -> Float[Array, "b t d"]:
        """The prompts' embeddings with visual tokens merged in."""


@flax.struct.dataclass
class Prompt:
    """Prompts as the decoder reads them."""

    embeds: jax.Array  # [B, T, D], right-padded
    length: jax.Array  # int32 [B], 1 … T


def read(
    model: VisionLanguageModel, batch: Batch, *, flags: Mapping[str, str] | None = None
) -> Prompt:
    """Embeds the prompts of a batch; the model is not changed. `flags` are for XLA on a TPU."""
    return embed.under(flags or {})(*nnx.split(model), batch)


@flagged(static_argnames="graphdef")
def embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Prompt:
    """`read` as a pure function of a split model."""
    return Prompt(embeds=nnx.merge(graphdef, state).embeds(batch), length=batch.length)


@flagged(static_argnames="graphdef")
def look(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    frames: UInt8[Array, "f s s 3"],
    faces: UInt8[Array, "f t t 3"],
    found: Bool[Array, " f"],
) -> Sight:
    """What a split model sees in the frames of one example, and what it says of their faces."""
    return nnx.merge(graphdef, state).sight(frames, faces, found=found)


@flagged(static_argnames="graphdef")
def ask(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    mined: Mined,
    question: Int[Array, " l"],
    question_mask: Bool[Array, " l"],
) -> Float[Array, "v d"]:
    """The visual tokens that one question gets of one example's frames, in the prompt's order."""
    model = nnx.merge(graphdef, state)
    tokens = model.asked(
        mined,
        questions=question[None, None],
        question_mask=question_mask[None, None],
        question=jnp.zeros((1, mined.visual.shape[0]), jnp.int32),
        again=jnp.zeros((1, 0), jnp.int32),
    )
    return tokens.reshape(-1, tokens.shape[-1])  # [M · n, D]


@flagged(static_argnames="graphdef")
def lay(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    ids: Int[Array, " t"],
    visual: Float[Array, "v d"],
    length: Int[Array, ""],
) -> Prompt:
    """One prompt of a split decoder: its text's embeddings, visual tokens in their places."""
    embeds = nnx.merge(graphdef, state).embed(ids[None])
    return Prompt(embeds=merge_in_order(embeds, ids[None], visual[None]), length=length[None])
