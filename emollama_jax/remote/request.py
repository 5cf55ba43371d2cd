"""Requests and answers, the same for every client."""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emollama_jax import foreign_json
from emollama_jax.redact import redact

# Gemini counts 258 tokens for a picture whose sides are at most 384 pixels (its guide to tokens).
SIDE = 384  # pixels
IMAGE_TOKENS = 258
TILE = 768  # pixels; a larger picture is cut into tiles of so many tokens each
CHARACTERS = 3  # of a token at least, for an estimate that is not too low (English has about 4)

MOST_TOKENS = 10**8  # of one question; a service that counts more does not count
LONGEST_AFTER = 3600.0  # seconds that a service may ask to wait

Finish = Literal["stop", "cut", "blocked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One question."""

    parts: tuple[str | bytes, ...]  # text, and pictures as JPEG, in this order
    system: str = ""
    schema: Mapping[str, Any] | None = None  # JSON schema of the answer
    max_tokens: int
    temperature: float
    picture_tokens: int = IMAGE_TOKENS  # of one picture, for the estimate

    @property
    def input_tokens(self) -> int:
        """Estimated from above."""
        text = len(self.system) + sum(len(part) for part in self.parts if isinstance(part, str))
        pictures = sum(isinstance(part, bytes) for part in self.parts)
        schema = len(str(self.schema)) if self.schema else 0
        return (text + schema) // CHARACTERS + 1 + pictures * self.picture_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer that came, and that is paid for."""

    text: str
    finish: Finish
    why: str = ""  # of a block
    final: bool = False  # asking again would bring the same
    input_tokens: int | None = None  # None: the service did not say
    output_tokens: int | None = None


class Trouble(Exception):
    """A question that got no answer."""

    def __init__(
        self,
        message: str,
        *,
        kind: Literal["passing", "item", "fatal"],
        after: float | None = None,
        maybe_paid: bool = False,
    ):
        """Says what to do about it.

        Args:
            message: message of the service, one line.
            kind: "passing": try again; "item": this question is refused; "fatal": every one is.
            after: seconds that the service asks to wait; at most LONGEST_AFTER are waited.
            maybe_paid: the answer may have been made, and got lost.
        """
        super().__init__(message)
        self.kind, self.maybe_paid = kind, maybe_paid
        self.after = None if after is None else min(after, LONGEST_AFTER)


class Client(Protocol):
    """A model that can be asked."""

    name: str  # "gemini:MODEL", "openai:URL#MODEL", "hf:PATH"

    async def ask(self, request: Request) -> Reply:
        """One answer.

        Raises:
            Trouble: there is none.
        """
        ...

    async def close(self) -> None:
        """Ends its connections."""
        ...


def jpeg(picture: UInt8[np.ndarray, "h w 3"], side: int = SIDE) -> bytes:
    """A picture as it is sent: JPEG, its longer side at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def picture_tokens(side: int) -> int:
    """Gemini's tokens of a square picture; other services count in their own ways."""
    return IMAGE_TOKENS * (1 if side <= SIDE else math.ceil(side / TILE) ** 2)


def one_line(text: object, length: int = 300) -> str:
    """For messages and the journal; without keys, which a service may repeat."""
    return foreign_json.plain(redact(" ".join(str(text).split()))[:length])


def text_of(content: Any) -> str:
    """The text in an answer's content: a text, none, or a list of parts, whose texts are joined.

    Args:
        content: as the service sent it.

    Raises:
        ValueError: anything else.
    """
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if content and not texts:
            raise ValueError(f"a content of {len(content)} parts without a text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"a content that is a {type(content).__name__}, wanted a text")
    return foreign_json.plain(redact(content))


def tokens_of(count: Any) -> int | None:
    """A service's count of tokens; None for what no count can be: the estimate is used then."""
    whole = isinstance(count, int) or (isinstance(count, float) and count.is_integer())
    if isinstance(count, bool) or not whole or not 0 <= count <= MOST_TOKENS:
        return None
    return int(count)
