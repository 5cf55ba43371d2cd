"""What went wrong with a request, as a status and OpenAI's error body.

The body is `{"error": {"message", "type", "param", "code"}}` (OpenAI's API reference, "Errors"),
alone or as one event of a stream that has begun.
"""

import dataclasses
import math
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.serve.requests import Busy, Stopped

INVALID = "invalid_request_error"
SERVER = "server_error"


@dataclasses.dataclass(eq=False)
class Fault(Exception):
    """A request that is refused or failed."""

    status: int  # of HTTP
    message: str
    type: str = INVALID
    param: str | None = None  # the field that is at fault
    code: str | None = None
    retry_after: float | None = None  # seconds

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        said = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}

    def headers(self) -> dict[str, str]:
        """Headers beside the body's own."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str | None = None) -> Fault:
    """What the client can mend: 400."""
    return Fault(400, message, param=param, code=code)


def busy(seconds: float) -> Fault:
    """A full queue: 429."""
    return Fault(
        429,
        f"too many requests are waiting; try again in about {max(1, math.ceil(seconds))} s",
        type="rate_limit_error",
        code="queue_full",
        retry_after=seconds,
    )


def draining() -> Fault:
    """A server that is about to stop: 503."""
    return Fault(
        503, "the server is stopping; ask another", type=SERVER, code="draining", retry_after=5
    )


def deadline(seconds: float) -> Fault:
    """A request that took too long: 504."""
    return Fault(
        504, f"not answered within {seconds:g} s; ask for fewer tokens, or later",
        type=SERVER, code="deadline",
    )  # fmt: skip


def of(error: Exception) -> Fault | None:
    """The fault of an error that is expected; None for one that is a defect of ours."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, UserError):
        return invalid(str(error))
    if isinstance(error, Busy):
        return busy(error.seconds)
    if isinstance(error, Stopped):
        return Fault(503, f"the model has stopped: {error}", type=SERVER, code="stopped")
    return None


UNEXPECTED = Fault(
    500, "the server failed on this request; its log says how", type=SERVER, code="internal"
)
