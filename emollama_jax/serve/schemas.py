"""Requests as they arrive: OpenAI's chat completions and our label scores, checked by pydantic.

Fields follow OpenAI's API reference ("Create chat completion"); `video_url` and
`structured_outputs` are vLLM's, `emollama` holds our own. Fields that are not listed here are
accepted and do nothing: clients send what other servers know. `unknown` names them for the log.
"""

import json
from typing import Annotated, Any, Literal

import pydantic

from emollama_jax.serve.faults import Fault, invalid
from emollama_jax.serve.limits import CHOICES, LABEL, LABELS, MESSAGES, STOPS
from emollama_jax.serve.requests import TOP_LOGPROBS


class _Schema(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", frozen=True)


Label = Annotated[str, pydantic.Field(min_length=1, max_length=LABEL)]
Labels = Annotated[list[Label], pydantic.Field(min_length=1, max_length=LABELS)]


class Url(_Schema):
    """Where a medium is: a data URI, or an address of a host that the server allows."""

    url: str


class TextPart(_Schema):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Schema):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Schema):
    """A clip of a message."""

    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, pydantic.Discriminator("type")]


def _as_parts(content: Any) -> Any:
    """Content that is a string, or none, in the form that all content has."""
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], pydantic.BeforeValidator(_as_parts)] = []


class Extension(_Schema):
    """What OpenAI's API has no word for."""

    face: Annotated[int, pydantic.Field(ge=0)] | None = None  # the largest is 0
    agr: bool = False  # tell the model the predicted age, gender and race of the face


class StreamOptions(_Schema):
    """Options of a stream."""

    include_usage: bool = False


class StructuredOutputs(_Schema):
    """vLLM's constraints on an answer, of which we know one."""

    choice: Labels | None = None


class ResponseFormat(_Schema):
    """OpenAI's constraint on an answer."""

    type: Literal["text", "json_schema", "json_object"]
    json_schema: dict[str, Any] | None = None


class _Asked(_Schema):
    """What chat and score have in common."""

    model: str | None = None
    messages: Annotated[list[Message], pydantic.Field(min_length=1, max_length=MESSAGES)]
    emollama: Extension = Extension()


def _as_list(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[str], pydantic.Field(max_length=STOPS), pydantic.BeforeValidator(_as_list)
    ] = []
    n: Annotated[int, pydantic.Field(ge=1, le=CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return tuple(text for text in self.stop if text)

    @property
    def told(self) -> int | None:
        """Likeliest tokens to tell of each step; None: no log-probabilities.

        Raises:
            Fault: a number of tokens, and none wanted.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class ScoreRequest(_Asked):
    """`POST /v1/score`: the likelihood of each label as the answer to the last message.

    Without labels, the run's emotion classes; without a text beside the medium, the category
    question with these labels, as in training.
    """

    labels: Labels | None = None


def read(schema: type[pydantic.BaseModel], body: bytes) -> Any:
    """A request from its body.

    Raises:
        Fault: not JSON, or not of this schema.
    """
    try:
        return schema.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _fault(error) from None


def _fault(error: pydantic.ValidationError) -> Fault:
    """The first of the errors, with the field's path and without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {first['msg']}", code="invalid_json")
    path = ".".join(str(step)[:60] for step in first["loc"][:12])
    return invalid(f"{path or 'body'}: {first['msg']}", path or None, code=first["type"])


def unknown(asked: pydantic.BaseModel) -> list[str]:
    """Names of fields that do nothing here, as the log shows them."""
    names = sorted(asked.model_extra or {})
    return [ascii(name[:40]) for name in names[:10]]


class Choice:
    """An answer that must be one of some labels, and how its content is written."""

    def __init__(self, labels: list[str], key: str | None, quoted: bool):
        """`key`: of the JSON object that holds it; `quoted`: as a JSON string."""
        self.labels, self._key, self._quoted = labels, key, quoted

    def content(self, label: str) -> str:
        """What the message says."""
        if self._key is not None:
            return json.dumps({self._key: label}, ensure_ascii=False)
        return json.dumps(label, ensure_ascii=False) if self._quoted else label


def choice_of(asked: ChatRequest) -> Choice | None:
    """The choice that a request wants, if it does.

    Raises:
        Fault: a constraint that is none between labels.
    """
    structured, form = asked.structured_outputs, asked.response_format
    if structured is not None:
        if structured.choice is None:
            raise invalid(
                "structured_outputs: wanted {choice: [label, …]}, the only one supported",
                "structured_outputs",
            )
        return Choice(_different(structured.choice, "structured_outputs.choice"), None, False)
    if form is None or form.type == "text":
        return None
    where = "response_format"
    schema = (form.json_schema or {}).get("schema") if form.type == "json_schema" else None
    if not isinstance(schema, dict):
        raise invalid(
            f"{where}: wanted type text, or json_schema with an enum of strings; free JSON is "
            "not supported",
            where,
        )
    return _of_schema(schema, f"{where}.json_schema.schema")


def _of_schema(schema: dict[str, Any], where: str) -> Choice:
    """An enum of strings, or an object with one property that is such an enum."""
    definitions = schema.get("$defs")
    key, found = None, _enum(schema, definitions)
    properties = schema.get("properties")
    if found is None and isinstance(properties, dict) and len(properties) == 1:
        ((key, inner),) = properties.items()
        found = _enum(inner, definitions)
    if found is None:
        raise invalid(
            f"{where}: wanted an enum of strings, or an object with one property that is one; "
            "other schemas are not supported",
            where,
        )
    labels = pydantic.TypeAdapter(Labels)
    try:
        return Choice(_different(labels.validate_python(found), where), key, quoted=True)
    except pydantic.ValidationError as error:
        raise _fault(error) from None


def _enum(schema: Any, definitions: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str) and isinstance(definitions, dict):
        schema = definitions.get(reference.removeprefix("#/$defs/"), {})
    if not isinstance(schema, dict):
        return None
    found = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        return None
    return found


def _different(labels: list[str], where: str) -> list[str]:
    """Raises Fault where a label occurs twice."""
    if len(set(labels)) < len(labels):
        raise invalid(f"{where}: the same label twice", where)
    return labels
