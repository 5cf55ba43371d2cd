"""`emollama zero-shot`: the same question, options and parser put to any other model.

Answers are cached in a journal, so that a stopped run resumes, and a second one costs nothing. What
cannot be asked (a block of the service, a broken picture) counts as wrong and is reported as
unparsed, as everything does that names no class.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax.data.face_crop import crop_face
from emollama_jax.data.media import read_frames, read_image, segment_indices
from emollama_jax.data.priors import Prior
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds, groups, without
from emollama_jax.evaluate.asked import Asked
from emollama_jax.evaluate.options import ZeroShot
from emollama_jax.evaluate.parse.answers import parse_answer
from emollama_jax.evaluate.parse.unparsed import warning
from emollama_jax.evaluate.protocol import Prediction, write_predictions
from emollama_jax.evaluate.publish import Tested, make_tested, write_results
from emollama_jax.evaluate.trace import data_hash, file_hash
from emollama_jax.remote.clients import check_spec, open_client
from emollama_jax.remote.journal import Journal
from emollama_jax.remote.prices import price_of
from emollama_jax.remote.request import Reply, Request, jpeg, picture_tokens
from emollama_jax.remote.run import Outcome, Task, Verdict, ask_all

Data = Sequence[Mapping[str, Any]]

ANSWERS_DEPEND_ON = (
    "model",
    "data",
    "split",
    "frames",
    "crop",
    "side",
    "order",
    "max_tokens",
    "thinking_tokens",
)
ASIDE = "set_aside.jsonl"
MARGIN = 0.5  # of the face crop, FaceXFormer's


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the model made of a split."""

    predictions: list[Prediction]
    aside: dict[str, str]  # id → why it was not answered
    outcome: Outcome
    asked: Asked
    data: Data


def answer(options: ZeroShot, out: pathlib.Path, console: Console) -> Answered:
    """Asks about every example that has no answer yet.

    Args:
        options: of the command.
        out: gets the journal.
        console: where progress goes.

    Raises:
        UserError: no such model or set, a service that refuses, or examples left without answer.
    """
    check_spec(options.model)
    split = Split(options.dir, options.data, options.split)
    data, index = split.examples, split.index
    asked = Asked(split.space, options.order)
    count = len(data) if options.limit is None else min(options.limit, len(data))
    priors = None
    if options.crop == "face":
        priors = split.priors
    price = price_of(options.model, options.limits)
    tasks = [
        Task(
            f"{index.ids[i]} {index.digests[i]}",
            functools.partial(_request, options, data, priors, asked, i),
            _judge,
        )
        for i in range(count)
    ]
    with Journal(out / "journal.jsonl", _settings(options)) as journal, _bars(console) as bars:
        client = open_client(
            options.model,
            options.limits,
            thinking_tokens=options.thinking_tokens,
            base_url=options.base_url,
        )
        bar = bars.add_task(f"{options.data}, {options.split}", total=count)
        outcome = ask_all(
            tasks,
            client,
            journal,
            _one_at_a_time(options),
            price,
            lambda done: bars.update(bar, completed=done),
        )
        items = [journal.item(task.key) for task in tasks]
    if outcome.stopped.startswith("interrupted"):
        raise KeyboardInterrupt
    if outcome.open:
        why = outcome.stopped or "the service kept failing: re-run the command to resume"
        raise UserError(f"{outcome.open} of {count} examples have no answer: {why}")
    predictions, aside, space = [], {}, asked.space
    for number, item in enumerate(items):
        example = data[number]
        text = item.value or ""
        parsed = parse_answer(text, space)
        if item.aside:
            aside[example["id"]] = item.aside
        predictions.append(
            Prediction(
                id=example["id"],
                source=f"{options.data}:{options.split}",
                label=space.classes[int(example["label"])],
                predicted=parsed.label,
                text=text,
                scores=None,
                parsed=parsed.how,
                subject=str(int(example["subject"])) if int(example["subject"]) >= 0 else None,
                options=None if options.order == "native" else asked.options(example["id"]),
            )
        )
    return Answered(predictions, aside, outcome, asked, data)


def run(options: ZeroShot, console: Console) -> str:
    """Answers, numbers and a page, as `emollama eval` writes them for a model of this package.

    Args:
        options: of the command.
        console: where progress goes.

    Returns:
        What the command prints.

    Raises:
        UserError: as `answer`, or no such fold.
    """
    home, names = out_folder(options), folds.names(options.data, options.fold)
    if len(names) == 1:
        name = names[0][1]
        found, _ = _run(dataclasses.replace(options, data=name), home, console)
        e, second = found.evaluation, found.without
        line = f"WAR {e.war:.4f}  UAR {e.uar:.4f}  n {e.n}: {home / 'report.html'}"
        return "\n".join(
            filter(None, [warning([e]), line, "" if second is None else without.line(second)])
        )
    if options.without is not None:
        raise UserError(f"--without {options.without}: of one fold, not of all")
    tested, left = {}, options.limits.budget  # one budget for all folds
    for number, name in names:
        one = dataclasses.replace(
            options,
            data=name,
            fold=None,
            limits=dataclasses.replace(options.limits, budget=left),
        )
        found, spent = _run(one, home / f"fold{number}", console)
        tested[number] = found.evaluation
        left = None if left is None else max(left - spent, 0.0)
    mean = folds.write_joined(
        home,
        tested,
        source=options.data,
        split=options.split,
        model=options.model,
        seen=groups.joined(groups.read_seen(options.dir, name, options.split) for _, name in names),
        command=_command(options),
        versions=_versions(options),
    )
    return folds.line(mean, home)


