"""`emollama ask` in a terminal: pictures and clips, one question or a conversation, text or JSON.

Everything that can be refused is refused before JAX is imported.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from emollama_jax import compile_cache
from emollama_jax.data.items import standard_question
from emollama_jax.data.media import is_video
from emollama_jax.errors import UserError
from emollama_jax.preflight import at_least
from emollama_jax.runs import PACKAGE, find
from emollama_jax.status import Status

if TYPE_CHECKING:  # they import JAX
    from emollama_jax.config import GenerateConfig
    from emollama_jax.serve.answer import Answerer, Media

PROMPT = "> "
DEMO = pathlib.Path("demo_out/run")  # of `make demo`


@dataclasses.dataclass(frozen=True)
class Wish:
    """The request: what to answer, and how."""

    media: tuple[pathlib.Path, ...]
    question: str | None
    chat: bool  # read more questions, line by line
    run: str
    face: int | None
    temperature: float | None
    max_new_tokens: int | None
    as_json: bool
    without_face: bool


def default_run() -> str:
    """The run that answers where none is named: the package's. Says so beside a demo's."""
    if DEMO.is_dir():
        print(f"(using the package's own run; for yours: --run {DEMO})", file=sys.stderr)
    return PACKAGE


def split_arguments(given: Sequence[str]) -> tuple[tuple[pathlib.Path, ...], str | None]:
    """Media and the question behind them, if there is one.

    What exists is a medium. Of what does not, the last argument is a question if it has a space,
    ends in a question mark, or looks like no path: without a slash and an ending. All else is a
    path that does not exist, and `check` says so.
    """
    *rest, last = given
    question = None
    if rest and not _exists(last):
        words = last.strip()
        path = bool(words) and ("/" in words or pathlib.PurePath(words).suffix)
        if not path or re.search(r"\s", words) or words.endswith("?"):
            question, given = last, rest
    return tuple(map(pathlib.Path, given)), question


def _exists(path: str) -> bool:
    try:
        return bool(path) and pathlib.Path(path).exists()
    except (OSError, ValueError):  # longer than any name, or with a null character
        return False


def check(wish: Wish) -> None:
    """Refuses what no model needs to be loaded for.

    Raises:
        UserError: media that are not there or cannot be read, a run that is none, bad numbers.
    """
    if wish.question is not None and not wish.question.strip():
        raise UserError("the question is empty")
    at_least(0, temperature=wish.temperature, face=wish.face)
    at_least(1, max_new_tokens=wish.max_new_tokens)
    for path in wish.media:
        if is_video(path) and wish.face is not None:
            raise UserError(
                f"--face {wish.face}: {path} is a clip; faces are chosen in pictures only"
            )
    find(wish.run)


def ask(wish: Wish, console: Console) -> None:
    """Answers.

    Args:
        wish: request of the user.
        console: terminal for progress.

    Raises:
        UserError: as of `check`, and what only the model can tell.
    """
    check(wish)
    began = time.monotonic()
    with Status(console) as status, _no_garbage_search():
        status.say(f"loading the run {wish.run}")
        answerer = _load(wish.run)
        if compile_cache.is_cold():
            status.say("compiling once for this machine, which takes a few seconds")
        else:
            status.say("looking for faces")
        how = _how(answerer, wish)
        loading = time.monotonic() - began
        talks, troubles = [], []
        for path in wish.media:
            began = time.monotonic()
            try:
                media = answerer.look(path, face=wish.face)
            except UserError as error:
                named = str(path) in str(error)
                troubles.append(str(error) if named else f"{path}: {error}")
                continue
            talks.append(_Talk(wish, answerer, media, path, how, began, loading))
            if wish.question is not None:
                talks[-1].answer(wish.question, status)
            gc.enable()
        if wish.chat and talks:
            status.clear()
            asked = _converse(talks, status, standard=wish.question is None)
            if wish.question is None and not asked:
                raise UserError("no question: give one after the picture, or on standard input")
    if troubles:  # told last, so that one file costs no answer about the others
        raise UserError("; ".join(troubles))


@contextlib.contextmanager
def _no_garbage_search() -> Iterator[None]:
    """Until the first answer nearly all new objects stay: imports, traces, programs. Searching them
    for cycles took a tenth of a warm question's CPU seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _converse(talks: Sequence["_Talk"], status: Status, *, standard: bool) -> int:
    """Puts each question to every picture; returns how many there were.

    Args:
        talks: about the pictures.
        status: display of the current activity.
        standard: put the standard question first in a terminal, or where a pipe holds nothing.
    """
    for talk in talks:
        talk.introduce()
    asked = 0
    for question in _questions(standard=standard):
        asked += 1
        for talk in talks:
            talk.answer(question, status)
    return asked


