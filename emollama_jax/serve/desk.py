"""The work behind the endpoint: a checked request → decoded media → the engine → an answer."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from emollama_jax.data.items import category_question, standard_question
from emollama_jax.serve import words
from emollama_jax.serve.decoders import Decoders
from emollama_jax.serve.media import Fetching, load
from emollama_jax.serve.metrics import Metrics
from emollama_jax.serve.reply import Reply
from emollama_jax.serve.requests import (
    AnswerToken,
    Decoded,
    End,
    Engine,
    FacesFound,
    Piece,
    Question,
)
from emollama_jax.serve.schemas import ChatRequest, Choice, ScoreRequest, choice_of
from emollama_jax.serve.words import Talk, Words

AHEAD = 8  # pieces that an answer may be ahead of its reader

Event = tuple[int, Piece | End]


@dataclasses.dataclass
class Clock:
    """Seconds of a request's parts."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    spent: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str):
        """Measures a part."""
        start = time.monotonic()
        yield
        self.spent[name] = time.monotonic() - start

    @property
    def total(self) -> float:
        """Since the request's arrival."""
        return time.monotonic() - self.began

    def told(self) -> dict[str, float]:
        """For the answer."""
        return {
            name: round(value, 4) for name, value in (self.spent | {"total": self.total}).items()
        }


class Desk:
    """Answers checked requests."""

    def __init__(
        self,
        engine: Engine,
        decoders: Decoders,
        metrics: Metrics,
        *,
        name: str,
        classes: Sequence[str],
        fetching: Fetching,
    ):
        """Keeps what it needs.

        Args:
            engine: open.
            decoders: started.
            metrics: count what is done.
            name: the model's, as clients know it.
            classes: the run's emotion classes.
            fetching: what may be fetched from other hosts.
        """
        self.name, self.classes = name, tuple(classes)
        self._engine, self._decoders, self._metrics = engine, decoders, metrics
        self._fetching = fetching

    async def chat(self, asked: ChatRequest, reply: Reply, clock: Clock) -> None:
        """Answers `POST /v1/chat/completions`.

        Raises:
            Fault, UserError, Busy, Stopped: see `faults.of`.
        """
        talk, chosen = words.talk_of(asked.messages), choice_of(asked)
        how = words.how_of(asked, self._engine.cfg.generate, self._engine.room)
        told = asked.told
        if talk.url is None and not talk.question:
            raise words.invalid("messages: the last one is empty", "messages")
        async with self._seen(talk, asked.emollama.face, clock) as (media, found):
            question = Question(
                media=media,
                text=talk.question or standard_question(talk.kind),
                how=how,
                face=asked.emollama.face,
                agr=asked.emollama.agr,
                earlier=talk.earlier,
                stop=asked.stops,
                top_logprobs=told,
            )
            said = words.faces(found, agr=asked.emollama.agr)
            task = _Answer(asked, question, said, clock, reply, self._metrics, self.name)
            if chosen is not None:
                await self._choose(task, chosen)
                return
            seeds = range(how.seed, how.seed + (asked.n or 1))
            questions = [
                dataclasses.replace(question, how=dataclasses.replace(how, seed=seed % 2**31))
                for seed in seeds
            ]
            async with contextlib.aclosing(
                _together([self._engine.ask(one) for one in questions])
            ) as events:
                await (task.stream(events) if asked.stream else task.whole(events))

    async def _choose(self, task: "_Answer", chosen: Choice) -> None:
        with task.clock.part("answer"):
            scores = await self._engine.score(task.question, chosen.labels)
        likeliest = max(scores.log_likelihoods, key=lambda label: scores.log_likelihoods[label])
        task.said["choices"] = _scored(scores.log_likelihoods, scores.probabilities)
        text = Piece(chosen.content(likeliest))
        end = End("stop", scores.prompt_tokens, 0, 0)

        async def events() -> AsyncGenerator[Event]:
            for index in range(task.asked.n or 1):
                yield index, text
                yield index, end

        await (task.stream(events()) if task.asked.stream else task.whole(events()))

    async def score(self, asked: ScoreRequest, reply: Reply, clock: Clock) -> None:
        """Answers `POST /v1/score`. Raises as `chat`."""
        talk, labels = words.talk_of(asked.messages), words.labels_of(asked, self.classes)
        text = talk.question or category_question(labels, talk.kind)
        async with self._seen(talk, asked.emollama.face, clock) as (media, found):
            said = words.faces(found, agr=asked.emollama.agr)
            data: list[dict[str, Any]] = []
            prompt = 0
            if found is None or said["face_found"]:
                question = Question(
                    media=media,
                    text=text,
                    how=self._engine.cfg.generate,
                    face=asked.emollama.face,
                    agr=asked.emollama.agr,
                    earlier=talk.earlier,
                )
                with clock.part("answer"):
                    scores = await self._engine.score(question, labels)
                data = _scored(scores.log_likelihoods, scores.probabilities)
                prompt = scores.prompt_tokens
        self._metrics.finished("stop", prompt=prompt, generated=0)
        self._metrics.whole(clock.total)
        await reply.json(
            Words("score", "score", self.name).whole(
                question=text,
                data=data,
                usage=words.usage(prompt, 0),
                emollama=said | {"seconds": clock.told()},
            )
        )

    @contextlib.asynccontextmanager
    async def _seen(
        self, talk: Talk, face: int | None, clock: Clock
    ) -> AsyncIterator[tuple[Decoded | None, FacesFound | None]]:
        """The medium of a conversation, decoded, and its faces; None without a medium."""
        if talk.url is None:
            yield None, None
            return
        async with contextlib.AsyncExitStack() as holding:
            with clock.part("decode"):
                data = await load(talk.url, self._fetching, param=talk.param)
                media = await holding.enter_async_context(
                    self._decoders.decoded(data, talk.kind, param=talk.param)
                )
                del data
            self._metrics.decode(clock.spent["decode"])
            with clock.part("look"):
                found = await self._engine.look(media, face)
            yield media, found


