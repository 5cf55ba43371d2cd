"""Conversation formats by name: the text around questions and answers, and the end of an answer.

    vicuna   <s>SYSTEM USER: [question] ASSISTANT: answer</s>USER: …          (LLaMA-VID's imgsp_v1)
    chatml   <|im_start|>system⏎SYSTEM<|im_end|>⏎<|im_start|>user⏎[question]<|im_end|>⏎
             <|im_start|>assistant⏎answer<|im_end|>⏎<|im_start|>user⏎ …       (SmolLM2, Qwen)
    llama3   <|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎[question]<|eot_id|>
             <|start_header_id|>assistant<|end_header_id|>⏎⏎answer<|eot_id|> …  (Llama 3)

Without visual tokens, `chatml` and `llama3` are what `apply_chat_template` makes of the models'
own templates: `chatml`'s system text is SmolLM2's, `llama3` has none, as Llama 3's. (From 3.1 on,
Meta's template puts a date into the system text; it is left out here.) A folder of converted
weights may carry a format with another system text.
"""

import dataclasses
import json
from typing import Any

from emollama_jax import foreign_json
from emollama_jax.errors import UserError

TEMPLATE_FILE = "template.json"  # of a folder of converted weights: {"name": …, "system": …}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BOS, EOS = "{bos}", "{eos}"  # stand for the tokenizer's own


class Token(str):
    """A special token of the tokenizer, by its text, or BOS or EOS."""


Pieces = tuple[str, ...]  # text, and `Token`s among it


@dataclasses.dataclass(frozen=True)
class Template:
    """A conversation format. Text that stands next to text is encoded with it, in one."""

    name: str
    system: str  # "" for none
    opening: Pieces  # before all
    system_before: Pieces  # around the system text, both left out where there is none
    system_after: Pieces
    user: Pieces  # before a question
    assistant: Pieces  # between a question and its answer
    gap: str  # before an answer; bears loss with it
    end: Token  # of an answer; bears loss
    between: str  # after it
    placed: bool  # the line break after visual tokens stands even where there are none
    trims: bool  # spaces around questions and answers are taken away

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Every special token that it needs."""
        parts = (
            *(*self.opening, *self.system_before, *self.system_after, *self.user),
            *(*self.assistant, self.end),
        )
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, Token)))

    @property
    def start(self) -> Pieces:
        """Text before the first question's own pieces."""
        if not self.system:
            return self.opening
        return (*self.opening, *self.system_before, self.system, *self.system_after)


def _turn(role: str, *, start: str, end: str, line: str) -> Pieces:
    return (Token(start), role, Token(end), line) if end else (Token(start), role + line)


_IM = {"start": "<|im_start|>", "end": "", "line": "\n"}
_HEADER = {"start": "<|start_header_id|>", "end": "<|end_header_id|>", "line": "\n\n"}
_EOT = Token("<|eot_id|>")
_IM_END = (Token("<|im_end|>"), "\n")

TEMPLATES = {
    "vicuna": Template(
        name="vicuna",
        system=SYSTEM,
        opening=(Token(BOS),),
        system_before=(),
        system_after=(" ",),
        user=("USER: ",),
        assistant=(" ASSISTANT:",),
        gap=" ",
        end=Token(EOS),
        between="",
        placed=True,
        trims=False,
    ),
    "chatml": Template(
        name="chatml",
        system=SMOLLM2,
        opening=(),
        system_before=_turn("system", **_IM),
        system_after=_IM_END,
        user=_turn("user", **_IM),
        assistant=(*_IM_END, *_turn("assistant", **_IM)),
        gap="",
        end=_IM_END[0],
        between="\n",
        placed=False,
        trims=False,
    ),
    "llama3": Template(
        name="llama3",
        system="",
        opening=(Token("<|begin_of_text|>"),),
        system_before=_turn("system", **_HEADER),
        system_after=(_EOT,),
        user=_turn("user", **_HEADER),
        assistant=(_EOT, *_turn("assistant", **_HEADER)),
        gap="",
        end=_EOT,
        between="",
        placed=False,
        trims=True,
    ),
}
# Tokens that only a format may place, whatever a tokenizer's file says of them.
CONTROL = frozenset(
    token for template in TEMPLATES.values() for token in template.tokens if token not in (BOS, EOS)
)


def written(template: Template) -> str:
    """A template as `TEMPLATE_FILE` holds it."""
    return json.dumps({"name": template.name, "system": template.system}, indent=2)


def read_template(text: str, *, name: Any) -> Template:
    """Reads the output of `written`.

    Args:
        text: text of the file.
        name: name of the file, for messages.

    Raises:
        UserError: something else.
    """
    wanted = f'wanted {{"name": one of {", ".join(TEMPLATES)}, "system": text}}'
    try:
        held = foreign_json.parse(text)
        template, system = TEMPLATES[held["name"]], held["system"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{name}: names no conversation format, {wanted}: convert again") from None
    if not isinstance(system, str):
        raise UserError(f"{name}: its system text is {system!r}, {wanted}: convert again")
    return dataclasses.replace(template, system=system)
