"""An answer as it grows: from drawn tokens to pieces of text, and where it ends."""

from collections.abc import Iterator, Sequence

import numpy as np

from emollama_jax.data.chat import Chat
from emollama_jax.generate.decode import Detokenizer
from emollama_jax.generate.slot_steps import Drawn
from emollama_jax.serve.requests import AnswerToken, End, Piece, Question


class StopTexts:
    """Looks for stop texts in an answer, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop text follows it."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """What was held back, once the answer has ended."""
        return self._held


class Writing:
    """One answer."""

    def __init__(self, question: Question, chat: Chat, *, prompt_tokens: int, cached_tokens: int):
        self._chat, self._limit = chat, question.how.max_new_tokens
        self._told = question.top_logprobs
        self._pieces, self._stops = Detokenizer(chat.tokenizer.decode), StopTexts(question.stop)
        self._prompt, self._cached = prompt_tokens, cached_tokens
        self._waiting: list[AnswerToken] = []  # tokens whose text is held back
        self.count = 0  # tokens of the answer

    def add(self, token: int, drawn: Drawn, row: int) -> Iterator[Piece | End]:
        """What a newly drawn token makes certain; the last one is an `End`.

        Args:
            token: id.
            drawn: where its log-probabilities are, if they are told.
            row: its row there.
        """
        if token in self._chat.stop:
            yield from self._last(self._stops.rest(), "stop")
            return
        self.count += 1
        if self._told is not None:
            self._waiting.append(self._answer_token(token, drawn, row))
        text, ended = self._stops.add(self._pieces.add(token))
        if ended:
            yield from self._last(text, "stop")
        elif self.count == self._limit:
            yield from self._last(text + self._stops.rest(), "length")
        else:
            yield from self._piece(text)

    def _last(self, text: str, reason: str) -> Iterator[Piece | End]:
        yield from self._piece(text)
        yield End(
            reason,
            prompt_tokens=self._prompt,
            completion_tokens=self.count,
            cached_tokens=self._cached,
        )

    def _piece(self, text: str) -> Iterator[Piece]:
        if text or self._waiting:
            yield Piece(text, tuple(self._waiting))
            self._waiting = []

    def _answer_token(self, token: int, drawn: Drawn, row: int) -> AnswerToken:
        def word(token: int) -> str:
            return self._chat.tokenizer.decode([token])

        ids, values = (np.asarray(x)[row].tolist() for x in (drawn.top, drawn.top_logprob))
        top = tuple((i, word(i), value) for i, value in zip(ids, values, strict=True))
        return AnswerToken(token, word(token), float(drawn.logprob[row]), top[: self._told])
