"""`emollama demo`: the whole of EMO-LLaMA, small, on the embedded data set.

prepare → face priors → train, stopped by a signal and resumed → evaluate → ask. Everything runs
through the same functions as the single commands; a demo that was stopped resumes.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from emollama_jax import compile_cache, config
from emollama_jax.base import load_face
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Shown
from emollama_jax.data.face_crop import crop_box, from_crop
from emollama_jax.data.items import standard_question
from emollama_jax.data.media import read_image, read_video
from emollama_jax.data.sets import Preparation, label_space, parse
from emollama_jax.data.split import Split
from emollama_jax.evaluate import groups, report
from emollama_jax.evaluate.difficulty import grey, pixel_regression
from emollama_jax.evaluate.of_run import Answering, describe, predict
from emollama_jax.evaluate.parse.answers import parse_answer
from emollama_jax.evaluate.protocol import Evaluation, Prediction, evaluate, write_predictions
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.prepare import prepare_source
from emollama_jax.serve.answer import Answerer
from emollama_jax.tiny import demo_photographs
from emollama_jax.tiny.demo_page import make_page
from emollama_jax.train.loop import FitResult, fit
from emollama_jax.train.run_log import METRICS, read_metrics

IMAGES, CLIPS = "actionfaces/images", "actionfaces/clips"
VARIANTS = {  # of the ablation: name → overrides
    "whole": (),
    "without FIM": ("model.fim.branches=none",),
    "without the global branch": ("model.fim.branches=local",),
    "without the local branch": ("model.fim.branches=global",),
    "without AGR": ("data.agr=false",),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: Mapping[str, int]  # split → examples
    clips: Mapping[str, int]
    steps: int
    interrupt: int  # the signal comes after this step
    compare: int  # steps whose losses must equal the uninterrupted run's
    eval_images: int  # at a time
    eval_clips: int


FULL = Size(
    images={"train": 1500, "validation": 150, "test": 1000},
    clips={"train": 400, "validation": 20, "test": 250},
    steps=50,
    interrupt=10,
    compare=20,
    eval_images=100,
    eval_clips=25,
)
QUICK = Size(
    images={"train": 200, "validation": 50, "test": 60},
    clips={"train": 40, "validation": 10, "test": 20},
    steps=12,
    interrupt=4,
    compare=8,
    eval_images=30,
    eval_clips=10,
)


class Stopwatch:
    """Seconds and compilations of each stage, in order."""

    def __init__(self, console: Console):
        self.seconds: dict[str, float] = {}
        self.compilations: dict[str, dict[str, float]] = {}
        self._console = console

    @contextmanager
    def stage(self, name: str):
        self._console.rule(f"[bold]{name}")
        start, before = time.monotonic(), compile_cache.counted()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)
        done = compile_cache.counted().since(before)
        self.compilations[name] = {
            "compiled": done.compiled,
            "seconds": round(done.seconds, 1),
            "found": done.found,
        }


def run(out: pathlib.Path, *, quick: bool, ablation: bool, console: Console) -> dict[str, Any]:
    """Runs the demo.

    Args:
        out: gets the data, the run, predictions, `report.json` and `report.html`.
        quick: a shortened demo that shows that everything runs; its numbers mean nothing.
        ablation: trains four more variants and all five over three seeds.
        console: where progress goes.

    Returns:
        What `report.json` holds.
    """
    size = QUICK if quick else FULL
    demo_photographs.check()
    out.mkdir(parents=True, exist_ok=True)
    compile_cache.start()
    overrides = (
        f"data.dir={json.dumps(str(out / 'data'))}",
        f"train.steps={size.steps}",
        f"train.save_every={max(size.steps // 3, 1)}",
    )
    cfg = config.load("tiny", overrides)
    watch = Stopwatch(console)
    with watch.stage("prepare"):
        face = load_face(cfg)
        for name, sizes in ((IMAGES, size.images), (CLIPS, size.clips)):
            prepare_source(
                cfg,
                face,
                name,
                Preparation(sizes=sizes, processes=os.cpu_count() or 1),
                splits=("train", "test"),
                console=console,
            )
    with watch.stage("train"):
        identical = _train_with_interruption(cfg, out, size, console)
    _, model = load_for_inference(out / "run")
    with watch.stage("evaluate"):
        results = {
            name: _evaluate(cfg, model, name, out, size, console) for name in (IMAGES, CLIPS)
        }
    with watch.stage("difficulty"):
        difficulty = _difficulty(cfg, model, results, size, console)
    with watch.stage("ask"):
        answerer = Answerer(cfg, model)
        _ask(answerer, out, console)
        items = {
            name: _items(cfg, model, size, *results[name]["generate"]) for name in (IMAGES, CLIPS)
        }
    with watch.stage("photographs"):
        photographs = demo_photographs.ask(console)
    by_group = {
        name: groups.by_group(
            results[name]["generate"][0],
            groups.read_seen(cfg.data.dir, name, "test", race_labels=cfg.model.face.race_labels),
            label_space(name),
        )
        for name in (IMAGES, CLIPS)
    }
    summary: dict[str, Any] = {
        "image": _summary(results[IMAGES]["generate"][1]),
        "clip": _summary(results[CLIPS]["generate"][1]),
        "groups": {
            key: groups.tree(by_group[name]) for key, name in (("image", IMAGES), ("clip", CLIPS))
        },
        "photographs": {
            photo.name: {"faces": photo.boxes, "answer": photo.answer, "emotion": photo.emotion}
            for photo in photographs
        },
        "difficulty": difficulty,
        "resume_bit_identical": identical,
        "label_scoring": {
            key: _summary(results[name]["score"][1])
            for key, name in (("image", IMAGES), ("clip", CLIPS))
        },
    }
    if ablation:
        with watch.stage("ablation"):
            summary["ablation"] = _ablation(overrides, out, size, console)
    summary["seconds"] = watch.seconds | {"all": round(sum(watch.seconds.values()), 1)}
    # Compiled by this process, how long that took, and programs found from earlier ones.
    summary["compilations"] = watch.compilations
    _write(out / "report.json", summary)
    page = make_page(cfg, out, summary, results, items, photographs, by_group)
    report.write_report(out / "report.html", page)
    return summary


def _train_with_interruption(cfg: Config, out: pathlib.Path, size: Size, console: Console) -> bool:
    """Trains, stopped once by SIGTERM and resumed; whether the loss curve shows no trace of it."""
    console.print(f"the first {size.compare} steps without a stop, to compare with")
    _whole(fit(cfg, out / "reference", until=size.compare, console=console))
    run = out / "run"
    if not (run / METRICS).exists():
        console.print(f"the run, with a SIGTERM after step {size.interrupt}")
        with _signal_after(run / METRICS, size.interrupt):
            result = fit(cfg, run, console=console)
        if result.stopped_by is not signal.SIGTERM:
            _whole(result)
        console.print("the same again: it resumes")
    _whole(fit(cfg, run, console=console))
    curves = [read_metrics(folder / METRICS) for folder in (out / "reference", run)]
    return curves[0] == curves[1][: size.compare]


def _whole(result: FitResult) -> None:
    """Ends the demo where the user stopped it; the next one resumes."""
    if result.stopped_by is not None:
        sys.exit(result.exit_status)


@contextmanager
def _signal_after(metrics: pathlib.Path, step: int):
    """Sends this process a real SIGTERM once that many steps are in the log."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _source(name: str, split: str = "test") -> SourceConfig:
    kind = "image" if name == IMAGES else "clip"
    return SourceConfig(name=name, split=split, kind=kind, weight=1.0)


