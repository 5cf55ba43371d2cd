"""Generation: prefill, then one jitted `while_loop` over tokens; and the same steps as a stream.

The decoder is split on the caller's side of `jax.jit` and merged inside, so a second call with the
same shapes compiles nothing. The loop and the stream share one step, and every step equals a pass
over the whole sequence without a cache.
"""

import enum
import re
from collections.abc import Callable, Generator, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from emollama_jax.batch import Batch
from emollama_jax.errors import UserError
from emollama_jax.generate.cache import prefill
from emollama_jax.generate.flagged import flagged
from emollama_jax.generate.prompt import Prompt, VisionLanguageModel, read
from emollama_jax.generate.sampling import Sampling, draw
from emollama_jax.models.llama import KVCache, Llama


class Stop(enum.IntEnum):
    """Why a row's answer ended."""

    RUNNING = 0  # it has not
    TOKEN = 1  # the model drew a stop token
    LENGTH = 2  # max_new_tokens were drawn


@flax.struct.dataclass
class Ending:
    """What ends a row's answer, and what then fills its place. Traced, as `Sampling` is."""

    stop: jax.Array  # int32 [n], n ≥ 0
    pad: jax.Array  # int32 []


def make_ending(stop: Sequence[int], pad: int) -> Ending:
    """Stop ids and padding id as arrays."""
    return Ending(stop=np.array(stop, np.int32), pad=np.int32(pad))


@flax.struct.dataclass
class Generated:
    """Answers of a batch."""

    ids: jax.Array  # int32 [B, N], the stop token left out, then pad
    length: jax.Array  # int32 [B], tokens before the padding
    stopped: jax.Array  # int32 [B], a Stop


@flax.struct.dataclass
class DecodeState:
    """What goes around the loop."""

    cache: KVCache
    token: jax.Array  # int32 [B], the newest token, not in the cache yet
    position: jax.Array  # int32 [B], its slot
    step: jax.Array  # int32 [], tokens drawn so far
    answer: Generated


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    how: Sampling | None,
    max_new_tokens: int,
    stop: Sequence[int],
    pad: int,
) -> Generated:
    """Answers a batch of prompts.

    Args:
        model: the model; not changed.
        batch: prompts, right-padded, `length` at least 1.
        how: to draw tokens; None for greedy.
        max_new_tokens: N, at least 1.
        stop: ids that end an answer.
        pad: the id that fills `ids` after the end.

    Raises:
        UserError: `max_new_tokens` below 1, or more slots than the model has positions.
    """
    limit = _at_least_one(max_new_tokens)
    llama, prompt = nnx.split(model.llama), read(model, batch)
    return decode(*llama, prompt, how, make_ending(stop, pad), max_new_tokens=limit)


@flagged(static_argnames=("graphdef", "max_new_tokens"))
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompt: Prompt,
    how: Sampling | None,
    ending: Ending,
    *,
    max_new_tokens: int,
) -> Generated:
    """`generate` as a pure function of a split decoder and prompts already read."""
    llama = nnx.merge(graphdef, state)
    loop = _start(llama, prompt, how, ending, max_new_tokens=max_new_tokens)

    def running(loop: DecodeState) -> jax.Array:
        return (loop.answer.stopped == Stop.RUNNING).any()

    def advance(loop: DecodeState) -> DecodeState:
        return _advance(llama, loop, how, ending)

    return jax.lax.while_loop(running, advance, loop).answer


def stream(
    llama: tuple[nnx.GraphDef, nnx.State],
    prompt: Prompt,
    to_text: Callable[[Sequence[int]], str],
    *,
    how: Sampling | None,
    max_new_tokens: int,
    stop: Sequence[int],
    pad: int,
    flags: Mapping[str, str] | None = None,
) -> Generator[str, None, Stop]:
    """Answers one prompt piece by piece; joined, the pieces are what `generate` would answer.

    Args:
        llama: the decoder, split.
        prompt: one, as the decoder reads it.
        to_text: decodes ids, e.g. a tokenizer's `decode`.
        how: to draw tokens; None for greedy.
        max_new_tokens: at least 1.
        stop: ids that end the answer.
        pad: as for `generate`.
        flags: for XLA on a TPU.

    Yields:
        Text, never a part of a character.

    Returns:
        The `Stop` that ended it (`reason = yield from stream(…)`).

    Raises:
        ValueError: more than one prompt.
        UserError: as `generate`.
    """
    if prompt.embeds.shape[0] != 1:
        raise ValueError(f"{prompt.embeds.shape[0]} prompts: a stream answers one")
    limit, fixed = _at_least_one(max_new_tokens), (how, make_ending(stop, pad))
    flags = flags or {}
    following = next_token.under(flags)
    loop = first_token.under(flags)(*llama, prompt, *fixed, max_new_tokens=limit)
    pieces = Detokenizer(to_text)
    while True:
        token, stopped = jax.device_get((loop.token, loop.answer.stopped))
        reason = Stop(stopped[0])
        if reason is not Stop.TOKEN and (piece := pieces.add(int(token[0]))):
            yield piece
        if reason is not Stop.RUNNING:
            return reason
        loop = following(*llama, loop, *fixed)


