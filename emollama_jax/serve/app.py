"""The ASGI application: routes, and what holds for every request before it is looked at.

`/v1/chat/completions` and `/v1/models` follow OpenAI's API reference; `/v1/score`, `/about` and
the page at `/` are ours; `/health` and `/metrics` are for what watches servers.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emollama_jax.data.elements import sampling_of
from emollama_jax.serve import page, schemas
from emollama_jax.serve.decoders import Decoders
from emollama_jax.serve.desk import Clock, Desk
from emollama_jax.serve.faults import Fault
from emollama_jax.serve.limits import ClientGone, Gate, Limits, check_key, read_body
from emollama_jax.serve.media import Fetching
from emollama_jax.serve.metrics import CONTENT_TYPE, Metrics
from emollama_jax.serve.reply import Reply, answer
from emollama_jax.serve.requests import Engine

log = logging.getLogger(__name__)

GONE = 499  # nginx's status for a client that left, in our log

Work = Callable[[Any, Reply, Clock], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with, beside its engine."""

    name: str  # of the model, as clients know it
    classes: tuple[str, ...]  # the run's emotion classes
    limits: Limits
    key: str | None = None  # that requests to /v1 must bring
    media_hosts: tuple[str, ...] = ()  # that media may be fetched from
    hosts: tuple[str, ...] = ()  # names in the header Host that are answered; () for any
    examples: tuple[page.Example, ...] = ()  # pictures to try on the page
    trained_on: tuple[str, ...] = ()  # names of the run's data sets, for the page's notice
    measured: bool = False  # whether it is the package's run, whose results the notice tells


