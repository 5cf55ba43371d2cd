"""`emollama data instruct`: instruction data of a prepared split."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from emollama_jax import foreign_json
from emollama_jax.data.builders.stored import Example
from emollama_jax.data.media import read_frames, read_image
from emollama_jax.data.sets import parse
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.instruct import ask, store
from emollama_jax.instruct.options import InstructOptions
from emollama_jax.instruct.templates import template
from emollama_jax.locks import hold
from emollama_jax.paths import on_disk
from emollama_jax.preflight import at_least
from emollama_jax.remote.clients import check_spec
from emollama_jax.remote.gemini import KEYS, api_key
from emollama_jax.remote.journal import Journal
from emollama_jax.remote.prices import Price, price_of
from emollama_jax.remote.request import Request, jpeg
from emollama_jax.remote.run import Outcome, Task, ask_model
from emollama_jax.status import Bars
from emollama_jax.tables import read_text

# As in EMO-LLaMA's data: FERPlus (grey, 48 pixels wide) has category items only.
CATEGORY_ONLY = ("ferplus",)
FRAMES = 6  # of a clip that its description is made from
TYPICAL_TOKENS = 220  # of an accepted conversation as JSON, for the estimate


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the conversations would cost, before anything is sent."""

    items: int  # conversations still to be made
    input_tokens: int
    output_tokens: int
    price: Price
    descriptions: int  # still to be made
    description_tokens: tuple[int, int]
    description_price: Price | None

    def lines(self) -> list[str]:
        """For the terminal."""
        cost = self.price.cost(self.input_tokens, self.output_tokens)
        what = (
            f"${cost:.2f}" if self.price.known else "unknown (give --input-price, --output-price)"
        )
        said = [
            f"conversations  {self.items:,}",
            f"tokens         {self.input_tokens:,} in, about {self.output_tokens:,} out",
            f"cost           about {what} (prices: {self.price.source})",
        ]
        if self.description_price is not None:
            tokens = self.description_tokens
            known = self.description_price.known
            more = f"${self.description_price.cost(*tokens):.2f}" if known else "price unknown"
            said.append(
                f"descriptions   {self.descriptions:,}: {tokens[0]:,} tokens in, at most "
                f"{tokens[1]:,} out, {more}"
            )
        return said


def instruct(options: InstructOptions, console: Console) -> tuple[pathlib.Path, Outcome]:
    """Makes the instruction data of a split, or resumes.

    Args:
        options: options of the command.
        console: terminal for progress and remarks.

    Returns:
        The folder, and how far it got.

    Raises:
        UserError: not prepared, no descriptions for clips, a service that refuses or keeps failing.
    """
    work = _open(options)
    with hold(work.folder, instead="choose another --dir"):
        return _instruct(work, console)


def _instruct(work: "Work", console: Console) -> tuple[pathlib.Path, Outcome]:
    options, folder, by = work.options, work.folder, _maker(work.options, console)
    if by != "gemini":
        _keep_what_was_paid(folder, by)
        found = {} if by == "category" else _templates(work, console)
        _write(work, found, {}, by, console)
        return folder, Outcome(len(found), 0, 0, "", 0.0)
    _check_descriptions(work)
    model = f"gemini:{options.model}"
    price_of(model, options.limits)  # a budget needs one, before descriptions are paid for
    with Journal(work.journal, _settings(work)) as journal, Bars(console) as bars:
        described, aside = _describe(work, journal, bars)
        tasks = [_conversation_task(work, i, text) for i, text in described.items()]
        outcome = ask_model(model, options, tasks, journal, bars.bar("conversations", len(tasks)))
        found, late = _values(journal, {i: work.key(i) for i in described})
    aside |= late
    left = work.wanted - len(found) - len(aside)
    outcome = dataclasses.replace(outcome, aside=len(aside), open=left)
    if not outcome.stopped.startswith("interrupted"):
        _write(work, found, aside, model, console)
    return folder, outcome


