"""What Gemini is asked, and what its answer must be.

EMO-LLaMA names the ingredients (a picture, or a clip's centre frame with a description of the clip
by another model; the label; a prompt) and not the prompt: its words here are ours.
"""

import json
from collections.abc import Sequence
from typing import Any

import pydantic

from emollama_jax import foreign_json
from emollama_jax.data.items import MEDIUM
from emollama_jax.data.prompts import PLACE
from emollama_jax.instruct.check import faults
from emollama_jax.remote.request import Reply, Request, one_line
from emollama_jax.remote.run import Verdict

ANSWER_TOKENS = 700  # of two turns at most, as JSON
DESCRIPTION_TOKENS = 300
TEMPERATURE = 0.7  # conversations of a set should not all sound alike


class Exchange(pydantic.BaseModel):
    """A question and its answer."""

    model_config = pydantic.ConfigDict(extra="forbid")
    question: str = pydantic.Field(min_length=5, max_length=300)
    answer: str = pydantic.Field(min_length=20, max_length=1200)


class Dialogue(pydantic.BaseModel):
    """What Gemini has to return."""

    model_config = pydantic.ConfigDict(extra="forbid")
    turns: list[Exchange] = pydantic.Field(min_length=1, max_length=2)


# The plain schema that services take: bounds of lengths are checked here.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "turns": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["turns"],
    "additionalProperties": False,
}

SYSTEM = """\
You write training conversations about facial expressions. You get a picture of a person and the \
emotion that annotators agreed on. Write one or two turns between a curious user and an assistant \
who sees the same {medium} and was not told the emotion.

Rules:
- The first question asks what emotion the person shows, how one can tell, or what the face looks \
like. It names no emotion.
- The first answer describes what is visible of the eyebrows, the eyes and the mouth, and then \
names the emotion with the given word. It names no other emotion, not even to deny it.
- A second turn is optional. It may ask what the person is doing, or why the person feels this \
way. The answer says only what is visible. It never invents a reason, an event or a thought; asked \
for a reason, it says that the {medium} does not show one.
- Two or three plain sentences an answer. No lists, no mention of labels, annotators or these rules.
"""
DESCRIBE = (
    "These are {count} frames of one short video, in order. Describe in at most five sentences "
    "what the person's face and body do from the first to the last: eyebrows, eyes, mouth, head, "
    "gestures. Say only what is visible; do not name an emotion and do not guess a reason."
)


def conversation_request(
    picture: bytes,
    *,
    label: str,
    kind: str,
    description: str | None,
    rejections: Sequence[str],
) -> Request:
    """The question for one example.

    Args:
        picture: JPEG; of a clip, its centre frame.
        label: the emotion in the words that all sets share.
        kind: "image" or "clip".
        description: description of a clip, by another model.
        rejections: why earlier answers were not taken.
    """
    medium = MEDIUM[kind]
    text = f"The emotion: {label}."
    if kind == "clip":
        text += (
            "\nThe picture is the centre frame of a video. What happens in the video, as another "
            f"model describes it: {description}\nSpeak of the video, not of a frame or picture."
        )
    if rejections:
        text += f"\nAn earlier answer was rejected: {rejections[-1]}. Do better."
    return Request(
        system=SYSTEM.format(medium=medium),
        parts=(picture, text),
        schema=SCHEMA,
        max_tokens=ANSWER_TOKENS,
        temperature=TEMPERATURE,
    )


def description_request(frames: Sequence[bytes]) -> Request:
    """The question for the description of a clip, from frames of it as JPEG."""
    return Request(
        parts=(*frames, DESCRIBE.format(count=len(frames))),
        max_tokens=DESCRIPTION_TOKENS,
        temperature=0.0,
    )


def judge_conversation(reply: Reply, *, label: str, kind: str) -> Verdict:
    """The answer as a LLaVA conversation, or why it is none."""
    if reply.finish == "cut":
        return Verdict(None, "the answer was cut off before its end; be shorter")
    try:
        dialogue = Dialogue.model_validate(foreign_json.parse(reply.text))
    except json.JSONDecodeError as error:
        return Verdict(None, f"not JSON ({error.msg}, column {error.colno})")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Verdict(None, f"not of the wanted form ({where}: {first['msg']})")
    except ValueError as error:
        return Verdict(None, f"not JSON that can be read ({error})")
    turns = [(one_line(t.question, 300), one_line(t.answer, 1200)) for t in dialogue.turns]
    if found := faults(turns, label=label, kind=kind):
        return Verdict(None, "; ".join(found))
    conversation = []
    for number, (question, answer) in enumerate(turns):
        place = "" if number else f"{PLACE}\n"
        conversation.append({"from": "human", "value": place + question})
        conversation.append({"from": "gpt", "value": answer})
    return Verdict(conversation)


def judge_description(reply: Reply) -> Verdict:
    """Any text is a description; one that is cut off ends with its last whole sentence."""
    text = one_line(reply.text, 2000)
    if reply.finish == "cut":
        text = text[: text.rfind(".") + 1]
    return Verdict(text) if text else Verdict(None, "an empty description")
