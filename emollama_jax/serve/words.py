"""Between OpenAI's words and the engine's: a request's messages as turns, answers as OpenAI's
objects.
"""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from emollama_jax.config import GenerateConfig
from emollama_jax.data.items import standard_question
from emollama_jax.data.prompts import Turn, question_text
from emollama_jax.serve.faults import invalid
from emollama_jax.serve.limits import TEXT
from emollama_jax.serve.requests import AnswerToken, End, FacesFound
from emollama_jax.serve.schemas import (
    ChatRequest,
    ImagePart,
    Message,
    ScoreRequest,
    TextPart,
    VideoPart,
)
from emollama_jax.terms import Kind

IMPOSSIBLE = -9999.0  # what OpenAI's API says for log 0, which JSON cannot


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation as the engine knows it: one medium, turns, and a question."""

    url: str | None  # of the medium
    kind: Kind
    param: str  # the field that the medium is in
    earlier: tuple[Turn, ...]
    question: str  # "" where the message holds a medium alone


def talk_of(messages: Sequence[Message]) -> Talk:
    """Reads messages: an optional system text, then user and assistant in turns, the user last.

    Messages of one role in a row are one. The model was trained with one system text, which its
    template holds; a request's stands before the first question.

    Raises:
        Fault: other turns, more than one medium, too much text.
    """
    system: list[str] = []
    said: list[tuple[str, list[str]]] = []  # role, texts
    media: dict[str, tuple[Kind, str]] = {}  # URL → kind, field
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        if message.role in ("system", "developer"):
            if said:
                raise invalid(f"{where}: a {message.role} message stands first", where)
            system += texts
        elif said and said[-1][0] == message.role:
            said[-1][1].extend(texts)
        else:
            said.append((message.role, texts))
        for place, part in enumerate(message.content):
            if isinstance(part, TextPart):
                continue
            if message.role != "user":
                raise invalid(f"{where}: media stand in messages of the user", where)
            url, kind, field = _medium(part)
            media.setdefault(url, (kind, f"{where}.content.{place}.{field}"))
    if not said or said[0][0] != "user" or said[-1][0] != "user":
        raise invalid(
            "messages: user and assistant take turns, the user first and last", "messages"
        )
    if len(media) > 1:
        raise invalid(
            "messages: more than one picture or clip; a conversation is about one", "messages"
        )
    if sum(len(text) for _, texts in said for text in texts) + sum(map(len, system)) > TEXT:
        raise invalid(f"messages: over {TEXT:,} characters of text", "messages", "text_too_long")
    ((url, (kind, param)),) = media.items() or ((None, ("image", "messages")),)
    values = ["\n".join(texts) for _, texts in said]
    values[::2] = [question_text(text) for text in values[::2]]
    values[0] = "\n".join(filter(None, [*system, values[0]]))
    for place in range(0, len(values) - 1, 2):
        values[place] = values[place] or standard_question(kind)
    turns = tuple(map(Turn, values[:-1:2], values[1::2]))
    return Talk(url, kind, param, turns, values[-1].strip())


def _medium(part: ImagePart | VideoPart) -> tuple[str, Kind, str]:
    if isinstance(part, ImagePart):
        return part.image_url.url, "image", "image_url"
    return part.video_url.url, "clip", "video_url"


def how_of(asked: ChatRequest, usual: GenerateConfig, room: int) -> GenerateConfig:
    """How an answer is drawn: the run's own settings where the request says nothing.

    Args:
        asked: the request.
        usual: the run's settings.
        room: the largest number of new tokens.

    Raises:
        Fault: more tokens than there is room for.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        wanted = getattr(asked, name)
        if wanted is not None and wanted > room:
            raise invalid(
                f"{name} is {wanted}, wanted at most {room}, which is what the model's positions "
                "leave beside a prompt",
                name,
                "context_length_exceeded",
            )
    tokens = asked.max_completion_tokens or asked.max_tokens or usual.max_new_tokens
    seed = secrets.randbits(31) if asked.seed is None else asked.seed % 2**31
    return dataclasses.replace(
        usual,
        max_new_tokens=min(tokens, room),
        temperature=usual.temperature if asked.temperature is None else asked.temperature,
        top_p=usual.top_p if asked.top_p is None else asked.top_p,
        seed=seed,
    )


class Words:
    """Builds the objects of one answer."""

    def __init__(self, kind: str, prefix: str, model: str):
        """Draws its id.

        Args:
            kind: OpenAI's `object`.
            prefix: start of the id.
            model: name of the model.
        """
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, **fields: Any) -> dict[str, Any]:
        """An answer, or an event of a stream."""
        return self._head | fields


def choice(index: int, content: str, logprobs: Any, reason: str) -> dict[str, Any]:
    """One finished choice."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def delta(
    index: int, said: dict[str, Any], logprobs: Any = None, reason: str | None = None
) -> dict[str, Any]:
    """A part of a choice in a stream."""
    return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": reason}


def finish_reason(end: End) -> str:
    """OpenAI knows no reason "no_face"; `emollama.face_found` tells."""
    return "length" if end.reason == "length" else "stop"


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """Tokens of a request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def logprobs(tokens: Sequence[AnswerToken], told: int | None) -> dict[str, Any] | None:
    """Log-probabilities in OpenAI's form; None where none are wanted."""
    if told is None:
        return None
    content = [
        _token(token.text, token.logprob)
        | {"top_logprobs": [_token(text, value) for _, text, value in token.top[:told]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: str, value: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": max(float(value), IMPOSSIBLE),
        "bytes": list(text.encode("utf-8", "replace")),
    }


def faces(found: FacesFound | None, *, agr: bool) -> dict[str, Any]:
    """Our extension: the faces of the medium, as far as there is one.

    Args:
        found: what was found; None without a medium.
        agr: also tell the predicted age, gender and race.
    """
    if found is None:
        return {}
    listed = [
        {"box": [round(float(x), 1) for x in box], "probability": round(float(p), 4)}
        for box, p in zip(found.boxes, found.probabilities, strict=True)
    ]
    said: dict[str, Any] = {
        "face_found": len(listed) > 0,
        "faces": listed,
        "face": found.face,
    }
    if agr:
        groups = {"age": found.age, "gender": found.gender, "race": found.race}
        said["agr"] = {"sentence": found.agr} | {
            name: value and {label: round(float(p), 4) for label, p in value.items()}
            for name, value in groups.items()
        }
    return said


def labels_of(asked: ScoreRequest, usual: Sequence[str]) -> list[str]:
    """Labels of a score request.

    Raises:
        Fault: one of them twice.
    """
    labels = list(usual) if asked.labels is None else asked.labels
    if len(set(labels)) < len(labels):
        raise invalid("labels: the same label twice", "labels")
    return labels
