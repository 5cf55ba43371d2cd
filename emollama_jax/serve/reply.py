"""An answer on its way to the client: JSON, or server-sent events that end with `[DONE]`.

Straight on ASGI: a request's work is raced against the client's leaving and the deadline, in the
middle of a stream too, where a slow reader holds it up as well.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from emollama_jax.serve import faults
from emollama_jax.serve.faults import Fault
from emollama_jax.serve.limits import ClientGone, Receive

log = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]  # ASGI's
FAREWELL = 2.0  # seconds for telling a stream's reader that it failed


class Reply:
    """One response."""

    def __init__(self, send: Send):
        """`send`: ASGI's channel."""
        self._send = send
        self.status: int | None = None  # once it has begun
        self._streams = self._ended = False

    async def json(
        self, said: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole answer."""
        body = json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        length = {"Content-Length": str(len(body))}
        await self._start(
            status, {"Content-Type": "application/json"} | length | dict(headers or {})
        )
        await self._body(body, more=False)

    async def event(self, said: Mapping[str, Any]) -> None:
        """Sends one event; the first opens the stream."""
        if not self._streams:
            self._streams = True
            # Proxies would gather the events: X-Accel-Buffering is nginx's.
            kind = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
            await self._start(200, kind | {"Cache-Control": "no-store"})
        text = json.dumps(said, ensure_ascii=False, allow_nan=False)
        await self._body(f"data: {text}\n\n".encode())

    async def done(self) -> None:
        """Ends a stream."""
        await self._body(b"data: [DONE]\n\n", more=False)

    async def fail(self, fault: Fault) -> None:
        """Says what went wrong, as far as the answer has not ended."""
        if self._ended:
            return
        if self.status is None:
            headers = fault.headers()
            if fault.status in (408, 413):  # the rest of the body is not read
                headers["Connection"] = "close"
            await self.json(fault.body(), fault.status, headers)
        elif self._streams:
            await self.event(fault.body())
            await self.done()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, part: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": more})
        self._ended = not more


async def answer(
    reply: Reply,
    receive: Receive,
    work: Callable[[], Awaitable[None]],
    *,
    seconds: float,
    end: asyncio.Future[None],
) -> Fault | None:
    """Runs a request's work until it is done, the client is gone, or time is up.

    Args:
        reply: where the work's answer goes, and what went wrong.
        receive: ASGI's channel; the body has been read.
        work: the work; it is cancelled where nobody waits for it.
        seconds: deadline.
        end: done when the server will not wait any longer.

    Returns:
        What went wrong; None for nothing.

    Raises:
        ClientGone: the client closed its connection.
    """

    async def watched() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    fault: Fault | None = None
    working = asyncio.ensure_future(work())
    watching = asyncio.create_task(watched())
    try:
        await asyncio.wait([working, end], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            fault = faults.draining() if end.done() else faults.deadline(seconds)
        elif working.cancelled():
            raise ClientGone
        elif error := working.exception():
            fault = faults.of(error) if isinstance(error, Exception) else None
            if fault is None:
                log.error("a request failed", exc_info=error)
                fault = faults.UNEXPECTED
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
    if fault is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await reply.fail(fault)
    return fault
