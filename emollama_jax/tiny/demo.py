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
from typing import Any, Literal

import numpy as np
from rich.console import Console

from emollama_jax import compile_cache, config, runs
from emollama_jax.base import load_face
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Shown
from emollama_jax.data.face_crop import crop_box, from_crop
from emollama_jax.data.items import standard_question
from emollama_jax.data.media import read_image, read_video
from emollama_jax.data.sets import Preparation, label_space, parse
from emollama_jax.data.split import Split
from emollama_jax.evaluate import report
from emollama_jax.evaluate.groups import read_seen
from emollama_jax.evaluate.options import Answering, Asking
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.evaluate.protocol import Prediction, evaluate, write_predictions
from emollama_jax.evaluate.result import Answers
from emollama_jax.evaluate.speaker import describe, predict
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.paths import as_path, write_whole
from emollama_jax.prepare import prepare_source
from emollama_jax.runs import PACKAGE
from emollama_jax.serve.answer import Answerer
from emollama_jax.tiny import demo_photographs
from emollama_jax.tiny.demo_page import make_page
from emollama_jax.tiny.difficulty import grey, pixel_regression
from emollama_jax.train.loop import FitResult, fit
from emollama_jax.train.run_log import METRICS, read_metrics

IMAGES, CLIPS = "actionfaces/images", "actionfaces/clips"
SETS = {"image": IMAGES, "clip": CLIPS}
VARIANTS = {  # of the ablation: name → overrides
    "whole": (),
    "without FIM": ("model.fim.branches=none",),
    "without the global branch": ("model.fim.branches=local",),
    "without the local branch": ("model.fim.branches=global",),
    "without AGR": ("data.agr=false",),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Amounts of data and training."""

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
        out: folder for the data, the run, predictions, `report.json` and `report.html`.
        quick: a shortened demo that shows that everything runs; its numbers mean nothing.
        ablation: trains four more variants and all five over three seeds.
        console: terminal for progress.

    Returns:
        What `report.json` holds.
    """
    size = QUICK if quick else FULL
    runs.find(PACKAGE)  # it answers about the photographs
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
        _prepare(cfg, size, console)
    with watch.stage("train"):
        identical = _train_with_interruption(cfg, out, size, console)
    _, model = load_for_inference(out / "run")
    with watch.stage("evaluate"):
        results = {name: _evaluate(cfg, model, name, out, size, console) for name in SETS.values()}
    with watch.stage("difficulty"):
        difficulty = _difficulty(cfg, model, results, size, console)
    with watch.stage("ask"):
        _ask(Answerer(cfg, model), out, console)
        shown = {
            name: _exhibits(cfg, model, size, answers["generate"])
            for name, answers in results.items()
        }
    with watch.stage("photographs"):
        photographs = demo_photographs.ask(console)
    summary: dict[str, Any] = {
        **{kind: _summary(results[name]["generate"]) for kind, name in SETS.items()},
        "groups": {kind: results[name]["generate"].groups.to_dict() for kind, name in SETS.items()},
        "photographs": {photo.name: photo.summary() for photo in photographs},
        "difficulty": difficulty,
        "resume_bit_identical": identical,
        "label_scoring": {kind: _summary(results[name]["score"]) for kind, name in SETS.items()},
    }
    if ablation:
        with watch.stage("ablation"):
            summary["ablation"] = _ablation(overrides, out, size, console)
    summary["seconds"] = watch.seconds | {"all": round(sum(watch.seconds.values()), 1)}
    # Compiled by this process, how long that took, and programs found from earlier ones.
    summary["compilations"] = watch.compilations
    write_whole(as_path(out / "report.json"), json.dumps(summary, indent=1) + "\n")
    headlines = {name: answers["generate"] for name, answers in results.items()}
    page = make_page(cfg, out, summary, headlines, shown, photographs)
    report.write_report(out / "report.html", page)
    return summary


def _prepare(cfg: Config, size: Size, console: Console) -> None:
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


def _train_with_interruption(cfg: Config, out: pathlib.Path, size: Size, console: Console) -> bool:
    """Trains, stopped once by SIGTERM and resumed; whether the loss curve shows no trace of it."""
    console.print(f"training the first {size.compare} steps without interruption, for comparison")
    _whole(fit(cfg, out / "reference", until=size.compare, console=console))
    run = out / "run"
    if not (run / METRICS).exists():
        console.print(f"training the run, with a SIGTERM after step {size.interrupt}")
        with _signal_after(run / METRICS, size.interrupt):
            result = fit(cfg, run, console=console)
        if result.stopped_by is not signal.SIGTERM:
            _whole(result)
        console.print("re-running the command: it resumes")
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


def _asking(name: str, size: Size, answering: Literal["both", "generate"]) -> Asking:
    batch = size.eval_images if name == IMAGES else size.eval_clips
    return Asking(answering=answering, batch=batch)


def _evaluate(
    cfg: Config, model: EmoLlama, name: str, out: pathlib.Path, size: Size, console: Console
) -> dict[Answering, Answers]:
    """What the model answers about a set, in both ways."""
    found = {}
    seen = read_seen(cfg.data.dir, name, "test", race_labels=cfg.model.face.race_labels)
    predicted = predict(cfg, model, _source(name), _asking(name, size, "both"))
    for way, items in predicted.items():
        write_predictions(out / "predictions" / f"{parse(name).config}-{way}.jsonl", items)
        found[way] = Answers.of(way, items, label_space(name), seen=seen)
        e = found[way].evaluation
        console.print(f"{name}, {way}: WAR {e.war:.3f}  UAR {e.uar:.3f}  n {e.n}")
    return found


def _written(
    cfg: Config, model: EmoLlama, name: str, size: Size, shown: Shown = "all"
) -> tuple[float, list[Prediction]]:
    """WAR of the written answers, and they themselves."""
    asking = _asking(name, size, "generate")
    found = predict(cfg, model, _source(name), asking, shown=shown)["generate"]
    return evaluate(found, label_space(name)).war, found


def _difficulty(
    cfg: Config, model: EmoLlama, results: Mapping[str, Any], size: Size, console: Console
) -> dict[str, float]:
    """What shows that the data are no toy; shares of right answers, 0 … 1."""

    def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
        data = Split(cfg.data.dir, IMAGES, split).examples
        pictures = [read_image(data[i]["media"]) for i in range(len(data))]
        return grey(pictures), np.array([int(data[i]["label"]) for i in range(len(data))])

    classes = label_space(IMAGES).classes
    regression = pixel_regression(
        pixels("train"), pixels("validation"), pixels("test"), classes=len(classes)
    )
    middle, _ = _written(cfg, model, CLIPS, size, "middle")
    blank, answers = _written(cfg, model, IMAGES, size, "blank")
    labels = [item.label for item in results[IMAGES]["generate"].predictions]
    named = [item.predicted for item in answers]
    difficulty = {
        "pixel_regression_war": regression,
        "clip_war": results[CLIPS]["generate"].evaluation.war,
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


def _exhibits(cfg: Config, model: EmoLlama, size: Size, answers: Answers) -> list[report.Exhibit]:
    """Held-out examples for the page, the classes taken in turn."""
    predictions = answers.predictions
    name = predictions[0].source.partition(":")[0]
    of_class = [
        [i for i, item in enumerate(predictions) if item.label == label]
        for label in answers.evaluation.classes
    ]
    wanted = 28 if name == IMAGES else 8
    turns = itertools.chain.from_iterable(itertools.zip_longest(*of_class))
    chosen = [i for i in turns if i is not None][:wanted]
    source, asking = _source(name), _asking(name, size, "generate")
    question = standard_question(source.kind)
    texts = describe(cfg, model, source, chosen, question, batch=asking.batch)
    split = Split(cfg.data.dir, name, "test")
    exhibits = []
    for i, text in zip(chosen, texts, strict=True):
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
        exhibits.append(
            report.Exhibit(
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
    return exhibits


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
                values.append(_written(cfg, model, name, size)[0])
        table[variant] = {
            key: {"mean": float(np.mean(wars[name])), "std": float(np.std(wars[name], ddof=1))}
            | {"seeds": wars[name]}
            for key, name in SETS.items()
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


def _summary(answers: Answers) -> dict[str, Any]:
    e = answers.evaluation
    return {"WAR": e.war, "UAR": e.uar, "n": e.n}
