"""The engine: many questions at once from one model, by two threads beside the event loops.

    ask() ─► queue ─► looker ─────────► ready ─► decoder ─────────────────► pieces, to the
             bounded  faces, towers,             prompts into free slots,   asker's event loop
                      Q-Former, prompt           one token for all slots

The looker prepares what waits while the decoder draws. Requests join and leave at any step, and
each event reaches its asker through its own event loop. What goes wrong in one request's
preparation ends that request; what goes wrong in a step, whose cache is lost then, ends all, and
`figures` says so.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from emollama_jax import compile_cache
from emollama_jax.checkpoint import ONE_DEVICE, load_for_inference
from emollama_jax.config import Config, MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.faces.reader import Detect
from emollama_jax.generate.slot_steps import Drawn
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.serve.answer import Answerer, probabilities
from emollama_jax.serve.passing import Outbox, Request, Turns
from emollama_jax.serve.preparation import Preparer, faces_found, no_face
from emollama_jax.serve.requests import (
    TOP_LOGPROBS,
    Busy,
    Decoded,
    End,
    EngineSizes,
    FacesFound,
    Figures,
    Piece,
    Question,
    Scores,
    Stopped,
)
from emollama_jax.serve.slots import Progress, Slots
from emollama_jax.serve.writing import Writing
from emollama_jax.sharding.mesh import flags_for, make_mesh
from emollama_jax.terms import Kind

LOOKED_AT = 8  # waiting media whose faces are searched for together
CLOSED = "the engine was closed"

_log = logging.getLogger(__name__)


class BatchingEngine:
    """`requests.Engine` on the devices of a mesh."""

    def __init__(
        self,
        cfg: Config,
        model: EmoLlama,
        sizes: EngineSizes,
        *,
        mesh: Mesh | None = None,
        detect: Detect | None = None,
    ):
        """Compiles nothing yet.

        Args:
            cfg: config of the model's run.
            model: not changed.
            sizes: bounds.
            mesh: mesh that the model is spread over; None for one device.
            detect: finds the faces of pictures; MTCNN by default.
        """
        self.cfg, self._sizes = cfg, sizes
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        with self._on_devices():
            # A server looks often: its towers' program is worth optimising on a CPU too.
            flags = flags_for(jax.devices()[0], cfg.xla_flags)
            self._answerer = Answerer(cfg, model, detect=detect, towers=flags)
            encoder = self._answerer.encoder
            self._slots = Slots(
                model.llama,
                count=sizes.slots,
                texts=sorted(encoder.text_length(kind) for kind in KINDS),
                flags=flags,
                top=TOP_LOGPROBS,
            )
        self._preparer = self._new_preparer()
        # Programs that several devices run together must start on all in the same order.
        self._turn = Turns() if self._mesh else contextlib.nullcontext()
        self._lock = threading.Lock()  # of all that follows
        self._unfinished: set[Request] = set()
        self._waiting = 0
        self._stopped: str | None = "the engine is not open yet"
        self._counts = collections.Counter()
        self._seconds = 1.0  # about how long a request takes
        self._compiled = 0
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("looker", self._look_on), ("decoder", self._decode_on))
        ]

    @property
    def room(self) -> int:
        """The largest `max_new_tokens` behind any first question of the config's length."""
        lengths = (self._answerer.encoder.text_length(kind) for kind in KINDS)
        return self._slots.places - max(lengths)

    # -------------------------------------------------------------- the asker's side

    def open(self, progress: Progress) -> None:
        """See `requests.Engine`."""
        compile_cache.count()
        # Twice: the second time arrays lie as programs leave them, which may be another program.
        steps = [*self._first_looks(), *self._slots.warm_up()] * 2
        with self._on_devices():
            for done, (what, run) in enumerate(steps):
                progress(what, done, len(steps))
                run()
        progress("ready", len(steps), len(steps))
        self._compiled = _compiled()
        self._stopped = None
        for thread in self._threads:
            thread.start()

    async def look(self, media: Decoded, face: int | None) -> FacesFound:
        """See `requests.Engine`."""
        return await self._one(self._accept(media, face, None, None))

    async def ask(self, question: Question) -> AsyncGenerator[Piece | End]:
        """See `requests.Engine`."""
        request = self._accept(question.media, question.face, question, None)
        del question  # and its frames with it, once they were looked at
        try:
            while True:
                event = await request.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            request.gone = True

    async def score(self, question: Question, labels: Sequence[str]) -> Scores:
        """See `requests.Engine`."""
        return await self._one(self._accept(question.media, question.face, question, tuple(labels)))

    def figures(self) -> Figures:
        """See `requests.Engine`."""
        sights = self._preparer.sights
        with self._lock:
            counts = self._counts
            return Figures(
                running=len(self._unfinished) - self._waiting,
                waiting=self._waiting,
                slots=self._sizes.slots,
                failure=self._stopped,
                compilations=_compiled() - self._compiled,
                tower_hits=sights.hits,
                tower_misses=sights.misses,
                prompt_tokens=counts["prompt"],
                cached_tokens=counts["cached"],
                generation_tokens=counts["generation"],
                requests=counts["requests"],
                failures=counts["failures"],
            )

    def close(self) -> None:
        """See `requests.Engine`."""
        self._stop(CLOSED)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _accept(
        self,
        decoded: Decoded | None,
        face: int | None,
        question: Question | None,
        labels: tuple[str, ...] | None,
    ) -> Request:
        """A request in the queue."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        request = Request(decoded, face, question, labels, loop, events)
        with self._lock:
            if self._stopped is not None:
                raise Stopped(self._stopped)
            if self._waiting >= self._sizes.waiting:
                raise Busy(self._seconds * (1 + self._waiting / self._sizes.slots))
            self._waiting += 1
            self._unfinished.add(request)
            self._queue.put(request)
        return request

    @staticmethod
    async def _one(request: Request) -> Any:
        """The only event of a request."""
        try:
            event = await request.events.get()
        finally:
            request.gone = True
        if isinstance(event, Exception):
            raise event
        return event

    # -------------------------------------------------------------- both threads

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread's work; its failure ends the engine."""
        try:
            with self._on_devices():
                work()
        except Exception as error:
            _log.exception("the engine stopped")
            self._stop(f"the engine stopped: {type(error).__name__}: {error}")

    def _stop(self, why: str) -> None:
        """Refuses what comes, ends what is there, and lets the threads end."""
        with self._lock:
            if self._stopped is None:
                self._stopped = why
            left, self._unfinished, self._waiting = self._unfinished, set(), 0
        outbox = Outbox()
        for request in left:
            request.gone = True
            outbox.add(request, Stopped(why))
        outbox.post()
        self._queue.put(None)
        self._ready.put(None)

    def _finish(self, request: Request, *, failed: bool = False) -> None:
        """Nothing more comes of a request."""
        with self._lock:
            if request not in self._unfinished:
                return
            self._unfinished.remove(request)
            self._waiting -= request.waits
            self._counts["failures" if failed else "requests"] += 1
            if not (failed or request.waits):
                self._seconds += 0.1 * (time.monotonic() - request.began - self._seconds)

    def _on_devices(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    # -------------------------------------------------------------- the looker

    def _look_on(self) -> None:
        outbox = Outbox()
        while True:
            requests = self._next_requests()
            if requests is None:
                return
            with self._turn, contextlib.suppress(Exception):
                # What goes wrong with one of them is met again below, and told to its asker.
                self._preparer.search([one.decoded for one in requests if one.decoded])
            for request in requests:
                try:
                    with self._turn:
                        events = self._prepare(request)
                except UserError as error:
                    outbox.add(request, error)
                    self._finish(request, failed=True)
                except Exception as error:
                    _log.exception("a request could not be prepared")
                    outbox.add(request, error)
                    self._finish(request, failed=True)
                else:
                    outbox.add(request, *events)
                    if events:
                        self._finish(request)
                outbox.post()

    def _next_requests(self) -> list[Request] | None:
        """Those that wait, a few at once; None at the end."""
        found, waiting = [], True
        while waiting and len(found) < LOOKED_AT:
            try:
                request = self._queue.get(block=not found)
            except queue.Empty:
                break
            if request is None or self._stopped is not None:
                return None
            if request.gone:
                self._finish(request)
            else:
                found.append(request)
        return found

    def _prepare(self, request: Request) -> list[object]:
        """All events of a request that no slot is needed for; else hands it over, and has none."""
        preparer, question, labels = self._preparer, request.question, request.labels
        decoded, request.decoded = request.decoded, None
        media = None if decoded is None else preparer.see(decoded, request.face)
        if question is None:
            return [faces_found(media, self.cfg)]
        if media is not None and not media.found:
            if labels is not None:
                raise UserError(no_face(media))
            told = End("no_face", prompt_tokens=0, completion_tokens=0, cached_tokens=0)
            return [Piece(no_face(media)), told]
        if labels is not None:
            request.label_ids = preparer.labels(labels)
        request.entry = preparer.entry(question, media, labels=labels is not None)
        request.question = dataclasses.replace(question, media=None)  # frames are large
        self._ready.put(request)
        return []

    # -------------------------------------------------------------- the decoder

    def _decode_on(self) -> None:
        waiting: list[Request] = []
        running: dict[int, Request] = {}
        outbox = Outbox()
        while self._receive(waiting, block=not (waiting or running)):
            for number, request in list(running.items()):
                if request.gone:
                    self._leave(running, number)
            for request in [one for one in waiting if one.gone]:
                waiting.remove(request)
                self._finish(request)
            with self._turn:
                if waiting and self._slots.free():
                    self._begin(waiting, running, outbox)
                    outbox.post()
                if running:
                    self._advance(running, outbox)
            outbox.post()

    def _receive(self, waiting: list[Request], *, block: bool) -> bool:
        """Takes what is prepared; whether to go on."""
        while True:
            try:
                request = self._ready.get(block=block)
            except queue.Empty:
                return self._stopped is None
            if request is None:
                return False
            waiting.append(request)
            block = False

    def _begin(self, waiting: list[Request], running: dict[int, Request], outbox: Outbox) -> None:
        """The next prompts into slots, and their first tokens."""
        chosen = [waiting[i] for i in self._slots.group([one.entry for one in waiting])]
        for request in chosen:
            waiting.remove(request)
        begun = self._slots.begin([request.entry for request in chosen])
        for row, (number, request) in enumerate(zip(begun.slots, chosen, strict=True)):
            tokens = len(request.entry)
            with self._lock:
                self._waiting -= request.waits
                request.waits = False
                self._counts["prompt"] += tokens
                self._counts["cached"] += begun.cached
            running[number] = request
            if request.labels is not None:
                rated = self._slots.rate(begun, request.label_ids)
                outbox.add(request, _scores(request.labels, rated, prompt_tokens=tokens))
                self._leave(running, number)
                continue
            request.writing = Writing(
                request.question,
                self._answerer.encoder.chat,
                prompt_tokens=tokens,
                cached_tokens=begun.cached,
            )
            self._write(running, number, begun.drawn, row, outbox)

    def _advance(self, running: dict[int, Request], outbox: Outbox) -> None:
        """A token for every slot."""
        drawn = self._slots.advance()
        for number in list(running):
            self._write(running, number, drawn, number, outbox)

    def _write(
        self, running: dict[int, Request], number: int, drawn: Drawn, row: int, outbox: Outbox
    ) -> None:
        """Tells what one slot's token makes certain."""
        request = running[number]
        for event in request.writing.add(int(drawn.token[row]), drawn, row):
            outbox.add(request, event)
            if isinstance(event, End):
                with self._lock:
                    self._counts["generation"] += event.completion_tokens
                self._leave(running, number)

    def _leave(self, running: dict[int, Request], number: int) -> None:
        self._slots.leave(number)
        self._finish(running.pop(number))

    # -------------------------------------------------------------- compilation

    def _new_preparer(self) -> Preparer:
        return Preparer(self._answerer, places=self._slots.places, mebibytes=self._sizes.kept)

    def _first_looks(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Faces, towers and Q-Former, each of their shapes."""

        def look(kind: Kind) -> None:
            count = self._answerer.encoder.frames(kind)
            frame = np.zeros((64, 64, 3), np.uint8)
            decoded = Decoded(kind, [frame] * count, np.zeros(count, int), 1, digest=kind)
            media = self._new_preparer().see(decoded, None)
            self._answerer.asked(media, "?")

        for kind, what in KINDS.items():
            yield f"the towers for {what}", lambda kind=kind: look(kind)


KINDS: dict[Kind, str] = {"image": "pictures", "clip": "clips"}


def load_engine(run: str, sizes: EngineSizes, *, mesh: MeshConfig = ONE_DEVICE) -> BatchingEngine:
    """The engine of a run, not open yet.

    Args:
        run: as of `load_for_inference`.
        sizes: bounds.
        mesh: devices to load onto.

    Raises:
        UserError: as of `load_for_inference`.
    """
    cfg, model = load_for_inference(run, mesh=mesh)
    return BatchingEngine(cfg, model, sizes, mesh=make_mesh(mesh))


def _scores(labels: Sequence[str], rated: np.ndarray, *, prompt_tokens: int) -> Scores:
    found = dict(zip(labels, map(float, rated), strict=True))
    return Scores(found, probabilities(found), prompt_tokens)


def _compiled() -> int:
    """Programs that this process compiled or read from a folder of compiled ones."""
    counted = compile_cache.counted()
    return counted.compiled + counted.found
