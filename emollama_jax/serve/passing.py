"""What passes between the threads of an engine and the event loops of its askers."""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence

from emollama_jax.serve.requests import Decoded, Question
from emollama_jax.serve.slots import Entry
from emollama_jax.serve.writing import Writing


@dataclasses.dataclass(eq=False)
class Request:
    """A question on its way; without `question`, only faces are looked for."""

    decoded: Decoded | None
    face: int | None
    question: Question | None
    labels: tuple[str, ...] | None
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue
    began: float = dataclasses.field(default_factory=time.monotonic)
    waits: bool = True  # not in a slot yet
    gone: bool = False  # nobody listens any more
    entry: Entry | None = None
    label_ids: Sequence[Sequence[int]] = ()
    writing: Writing | None = None


class Turns:
    """A lock that is handed on in the order in which it was asked for: nobody is left out."""

    def __init__(self):
        self._lock, self._held = threading.Lock(), False
        self._waiting: collections.deque[threading.Event] = collections.deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False


class Outbox:
    """Events on their way to event loops: one call to each loop, whatever there is."""

    def __init__(self):
        self._events: dict[asyncio.AbstractEventLoop, list] = collections.defaultdict(list)

    def add(self, request: Request, *events: object) -> None:
        self._events[request.loop] += [(request, event) for event in events]

    def post(self) -> None:
        for loop, events in self._events.items():
            try:
                loop.call_soon_threadsafe(_put, events)
            except RuntimeError:  # the loop was closed
                for request, _ in events:
                    request.gone = True
        self._events.clear()


def _put(events: Iterable[tuple[Request, object]]) -> None:
    for request, event in events:
        request.events.put_nowait(event)
