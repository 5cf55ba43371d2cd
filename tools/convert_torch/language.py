"""Language files of a checkpoint: the tokenizer, and its conversation format by name.

A chat template is a program (Jinja); which format it writes is found by letting it write, in the
sandbox that `transformers` runs it in, and comparing with the formats of `data/templates.py`.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence

from emollama_jax import foreign_json
from emollama_jax.data import templates
from emollama_jax.data.chat import Chat
from emollama_jax.data.templates import TEMPLATE_FILE, TEMPLATES, Template
from emollama_jax.data.tokenizers import (
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    SentencePieceTokenizer,
    Tokenizer,
    from_files,
)
from emollama_jax.errors import UserError
from tools.convert_torch.files import Opened

JINJA = "chat_template.jinja"
DATED = re.compile(r"Cutting Knowledge Date|Today Date")  # Llama 3.1's system text
TOLD = (  # a conversation that shows all that a format is made of
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
)
S = "S1"  # a system text

Messages = Sequence[Mapping[str, str]]


def carry(opened: Opened) -> None:
    """Checks the tokenizer that a checkpoint carries, and adds its format's name to the files.

    Args:
        opened: problems and notes are added; `carried` is completed, or emptied with a note.
    """
    held = opened.carried
    if not opened.tensors or opened.problems:
        return
    if TOKENIZER not in held and SENTENCEPIECE not in held:
        held.clear()
        opened.notes.append("no tokenizer beside the weights: name one under data.llm_tokenizer")
        return
    if TOKENIZER in held and TOKENIZER_CONFIG not in held:
        del held[TOKENIZER]
        opened.notes.append(
            f"{TOKENIZER} without {TOKENIZER_CONFIG}, which names its special tokens: not carried"
        )
        return
    try:
        settings = foreign_json.parse(held.get(TOKENIZER_CONFIG, b"{}"))
        tokenizer = _tokenizer(held, settings)
    except Exception as error:  # the Rust and C++ libraries raise bare Exception and RuntimeError
        reason = " ".join(str(error).split())[:200]
        opened.problems.append(f"its tokenizer ({', '.join(held)}): {reason}")
        return
    program = _program(held, settings)
    if importlib.util.find_spec("jinja2") is None:
        opened.problems.append(
            "its chat template needs jinja2: pip install 'emollama-jax[convert]'"
        )
        return
    if program is None:
        opened.notes.append("no chat template beside the tokenizer: name a data.template")
        return
    found = recognise(program, settings)
    if found is None:
        opened.notes.append(
            f"its chat template is not one of {', '.join(TEMPLATES)}: name a data.template yourself"
        )
        return
    try:
        Chat(found.template, tokenizer)
    except UserError as error:
        opened.problems.append(f"its tokenizer: {error}")
        return
    held[TEMPLATE_FILE] = templates.written(found.template).encode()
    system = found.template.system
    about = f"system text {system!r}" if system else "no system text"
    opened.notes.append(f"its chat template is {found.template.name}, {about}{found.note}")


def _tokenizer(held: Mapping[str, bytes], settings: Mapping) -> Tokenizer:
    if TOKENIZER in held:
        return from_files(held[TOKENIZER].decode(), settings)
    return SentencePieceTokenizer(held[SENTENCEPIECE])


def _program(held: Mapping[str, bytes], settings: Mapping) -> str | None:
    """The chat template; a file of its own goes before the setting."""
    if JINJA in held:
        return held[JINJA].decode()
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


@dataclasses.dataclass(frozen=True)
class Found:
    """A format that a chat template writes."""

    template: Template
    note: str  # what of it is left out


def recognise(program: str, settings: Mapping) -> Found | None:
    """The format that a chat template writes; None for another one.

    Args:
        program: in Jinja.
        settings: settings of `tokenizer_config.json`, whose special tokens it may name.
    """
    tokens = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    try:
        whole = render(program, [{"role": "system", "content": S}, *TOLD], tokens)
        alone = render(program, TOLD, tokens)
    except Exception:  # a program may raise anything
        return None
    for template in TEMPLATES.values():
        if template.name == "vicuna":  # made before there were chat templates
            continue
        told, silent = (_text(template, system) for system in (S, ""))
        if not whole.endswith(told.removeprefix(_text(template, S, turns=False))):
            continue
        start = _text(template, "\0", turns=False).split("\0")
        system = re.match(rf"{re.escape(start[0])}(.*?){re.escape(start[1])}", alone, re.DOTALL)
        if alone == silent:
            found = Found(dataclasses.replace(template, system=""), "")
        elif system and DATED.search(system[1]):
            note = f"; the date in its own ({system[1].strip()!r}) is left out"
            found = Found(dataclasses.replace(template, system=""), note)
        elif system and alone == _text(template, system[1]):
            found = Found(dataclasses.replace(template, system=system[1]), "")
        else:
            continue
        return found if found.note or whole == told else None
    return None


def _text(template: Template, system: str, *, turns: bool = True) -> str:
    """What a format makes of `TOLD`, its end open; or of its system text alone."""
    start = "".join(dataclasses.replace(template, system=system).start)
    if not turns:
        return start
    user, assistant = "".join(template.user), "".join(template.assistant)
    answer = f"{template.gap}A1{template.end}{template.between}"
    return f"{start}{user}Q1{assistant}{answer}{user}Q2{assistant}"


def render(program: str, messages: Messages, tokens: Mapping[str, str | None]) -> str:
    """Renders a chat template, with its end open for an answer.

    Raises:
        Exception: whatever the program raises.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return sandbox.from_string(program, globals={"raise_exception": refuse}).render(
        messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
    )


def _content(value: object) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def stops(held: Mapping[str, bytes]) -> dict[str, object]:
    """Ids of `config.json` out of the files that a folder carries; empty where it has none.

    Args:
        held: files by name.
    """
    if not {TOKENIZER, TOKENIZER_CONFIG} <= held.keys() and SENTENCEPIECE not in held:
        return {}
    tokenizer = _tokenizer(held, foreign_json.parse(held.get(TOKENIZER_CONFIG, b"{}")))
    ends = [tokenizer.eos]
    if TEMPLATE_FILE in held:
        template = templates.read_template(held[TEMPLATE_FILE].decode(), name=TEMPLATE_FILE)
        ends = list(Chat(template, tokenizer).stop)
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad,
    }