def estimate(options: InstructOptions) -> Estimate:
    """What is still to be asked, and what that would cost; nothing is sent, no key is needed."""
    work = _open(options)
    wanted = range(0 if parse(options.name).family in CATEGORY_ONLY else work.wanted)
    done = described = 0
    if work.journal.exists():
        with Journal(work.journal, _settings(work)) as journal:
            done = sum(journal.entry(work.key(i)).done for i in wanted)
            described = sum(journal.entry(work.description_key(i)).done for i in wanted)
    clip = work.split.kind == "clip"
    one = ask.conversation_request(
        b"",
        label=max(work.split.space.canonical, key=len),
        kind=work.split.kind,
        description="x" * 4 * ask.DESCRIPTION_TOKENS if clip else None,
        rejections=(),
    )
    left, price = len(wanted) - done, price_of(f"gemini:{options.model}", options.limits)
    other, more, tokens = None, 0, (0, 0)
    if clip and options.describe and not _is_file(options.describe):
        other = price_of(options.describe, options.limits)
        more = len(wanted) - described
        first = ask.description_request([b""] * FRAMES)
        tokens = (more * first.input_tokens, more * first.max_tokens)
    return Estimate(
        left, left * one.input_tokens, left * TYPICAL_TOKENS, price, more, tokens, other
    )


# ---- the work


@dataclasses.dataclass(frozen=True)
class Work:
    """The conversations wanted of a prepared split, and what is known without reading its media."""

    options: InstructOptions
    split: Split
    wanted: int  # conversations, of the first examples
    journal: pathlib.Path  # one for all folds: a clip is paid once

    @property
    def folder(self) -> pathlib.Path:
        """Where the result goes."""
        return pathlib.Path(self.split.instruct_folder)

    def word(self, index: int) -> str:
        """The emotion in the words that all sets share ("happy" is happiness)."""
        return self.split.space.canonical[self.split.index.labels[index]]

    def key(self, index: int) -> str:
        """Everything that a conversation depends on, beside the journal's settings."""
        return f"{self.description_key(index)} {self.word(index)}"

    def description_key(self, index: int) -> str:
        """Of a clip's description, which does not depend on the label."""
        return f"{self.split.index.ids[index]} {self.split.index.digests[index]}"


def _open(options: InstructOptions) -> Work:
    at_least(1, limit=options.limit)
    on_disk(options.dir, instead="prepare the set there; what was made may be copied to a bucket")
    split = Split(options.dir, options.name, options.split)
    count, model = len(split.examples), re.sub(r"[^\w.-]", "_", options.model)
    return Work(
        options=options,
        split=split,
        wanted=count if options.limit is None else min(options.limit, count),
        journal=pathlib.Path(options.dir, "instruct", split.place, f"journal-{model}.jsonl"),
    )


# ---- who makes them


def _maker(options: InstructOptions, console: Console) -> str:
    """ "gemini", "template" or "category"."""
    if parse(options.name).family in CATEGORY_ONLY:
        console.print(f"{options.name}: category items only, as in EMO-LLaMA's data")
        return "category"
    if options.by == "auto":
        if api_key() is not None:
            return "gemini"
        console.print(
            f"no {KEYS[0]} in the environment: templates replace Gemini's conversations and "
            'are marked "template"; use them for trials, not for a model that people rely on'
        )
        return "template"
    return options.by


def _keep_what_was_paid(folder: pathlib.Path, by: str) -> None:
    before = store.made_by(folder)
    if before is not None and before.startswith("gemini:") and by == "template":
        raise UserError(
            f"{folder} holds conversations of {before}; set {KEYS[0]} to resume them, or move "
            "the folder away to have templates"
        )


def _check_descriptions(work: Work) -> None:
    describe = work.options.describe
    if work.split.kind != "clip":
        return
    if describe is None:
        raise UserError(
            f"{work.options.name}: Gemini sees a clip's centre frame and needs a description of "
            "the rest; give --describe openai:URL#MODEL, hf:PATH, gemini:MODEL, or a .jsonl file "
            'of {"id", "description"}'
        )
    if not _is_file(describe):
        check_spec(describe)


