"""Label scoring: the log-likelihood of each label as the answer to a prompt.

All labels share one prefix, so the prompt runs once; the labels' own few tokens then run as a
batched continuation on that one cache, which they only read: nothing of it is tiled over labels.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.batch import Batch
from emollama_jax.generate.cache import prefill
from emollama_jax.generate.flagged import flagged
from emollama_jax.generate.prompt import Prompt, VisionLanguageModel, read
from emollama_jax.models.llama import KVCache, Llama


@flax.struct.dataclass
class Labels:
    """C label texts as tokens."""

    ids: jax.Array  # int32 [C, N], right-padded with 0
    length: jax.Array  # int32 [C]


def pad_labels(labels: Sequence[Sequence[int]]) -> Labels:
    """Tokens of each label, padded to the longest.

    Give each label its end token: else "fear" is never less likely than "fearful".
    """
    if not labels or not all(labels):
        raise ValueError(f"labels {labels!r}: wanted at least one, each with at least one token")
    ids = np.zeros((len(labels), max(map(len, labels))), np.int32)
    for row, label in zip(ids, labels, strict=True):
        row[: len(label)] = label
    return Labels(ids=ids, length=np.array([len(label) for label in labels], np.int32))


def score_labels(model: VisionLanguageModel, batch: Batch, labels: Labels) -> Float[Array, "b c"]:
    """Log-likelihood of each label after each prompt, summed over the label's tokens.

    Args:
        model: the model; not changed.
        batch: prompts, right-padded.
        labels: labels from `pad_labels`.

    Returns:
        float32 [B, C], natural logarithm.

    Raises:
        UserError: more slots than the model has positions.
    """
    return score(*nnx.split(model.llama), read(model, batch), labels)


@flagged(static_argnames="graphdef")
def score(
    graphdef: nnx.GraphDef, state: nnx.State, prompt: Prompt, labels: Labels
) -> Float[Array, "b c"]:
    """`score_labels` as a pure function of a split decoder and prompts already read."""
    llama = nnx.merge(graphdef, state)
    cache, hidden = prefill(llama, prompt, extra=labels.ids.shape[1] - 1)
    return score_after(llama, cache, llama.logits(hidden), length=prompt.length, labels=labels)


def score_after(
    llama: Llama,
    cache: KVCache,
    logits: Float[Array, "b v"],
    *,
    length: Int[Array, " b"],
    labels: Labels,
) -> Float[Array, "b c"]:
    """`score_labels` after prompts that have run.

    Args:
        llama: the decoder.
        cache: holds the prompts, and is only read.
        logits: logits of the token after each prompt.
        length: tokens of each prompt.
        labels: labels from `pad_labels`.
    """
    rows, tokens = length.shape[0], labels.ids.shape[1]
    first = jax.nn.log_softmax(logits)[:, labels.ids[:, 0]]  # [B, C]
    if tokens == 1:
        return first
    positions = length[:, None] + jnp.arange(tokens - 1)  # [B, N - 1]

    def rest(ids: jax.Array, length: jax.Array) -> jax.Array:
        """One label's tokens after its first, for every prompt: [B]."""
        embeds = jnp.broadcast_to(llama.embed(ids[None, :-1]), (rows, tokens - 1, llama.cfg.width))
        out = llama(embeds, positions=positions, cache=cache)
        likelihood = jax.nn.log_softmax(llama.logits(out.hidden))  # [B, N - 1, V]
        chosen = jnp.take_along_axis(likelihood, ids[None, 1:, None], axis=-1)[..., 0]
        return jnp.where(jnp.arange(1, tokens) < length, chosen, 0).sum(-1)

    return first + jax.vmap(rest, out_axes=1)(labels.ids, labels.length)