@dataclasses.dataclass
class _Answer:
    """One answer to `chat`, whole or streamed."""

    asked: ChatRequest
    question: Question
    said: dict[str, Any]  # our extension: faces
    clock: Clock
    reply: Reply
    metrics: Metrics
    name: str

    async def whole(self, events: AsyncIterator[Event]) -> None:
        """Sends it in one."""
        number = self.asked.n or 1
        texts: list[list[str]] = [[] for _ in range(number)]
        tokens: list[list[AnswerToken]] = [[] for _ in range(number)]
        ends: dict[int, End] = {}
        async for index, event in self._timed(events):
            if isinstance(event, End):
                ends[index] = event
            else:
                texts[index].append(event.text)
                tokens[index].extend(event.tokens)
        told = None if "choices" in self.said else self.question.top_logprobs
        choices = [
            words.choice(
                index,
                "".join(texts[index]),
                words.logprobs(tokens[index], told),
                words.finish_reason(ends[index]),
            )
            for index in range(number)
        ]
        kind = Words("chat.completion", "chatcmpl", self.name)
        self.metrics.whole(self.clock.total)
        await self.reply.json(
            kind.whole(choices=choices, usage=_usage(ends), emollama=self._extension())
        )

    async def stream(self, events: AsyncIterator[Event]) -> None:
        """Sends it as it comes. Faults before the first piece are answered with their status."""
        kind = Words("chat.completion.chunk", "chatcmpl", self.name)
        wants_usage = (
            self.asked.stream_options is not None and self.asked.stream_options.include_usage
        )
        more = {"usage": None} if wants_usage else {}
        told = None if "choices" in self.said else self.question.top_logprobs
        ends: dict[int, End] = {}
        opened = False
        async for index, event in self._timed(events):
            if not opened:
                opened = True
                for first in range(self.asked.n or 1):
                    start = words.delta(first, {"role": "assistant", "content": ""})
                    said = {} if first else {"emollama": self.said}
                    await self.reply.event(kind.whole(choices=[start], **said, **more))
            if isinstance(event, End):
                ends[index] = event
                last = words.delta(index, {}, reason=words.finish_reason(event))
                said = (
                    {"emollama": {"seconds": self.clock.told()}}
                    if len(ends) == (self.asked.n or 1)
                    else {}
                )
                await self.reply.event(kind.whole(choices=[last], **said, **more))
            elif event.text or event.tokens:
                part = words.delta(
                    index, {"content": event.text}, words.logprobs(event.tokens, told)
                )
                await self.reply.event(kind.whole(choices=[part], **more))
        if wants_usage:
            await self.reply.event(kind.whole(choices=[], usage=_usage(ends)))
        self.metrics.whole(self.clock.total)
        await self.reply.done()

    async def _timed(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        """Measures and counts what passes."""
        last: dict[int, float] = {}
        async for index, event in events:
            now = time.monotonic()
            if isinstance(event, End):
                self.metrics.finished(
                    event.reason, prompt=event.prompt_tokens, generated=event.completion_tokens
                )
            elif index in last:
                self.metrics.next_token(now - last[index])
            elif not last:
                self.clock.spent["first_token"] = self.clock.total
                self.metrics.first_token(self.clock.total)
            last[index] = now
            yield index, event

    def _extension(self) -> dict[str, Any]:
        return self.said | {"seconds": self.clock.told()}


def _scored(likelihoods: dict[str, float], shares: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "log_likelihood": value if math.isfinite(value) else words.IMPOSSIBLE,
            "probability": shares[label],
        }
        for label, value in likelihoods.items()
    ]


def _usage(ends: dict[int, End]) -> dict[str, Any]:
    """The prompt is one, however many answers it has."""
    first = ends[0]
    completion = sum(end.completion_tokens for end in ends.values())
    return words.usage(first.prompt_tokens, completion, first.cached_tokens)


async def _together(answers: list[AsyncGenerator[Piece | End]]) -> AsyncGenerator[Event]:
    """Events of several answers as they come, each with its answer's number.

    Whatever ends this one ends all of them: each is closed, which frees its slot.
    """
    if len(answers) == 1:
        async with contextlib.aclosing(answers[0]) as answer:
            async for event in answer:
                yield 0, event
        return
    events: asyncio.Queue[Event | Exception | None] = asyncio.Queue(AHEAD)

    async def pump(index: int, answer: AsyncGenerator[Piece | End]) -> None:
        try:
            async with contextlib.aclosing(answer):
                async for event in answer:
                    await events.put((index, event))
        except Exception as error:  # raised where the events are read
            await events.put(error)
        else:
            await events.put(None)

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(answers)]
    try:
        open_ones = len(tasks)
        while open_ones:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                open_ones -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