def _is_file(describe: str) -> bool:
    return describe.endswith((".jsonl", ".json"))


# ---- what is asked


def _describe(
    work: Work, journal: Journal, bars: Bars
) -> tuple[dict[int, str | None], dict[int, str]]:
    """Position → description (None for pictures, which need none), and position → why not."""
    wanted, by = range(work.wanted), work.options.describe
    if work.split.kind != "clip" or by is None:
        return dict.fromkeys(wanted), {}
    if _is_file(by):
        given = _read_descriptions(pathlib.Path(by))
        found = {index: given.get(work.split.index.ids[index]) for index in wanted}
        missing = [index for index, text in found.items() if not text]
        why = f"no description in {by}"
        return {i: text for i, text in found.items() if text}, dict.fromkeys(missing, why)
    data, keys = work.split.examples, {index: work.description_key(index) for index in wanted}
    tasks = [
        Task(key, functools.partial(_description_request, data, index), ask.judge_description)
        for index, key in keys.items()
    ]
    ask_model(by, work.options, tasks, journal, bars.bar("descriptions", len(tasks)))
    return _values(journal, keys)


def _values(journal: Journal, keys: Mapping[int, str]) -> tuple[dict[int, Any], dict[int, str]]:
    """Position → accepted value, and position → why it was set aside."""
    entries = {index: journal.entry(key) for index, key in keys.items()}
    found = {index: entry.value for index, entry in entries.items() if entry.value is not None}
    return found, {index: entry.aside for index, entry in entries.items() if entry.aside}


def _read_descriptions(path: pathlib.Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file of descriptions")
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            read = foreign_json.parse(line)
            found[str(read["id"])] = str(read["description"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{path}, line {number}: wanted {{"id": …, "description": …}}'
            ) from None
    return found


def _description_request(data: Sequence[Example], index: int, rejections: Sequence[str]) -> Request:
    del rejections
    clip = read_frames(
        data[index]["media"], lambda count, fps: np.linspace(0, count - 1, FRAMES).astype(int)
    )
    return ask.description_request([jpeg(frame) for frame in clip.frames])


def _conversation_task(work: Work, index: int, description: str | None) -> Task:
    """One example; its media are read when its turn comes."""
    label, kind = work.word(index), work.split.kind

    def request(rejections: Sequence[str]) -> Request:
        return ask.conversation_request(
            jpeg(_picture(work.split.examples[index])),
            label=label,
            kind=kind,
            description=description,
            rejections=rejections,
        )

    judge = functools.partial(ask.judge_conversation, label=label, kind=kind)
    return Task(work.key(index), request, judge)


def _picture(example: Example) -> np.ndarray:
    if example["kind"] == "image":
        return read_image(example["media"])
    return read_frames(example["media"], lambda count, fps: np.array([count // 2])).frames[0]


# ---- what is written


def _templates(work: Work, console: Console) -> dict[int, list[dict[str, str]]]:
    with Bars(console) as bars:
        places = bars.track(range(work.wanted), description="templates")
        return {index: template(work.split.examples[index], work.split.space) for index in places}


def _write(
    work: Work,
    found: Mapping[int, Sequence[Mapping[str, str]]],
    aside: Mapping[int, str],
    by: str,
    console: Console,
) -> None:
    with Bars(console) as bars:
        store.write(
            work.split,
            conversations=found,
            made_by=by,
            aside=aside,
            media=work.options.media,
            progress=bars.bar("writing", len(work.split.examples)),
        )


def _settings(work: Work) -> dict[str, Any]:
    """What all conversations of a journal depend on."""
    words = [ask.SYSTEM, json.dumps(ask.SCHEMA), ask.DESCRIBE]
    return {
        "model": f"gemini:{work.options.model}",
        "describe": work.options.describe if work.split.kind == "clip" else None,
        "prompt": hashlib.sha256("\n".join(words).encode()).hexdigest()[:16],
    }
