"""What the endpoint asks of the engine, and what comes back: plain data, without JAX.

The endpoint, its decoding workers and its tests know the engine by these types alone;
`serve/engine.py` holds the one that answers (`load_engine`).
"""

import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Float32, Int, UInt8

from emollama_jax.config import Config, GenerateConfig
from emollama_jax.terms import Kind

if TYPE_CHECKING:  # a decoding worker needs no JAX
    from emollama_jax.data.prompts import Turn

TOP_LOGPROBS = 20  # likeliest tokens that may be told of a step


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """How much an engine takes on."""

    slots: int = 8
    """answers written at once."""
    waiting: int = 64
    """requests that may wait for a slot; more are refused."""
    kept: int = 256
    """MiB of what the towers saw, kept for further questions about the same media."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A picture or clip as a decoding worker hands it over; pickles."""

    kind: Kind
    frames: list[UInt8[np.ndarray, "_ _ 3"]]  # the M that the model sees; 1 of a picture
    indices: Int[np.ndarray, " m"]  # the stored frame of each; short clips repeat frames
    count: int  # stored frames
    digest: str  # SHA-256 of the file's content: what the towers' cache knows it by


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one picture or clip, with the turns before it."""

    media: Decoded | None  # None: about text alone
    text: str
    how: GenerateConfig  # length, temperature (0: greedy), top_p, seed
    face: int | None = None  # number of a picture's face, largest first from 0; None: the largest
    agr: bool = False  # whether the prompt says age, gender and race, where the model's config does
    earlier: "tuple[Turn, ...]" = ()  # of the same media, the oldest first
    stop: tuple[str, ...] = ()  # texts that end the answer, beside the model's stop tokens
    top_logprobs: int | None = None  # 0 … TOP_LOGPROBS; None: no log-probabilities


@dataclasses.dataclass(frozen=True)
class AnswerToken:
    """A token that was drawn, with its log-probability under the model (at temperature 1)."""

    id: int
    text: str  # alone; of a part of a character, the replacement character
    logprob: float
    top: tuple[tuple[int, str, float], ...]  # id, text, log-probability; the likeliest first


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer; joined, the texts of an answer's pieces are the answer."""

    text: str  # whole characters; may be "" where tokens are told
    tokens: tuple[AnswerToken, ...] = ()  # drawn since the last piece; () unless asked for


@dataclasses.dataclass(frozen=True)
class End:
    """The last event of an answer."""

    reason: Literal["stop", "length", "no_face"]  # no_face: a sentence was said, no model asked
    prompt_tokens: int  # visual ones included
    completion_tokens: int  # the stop token left out
    cached_tokens: int  # of the prompt: kept from the conversation's turn before


@dataclasses.dataclass(frozen=True)
class FacesFound:
    """The faces of a picture, or of the clip's fullest frame."""

    boxes: Float32[np.ndarray, "n 4"]  # (x1, y1, x2, y2) in pixels, the largest first
    probabilities: Float32[np.ndarray, " n"]
    face: int | None  # the chosen one; None for clips, and without a face
    agr: str  # the sentence that a prompt with `agr` has; "" for none
    # Label → probability of the chosen face; None without a face.
    age: Mapping[str, float] | None
    gender: Mapping[str, float] | None
    race: Mapping[str, float] | None  # None too where the model never learned it


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-likelihoods of labels as the answer to one question."""

    log_likelihoods: dict[str, float]  # natural logarithm, summed over a label's tokens
    probabilities: dict[str, float]  # their shares among these labels; sum to 1
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an engine counts. All but the first four only grow."""

    running: int  # requests in a slot
    waiting: int  # requests in the queue
    slots: int
    failure: str | None  # why the engine stopped; None: it works
    compilations: int  # since the engine opened: 0, or a request paid for one
    tower_hits: int  # media whose towers' output was kept
    tower_misses: int
    prompt_tokens: int
    cached_tokens: int  # of them: not prefilled, kept from a turn before
    generation_tokens: int
    requests: int  # finished ones
    failures: int  # requests that ended with an error


class Busy(Exception):
    """The queue is full; try again later.

    Attributes:
        seconds: about how long until there is room.
    """

    def __init__(self, seconds: float):
        super().__init__(f"the queue is full; try again in about {seconds:.0f} s")
        self.seconds = seconds


class Stopped(Exception):
    """The engine stopped, by `close` or by a failure of its own; its message says which."""


class Engine(Protocol):
    """Answers many questions at once. All methods may be called from any event loop's thread."""

    cfg: Config  # of the run that answers

    @property
    def room(self) -> int:
        """The largest `max_new_tokens`."""

    def open(self, progress: Callable[[str, int, int], None]) -> None:
        """Compiles every program; from here on no request compiles.

        Args:
            progress: called with what is being compiled, the number done, and of how many.
        """

    async def look(self, media: Decoded, face: int | None) -> FacesFound:
        """Finds the faces and runs the towers on the chosen one; what is found is kept.

        Raises:
            UserError: no such face.
            Busy, Stopped: as for `ask`.
        """

    def ask(self, question: Question) -> AsyncGenerator[Piece | End]:
        """Streams an answer; its last event is an `End`.

        Closing the generator frees the slot at the next step.

        Raises (at the first step of the generator, or at any later one):
            UserError: what the asker can mend: too long a question, no such face.
            Busy: the queue is full.
            Stopped: the engine does not answer any more.
        """

    async def score(self, question: Question, labels: Sequence[str]) -> Scores:
        """Rates each label as the answer; all share the question's prefix.

        Args:
            question: `how`, `stop` and `top_logprobs` are not read.
            labels: different texts, each with at least one character.

        Raises:
            UserError, Busy, Stopped: as for `ask`; labels that are too many, too long or equal.
        """

    def figures(self) -> Figures:
        """Counts, at no cost."""

    def close(self) -> None:
        """Ends what runs with `Stopped` and frees the devices."""
