"""Asks a model many questions: politely, within a budget, and so that a kill costs next to nothing.

Every item is asked until its answer is accepted, or until so many were rejected that it is set
aside; whatever is learnt goes to the journal first. What fails in passing (429, 5xx, time-outs,
broken lines) is tried again with exponential back-off and jitter, and a service that asks to wait
(Retry-After) makes all questions wait. Items that a kill left on their way are asked first.
"""

import asyncio
import contextlib
import dataclasses
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from emollama_jax.errors import UserError
from emollama_jax.remote.clients import open_client
from emollama_jax.remote.journal import Journal
from emollama_jax.remote.options import Limits
from emollama_jax.remote.prices import Price, price_of
from emollama_jax.remote.request import Client, Reply, Request, Trouble, one_line

LONGEST_WAIT = 60.0  # seconds of back-off; a service may ask for more
GIVE_UP = 5  # items in a row without an answer: the service, not the items, is at fault


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of an answer: a JSON value, or why there is none."""

    value: Any
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """One item to ask about."""

    key: str  # of the journal
    request: Callable[[Sequence[str]], Request]  # given why answers were rejected; may read media
    judge: Callable[[Reply], Verdict]  # of an answer that was not blocked, perhaps cut off


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How asking ended."""

    accepted: int
    aside: int
    open: int  # not asked yet, or without an answer
    stopped: str  # why it ended before all were done, "" if all are
    spent: float  # US dollars, all runs of this journal

    @property
    def summary(self) -> str:
        """For the terminal."""
        counts = f"{self.accepted} accepted, {self.aside} set aside, {self.open} open"
        return counts + (f", ${self.spent:.4f} so far" if self.spent else "")


