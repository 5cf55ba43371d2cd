"""The `Result` of any other model, to which the same question, options and parser are put.

Answers are cached in a journal, so that a stopped run resumes, and a second one costs nothing. What
cannot be asked (a block of the service, a broken picture) counts as wrong and is reported as
unparsed, as everything does that names no class.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from emollama_jax.data.face_crop import crop_face
from emollama_jax.data.media import read_frames, read_image, segment_indices
from emollama_jax.data.priors import Prior
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds
from emollama_jax.evaluate.asked import Asked
from emollama_jax.evaluate.copies import find_copies
from emollama_jax.evaluate.groups import read_seen
from emollama_jax.evaluate.options import ZeroShot
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.evaluate.protocol import Prediction, subject_of
from emollama_jax.evaluate.publish import publish
from emollama_jax.evaluate.result import Answers, Result, Settings
from emollama_jax.evaluate.trace import data_hash, predictions_hash, versions
from emollama_jax.locks import hold
from emollama_jax.remote.clients import check_spec
from emollama_jax.remote.journal import Entry, Journal
from emollama_jax.remote.prices import price_of
from emollama_jax.remote.request import Reply, Request, jpeg, picture_tokens
from emollama_jax.remote.run import Task, Verdict, ask_model
from emollama_jax.status import Bars

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
    """A model's answers about a split."""

    predictions: list[Prediction]
    aside: dict[str, str]  # id → why it was not answered
    spent: float  # US dollars, what the journal has cost in all
    asked: Asked
    data: Data


def answer(options: ZeroShot, out: pathlib.Path, console: Console) -> Answered:
    """Asks about every example that has no answer yet.

    Args:
        options: options of the command.
        out: folder for the journal.
        console: terminal for progress.

    Raises:
        UserError: no such model or set, a service that refuses, or examples left without answer.
    """
    split = Split(options.dir, options.data, options.split)
    data, index = split.examples, split.index
    asked = Asked(split.space, options.order, native=options.order == "native")
    count = len(data) if options.limit is None else min(options.limit, len(data))
    priors = split.priors if options.crop == "face" else None
    tasks = [
        Task(
            f"{index.ids[i]} {index.digests[i]}",
            functools.partial(_request, options, data, priors, asked, i),
            _judge,
        )
        for i in range(count)
    ]
    price_of(options.model, options.limits)  # a budget needs one
    with (
        Journal(out / "journal.jsonl", _settings(options)) as journal,
        Bars(console) as bars,
    ):
        progress = bars.bar(f"{options.data}, {options.split}", count)
        outcome = ask_model(options.model, options, tasks, journal, progress)
        entries = [journal.entry(task.key) for task in tasks]
    if outcome.stopped.startswith("interrupted"):
        raise KeyboardInterrupt
    if outcome.open:
        why = outcome.stopped or "the service kept failing: re-run the command to resume"
        raise UserError(f"{outcome.open} of {count} examples have no answer: {why}")
    examples = [data[number] for number in range(count)]
    pairs = list(zip(examples, entries, strict=True))
    return Answered(
        predictions=[_prediction(options, asked, *pair) for pair in pairs],
        aside={example["id"]: entry.aside for example, entry in pairs if entry.aside},
        spent=outcome.spent,
        asked=asked,
        data=data,
    )


def _prediction(
    options: ZeroShot, asked: Asked, example: Mapping[str, Any], entry: Entry
) -> Prediction:
    text = entry.value or ""
    parsed = parse_answer(text, asked.space)
    return Prediction(
        id=example["id"],
        source=f"{options.data}:{options.split}",
        label=asked.space.classes[int(example["label"])],
        predicted=parsed.label,
        text=text,
        scores=None,
        parsed=parsed.how,
        subject=subject_of(example),
        options=None if asked.native else asked.options(example["id"]),
    )


def evaluate_remote(options: ZeroShot, home: pathlib.Path, console: Console) -> Result:
    """Evaluates a model on a split, or on every fold of a set, and publishes every result.

    Args:
        options: options of the command.
        home: folder of the journal and the results.
        console: terminal for progress.

    Returns:
        The result, or that of all folds.

    Raises:
        UserError: as `answer`, or no such fold.
    """
    with hold(home, instead="choose another --out"):
        return _evaluate_folds(options, home, console)


def _evaluate_folds(options: ZeroShot, home: pathlib.Path, console: Console) -> Result:
    names = folds.names(options.data, options.fold, without=options.without)
    results, left = [], options.limits.budget  # one budget for all folds
    for number, name in names:
        limits = dataclasses.replace(options.limits, budget=left)
        fold = options.fold if len(names) == 1 else None
        one = dataclasses.replace(options, data=name, fold=fold, limits=limits)
        out = home if len(names) == 1 else home / f"fold{number}"
        result, spent = _evaluate(one, out, console)
        publish(result, out)
        results.append(result)
        left = None if left is None else max(left - spent, 0.0)
    if len(results) == 1:
        return results[0]
    title = f"{options.model} on {folds.title_of(options.data)}, {options.split}"
    result = folds.join(results, options.data, what=title, command=_command(options))
    publish(result, home)
    return result


def _evaluate(options: ZeroShot, out: pathlib.Path, console: Console) -> tuple[Result, float]:
    """The result on one split, and the US dollars that its journal has cost."""
    where = (options.dir, options.data, options.split)
    copies = find_copies(*where, options.without)  # before anything is paid for
    answered = answer(options, out, console)
    data, space, predictions = answered.data, answered.asked.space, answered.predictions
    lines = [{"id": key, "why": why} for key, why in answered.aside.items()]
    (out / ASIDE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"{len(predictions):,} examples; {options.model} was asked, zero-shot."]
    if options.limit is not None:
        words.append("Only the first examples of the split: a trial, not a result.")
    if answered.aside:
        words.append(f"{len(answered.aside)} got no answer ({ASIDE} says why) and count as wrong.")
    settings = yaml.safe_dump(_settings(options), sort_keys=False, allow_unicode=True, width=1000)
    library = {"hf": "transformers", "openai": "httpx2", "gemini": "google-genai"}
    kind, _ = check_spec(options.model)
    result = Result(
        title=f"{options.model} on {options.data}, {options.split}",
        lede=" ".join(words),
        source=options.data,
        answers=[
            Answers.of("written answers", predictions, space, seen=read_seen(*where), copies=copies)
        ],
        predictions={"predictions.jsonl": predictions},
        settings=Settings(_command(options), settings, versions("emollama-jax", library[kind])),
        trace={
            "predictions.jsonl": predictions_hash(predictions),
            f"data, {options.data}, {options.split}": data_hash(data, space),
            "question": answered.asked.question(data[0]["id"], data[0]["kind"]),
        },
    )
    return result, answered.spent


def _command(options: ZeroShot) -> str:
    """The command that made a page, without what changes no answer."""
    given = []
    for name in (*ANSWERS_DEPEND_ON, "fold", "limit", "without"):
        value = getattr(options, name)
        if value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(["emollama", "zero-shot", *given])


def out_folder(options: ZeroShot) -> pathlib.Path:
    """Default output folder of a run."""
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


def _settings(options: ZeroShot) -> dict[str, Any]:
    """What answers depend on: a journal of other settings is not gone on with."""
    return {name: getattr(options, name) for name in ANSWERS_DEPEND_ON}
