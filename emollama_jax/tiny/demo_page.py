"""The report page of `emollama demo`."""

import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from emollama_jax import config
from emollama_jax.config import Config
from emollama_jax.data.sets import parse
from emollama_jax.evaluate import groups, report
from emollama_jax.tiny import demo_photographs
from emollama_jax.tiny.demo_photographs import Photograph
from emollama_jax.train.run_log import METRICS, read_metrics

LEDE = (
    "But for the photographs, the faces on this page are drawings. This program drew them from the "
    "muscles that move a face in an emotion; they show no real people, and stand in for pictures "
    "that may not be passed on. On them the whole of EMO-LLaMA runs, small: it finds and reads the "
    "faces, trains a tiny LLaMA, and answers about drawn people that it has never seen. The "
    "numbers show that all of it works together, and say nothing about real faces."
)


def make_page(
    cfg: Config,
    out: pathlib.Path,
    summary: Mapping[str, Any],
    results: Mapping[str, Any],
    items: Mapping[str, list[report.Item]],
    photographs: Sequence[Photograph],
    by_group: Mapping[str, groups.ByGroup],
) -> report.Report:
    """The page of a finished demo.

    Args:
        cfg: of the run.
        out: the demo's folder.
        summary: what `report.json` holds.
        results: data set → way of answering → (predictions, evaluation).
        items: data set → held-out examples to show.
        photographs: real ones, with what was answered.
        by_group: data set → errors by group.
    """
    rows = read_metrics(out / "run" / METRICS)
    shares = summary["difficulty"]
    explained = {
        "pixel_regression_war": "Logistic regression on 48 × 48 grey pixels, images",
        "clip_war": "The model, whole clips",
        "clip_middle_frame_war": "The model, given a clip's middle frame alone",
        "blank_war": "The model, given blank pictures",
        "blank_most_named": "Share of the class that it names most often then",
        "majority_share": "Share of the largest class among the images",
    }
    tables = [
        report.Table(
            title="How hard the data are",
            note="Shares of right answers on the held-out people, in percent.",
            head=("what", "%"),
            rows=[(text, report.percent(shares[key])) for key, text in explained.items()],
        ),
        *(groups.table(parse(name).config, found) for name, found in by_group.items()),
    ]
    if "ablation" in summary:
        tables.append(
            report.Table(
                title="Ablation",
                note="WAR in percent, mean ± standard deviation over three seeds.",
                head=("variant", "images", "clips"),
                rows=[
                    (
                        variant,
                        *(
                            f"{report.percent(v[k]['mean'])} ± {report.percent(v[k]['std'])}"
                            for k in ("image", "clip")
                        ),
                    )
                    for variant, v in summary["ablation"].items()
                ],
            )
        )
    same = "identical to" if summary["resume_bit_identical"] else "NOT identical to"
    return report.Report(
        title="EMO-LLaMA, small, on drawn faces",
        lede=LEDE,
        results=[
            report.Result(
                title=parse(name).config.capitalize(),
                source=f"{name}, test split. The question lists the seven emotions; the one that "
                "the written answer names counts",
                evaluation=result["generate"][1],
            )
            for name, result in results.items()
        ],
        photographs=[
            report.Item(
                id=photo.name,
                frames=[photo.picture],
                landmarks=[None],
                label=None,
                predicted=photo.emotion or ("no face" if not photo.boxes else None),
                question=photo.question,
                text=photo.answer,
                boxes=photo.boxes,
            )
            for photo in photographs
        ],
        photographs_note=demo_photographs.note(),
        pictures=items["actionfaces/images"],
        clips=items["actionfaces/clips"],
        curves=[
            report.Curve(
                title="Loss",
                label="loss, nats a token",
                note=f"Stopped by SIGTERM and resumed; the first steps are bit for bit {same} an "
                "uninterrupted run's.",
                steps=[int(row["step"]) for row in rows],
                values=[float(row["loss"]) for row in rows],
            )
        ],
        tables=tables,
        seconds={stage: spent for stage, spent in summary["seconds"].items() if stage != "all"},
        command=f"emollama demo --out {out}" + (" --ablation" if "ablation" in summary else ""),
        config=yaml.safe_dump(json.loads(json.dumps(config.to_dict(cfg))), sort_keys=False),
        versions={
            "python": sys.version.split()[0],
            **{
                name: importlib.metadata.version(name)
                for name in ("emollama-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
            },
        },
    )
