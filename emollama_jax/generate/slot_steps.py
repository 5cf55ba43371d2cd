"""The steps of an engine that answers many at once, each one program of static shapes.

Every answer has a slot: a row of one cache that is written in place. A prompt is run alone
(`begin`), or behind what its slot holds already (`extend`); then all slots go on by a token at a
time together (`advance`). Each gives logits, which `pick` draws from: a program of its own, so that
sorting is compiled once and not with every length. What a row draws depends on that row alone. A
slot that is idle is computed too, at a position that its next occupant overwrites.

The `slots` of a `KVCache` are another thing: one for each token of a row. They are called places
here.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.generate.cache import init_cache, prefill
from emollama_jax.generate.flagged import flagged
from emollama_jax.generate.label_scores import Labels, score_after
from emollama_jax.generate.prompt import Prompt
from emollama_jax.generate.sampling import Sampling, draw_each
from emollama_jax.models.llama import Llama
from emollama_jax.models.visual_tokens import merge_in_order
from emollama_jax.sharding.points import constrain

# In the layout that the decoder reads token by token: `KVCache`, or a list of `LayerCache`.
Cache = object


@flax.struct.dataclass
class Chunk:
    """Parts of R prompts. Padding rows repeat the first one: they write the same once more."""

    ids: jax.Array  # int32 [R, C], right-padded
    visual: jax.Array  # [R, C, D], the visual tokens of each in its first places
    slot: jax.Array  # int32 [R]
    start: jax.Array  # int32 [R], the place of its first token
    length: jax.Array  # int32 [R], tokens before the padding


@flax.struct.dataclass
class Drawing:
    """How the next tokens are drawn."""

    how: Sampling  # arrays of [B]; temperature 0: greedy
    step: jax.Array  # int32 [B], number of the token in its answer
    told: jax.Array  # bool [], whether log-probabilities are wanted


@flax.struct.dataclass
class Drawn:
    """The next tokens. Log-probabilities are at temperature 1; zeros where not told."""

    token: jax.Array  # int32 [B]
    logprob: jax.Array  # float32 [B]
    top: jax.Array  # int32 [B, n], the likeliest tokens
    top_logprob: jax.Array  # float32 [B, n]


@flagged(static_argnames=("graphdef", "slots", "places"))
def empty(graphdef: nnx.GraphDef, state: nnx.State, *, slots: int, places: int) -> Cache:
    """A cache of B slots with S places each."""
    llama = nnx.merge(graphdef, state)
    return _laid(llama.writer.take(init_cache(llama.cfg, rows=slots, slots=places)))


@flagged(static_argnames="graphdef", donate_argnames="cache")
def begin(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    chunk: Chunk,
) -> tuple[Cache, Float[Array, "r v"]]:
    """Whole prompts, each into its slot; `start` is 0.

    Args:
        graphdef, state: the decoder, split.
        cache: is donated.
        chunk: the prompts.

    Returns:
        The cache, and the logits of each prompt's first new token.
    """
    llama = nnx.merge(graphdef, state)
    new, hidden = prefill(llama, Prompt(_embeds(llama, chunk), chunk.length), extra=0)
    return _laid(llama.writer.stored(cache, new, chunk.slot)), llama.logits(hidden)


@flagged(static_argnames="graphdef", donate_argnames="cache")
def extend(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    chunk: Chunk,
) -> tuple[Cache, Float[Array, "r v"]]:
    """`begin` of prompts whose first `start` tokens are in their slots; start + C is at most S."""
    llama = nnx.merge(graphdef, state)
    positions = chunk.start[:, None] + jnp.arange(chunk.ids.shape[1])
    earlier = llama.writer.rows(cache, chunk.slot)
    out = llama(_embeds(llama, chunk), positions=positions, cache=earlier)
    last = (chunk.length - 1)[:, None, None]
    logits = llama.logits(jnp.take_along_axis(out.hidden, last, axis=1)[:, 0])
    return _laid(llama.writer.stored(cache, out.cache, chunk.slot)), logits


@flagged(static_argnames="graphdef", donate_argnames="cache")
def advance(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    token: Int[Array, " b"],
    position: Int[Array, " b"],
    used: Int[Array, ""],
) -> tuple[Cache, Float[Array, "b v"]]:
    """One more token of every slot enters the cache; returns the logits of the next ones.

    Args:
        graphdef, state: the decoder, split.
        cache: is donated.
        token: each slot's newest token, not in the cache yet.
        position: its place.
        used: places that the answers need so far, idle slots left out.
    """
    llama = nnx.merge(graphdef, state).writer
    cache = llama.bounded(cache, used)
    out = llama(llama.embed(token[:, None]), positions=position[:, None], cache=cache)
    return _laid(out.cache), llama.logits(out.hidden[:, 0])


@flagged(static_argnames="top")
def pick(logits: Float[Array, "b v"], drawing: Drawing, *, top: int) -> Drawn:
    """The next tokens.

    Args:
        logits: next tokens' logits.
        drawing: how each is drawn.
        top: n.
    """
    token = draw_each(logits, drawing.how, steps=drawing.step)
    rows = len(logits)

    def told() -> tuple[jax.Array, ...]:
        logprob = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logprob, token[:, None], axis=-1)[:, 0]
        best, ids = jax.lax.top_k(logprob, top)
        return own, ids, best

    def silent() -> tuple[jax.Array, ...]:
        zeros = jnp.zeros((rows, top), jnp.float32)
        return zeros[:, 0], zeros.astype(jnp.int32), zeros

    return Drawn(token, *jax.lax.cond(drawing.told, told, silent))


@flagged(static_argnames="graphdef")
def rate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: Cache,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    logits: Float[Array, "r v"],
    labels: Labels,
) -> Float[Array, " c"]:
    """Log-likelihood of labels after the prompt in one slot.

    Args:
        graphdef, state: the decoder, split.
        cache: is only read.
        slot: number of the slot.
        length: tokens of its prompt.
        logits: logits of the token after it, in row 0.
        labels: C labels.
    """
    llama = nnx.merge(graphdef, state)
    row = llama.writer.rows(cache, slot[None])
    return score_after(llama, row, logits[:1], length=length[None], labels=labels)[0]


def _embeds(llama: Llama, chunk: Chunk) -> Float[Array, "r c d"]:
    return merge_in_order(llama.embed(chunk.ids), chunk.ids, chunk.visual)


def _laid(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: constrain(x, "cache"), cache)
