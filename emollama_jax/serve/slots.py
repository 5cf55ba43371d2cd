"""The slots of an engine on its devices: their cache, what each holds, and the programs.

`generate/slot_steps.py` has the programs; this knows their shapes. Prompts are padded to one of a
few lengths and run alone or in groups of `GROUP`; labels are rated `LABELS` at a time. `warm_up`
runs each shape once, so that nothing is compiled later.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int32, Int64

from emollama_jax.config import GenerateConfig
from emollama_jax.errors import UserError
from emollama_jax.generate import slot_steps
from emollama_jax.generate.label_scores import Labels
from emollama_jax.generate.sampling import Sampling
from emollama_jax.generate.slot_steps import Chunk, Drawing, Drawn
from emollama_jax.models.llama import Llama
from emollama_jax.models.llama_by_token import laid_out

GROUP = 4  # prompts that run together
LABELS = 8  # labels that are rated together
LABEL_TOKENS = (4, 12, 32)  # tokens of the longest of them, its end included
SMALLEST = 1024  # places of a slot, where the model's positions reach that far

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt on its way into a slot."""

    ids: Int32[np.ndarray, " n"]
    visual: Float[np.ndarray, "v d"]  # of its visual places, in their order
    signature: Int64[np.ndarray, " n"]  # equal where tokens and what they show are
    how: GenerateConfig
    told: bool  # whether log-probabilities are wanted
    follows: bool  # whether it goes on from a prompt before it
    alone: bool  # whether its logits are needed: it runs by itself

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass
class Slot:
    """One row of the cache."""

    kept: Int64[np.ndarray, " n"]  # signature of what is in it, from place 0 on
    used: int  # when, in steps of the engine
    entry: Entry | None = None  # None: idle
    token: int = 0  # the newest one, not in the cache yet
    step: int = 0  # its number in the answer


@dataclasses.dataclass(frozen=True)
class Begun:
    """Prompts that have run."""

    slots: list[int]  # of each
    drawn: Drawn  # their first tokens, NumPy; more rows are padding
    logits: jax.Array  # of these
    cached: int  # tokens of the only prompt that were in its slot already


NOTHING = np.zeros(0, np.int64)


def lengths_of(texts: Sequence[int], places: int) -> tuple[int, ...]:
    """Lengths to which prompts are padded: those of the config, and doubled ones for long talks."""
    found = {min(text, places) for text in texts}
    longest = max(found)
    while longest < places:
        longest = min(2 * longest, places)
        found.add(longest)
    return tuple(sorted(found))