def _predict(
    cfg: Config,
    model: EmoLlama,
    name: str,
    size: Size,
    *,
    answerings: Sequence[Answering],
    shown: Shown = "all",
) -> dict[Answering, list[Prediction]]:
    batch = size.eval_images if name == IMAGES else size.eval_clips
    return predict(cfg, model, _source(name), answerings=answerings, batch=batch, shown=shown)


def _evaluate(
    cfg: Config,
    model: EmoLlama,
    name: str,
    out: pathlib.Path,
    size: Size,
    console: Console,
) -> dict[str, tuple[list[Prediction], Evaluation]]:
    results = {}
    kind = parse(name).config
    found = _predict(cfg, model, name, size, answerings=("generate", "score"))
    for answering, predictions in found.items():
        write_predictions(out / "predictions" / f"{kind}-{answering}.jsonl", predictions)
        evaluation = evaluate(predictions, label_space(name))
        results[answering] = (predictions, evaluation)
        numbers = f"WAR {evaluation.war:.3f}  UAR {evaluation.uar:.3f}  n {evaluation.n}"
        console.print(f"{name}, {answering}: {numbers}")
    return results


def _difficulty(
    cfg: Config, model: EmoLlama, results: Mapping[str, Any], size: Size, console: Console
) -> dict[str, float]:
    """What shows that the data are no toy; shares of right answers, 0 … 1."""

    def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
        data = Split(cfg.data.dir, IMAGES, split).examples
        pictures = [read_image(data[i]["media"]) for i in range(len(data))]
        return grey(pictures), np.array([int(data[i]["label"]) for i in range(len(data))])

    def war(name: str, shown: Shown) -> tuple[float, list[Prediction]]:
        found = _predict(cfg, model, name, size, answerings=("generate",), shown=shown)["generate"]
        return evaluate(found, label_space(name)).war, found

    classes = label_space(IMAGES).classes
    regression = pixel_regression(
        pixels("train"), pixels("validation"), pixels("test"), classes=len(classes)
    )
    middle, _ = war(CLIPS, "middle")
    blank, answers = war(IMAGES, "blank")
    labels = [item.label for item in results[IMAGES]["generate"][0]]
    named = [item.predicted for item in answers]
    difficulty = {
        "pixel_regression_war": regression,
        "clip_war": results[CLIPS]["generate"][1].war,
        "clip_middle_frame_war": middle,
        "blank_war": blank,
        "blank_most_named": max(map(named.count, set(named))) / len(named),
        "majority_share": max(map(labels.count, classes)) / len(labels),
    }
    for key, value in difficulty.items():
        console.print(f"{key}: {value:.3f}")
    return difficulty