def ask_all(
    tasks: Sequence[Task],
    client: Client,
    journal: Journal,
    limits: Limits,
    price: Price,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Asks until every task is accepted or set aside, or something stops it.

    Ctrl-C and SIGTERM let the questions on their way come home; a second one does not.

    Args:
        tasks: with distinct keys.
        client: closed at the end.
        journal: knows what was asked before.
        limits: rate, retry and budget limits.
        price: price of the client's answers.
        progress: called with the number of done tasks.

    Raises:
        UserError: the service refuses every question (a wrong key, an unknown model).
    """
    session = _Session(client, journal, limits, price, progress)
    asyncio.run(session.run(tasks))
    if session.fatal:
        raise UserError(f"{client.name}: {session.fatal}")
    items = [journal.entry(task.key) for task in tasks]
    accepted = sum(item.value is not None for item in items)
    aside = sum(bool(item.aside) for item in items)
    left = len(items) - accepted - aside
    return Outcome(accepted, aside, left, session.stopped if left else "", journal.spent)


class Service(Protocol):
    """A command's options about the service that it asks."""

    @property
    def limits(self) -> Limits: ...
    @property
    def thinking_tokens(self) -> int: ...
    @property
    def base_url(self) -> str | None: ...


def ask_model(
    spec: str,
    service: Service,
    tasks: Sequence[Task],
    journal: Journal,
    progress: Callable[[int], None],
) -> Outcome:
    """Opens the client of a model and asks it; see `ask_all`.

    A model on this machine answers one question after the other, at its own pace.

    Args:
        spec: "hf:PATH", "openai:URL#MODEL" or "gemini:MODEL".
        service: limits and settings of the client.
        tasks: with distinct keys.
        journal: knows what was asked before.
        progress: called with the number of done tasks.

    Raises:
        UserError: no such model, no key, a budget without prices, a service that refuses.
    """
    limits = service.limits
    if spec.startswith("hf:"):
        limits = dataclasses.replace(limits, concurrency=1, per_minute=1e9)
    price = price_of(spec, limits)
    client = open_client(
        spec, limits, thinking_tokens=service.thinking_tokens, base_url=service.base_url
    )
    return ask_all(tasks, client, journal, limits, price, progress)


@dataclasses.dataclass
class _Session:
    client: Client
    journal: Journal
    limits: Limits
    price: Price
    progress: Callable[[int], None]
    stopped: str = ""
    fatal: str = ""

    def __post_init__(self):
        self._stop = asyncio.Event()
        self._next = 0.0  # when the next question may leave
        self._done = self._in_a_row = 0

    async def run(self, tasks: Sequence[Task]) -> None:
        waiting = [task for task in tasks if not self.journal.entry(task.key).done]
        self._done = len(tasks) - len(waiting)
        self.progress(self._done)
        # False sorts first: what a kill left on its way is asked again before anything else, so
        # that it is not on its way again at the next kill.
        waiting.sort(key=lambda task: not self.journal.entry(task.key).on_its_way)
        queue = iter(waiting)
        workers = [
            asyncio.create_task(self._work(queue))
            for _ in range(min(self.limits.concurrency, len(waiting)))
        ]
        try:
            with self._signals(workers):
                await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.client.close()

    @contextlib.contextmanager
    def _signals(self, workers: Sequence[asyncio.Task]) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt() -> None:
            if self._stop.is_set():
                for worker in workers:
                    worker.cancel()
            self._halt("interrupted: re-run the command to resume")

        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, interrupt)
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _halt(self, why: str) -> None:
        self.stopped = self.stopped or why
        self._stop.set()

    async def _work(self, queue: Iterator[Task]) -> None:
        for task in queue:
            if self._stop.is_set():
                return
            await self._finish(task)
            if self.journal.entry(task.key).done:
                self._done += 1
                self.progress(self._done)

    async def _finish(self, task: Task) -> None:
        """Asks for one item until it is done, or until the run stops."""
        while not self.journal.entry(task.key).done:
            reasons = self.journal.entry(task.key).rejections
            if len(reasons) >= self.limits.attempts:  # there were fewer attempts than are allowed
                self.journal.set_aside(task.key, reasons[-1])
                return
            try:
                request = await asyncio.to_thread(task.request, reasons)
            except UserError as error:  # media that cannot be read
                self.journal.set_aside(task.key, one_line(error))
                return
            reply = await self._ask(task.key, request)
            if reply is None:
                return
            verdict = _judge(task, reply)
            last = reply.final or len(reasons) + 1 >= self.limits.attempts
            used = (
                request.input_tokens if reply.input_tokens is None else reply.input_tokens,
                len(reply.text) // 4 if reply.output_tokens is None else reply.output_tokens,
            )
            self.journal.answer(
                task.key,
                text=reply.text,
                value=verdict.value,
                why=verdict.why,
                aside=verdict.value is None and last,
                cost=self.price.cost(*used),
                tokens=used,
            )

    async def _ask(self, key: str, request: Request) -> Reply | None:
        """One answer; None if the item has to stay open or was set aside."""
        most = self.price.cost(request.input_tokens, request.max_tokens)
        wait, why = self.limits.first_wait, ""
        for number in range(self.limits.tries):
            if not await self._turn():
                return None
            budget = self.limits.budget
            if budget is not None and self.journal.spent + most > budget:
                self._halt(
                    f"the budget of ${budget:.2f} is reached: re-run with a larger --budget to "
                    "resume"
                )
                return None
            self.journal.sent(key, most)
            try:
                reply = await self.client.ask(request)
            except Trouble as trouble:
                why = one_line(trouble)
                self.journal.failed(key, why, most if trouble.maybe_paid else 0.0)
                if trouble.kind == "fatal":
                    self.fatal = why
                    self._halt(why)
                    return None
                if trouble.kind == "item":
                    self.journal.set_aside(key, why)
                    self._no_answer(why)
                    return None
                pause = min(wait * 2**number, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if trouble.after is not None:
                    self._next = max(self._next, time.monotonic() + trouble.after)
                    pause = trouble.after + random.uniform(0, wait)
                if number + 1 < self.limits.tries and not await self._sleep(pause):
                    return None
                continue
            self._in_a_row = 0
            return reply
        self._no_answer(why)
        return None

    def _no_answer(self, why: str) -> None:
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP:
            self._halt(
                f"{GIVE_UP} items in a row got no answer, the last: {why}: re-run the command to "
                "resume"
            )

    async def _turn(self) -> bool:
        """Waits until the rate allows a question; False if the run stops instead."""
        while (ahead := self._next - time.monotonic()) > 0:
            if not await self._sleep(ahead):
                return False
        self._next = time.monotonic() + 60 / self.limits.per_minute
        return not self._stop.is_set()

    async def _sleep(self, seconds: float) -> bool:
        """Waits; False if the run stops meanwhile."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return True
        return False


def _judge(task: Task, reply: Reply) -> Verdict:
    if reply.finish == "blocked":
        return Verdict(None, f"blocked: {reply.why}")
    return task.judge(reply)
