"""An engine without a model: it answers with the question's own words, at a chosen pace.

It has slots and a bounded queue, so that what the endpoint does under load can be seen. As a
program (`python -m tests.helpers.fake_engine`) it serves until a signal.
"""

import asyncio
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

from emollama_jax.config import load
from emollama_jax.errors import UserError
from emollama_jax.serve import server
from emollama_jax.serve.app import App, Settings
from emollama_jax.serve.limits import Limits
from emollama_jax.serve.page import Example
from emollama_jax.serve.requests import (
    AnswerToken,
    Busy,
    End,
    FacesFound,
    Figures,
    Piece,
    Scores,
    Stopped,
)
from emollama_jax.tiny.actionfaces.examples import drawn_faces

CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


class FakeEngine:
    """The engine.

    Attributes:
        pace: seconds of a token.
        questions: that were asked, in order.
        freed: answers whose generator was closed before its end.
    """

    def __init__(self, *, slots: int = 4, queue: int = 8, pace: float = 0.0):
        self.cfg = load("tiny")
        self.room = 200
        self.pace, self.slots, self.queue = pace, slots, queue
        self.questions, self.freed, self.failure = [], 0, None
        self._running = self._waiting = self._requests = self._tokens = 0

    def open(self, progress):
        progress("nothing", 1, 1)

    def close(self):
        self.failure = "closed"

    @contextlib.asynccontextmanager
    async def _slot(self):
        if self.failure:
            raise Stopped(self.failure)
        if self._running >= self.slots and self._waiting >= self.queue:
            raise Busy(2.0)
        self._waiting += 1
        try:
            while self._running >= self.slots:
                await asyncio.sleep(0.001)
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._requests += 1

    async def look(self, media, face):
        """Two faces in a picture that is wider than high, none in a black one."""
        height, width = media.frames[0].shape[:2]
        count = 0 if media.frames[0].max() == 0 else 2 if width > height else 1
        if face is not None and face >= count:
            raise UserError(f"face {face}: the picture has {count}, counted from 0")
        boxes = np.array([[1, 2, 30, 40], [50, 2, 70, 40]], np.float32)[:count]
        chosen = (face or 0) if count and media.kind == "image" else None
        age = {"20-29": 0.75, "30-39": 0.25} if count else None
        return FacesFound(
            boxes, np.full(count, 0.99, np.float32), chosen, "A sentence.", age, age, age
        )

    async def ask(self, question):
        self.questions.append(question)
        if "too long" in question.text:
            raise UserError("the prompt has 999 tokens and the text length is 400")
        whole = False
        async with self._slot():
            try:
                for event in answer(question):
                    if self.pace:
                        await asyncio.sleep(self.pace)
                    if isinstance(event, Piece):
                        self._tokens += 1
                    elif "then break" in question.text:
                        raise RuntimeError("a defect")
                    yield event
                whole = True
            finally:
                self.freed += not whole

    async def score(self, question, labels):
        """The longest label is the likeliest."""
        self.questions.append(question)
        async with self._slot():
            values = np.array([-10.0 + len(label) for label in labels])
            shares = np.exp(values - values.max())
            return Scores(
                dict(zip(labels, values.tolist(), strict=True)),
                dict(zip(labels, (shares / shares.sum()).tolist(), strict=True)),
                prompt_tokens=11,
            )

    def figures(self):
        return Figures(
            running=self._running,
            waiting=self._waiting,
            slots=self.slots,
            failure=self.failure,
            compilations=0,
            tower_hits=1,
            tower_misses=2,
            prompt_tokens=10,
            cached_tokens=3,
            generation_tokens=self._tokens,
            requests=self._requests,
            failures=0,
        )


def answer(question):
    """The events of an answer: a seed where one is drawn, then the question's words."""
    if question.media is not None and question.media.frames[0].max() == 0:
        yield Piece("No face was found in the image.")
        yield End("no_face", 0, 0, 0)
        return
    drawn = [f"{question.how.seed} "] if question.how.temperature else []
    words = [*drawn, *(f"{word} " for word in question.text.split())]
    said, prompt = "", 5 + 2 * len(question.earlier)
    for number, word in enumerate(words):
        if number == question.how.max_new_tokens:
            yield End("length", prompt, number, 0)
            return
        ended = [said + word for stop in question.stop if stop in said + word]
        if ended:
            yield End("stop", prompt, number, 0)
            return
        said += word
        told = ()
        if question.top_logprobs is not None:
            top = ((7, word, -0.25), (8, "ß", -float("inf")))[: question.top_logprobs]
            told = (AnswerToken(7, word, -0.25, top),)
        yield Piece(word, told)
    yield End("stop", prompt, len(words), 3 if question.earlier else 0)


def settings(**changed) -> Settings:
    """Those of a small server."""
    limits = changed.pop("limits", Limits(queue=8, workers=1))
    return dataclasses.replace(Settings("fake", CLASSES, limits), **changed)


@contextlib.contextmanager
def serving(engine, how: Settings) -> Iterator[tuple[str, App]]:
    """A server in a thread: its address and its application, whose `server` it is."""
    app = App(engine, how)
    addresses: list[str] = []
    running = server.Server(server.configure(app), app, addresses.append)
    bound = server.bind("127.0.0.1", 0)
    app.server = running
    thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
    thread.start()
    for _ in range(2400):
        if addresses or not thread.is_alive():
            break
        time.sleep(0.05)
    try:
        yield addresses[0], app
    finally:
        running.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


def slow_engine() -> FakeEngine:
    """For `deploy/ray_serve.py`, by its name in EMOLLAMA_ENGINE."""
    return FakeEngine(slots=8, queue=64, pace=0.02)


def main() -> None:
    """Serves until a signal; the argument is JSON: arguments of the engine and the limits."""
    given = json.loads(sys.argv[1]) if sys.argv[1:] else {}
    limits = Limits(**{"queue": 8, "workers": 1} | given.pop("limits", {}))
    port = given.pop("port", 0)
    server.log_lines()
    pictures = tuple(Example(*drawn) for drawn in drawn_faces())
    app = App(
        FakeEngine(**given),
        settings(
            limits=limits,
            examples=pictures,
            trained_on=("ferplus", "actionfaces/images"),
            measured=True,
        ),
    )
    bound = server.bind("127.0.0.1", port)
    server.run(app, bound, ready=lambda address: print(address, flush=True))


if __name__ == "__main__":
    main()