def _ask(answerer: Answerer, out: pathlib.Path, console: Console) -> None:
    """Answers a question about a held-out picture and clip, from files, as `emollama ask` does."""
    cfg = answerer.cfg
    for name, ending in ((IMAGES, "jpg"), (CLIPS, "mp4")):
        example = Split(cfg.data.dir, name, "test").examples[0]
        path = out / f"held_out.{ending}"
        path.write_bytes(example["media"])
        media = answerer.look(path)
        question = standard_question(media.kind)
        console.print(f"{path} ({label_space(name).classes[int(example['label'])]}): {question}")
        for piece in answerer.ask(media, question):
            console.print(piece, end="", highlight=False)
        console.print()


def _items(
    cfg: Config,
    model: EmoLlama,
    size: Size,
    predictions: Sequence[Prediction],
    evaluation: Evaluation,
) -> list[report.Item]:
    """Held-out examples for the page, the classes taken in turn."""
    name = predictions[0].source.partition(":")[0]
    of_class = [
        [i for i, item in enumerate(predictions) if item.label == label]
        for label in evaluation.classes
    ]
    wanted = 28 if name == IMAGES else 8
    turns = itertools.chain.from_iterable(itertools.zip_longest(*of_class))
    chosen = [i for i in turns if i is not None][:wanted]
    question = standard_question("image" if name == IMAGES else "clip")
    batch = size.eval_images if name == IMAGES else size.eval_clips
    answers = describe(cfg, model, _source(name), chosen, question, batch=batch)
    split = Split(cfg.data.dir, name, "test")
    items = []
    for i, text in zip(chosen, answers, strict=True):
        media, prior = split.examples[i]["media"], split.priors[i]
        frames = [read_image(media)] if name == IMAGES else list(read_video(media))
        shown = np.unique(np.linspace(0, len(frames) - 1, 8).astype(int)).tolist()
        height, width = frames[0].shape[:2]
        landmarks = [
            from_crop(
                prior.landmarks[f],
                crop_box(prior.boxes[f], cfg.data.face_margin, width=width, height=height),
            )
            if prior.found[f]
            else None
            for f in shown
        ]
        items.append(
            report.Item(
                id=predictions[i].id,
                frames=[frames[f] for f in shown],
                landmarks=landmarks,
                label=predictions[i].label,
                # What this very answer names: the numbers above are of another question.
                predicted=parse_answer(text, label_space(name)).label,
                question=question,
                text=text,
            )
        )
    return items


def _ablation(
    overrides: Sequence[str], out: pathlib.Path, size: Size, console: Console
) -> dict[str, Any]:
    """Mean and standard deviation over three seeds of every variant."""
    table = {}
    for variant, extra in VARIANTS.items():
        wars: dict[str, list[float]] = {IMAGES: [], CLIPS: []}
        for seed in range(3):
            cfg = config.load("tiny", (*overrides, *_patterns(extra), f"train.seed={seed}"))
            # The demo's own run is the whole model with the first seed.
            own = not extra and seed == 0
            folder = out / ("run" if own else f"ablation/{variant.replace(' ', '_')}/{seed}")
            _whole(fit(cfg, folder, console=console))
            _, model = load_for_inference(folder)
            for name, values in wars.items():
                found = _predict(cfg, model, name, size, answerings=("generate",))
                values.append(evaluate(found["generate"], label_space(name)).war)
        table[variant] = {
            key: {"mean": float(np.mean(wars[name])), "std": float(np.std(wars[name], ddof=1))}
            | {"seeds": wars[name]}
            for key, name in (("image", IMAGES), ("clip", CLIPS))
        }
        means = (f"{k}s {v['mean']:.3f} ± {v['std']:.3f}" for k, v in table[variant].items())
        console.print(f"{variant}: WAR of {', '.join(means)} (three seeds)")
    return table


def _patterns(extra: Sequence[str]) -> tuple[str, ...]:
    """A model without FIM has no parameters for FIM's pattern to match."""
    if "model.fim.branches=none" not in extra:
        return tuple(extra)
    kept = [p for p in config.load("tiny").train.trainable if not p.startswith("fim/")]
    return (*extra, f"train.trainable={json.dumps(kept)}")


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    return {"WAR": evaluation.war, "UAR": evaluation.uar, "n": evaluation.n}


def _write(path: pathlib.Path, tree: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(tree, indent=1) + "\n")
    part.replace(path)
