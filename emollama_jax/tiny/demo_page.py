"""The report page of `emollama demo`."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from emollama_jax.config import Config
from emollama_jax.data.sets import parse
from emollama_jax.evaluate.report import Curve, Exhibit, Numbers, Report, Table, percent
from emollama_jax.evaluate.result import Answers
from emollama_jax.evaluate.trace import config_text, versions
from emollama_jax.tiny import demo_photographs
from emollama_jax.tiny.demo_photographs import Photograph
from emollama_jax.train.run_log import METRICS, read_metrics

LEDE = (
    "Apart from the photographs, every face on this page was drawn by this program, from the "
    "muscles that move a face in each emotion. They show nobody, and stand in for pictures that "
    "may not be redistributed. The whole of EMO-LLaMA runs on them at a small size: it finds and "
    "reads faces, trains a tiny LLaMA, and answers questions about drawn people it has never "
    "seen. The numbers show that the parts work together; they say nothing about real faces."
)
PACKAGES = ("emollama-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
DIFFICULTY = {  # key of `report.json` → what it measures
    "pixel_regression_war": "Logistic regression on 48 × 48 grey pixels, images",
    "clip_war": "The model, whole clips",
    "clip_middle_frame_war": "The model, shown only a clip's middle frame",
    "blank_war": "The model, shown blank pictures",
    "blank_most_named": "Share of its most frequent answer to blank pictures",
    "majority_share": "Share of the largest class among the images",
}


def make_page(
    cfg: Config,
    out: pathlib.Path,
    summary: Mapping[str, Any],
    answers: Mapping[str, Answers],
    shown: Mapping[str, Sequence[Exhibit]],
    photographs: Sequence[Photograph],
) -> Report:
    """The page of a finished demo.

    Args:
        cfg: config of the run.
        out: the demo's folder.
        summary: content of `report.json`.
        answers: data set → written answers and their numbers.
        shown: data set → held-out examples.
        photographs: real ones, with what was answered.
    """
    tables = [
        Table(
            title="How hard the data are",
            note="Correct answers on held-out people, in percent.",
            head=("what", "%"),
            rows=[(text, percent(summary["difficulty"][k])) for k, text in DIFFICULTY.items()],
        ),
        *(item.groups.table(parse(name).config) for name, item in answers.items()),
    ]
    if "ablation" in summary:
        tables.append(_ablation(summary["ablation"]))
    return Report(
        title="EMO-LLaMA, small, on drawn faces",
        lede=LEDE,
        numbers=[
            Numbers(
                title=parse(name).config.capitalize(),
                source=f"{name}, test split. The question lists the seven emotions; the answer "
                "is the one that the written text names",
                evaluation=item.evaluation,
            )
            for name, item in answers.items()
        ],
        photographs=list(map(_exhibit, photographs)),
        photographs_note=demo_photographs.note(),
        pictures=shown["actionfaces/images"],
        clips=shown["actionfaces/clips"],
        curves=[_loss(out, identical=summary["resume_bit_identical"])],
        tables=tables,
        seconds={stage: spent for stage, spent in summary["seconds"].items() if stage != "all"},
        command=f"emollama demo --out {out}" + (" --ablation" if "ablation" in summary else ""),
        config=config_text(cfg),
        versions={"python": sys.version.split()[0], **versions(*PACKAGES)},
    )


def _ablation(variants: Mapping[str, Any]) -> Table:
    def cell(war: Mapping[str, float]) -> str:
        return f"{percent(war['mean'])} ± {percent(war['std'])}"

    return Table(
        title="Ablation",
        note="WAR in percent, mean ± standard deviation over three seeds.",
        head=("variant", "images", "clips"),
        rows=[(name, cell(wars["image"]), cell(wars["clip"])) for name, wars in variants.items()],
    )


def _exhibit(photo: Photograph) -> Exhibit:
    return Exhibit(
        id=photo.name,
        frames=[photo.picture],
        landmarks=[None],
        label=None,
        predicted=photo.emotion or ("no face" if not photo.boxes else None),
        question=photo.question,
        text=photo.answer,
        boxes=photo.boxes,
    )


def _loss(out: pathlib.Path, *, identical: bool) -> Curve:
    rows = read_metrics(out / "run" / METRICS)
    same = "identical to" if identical else "NOT identical to"
    return Curve(
        title="Loss",
        label="loss, nats per token",
        note=f"Stopped by SIGTERM and resumed; the first steps are bit-for-bit {same} those of "
        "an uninterrupted run.",
        steps=[int(row["step"]) for row in rows],
        values=[float(row["loss"]) for row in rows],
    )