class Slots:
    """B slots with S places each. For one thread.

    Attributes:
        places: S, which prompt and answer share.
        slots: state of each.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        count: int,
        texts: Sequence[int],
        flags: dict[str, str],
        top: int,
    ):
        """Lays the decoder out and makes an empty cache.

        Args:
            llama: the decoder.
            count: B.
            texts: padded lengths of a first question, the longest last.
            flags: XLA's, for a TPU.
            top: likeliest tokens that are told with log-probabilities.
        """
        cfg = llama.cfg
        self.places = min(cfg.reach, max(SMALLEST, 2 * texts[-1]))
        self.lengths = lengths_of(texts, self.places)
        first = sorted({min(text, self.places) for text in texts})
        self._grouped = first if count >= GROUP else []
        self._extended = sorted({first[0] // 2, *first})
        self._llama, self._flags = nnx.split(laid_out(llama, least=0)), flags
        self._dtype, self._width = jnp.dtype(cfg.dtype), cfg.width
        self._top = min(top, cfg.vocab_size)
        self._step = 0
        self.slots = [Slot(NOTHING, 0) for _ in range(count)]
        self._cache = slot_steps.empty.under(flags)(*self._llama, slots=count, places=self.places)

    def free(self) -> list[int]:
        """Numbers of idle slots."""
        return [number for number, slot in enumerate(self.slots) if slot.entry is None]

    def running(self) -> list[int]:
        """Numbers of the others."""
        return [number for number, slot in enumerate(self.slots) if slot.entry is not None]

    # -------------------------------------------------------------- prompts

    def choose(self, entry: Entry) -> tuple[int, int]:
        """An idle slot for a prompt, and how many of its first tokens are kept there.

        A conversation's next question finds what was computed for it. All else runs whole, in the
        slot that was not used for longest: so the same first question gets the same numbers,
        whatever was asked before it.
        """
        free = self.free()
        if entry.follows:
            shared = {number: _shared(self.slots[number].kept, entry.signature) for number in free}
            best = max(free, key=lambda number: shared[number])
            start = min(shared[best], len(entry) - 1)
            length = _least(self._extended, len(entry) - start)
            if length is not None and length < self._whole(len(entry)):
                return best, min(start, self.places - length)
        return min(free, key=lambda number: self.slots[number].used), 0

    def group(self, entries: Sequence[Entry]) -> list[int]:
        """Which of some waiting prompts, in their order, run next together: with the first.

        Args:
            entries: at least one.
        """
        first = entries[0]
        length = self._whole(len(first))
        if first.follows or first.alone or length not in self._grouped:
            return [0]
        alike = [
            i
            for i, entry in enumerate(entries)
            if not (entry.follows or entry.alone) and self._whole(len(entry)) == length
        ]
        alike = alike[: min(GROUP, len(self.free()))]
        # A CPU computes padding rows like any others.
        return [0] if jax.default_backend() == "cpu" and len(alike) < GROUP else alike

    def begin(self, entries: Sequence[Entry]) -> "Begun":
        """Runs prompts of one `group`."""
        placed, start = [], 0
        for entry in entries:
            number, start = self.choose(entry)
            placed.append(number)
            self._occupy(number, entry)
        length = self._whole(len(entries[0]))
        step = slot_steps.begin
        if start:
            step, length = slot_steps.extend, _least(self._extended, len(entries[0]) - start)
        rows = 1 if len(entries) == 1 else GROUP
        padded = [*zip(placed, entries, strict=True)]
        padded += padded[:1] * (rows - len(padded))
        chunk = self._chunk(padded, start, length)
        self._cache, logits = step.under(self._flags)(*self._llama, self._cache, chunk)
        drawn = self._pick(logits, [(entry, 0) for _, entry in padded])
        for number, token in zip(placed, drawn.token.tolist(), strict=False):
            self.slots[number].token = token
        return Begun(placed, drawn, logits, cached=start)

    def _chunk(self, rows: Sequence[tuple[int, Entry]], start: int, length: int) -> Chunk:
        ids = np.zeros((len(rows), length), np.int32)
        visual = np.zeros((len(rows), length, self._width), self._dtype)
        count = np.zeros(len(rows), np.int32)
        for row, (_, entry) in enumerate(rows):
            part = entry.ids[start : start + length]
            seen = int((entry.ids[:start] < 0).sum())
            shown = entry.visual[seen : seen + int((part < 0).sum())]
            ids[row, : len(part)], count[row] = part, len(part)
            visual[row, : len(shown)] = shown
        slots = np.array([number for number, _ in rows], np.int32)
        return Chunk(ids, visual, slots, np.full(len(rows), start, np.int32), count)

    def _whole(self, tokens: int) -> int:
        """Padded length of a prompt that runs whole."""
        length = _least(self.lengths, tokens)
        if length is None:
            raise UserError(f"the prompt has {tokens} tokens, wanted at most {self.places}")
        return length

    def _occupy(self, number: int, entry: Entry) -> None:
        self._step += 1
        self.slots[number] = Slot(entry.signature, self._step, entry)

    def leave(self, number: int) -> None:
        """A slot's answer has ended; what is in the cache stays until the slot is needed."""
        slot = self.slots[number]
        slot.entry, slot.kept = None, slot.kept[: self.places - 1]

    # -------------------------------------------------------------- tokens

    def advance(self) -> Drawn:
        """The next token of all slots, NumPy; those of idle ones mean nothing."""
        self._step += 1
        for slot in self.slots:
            if slot.entry is not None:
                slot.step, slot.used = slot.step + 1, self._step
        token = np.array([slot.token for slot in self.slots], np.int32)
        # An idle slot writes where its next tokens would.
        position = np.array([len(slot.kept) for slot in self.slots], np.int32)
        used = np.int32(max((position[number] + 1 for number in self.running()), default=1))
        step = slot_steps.advance.under(self._flags)
        self._cache, logits = step(*self._llama, self._cache, token, position, used)
        drawn = self._pick(logits, [(slot.entry, slot.step) for slot in self.slots])
        for slot, new in zip(self.slots, drawn.token.tolist(), strict=True):
            if slot.entry is not None:
                slot.kept = np.append(slot.kept, np.int64(slot.token))
                slot.token = new
        return drawn

    def _pick(self, logits: jax.Array, rows: Sequence[tuple[Entry | None, int]]) -> Drawn:
        """The next tokens, NumPy; log-probabilities only where one row tells them.

        Args:
            logits: next tokens' logits.
            rows: a prompt, None for an idle slot, and the number of the token in its answer.
        """
        hows = [GREEDY if entry is None else entry.how for entry, _ in rows]
        how = Sampling(
            temperature=np.array([how.temperature for how in hows], np.float32),
            top_p=np.array([how.top_p for how in hows], np.float32),
            seed=np.array([how.seed for how in hows], np.int64).astype(np.int32),
        )
        told = any(entry is not None and entry.told for entry, _ in rows)
        drawing = Drawing(how, np.array([step for _, step in rows], np.int32), np.bool_(told))
        drawn = slot_steps.pick.under(self._flags)(logits, drawing, top=self._top)
        return jax.device_get(drawn if told else drawn.replace(top=None, top_logprob=None))

    # -------------------------------------------------------------- labels

    def rate(self, begun: "Begun", labels: Sequence[Sequence[int]]) -> Float[np.ndarray, " c"]:
        """Log-likelihood of each label after a prompt.

        Args:
            begun: the prompt, run alone just now.
            labels: tokens of each, LABEL_TOKENS[-1] at most.
        """
        (number,) = begun.slots
        where = np.int32(number), np.int32(len(self.slots[number].kept))
        call, rated = slot_steps.rate.under(self._flags), []
        for part in _label_chunks(labels):
            rated.append(call(*self._llama, self._cache, *where, begun.logits, part))
        return np.concatenate(jax.device_get(rated))[: len(labels)]

    # -------------------------------------------------------------- compilation

    def warm_up(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Each shape of each program: what it is, and the call that runs it on an empty slot."""

        def prompts(length: int, rows: int, start: int) -> None:
            ids = np.zeros(start + length, np.int32)
            visual, follows = np.zeros((0, self._width), self._dtype), start > 0
            signature = ids.astype(np.int64)
            entry = Entry(
                ids, visual, signature, GREEDY, told=False, follows=follows, alone=follows
            )
            for slot in self.slots[: 1 if start else None]:
                slot.kept = entry.signature[:start]
            begun = self.begin([entry] * rows)
            if rows == 1 and start == 0 and length == self.lengths[0]:
                for tokens in LABEL_TOKENS:
                    self.rate(begun, [[0] * tokens])
            for number in begun.slots:
                self.leave(number)
                self.slots[number].kept = NOTHING

        for length in self.lengths:
            yield f"prompts of {length} tokens", lambda length=length: prompts(length, 1, 0)
        for length in self._grouped:
            yield (
                f"{GROUP} prompts of {length} tokens",
                lambda length=length: prompts(length, GROUP, 0),
            )
        for length in self._extended:
            if length < self.lengths[-1]:
                start = self.places - length
                what = f"{length} tokens after a talk"
                yield what, lambda length=length, start=start: prompts(length, 1, start)
        yield "a token for each slot", self.advance


GREEDY = GenerateConfig(max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0)


def _shared(kept: Int64[np.ndarray, " n"], wanted: Int64[np.ndarray, " m"]) -> int:
    """How many of the first tokens are the same."""
    both = min(len(kept), len(wanted))
    apart = np.flatnonzero(kept[:both] != wanted[:both])
    return int(apart[0]) if len(apart) else both


def _least(sizes: Sequence[int], wanted: int) -> int | None:
    """The smallest of ascending sizes that holds a number."""
    return next((size for size in sizes if size >= wanted), None)


def _label_chunks(labels: Sequence[Sequence[int]]) -> Iterator[Labels]:
    """`LABELS` at a time, padded to one of the shapes; the last ones are padding."""
    for first in range(0, len(labels), LABELS):
        part = labels[first : first + LABELS]
        tokens = next(size for size in LABEL_TOKENS if size >= max(map(len, part)))
        ids, length = np.zeros((LABELS, tokens), np.int32), np.ones(LABELS, np.int32)
        for row, label in enumerate(part):
            ids[row, : len(label)], length[row] = label, len(label)
        yield Labels(ids=ids, length=length)
