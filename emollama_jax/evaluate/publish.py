"""Writes what an evaluation leaves behind: predictions, `evaluation.json`, `table.tex`,
`report.html`.

All of them say the same numbers, and each says where they come from.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.evaluate import latex, metrics, report
from emollama_jax.evaluate.asked import position_bias
from emollama_jax.evaluate.metrics import plain
from emollama_jax.evaluate.protocol import Prediction, write_predictions
from emollama_jax.evaluate.published import Published, published
from emollama_jax.evaluate.report import Table, percent
from emollama_jax.evaluate.result import Answers, Result
from emollama_jax.paths import as_path, write_whole

BINS = 10  # of a calibration curve
WORST = 12  # mistakes that a page shows
_EACH = 3  # of one confusion, so that the largest class does not fill the page


def publish(result: Result, out: epath.PathLike) -> None:
    """Writes a result into a folder: its predictions, the JSON, the LaTeX table and the page."""
    out = as_path(out)
    for name, records in result.predictions.items():
        write_predictions(out / name, records)
    others = published(result.source)
    tree = _tree(result) | {
        "source": result.source,
        "command": result.settings.command,
        "trace": dict(result.trace),
        "versions": dict(result.settings.versions),
        "published": [dataclasses.asdict(other) for other in others],
    }
    text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / "evaluation.json", text + "\n")
    rows = [(item.title, item.evaluation) for item in result.answers]
    table = latex.table(result.title, rows, others=others, folds=result.mean)
    write_whole(out / "table.tex", table)
    report.write_report(out / "report.html", _page(result, others))


def _page(result: Result, others: Sequence[Published]) -> report.Report:
    tables = [
        _comparison(result, others),
        *(
            item.without.table(item.title, item.evaluation)
            for item in result.answers
            if item.without
        ),
        *_by_group(result),
        *map(_positions, result.answers),
        *result.notes,
    ]
    if not result.mistakes:
        tables.append(_mistakes(result.headline))
    return report.Report(
        title=result.title,
        lede=result.lede,
        numbers=[
            report.Numbers(title=item.title, source=result.source, evaluation=item.evaluation)
            for item in result.answers
        ],
        mistakes=result.mistakes,
        calibrations=[
            (item.title, found)
            for item in result.answers
            if (found := calibration(item.predictions))
        ],
        tables=[table for table in tables if table is not None and table.rows],
        command=result.settings.command,
        config=result.settings.config,
        versions=result.settings.versions,
        trace=result.trace,
    )


def calibration(predictions: Sequence[Prediction]) -> metrics.Calibration | None:
    """Calibration of label scoring; None where text was generated.

    An answer is right if it is the true class, also where the question listed other words.
    """
    scored = [item for item in predictions if item.scores]
    if not scored:
        return None
    names = list(scored[0].scores or {})
    scores = np.array([[(item.scores or {})[name] for name in names] for item in scored])
    labels = [
        best if item.predicted == item.label else -1
        for item, best in zip(scored, scores.argmax(1).tolist(), strict=True)
    ]
    return metrics.calibration(labels, scores, bins=BINS)


def worst(predictions: Sequence[Prediction], count: int = WORST) -> list[int]:
    """Numbers of the worst mistakes: surest first, or of the most frequent confusions."""
    wrong = [n for n, item in enumerate(predictions) if item.predicted != item.label]
    pairs = Counter((predictions[n].label, predictions[n].predicted) for n in wrong)

    def rank(n: int) -> tuple[float, int, int]:
        item = predictions[n]
        return (-_sureness(item.scores), -pairs[item.label, item.predicted], n)

    chosen, taken = [], Counter()
    for n in sorted(wrong, key=rank):
        pair = (predictions[n].label, predictions[n].predicted)
        taken[pair] += 1
        if taken[pair] <= _EACH:
            chosen.append(n)
    return chosen[:count]


def _sureness(scores: Mapping[str, float] | None) -> float:
    """The largest probability; 0 where no labels were scored."""
    if not scores:
        return 0.0
    top = max(scores.values())
    return 1 / sum(math.exp(value - top) for value in scores.values())


def _tree(result: Result) -> dict[str, Any]:
    """The numbers of `evaluation.json`."""
    each = {}
    for item in result.answers:
        tree = item.evaluation.to_dict()
        for name, found in (
            ("calibration", calibration(item.predictions)),
            ("positions", position_bias(item.predictions)),
        ):
            tree[name] = None if found is None else plain(dataclasses.asdict(found))
        tree |= {"groups": item.groups.to_dict(), "groups_missing": item.groups.why}
        if item.without is not None:
            tree["without"] = item.without.to_dict()
        each[item.title] = tree
    if result.mean is None:
        return {**each[result.headline.title], "ways": each}
    together = {"groups": result.groups.to_dict(), "groups_missing": result.groups.why}
    return {**plain(dataclasses.asdict(result.mean)), **together, "folds": each}


def _by_group(result: Result) -> list[Table]:
    """A table for each way of answering, or one for all folds; one sentence where there is none."""
    if result.pooled is not None:
        return [result.pooled.table("all folds together")]
    if result.groups.why:
        return [result.groups.table("")]
    return [item.groups.table(item.title) for item in result.answers]


def _comparison(result: Result, others: Sequence[Published]) -> Table:
    """This result among the field's; folds one by one, and their mean."""
    rows, mean = [], result.mean
    if mean is not None:
        rows.append(
            (
                f"this result, mean of {len(mean.wars)} folds ± standard deviation",
                "",
                f"{percent(mean.uar, 2)} ± {percent(mean.uar_std, 2)}",
                f"{percent(mean.war, 2)} ± {percent(mean.war_std, 2)}",
            )
        )
    for item in result.answers:
        e = item.evaluation
        rows.append((f"this result, {item.title}", "", percent(e.uar, 2), percent(e.war, 2)))
    own = range(len(rows))
    for other in others:
        uar = "–" if other.uar is None else f"{other.uar:.2f}"
        rows.append((other.model, other.how, uar, f"{other.war:.2f}"))
    note = (
        "As their authors published them, or as later papers quote them; frames, crops, prompts "
        "and training data differ from model to model."
        if others
        else "No published numbers on this set are known here."
    )
    return Table(
        title="Beside the field's published numbers",
        note=note,
        head=("", "", "UAR, %", "WAR, %"),
        rows=rows,
        own=tuple(own),
    )


def _positions(item: Answers) -> Table | None:
    """What the place of an option did, where options were shuffled."""
    found = position_bias(item.predictions)
    if found is None:
        return None
    rows = [
        (f"place {place}", *map(percent, shares))
        for place, shares in enumerate(
            zip(found.answered, found.true, found.recall, strict=True), 1
        )
    ]
    note = (
        f"{item.title}: bias {found.bias:.3f}, half the summed distance between the first two "
        "columns; 0 for a model that ignores the order of the options."
    )
    head = ("of the option in the question", "answered, %", "true, %", "recall, %")
    return Table(title="Position bias", note=note, head=head, rows=rows)


def _mistakes(item: Answers) -> Table:
    """The worst mistakes in words, where no picture may be shown."""
    rows = [
        (one.id, one.label, one.predicted or "no class named", _short(one.text or ""))
        for one in (item.predictions[n] for n in worst(item.predictions))
    ]
    note = (
        "Pictures are left out. Most confident first where labels were scored, else the most "
        "frequent."
    )
    head = ("item", "true", "answered", "in its words")
    return Table(title="Worst mistakes", note=note, head=head, rows=rows)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"
