"""What one client may ask of the server: bounds, and the counters that hold them.

All are checked before the work that they bound: a body's bytes while it is read, pixels and frames
from a file's header, the number of requests before a body is read.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from emollama_jax.errors import UserError
from emollama_jax.serve import faults
from emollama_jax.serve.faults import Fault

Receive = Callable[[], Awaitable[dict]]  # ASGI's


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on requests and their media."""

    body: int = 32 * 2**20
    """Largest body of a request in bytes; base64 makes a file a third larger."""
    pixels: int = 24_000_000
    """Most pixels of a picture, or of a clip's frame."""
    frames: int = 3_600
    """Most frames of a clip, as stored."""
    duration: float = 120.0
    """Longest clip in seconds."""
    queue: int = 32
    """Requests that may wait beside those that run; beyond, the answer is 429."""
    deadline: float = 120.0
    """Seconds in which a request must be answered."""
    upload: float = 30.0
    """Seconds in which a request must have arrived."""
    grace: float = 30.0
    """Seconds that running requests get after SIGTERM."""
    workers: int = 2
    """Processes that decode media."""
    decode: float = 20.0
    """Seconds for decoding one file."""
    memory: int = 3 * 2**30
    """Most bytes of address space of a decoding process."""
    held: int = 2**30
    """Most bytes of decoded frames at any time, all requests together."""

    def check(self) -> None:
        """Raises UserError where one is not above 0; 0 is a queue's and a grace time's own."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least_open = field.name not in ("queue", "grace")
            if value < 0 or (least_open and value == 0):
                wanted = "more than 0" if least_open else "at least 0"
                raise UserError(f"--{field.name} is {value:g}, wanted {wanted}")


# Of the text of one request; these follow from what models of this kind can read at all.
TEXT = 32_768  # characters of all messages
MESSAGES = 128
LABELS = 128
LABEL = 200  # characters
CHOICES = 8  # answers to one question
STOPS = 16


class Gate:
    """Counts the requests that are inside; refuses those that are too many."""

    def __init__(self, most: int):
        """`most`: requests that may be inside at one time."""
        self.most, self.inside, self.closed = most, 0, False
        self._seconds = 1.0  # of a usual request: a moving mean

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside for the length of a `with`.

        Raises:
            Fault: closed, or full.
        """
        if self.closed:
            raise faults.draining()
        if self.inside >= self.most:
            raise faults.busy(self._seconds)
        self.inside += 1
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.inside -= 1
            took = asyncio.get_running_loop().time() - began
            self._seconds += (took - self._seconds) / 8


class Budget:
    """Bytes that all requests share; who wants more than is left waits for a turn."""

    def __init__(self, total: int):
        """`total`: bytes."""
        self.total, self.left = total, total
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @contextlib.asynccontextmanager
    async def held(self, size: int) -> AsyncIterator[None]:
        """Holds `size` bytes for the length of an `async with`.

        Raises:
            Fault: more than there are at all.
        """
        if size > self.total:
            raise faults.invalid(
                f"the frames take {size:,} bytes decoded, wanted at most {self.total:,}: send "
                "smaller or shorter media",
                code="media_too_large",
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._hand_out()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self.left += size
            self._hand_out()

    def _hand_out(self) -> None:
        """Gives to those who wait, the first first; a cancelled one has left the row."""
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():
                if size > self.left:
                    return
                self.left -= size
                turn.set_result(None)
            self._waiting.popleft()


async def read_body(receive: Receive, *, length: str | None, limits: Limits) -> bytes:
    """The body of a request.

    Args:
        receive: ASGI's channel.
        length: the header Content-Length.
        limits: bounds on bytes and seconds.

    Raises:
        Fault: too large, or not here in time.
        ClientGone: the client closed the connection.
    """
    too_large = Fault(
        413, f"the request is over {limits.body:,} bytes: send a smaller or shorter medium",
        code="request_too_large",
    )  # fmt: skip
    # Read to its end all the same, as far as that is bounded: a client that is still sending does
    # not read an answer.
    fits = not (length and length.isdigit() and int(length) > limits.body)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.upload):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limits.body:
                    fits = False
                    parts.clear()
                if fits:
                    parts.append(part)
                if not message.get("more_body"):
                    break
                if size > 4 * limits.body:
                    break
    except TimeoutError:
        raise Fault(
            408, f"the request did not arrive within {limits.upload:g} s", code="slow_request"
        ) from None
    if not fits:
        raise too_large
    return b"".join(parts)


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


def check_key(header: str | None, key: str | None) -> None:
    """Compares the header Authorization with `Bearer KEY`, in constant time.

    Raises:
        Fault: the key is not that.
    """
    if key is None:
        return
    given = (header or "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, key.encode()):
        raise Fault(
            401, "missing or wrong API key: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )  # fmt: skip
