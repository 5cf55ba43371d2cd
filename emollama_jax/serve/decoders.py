"""The pool of decoding workers (`serve/decoding.py`): bytes in, frames out, each file at a bounded
price.

A file that takes too long, crashes its worker or fills its memory costs that worker, which is
replaced, and is refused. A worker that something else killed (SIGKILL from outside: the kernel's
out-of-memory killer, an operator) is replaced too, and its file tried once more.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from emollama_jax.data.media import Sampling
from emollama_jax.serve import faults
from emollama_jax.serve.decoding import HEADER, Order
from emollama_jax.serve.limits import Budget, Limits
from emollama_jax.serve.requests import Decoded
from emollama_jax.terms import Kind

log = logging.getLogger(__name__)

READY = 60.0  # seconds for a worker's start
LONGEST = 2**20  # bytes of a reply's JSON
SAMPLED = 4096  # frames of a reply, at most


class _Died(Exception):
    """A worker ended, or said what makes no sense."""


class _Worker:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.process = process

    @classmethod
    async def start(cls, memory: int) -> "_Worker":
        """Starts one; it is ready when this returns."""
        # JAX warns of every fork; this one runs another program at once.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        # One thread each: the pool is what uses the cores.
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "emollama_jax.serve.decoding", str(memory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Not the whole environment: it may hold keys.
            env=threads | {name: os.environ[name] for name in kept if name in os.environ},
            start_new_session=True,  # Ctrl-C is the server's
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(READY):
                await worker.told()
        except BaseException:
            await worker.end()
            raise
        return worker

    async def send(self, order: Order, data: bytes) -> None:
        """Writes an order and its file."""
        text = json.dumps(dataclasses.asdict(order)).encode()
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(HEADER.pack(len(text)) + text)
            pipe.write(data)
            await pipe.drain()
        except (OSError, RuntimeError):  # uvloop raises the latter for a pipe that is closed
            raise _Died from None

    async def read(self, size: int) -> bytes:
        """Exactly so many bytes of the reply."""
        pipe = self.process.stdout
        assert pipe is not None
        try:
            return await pipe.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            raise _Died from None

    async def told(self) -> dict[str, Any]:
        """The JSON of a reply."""
        (size,) = HEADER.unpack(await self.read(HEADER.size))
        if size > LONGEST:
            raise _Died
        try:
            said = json.loads(await self.read(size))
        except ValueError:
            raise _Died from None
        if not isinstance(said, dict):
            raise _Died
        return said

    async def end(self) -> int:
        """Kills it if it still runs; its exit status."""
        if self.process.returncode is None:
            # Not `process.kill`, which would take a dead one's status from asyncio's watcher.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        return await self.process.wait()


class Decoders:
    """The pool.

    Attributes:
        restarts: workers that had to be replaced.
    """

    def __init__(self, limits: Limits, sampling: Sampling):
        """Starts nothing yet.

        Args:
            limits: bounds on media, seconds and memory.
            sampling: frames of a clip that the model sees.
        """
        self.restarts = 0
        self._limits, self._sampling = limits, sampling
        self._budget = Budget(limits.held)
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._all: set[_Worker] = set()
        self._tasks: set[asyncio.Task] = set()

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return sorted(worker.process.pid for worker in self._all)

    async def start(self) -> None:
        """Starts the workers."""
        await asyncio.gather(*(self._add() for _ in range(self._limits.workers)))

    async def close(self) -> None:
        """Ends them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._all))
        self._all.clear()

    @contextlib.asynccontextmanager
    async def decoded(self, data: bytes, want: Kind, *, param: str) -> AsyncIterator[Decoded]:
        """The frames of a file, which count as held for the length of an `async with`.

        Args:
            data: the file's content.
            want: a picture or a clip.
            param: the request's field that it came in.

        Raises:
            Fault: unreadable, over a bound, or it cost too much.
        """
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        async with contextlib.AsyncExitStack() as holding:
            try:
                try:
                    seen = await self._decode(data, want, digest, holding)
                except _Died:
                    seen = await self._decode(data, want, digest, holding, last=True)
            except faults.Fault as fault:
                fault.param = param
                raise
            yield seen

    async def _decode(
        self,
        data: bytes,
        want: Kind,
        digest: str,
        holding: contextlib.AsyncExitStack,
        *,
        last: bool = False,
    ) -> Decoded:
        """Decodes on the next free worker.

        Args:
            data: the file's content.
            want: a picture or a clip.
            digest: of the file.
            holding: closed by the caller when the frames are no longer needed.
            last: no further try: a worker that dies is the file's fault.

        Raises:
            Fault: as `decoded`.
            _Died: the worker was killed from outside.
        """
        worker = await self._next()
        whole = False
        try:
            async with asyncio.timeout(self._limits.decode) as limit:
                await worker.send(self._order(data, want), data)
                told = await worker.told()
                if "error" in told:
                    whole = True
                    raise faults.invalid(str(told["error"]), code="invalid_media")
                shapes, size = _shapes(told)
                limit.reschedule(None)  # what follows may wait for others' requests
                await holding.enter_async_context(self._budget.held(size))
                frames = [await self._frame(worker, shape) for shape in shapes]
            whole = True
            return _decoded(told, frames, want, digest)
        except TimeoutError:
            raise faults.invalid(
                f"decoding takes over {self._limits.decode:g} s: send a smaller or shorter medium",
                code="media_too_slow",
            ) from None
        except _Died:
            status = await worker.end()
            log.warning("a decoding worker ended (%s); another starts", _why(status))
            if status == -signal.SIGKILL and not last:
                raise
            raise faults.invalid(
                "the medium cannot be decoded: it crashes or overloads the decoder",
                code="invalid_media",
            ) from None
        finally:
            self._return(worker, whole)

    async def _next(self) -> _Worker:
        """The next free worker; those that died while they had nothing to do are replaced."""
        while True:
            worker = await self._idle.get()
            if worker.process.returncode is None:
                return worker
            self._return(worker, False)

    async def _frame(self, worker: _Worker, shape: tuple[int, int]) -> np.ndarray:
        height, width = shape
        raw = await worker.read(height * width * 3)
        return np.frombuffer(raw, np.uint8).reshape(height, width, 3)

    def _order(self, data: bytes, want: Kind) -> Order:
        limits = self._limits
        return Order(
            size=len(data),
            want=want,
            pixels=limits.pixels,
            frames=limits.frames,
            duration=limits.duration,
            cpu=max(1, round(limits.decode)),
            clip_frames=self._sampling.frames,
            clip_fps=self._sampling.fps,
        )

    def _return(self, worker: _Worker, whole: bool) -> None:
        """A worker that was not read to its reply's end is replaced."""
        if whole and worker.process.returncode is None:
            self._idle.put_nowait(worker)
            return
        self.restarts += 1
        self._all.discard(worker)
        task = asyncio.get_running_loop().create_task(self._replace(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, worker: _Worker) -> None:
        await worker.end()
        pause = 0.1
        while True:
            try:
                return await self._add()
            except (OSError, TimeoutError, _Died) as error:
                log.error("no decoding worker starts (%s); trying again", type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)

    async def _add(self) -> None:
        worker = await _Worker.start(self._limits.memory)
        self._all.add(worker)
        self._idle.put_nowait(worker)


def _shapes(told: dict[str, Any]) -> tuple[list[tuple[int, int]], int]:
    """Height and width of the frames, and their bytes; _Died for what is none of that."""
    try:
        shapes = [(int(height), int(width)) for height, width in told["shapes"]]
    except (KeyError, TypeError, ValueError):
        raise _Died from None
    if not 0 < len(shapes) <= SAMPLED or any(min(shape) < 1 for shape in shapes):
        raise _Died
    return shapes, 3 * sum(height * width for height, width in shapes)


def _decoded(told: dict[str, Any], frames: list[np.ndarray], want: Kind, digest: str) -> Decoded:
    try:
        order, indices = told["order"], np.array(told["indices"], np.int64)
        shown = [frames[int(number)] for number in order]
        if not len(shown) == len(indices) <= SAMPLED or min(order) < 0:
            raise _Died
        return Decoded(want, shown, indices, int(told["count"]), digest)
    except (KeyError, TypeError, ValueError, IndexError):
        raise _Died from None


def _why(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"
