"""Runs the application with uvicorn: one process, a drain on SIGTERM, and time limits that uvicorn
does not have.

What differs from uvicorn: at SIGTERM or Ctrl-C the port stays open while running requests finish,
so that new ones are told 503 and a load balancer sees `/health` fail, and the exit status is then
0; a connection on which no whole request head arrives is closed after a while.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from emollama_jax.data.file_kinds import one_line
from emollama_jax.errors import UserError
from emollama_jax.serve.app import App
from emollama_jax.serve.reply import FAREWELL

log = logging.getLogger(__name__)

HEAD = 10.0  # seconds in which a request's head must arrive
KEEP_ALIVE = 30  # seconds between two requests on one connection
CONNECTIONS = 1024  # at any time
HEAD_BYTES = 32 * 1024
TICK = 0.05  # seconds between looks at what still runs


class Protocol(H11Protocol):
    """HTTP/1.1 with a time limit for a request's head: slow senders are hung up on."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD, self._hang_up)

    def data_received(self, data: bytes) -> None:
        # The head of a further request on this connection: its time runs from its first byte.
        if self._late is None and self.conn.their_state is h11.IDLE:
            self._late = self.loop.call_later(HEAD, self._hang_up)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, as far as no answer has begun: then it hangs up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        if self.cycle is not None:  # whose body this was: to it, the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """A server that drains."""

    def __init__(self, config: uvicorn.Config, app: App, ready: Callable[[str], None]):
        """Keeps what it needs.

        Args:
            config: uvicorn's.
            app: the application; its gate is closed while draining.
            ready: called with the address once the port is open.
        """
        super().__init__(config)
        self._app, self._ready = app, ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Opens the port."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one ends at once."""
        if self._app.gate.closed:
            self.should_exit = self.force_exit = True
            return
        self._app.gate.closed = True
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        self._draining = self._loop.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        grace = self._app.settings.limits.grace
        running = self._app.gate.inside
        log.info("%s: %d requests may finish within %g s", name, running, grace)
        until = self._loop.time() + grace
        while self._app.gate.inside and self._loop.time() < until:
            await asyncio.sleep(TICK)
        if left := self._app.gate.inside:
            log.warning("%d requests were not finished in time", left)
            if self._app.end is not None:
                self._app.end.set_result(None)
            until = self._loop.time() + FAREWELL
            while self._app.gate.inside and self._loop.time() < until:
                await asyncio.sleep(TICK)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet.

    Args:
        host: name or address of this machine.
        port: 0 for any free one.

    Raises:
        UserError: no such address here, or another program has the port.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise UserError(f"--host {host} --port {port}: {one_line(error)}: choose another") from None
    return bound


def configure(app: App) -> uvicorn.Config:
    """uvicorn's configuration, with no log of its own but warnings: its lines show queries."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return uvicorn.Config(
        app.asgi,
        http=Protocol,
        loop="asyncio",  # also where uvloop is installed: one loop's ways are tested
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,  # the drain came before
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


def run(app: App, bound: socket.socket, *, ready: Callable[[str], None]) -> None:
    """Serves until a signal; returns when drained.

    Args:
        app: the application.
        bound: socket from `bind`; it is closed at the end.
        ready: called with the address once the port is open.
    """
    Server(configure(app), app, ready).run(sockets=[bound])


def log_lines() -> None:
    """Sends the server's log to standard error, a line each, with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("emollama_jax.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