def _run(options: ZeroShot, out: pathlib.Path, console: Console) -> tuple[Tested, float]:
    """One split, written down: its numbers, and the US dollars that its journal has cost."""
    left_out = None
    if options.without is not None:  # before anything is paid for
        twice = Split(options.dir, options.data, options.split).also_in(options.without)
        left_out = options.without, twice
    answered = answer(options, out, console)
    data, space = answered.data, answered.asked.space
    tested = make_tested(
        "written answers",
        answered.predictions,
        space,
        seen=groups.read_seen(options.dir, options.data, options.split),
        left_out=left_out,
    )
    file = out / "predictions.jsonl"
    write_predictions(file, answered.predictions)
    lines = [{"id": key, "why": why} for key, why in answered.aside.items()]
    (out / ASIDE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"{len(answered.predictions):,} examples; {options.model} was asked, zero-shot."]
    if options.limit is not None:
        words.append("The first of the split only: a trial, no result.")
    if answered.aside:
        words.append(f"{len(answered.aside)} got no answer ({ASIDE} says why) and count as wrong.")
    write_results(
        out,
        title=f"{options.model} on {options.data}, {options.split}",
        lede=" ".join(words),
        source=options.data,
        tested=[tested],
        command=_command(options),
        config=yaml.safe_dump(_settings(options), sort_keys=False, allow_unicode=True, width=1000),
        versions=_versions(options),
        trace={
            file.name: file_hash(file),
            f"data, {options.data}, {options.split}": data_hash(data, space),
            "question": answered.asked.question(data[0]["id"], data[0]["kind"]),
        },
    )
    return tested, answered.outcome.spent


def _command(options: ZeroShot) -> str:
    """The command that made a page, without what changes no answer."""
    given = []
    for name in (*ANSWERS_DEPEND_ON, "fold", "limit", "without"):
        value = getattr(options, name)
        if value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(["emollama", "zero-shot", *given])


def _versions(options: ZeroShot) -> dict[str, str]:
    kind, _ = check_spec(options.model)
    library = {"hf": "transformers", "openai": "httpx2", "gemini": "google-genai"}[kind]
    return {name: importlib.metadata.version(name) for name in ("emollama-jax", library)}


def out_folder(options: ZeroShot) -> pathlib.Path:
    """Where a run writes, unless it is told."""
    if options.out is not None:
        return options.out
    model = re.sub(r"[^\w.-]+", "_", options.model)
    which = "" if options.fold is None else f"/fold{options.fold}"
    return pathlib.Path("runs/zero-shot") / model / f"{options.data}{which}-{options.split}"


def _judge(reply: Reply) -> Verdict:
    """Every answer counts, also one that is cut off or empty: the parser has the last word."""
    return Verdict(reply.text)


def _request(
    options: ZeroShot,
    data: Data,
    priors: Sequence[Prior] | None,
    asked: Asked,
    index: int,
    rejections: Sequence[str],
) -> Request:
    del rejections  # blocks alone; there is nothing to be told
    example = data[index]
    question = asked.question(example["id"], example["kind"])
    pictures = _pictures(options, example, None if priors is None else priors[index])
    if example["kind"] == "clip":
        question = f"These are {len(pictures)} frames of a video, in order.\n{question}"
    return Request(
        parts=(*pictures, question),
        max_tokens=options.max_tokens,
        temperature=0.0,
        picture_tokens=picture_tokens(options.side),
    )


def _pictures(options: ZeroShot, example: Mapping[str, Any], prior: Any) -> list[bytes]:
    if example["kind"] == "image":
        pictures, indices = [read_image(example["media"])], np.zeros(1, int)
    else:

        def pick(count: int, fps: float | None) -> np.ndarray:
            del fps
            chosen = segment_indices(count, segments=options.frames, rng=None)
            return np.unique(chosen)  # a short clip is not made longer

        clip = read_frames(example["media"], pick)
        pictures, indices = clip.frames, clip.indices
    if prior is None:
        return [jpeg(picture, options.side) for picture in pictures]
    shown = [
        crop_face(picture, prior.boxes[i], MARGIN, options.side)[0] if prior.found[i] else picture
        for picture, i in zip(pictures, indices.tolist(), strict=True)
    ]
    return [jpeg(picture, options.side) for picture in shown]


def _one_at_a_time(options: ZeroShot) -> Any:
    """A model on this machine answers one question after the other, at its own pace."""
    if not options.model.startswith("hf:"):
        return options.limits
    return dataclasses.replace(options.limits, concurrency=1, per_minute=1e9)


def _settings(options: ZeroShot) -> dict[str, Any]:
    """What answers depend on: a journal of other settings is not gone on with."""
    return {name: getattr(options, name) for name in ANSWERS_DEPEND_ON}


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
