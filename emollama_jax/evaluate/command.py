"""`emollama eval`: predictions, numbers and a page for one split."""

import importlib.metadata
import json
import pathlib

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax import config as configs
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.emotions import label_space
from emollama_jax.data.pipeline import open_source
from emollama_jax.evaluate import report
from emollama_jax.evaluate.protocol import Evaluation, evaluate, write_predictions
from emollama_jax.evaluate.run import Answering, predict
from emollama_jax.models.emollama import EmoLlama


def evaluate_run(
    cfg: Config,
    model: EmoLlama,
    name: str,
    split: str,
    *,
    answering: Answering,
    batch: int,
    out: pathlib.Path,
    console: Console,
) -> Evaluation:
    """Evaluates a model on a prepared split and writes down everything.

    Args:
        cfg: of the model's run.
        model: trained.
        name: data set and builder config, e.g. "actionfaces/clips".
        split: of it.
        answering: how the model answers.
        batch: examples at a time.
        out: gets `predictions.jsonl`, `evaluation.json` and `report.html`.
        console: where progress goes.
    """
    data = open_source(cfg.data.dir, name, split)
    kind = data[0]["kind"]
    source = SourceConfig(name=name, split=split, kind=kind, weight=1.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(f"{name}, {split}", total=len(data))
        predictions = predict(
            cfg,
            model,
            source,
            answerings=(answering,),
            batch=batch,
            progress=lambda done: bars.update(task, completed=done),
        )[answering]
    evaluation = evaluate(predictions, label_space(name))
    write_predictions(out / "predictions.jsonl", predictions)
    (out / "evaluation.json").write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n")
    versions = ("emollama-jax", "jax", "flax")
    page = report.Report(
        title=f"{name}, {split}",
        lede=f"{evaluation.n} examples; the model answers by "
        f"{({'generate': 'writing', 'score': 'scoring the label words'})[answering]}.",
        results=[report.Result(title=kind.capitalize() + "s", source=name, evaluation=evaluation)],
        command=f"emollama eval RUN --source {name} --split {split} --answering {answering}",
        config=yaml.safe_dump(json.loads(json.dumps(configs.to_dict(cfg))), sort_keys=False),
        versions={package: importlib.metadata.version(package) for package in versions},
    )
    report.write_report(out / "report.html", page)
    return evaluation