class Detokenizer:
    """Turns ids into text as they come, holding back what is not a whole character yet.

    All ids are decoded anew at each step: only so do tokenizers that look at their neighbours
    (SentencePiece's spaces, byte fallback) give the text that the whole answer has.
    """

    def __init__(self, to_text: Callable[[Sequence[int]], str]):
        self._to_text = to_text
        self._ids: list[int] = []
        self._told = 0  # characters given out

    def add(self, token: int) -> str:
        """The text that became certain with this id; "" while a character is incomplete."""
        self._ids.append(token)
        text = settled(self._to_text(self._ids))
        piece, self._told = text[self._told :], max(self._told, len(text))
        return piece


def texts(generated: Generated, to_text: Callable[[Sequence[int]], str]) -> list[str]:
    """The answers as text, outer white space removed, as LLaMA-VID does."""
    ids, length = np.asarray(generated.ids), np.asarray(generated.length)
    return [settled(to_text(row[:n].tolist())) for row, n in zip(ids, length, strict=True)]


def settled(text: str) -> str:
    """What no later id can change: without outer white space and unfinished characters.

    Bytes that are not a whole character yet decode to replacement characters at the end.
    """
    return re.sub(r"[\s\ufffd]+\Z", "", text).lstrip()


def _start(
    llama: Llama, prompt: Prompt, how: Sampling | None, ending: Ending, *, max_new_tokens: int
) -> DecodeState:
    """Prefill and the first token."""
    rows = prompt.length.shape[0]
    written, hidden = prefill(llama, prompt, extra=max_new_tokens)
    cache = llama.writer.take(written)
    nothing = jnp.zeros((rows,), jnp.int32)
    state = DecodeState(
        cache=cache,
        token=nothing,
        position=prompt.length.astype(jnp.int32) - 1,
        step=jnp.int32(0),
        answer=Generated(
            ids=jnp.full((rows, max_new_tokens), ending.pad, jnp.int32),
            length=nothing,
            stopped=nothing,
        ),
    )
    return _take(state, draw(llama.logits(hidden), how, step=0), ending)


def _advance(llama: Llama, state: DecodeState, how: Sampling | None, ending: Ending) -> DecodeState:
    """The newest token enters the cache, the next one is drawn."""
    llama = llama.writer
    out = llama(
        llama.embed(state.token[:, None]), positions=state.position[:, None], cache=state.cache
    )
    token = draw(llama.logits(out.hidden[:, 0]), how, step=state.step)
    return _take(state.replace(cache=out.cache), token, ending)


def _take(state: DecodeState, token: Int[Array, " b"], ending: Ending) -> DecodeState:
    """Notes a drawn token: rows that have ended stay as they are."""
    answer = state.answer
    running = answer.stopped == Stop.RUNNING
    ends = running & (token[:, None] == ending.stop).any(-1)
    kept = running & ~ends
    last = state.step + 1 == answer.ids.shape[1]
    stopped = jnp.where(ends, Stop.TOKEN, jnp.where(kept & last, Stop.LENGTH, answer.stopped))
    token = jnp.where(kept, token, ending.pad)
    return state.replace(
        token=token,
        position=state.position + 1,
        step=state.step + 1,
        answer=Generated(
            ids=answer.ids.at[:, state.step].set(token),
            length=answer.length + kept,
            stopped=stopped,
        ),
    )


@flagged(static_argnames=("graphdef", "max_new_tokens"))
def first_token(graphdef, state, prompt, how, ending, *, max_new_tokens) -> DecodeState:
    return _start(nnx.merge(graphdef, state), prompt, how, ending, max_new_tokens=max_new_tokens)


@flagged(static_argnames="graphdef", donate_argnames="loop")
def next_token(graphdef, state, loop, how, ending) -> DecodeState:
    return _advance(nnx.merge(graphdef, state), loop, how, ending)


def _at_least_one(max_new_tokens: int) -> int:
    if max_new_tokens < 1:
        raise UserError(f"generate.max_new_tokens: found {max_new_tokens}, wanted at least 1")
    return max_new_tokens