class App:
    """One server's application and its state.

    Attributes:
        gate: counts requests; closed while the server drains.
        decoders: the pool of decoding workers.
        asgi: what a server runs.
        end: done when running requests are no longer waited for; None before the start.
    """

    def __init__(self, engine: Engine, settings: Settings):
        """Builds it; workers start with the server.

        Args:
            engine: open.
            settings: what the command line said.
        """
        limits = settings.limits
        self.settings, self.engine = settings, engine
        self.end: asyncio.Future[None] | None = None
        self.gate = Gate(engine.figures().slots + limits.queue)
        self.decoders = Decoders(limits, sampling_of(engine.cfg.data))
        self.metrics = Metrics(settings.name, engine.figures, lambda: self.decoders.restarts)
        hosts = frozenset(host.lower() for host in settings.media_hosts)
        self._desk = Desk(
            engine,
            self.decoders,
            self.metrics,
            name=settings.name,
            classes=settings.classes,
            fetching=Fetching(hosts, limits.body),
        )
        self._page = page.load(
            page.About(
                settings.name,
                settings.classes,
                settings.examples,
                settings.trained_on,
                limits,
                settings.measured,
            )
        )
        self._created = int(time.time())
        chat = _Endpoint(self, schemas.ChatRequest, self._desk.chat)
        score = _Endpoint(self, schemas.ScoreRequest, self._desk.score)
        routes = [
            Route("/", self._show),
            Route("/about", self._about),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/score", score, methods=["POST"]),
        ]
        handlers = {HTTPException: _http_fault, Fault: _fault}
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)
        self.asgi: ASGIApp = _Watched(inner, self)

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.end = asyncio.get_running_loop().create_future()
        await self.decoders.start()
        try:
            yield
        finally:
            await self.decoders.close()

    async def _show(self, _: Request) -> Response:
        return Response(self._page.html, headers=self._page.headers, media_type="text/html")

    async def _about(self, _: Request) -> Response:
        return Response(self._page.about, media_type="application/json")

    async def _health(self, _: Request) -> Response:
        failure = self.engine.figures().failure
        if self.gate.closed or failure is not None:
            state = "draining" if failure is None else f"stopped: {failure}"
            return JSONResponse({"status": state}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        check_key(request.headers.get("authorization"), self.settings.key)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        check_key(request.headers.get("authorization"), self.settings.key)
        self.check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "emollama_jax",
            "max_model_len": self.engine.cfg.model.llama.reach,
        }

    def check_model(self, name: str | None) -> None:
        """Raises Fault for a model that is not the one here; None is any."""
        if name is not None and name != self.settings.name:
            raise Fault(
                404, f"no model {name[:100]!a} here, only {self.settings.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip


class _Endpoint:
    """A route that reads a schema and is answered by the desk; an ASGI application."""

    def __init__(self, app: App, schema: type[Any], work: Work):
        self._app, self._schema, self._work = app, schema, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply, clock = Reply(send), Clock()
        try:
            fault = await self._answer(Headers(scope=scope), receive, reply, clock)
        except Fault as error:
            fault = error
            await reply.fail(fault)
        except ClientGone:
            scope["state"]["gone"] = True
            return
        if fault is not None:
            self._app.metrics.refused(fault.status)

    async def _answer(
        self, headers: Headers, receive: Receive, reply: Reply, clock: Clock
    ) -> Fault | None:
        app = self._app
        limits = app.settings.limits
        check_key(headers.get("authorization"), app.settings.key)
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Fault(
                415, "wanted the header Content-Type: application/json", code="wrong_content_type"
            )
        try:
            entering = app.gate.entered()
            entering.__enter__()
        except Fault:
            # Read all the same, without keeping it: who is still sending reads no answer.
            await _discard(receive, headers, limits)
            raise
        try:
            body = await read_body(receive, length=headers.get("content-length"), limits=limits)
            asked = schemas.read(self._schema, body)
            del body
            app.check_model(asked.model)
            if names := schemas.unknown(asked):
                log.info("fields that do nothing here: %s", ", ".join(names))

            async def work() -> None:
                await self._work(asked, reply, clock)

            assert app.end is not None
            return await answer(reply, receive, work, seconds=limits.deadline, end=app.end)
        finally:
            entering.__exit__(None, None, None)


async def _discard(receive: Receive, headers: Headers, limits: Limits) -> None:
    short = dataclasses.replace(limits, upload=min(limits.upload, 5.0))
    with contextlib.suppress(Fault):
        await read_body(receive, length=str(limits.body + 1), limits=short)


class _Watched:
    """What holds for every request: the header Host, the log, headers of every answer."""

    ALWAYS: Mapping[str, str] = {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
    }

    def __init__(self, inner: ASGIApp, app: App):
        self._inner, self._app = inner, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        scope.setdefault("state", {})
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                always = [(name.encode(), value.encode()) for name, value in self.ALWAYS.items()]
                message["headers"] = [*message["headers"], *always]
            await send(message)

        try:
            if self._knows(Headers(scope=scope).get("host")):
                await self._inner(scope, receive, watched)
            else:
                fault = Fault(421, "wrong header Host: ask by the server's own name", code="host")
                await Reply(watched).fail(fault)
        finally:
            if scope["state"].get("gone"):
                status = GONE
            # The path without the query, which may hold anything.
            path = urllib.parse.quote(scope["path"])[:80]
            log.info("%s %s %d %.3fs", scope["method"], path, status, time.monotonic() - began)

    def _knows(self, host: str | None) -> bool:
        """Whether a page of another name may not be what asks (DNS rebinding)."""
        hosts = self._app.settings.hosts
        if not hosts or host is None:
            return True
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in hosts


async def _http_fault(_: Request, error: Exception) -> Response:
    """Starlette's own refusals, as a wrong path, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    fault = Fault(error.status_code, str(error.detail), code=codes.get(error.status_code))
    headers = dict(error.headers or {})
    return JSONResponse(fault.body(), fault.status, headers=headers)


async def _fault(_: Request, error: Exception) -> Response:
    assert isinstance(error, Fault)
    return JSONResponse(error.body(), error.status, headers=error.headers())