@dataclasses.dataclass
class _Talk:
    """The questions about one picture or clip, and where their answers go."""

    wish: Wish
    answerer: "Answerer"
    media: "Media"
    path: pathlib.Path
    how: "GenerateConfig"
    began: float  # seconds of the clock
    loading: float  # seconds

    def __post_init__(self):
        from emollama_jax.serve.answer import Conversation

        without_face = self.wish.without_face
        self._conversation = Conversation(self.answerer, self.media, without_face=without_face)

    def introduce(self) -> None:
        """Says what was found, before questions are asked in a terminal."""
        if self.wish.as_json or not sys.stdin.isatty():
            return
        count = len(self.media.boxes)
        faces = {0: "no face found", 1: "one face found"}.get(count, f"{count} faces found")
        print(f"{self.path}: {faces}. Ask more; an empty line ends.", file=sys.stderr)

    def answer(self, question: str | None, status: Status) -> None:
        """Answers one question; None is the standard one."""
        if question is None:
            question = standard_question(self.media.kind)
        pieces = self._conversation.ask(question, how=self.how)
        if self.wish.as_json:
            text = "".join(pieces)
            status.clear()
            print(json.dumps(self._record(question, text), ensure_ascii=False), flush=True)
        else:
            self._stream(pieces, status)
        self.began, self.loading = time.monotonic(), 0.0
        if forgotten := self._conversation.forgotten:
            print(
                f"(the model no longer sees the first {forgotten} questions)",
                file=sys.stderr,
            )

    def _stream(self, pieces: Iterator[str], status: Status) -> None:
        first = next(pieces, "")
        status.clear()
        if len(self.wish.media) > 1:
            print(f"{self.path}: ", end="")
        if self.wish.without_face and not self.media.found:
            print("(no face found; answering about the whole picture) ", end="")
        for piece in itertools.chain([first], pieces):
            print(piece, end="", flush=True)
        print(flush=True)

    def _record(self, question: str, answer: str) -> dict[str, Any]:
        media = self.media
        faces = [
            {"box": [round(float(x), 1) for x in box], "probability": round(float(p), 4)}
            for box, p in zip(media.boxes, media.probabilities, strict=True)
        ]
        return {
            "media": str(self.path),
            "kind": media.kind,
            "question": question,
            "answer": answer,
            "face_found": media.found,
            "faces": faces,
            "face": media.face,
            "scores": self._scores,
            "seconds": {
                "load": round(self.loading, 2),
                "answer": round(time.monotonic() - self.began, 2),
            },
        }

    @functools.cached_property
    def _scores(self) -> dict[str, float] | None:
        """The share of each class as the answer to the category question; None without a face."""
        from emollama_jax.data.split import space_of
        from emollama_jax.serve.answer import probabilities

        if not (self.media.found or self.wish.without_face):
            return None
        data = self.answerer.cfg.data
        classes = space_of(data.dir, data.sources[0].name).classes
        shares = probabilities(self.answerer.scores(self.media, classes))
        return {name: round(share, 4) for name, share in shares.items()}


def _load(run: str) -> "Answerer":
    compile_cache.start()
    from emollama_jax.checkpoint import load_for_inference
    from emollama_jax.serve.answer import Answerer

    return Answerer(*load_for_inference(run))


def _how(answerer: "Answerer", wish: Wish) -> "GenerateConfig":
    given = {"temperature": wish.temperature, "max_new_tokens": wish.max_new_tokens}
    changes = {name: value for name, value in given.items() if value is not None}
    room = answerer.encoder.room
    if wish.max_new_tokens is not None and wish.max_new_tokens > room:
        raise UserError(
            f"--max-new-tokens {wish.max_new_tokens}: wanted at most {room}, which is what the "
            "model's positions leave beside a prompt"
        )
    return dataclasses.replace(answerer.cfg.generate, **changes)


def _questions(*, standard: bool) -> Iterator[str | None]:
    """Lines of the terminal, which an empty one ends, or of a pipe, where it says nothing.

    None stands for the standard question, first in a terminal and alone where a pipe holds nothing.
    """
    typed = sys.stdin.isatty()
    if typed and standard:
        yield None
    for number in itertools.count():
        if typed:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line and not typed and standard and number == 0:
            yield None
        if not line or (typed and not line.strip()):
            return
        if line.strip():
            yield line.strip()
