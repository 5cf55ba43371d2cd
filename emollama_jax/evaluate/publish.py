"""What an evaluation leaves behind: `report.html`, `evaluation.json`, `table.tex`.

All three say the same numbers, and each says where they come from.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.evaluate import groups as grouping
from emollama_jax.evaluate import latex, metrics, report
from emollama_jax.evaluate import without as leaving
from emollama_jax.evaluate.asked import position_bias
from emollama_jax.evaluate.predictions import summary
from emollama_jax.evaluate.protocol import Evaluation, Prediction, evaluate
from emollama_jax.evaluate.published import published
from emollama_jax.paths import as_path, write_whole

BINS = 10  # of a calibration curve
WORST = 12  # mistakes that a page shows
_EACH = 3  # of one confusion, so that the largest class does not fill the page


NO_SET = grouping.ByGroup(why="the predictions belong to no prepared set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tested:
    """One set of predictions and its numbers: a way of answering, or a fold."""

    title: str
    predictions: Sequence[Prediction]
    evaluation: Evaluation
    groups: grouping.ByGroup = NO_SET
    without: leaving.Without | None = None  # the second number, where it was asked for


def make_tested(
    title: str,
    predictions: Sequence[Prediction],
    space: LabelSpace,
    *,
    seen: grouping.Seen,
    left_out: tuple[str, Collection[str]] | None = None,
) -> Tested:
    """The numbers of predictions, also by group and without some items.

    Args:
        title: the way of answering, or the fold.
        predictions: every item once.
        space: the classes that count.
        seen: what the face priors say of the items.
        left_out: a split, and the items that also stand in it; None: no second number.
    """
    second = None
    if left_out is not None:
        second = leaving.without(predictions, left_out[1], space, split=left_out[0])
    return Tested(
        title=title,
        predictions=predictions,
        evaluation=evaluate(predictions, space),
        groups=grouping.by_group(predictions, seen, space),
        without=second,
    )


def summarise(tested: Tested) -> dict[str, Any]:
    """What `--json` prints of one result: its numbers, and those by group and without some items
    where there are any."""
    found = summary(tested.evaluation)
    if tested.without is not None:
        found["without"] = leaving.tree(tested.without)
    if not tested.groups.why:
        found["groups"] = grouping.tree(tested.groups)
    return found


def write_results(
    out: epath.PathLike,
    *,
    title: str,
    lede: str,
    source: str,
    tested: Sequence[Tested],
    folds: metrics.Folds | None = None,
    pooled: grouping.ByGroup | None = None,
    notes: Sequence[report.Table] = (),
    mistakes: Sequence[report.Item] = (),
    command: str,
    config: str,
    versions: Mapping[str, str],
    trace: Mapping[str, str],
) -> None:
    """Writes the page, the JSON and the LaTeX table.

    Args:
        out: the folder.
        title: of the page.
        lede: what was done, in a sentence or two.
        source: the set, e.g. "dfew/fold1": decides which published numbers stand beside.
        tested: the ways of answering, the headline first; or the folds, with `folds`.
        folds: mean and standard deviation over `tested`.
        pooled: the groups of all folds' items together.
        notes: more tables.
        mistakes: pictures of `worst`, where they may be shown.
        command: that did it.
        config: as YAML.
        versions: of packages.
        trace: what → file or hash.
    """
    out = as_path(out)
    others = published(source)
    tree = _tree(tested, folds, pooled) | {
        "source": source,
        "command": command,
        "trace": dict(trace),
        "versions": dict(versions),
        "published": [dataclasses.asdict(other) for other in others],
    }
    text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / "evaluation.json", text + "\n")
    rows = [(item.title, item.evaluation) for item in tested]
    table = latex.table(title, rows, others=others, folds=folds)
    write_whole(out / "table.tex", table)
    tables = [
        _comparison(tested, folds, others),
        *(
            leaving.table(item.title, item.evaluation, item.without)
            for item in tested
            if item.without is not None
        ),
        *_by_group(tested, pooled),
        *_positions(tested),
        *notes,
    ]
    if not mistakes:
        tables += _mistakes(tested[0])
    page = report.Report(
        title=title,
        lede=lede,
        results=[
            report.Result(title=item.title, source=source, evaluation=item.evaluation)
            for item in tested
        ],
        mistakes=mistakes,
        calibrations=[
            (item.title, found) for item in tested if (found := calibration(item.predictions))
        ],
        tables=[table for table in tables if table.rows],
        command=command,
        config=config,
        versions=versions,
        trace=trace,
    )
    report.write_report(out / "report.html", page)


def calibration(predictions: Sequence[Prediction]) -> metrics.Calibration | None:
    """Of label scoring; None where text was generated.

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


def _by_group(tested: Sequence[Tested], pooled: grouping.ByGroup | None) -> list[report.Table]:
    """A table for each way of answering, or one for all folds; one sentence where there is none."""
    if pooled is not None:
        return [grouping.table("all folds together", pooled)]
    if tested[0].groups.why:
        return [grouping.table("", tested[0].groups)]
    return [grouping.table(item.title, item.groups) for item in tested]


def _tree(
    tested: Sequence[Tested], folds: metrics.Folds | None, pooled: grouping.ByGroup | None
) -> dict[str, Any]:
    each = {}
    for item in tested:
        tree = item.evaluation.to_dict()
        for name, found in (
            ("calibration", calibration(item.predictions)),
            ("positions", position_bias(item.predictions)),
        ):
            tree[name] = None if found is None else _plain(dataclasses.asdict(found))
        tree["groups"] = grouping.tree(item.groups)
        tree["groups_missing"] = item.groups.why
        if item.without is not None:
            tree["without"] = leaving.tree(item.without)
        each[item.title] = tree
    if folds is None:
        return {**each[tested[0].title], "ways": each}
    by_group = pooled or tested[0].groups
    together = {"groups": grouping.tree(by_group), "groups_missing": by_group.why}
    return {**_plain(dataclasses.asdict(folds)), **together, "folds": each}


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray | tuple | list):
        return [_plain(value) for value in np.asarray(tree).tolist()]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _comparison(tested: Sequence[Tested], folds: metrics.Folds | None, others: Sequence[Any]):
    """This result among the field's; folds one by one, and their mean."""
    rows = []
    if folds:
        rows.append(
            (
                f"this result, mean of {len(folds.wars)} folds ± standard deviation",
                "",
                f"{report.percent(folds.uar, 2)} ± {report.percent(folds.uar_std, 2)}",
                f"{report.percent(folds.war, 2)} ± {report.percent(folds.war_std, 2)}",
            )
        )
    for item in tested:
        e = item.evaluation
        rows.append(
            (f"this result, {item.title}", "", report.percent(e.uar, 2), report.percent(e.war, 2))
        )
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
    return report.Table(
        title="Beside the field's published numbers",
        note=note,
        head=("", "", "UAR, %", "WAR, %"),
        rows=rows,
        own=tuple(own),
    )


def _positions(tested: Sequence[Tested]) -> list[report.Table]:
    tables = []
    for item in tested:
        if not any(p.options for p in item.predictions):
            continue
        found = position_bias(item.predictions)
        if found is None:
            continue
        rows = [
            (
                f"place {place + 1}",
                report.percent(found.answered[place]),
                report.percent(found.true[place]),
                report.percent(found.recall[place]),
            )
            for place in range(len(found.true))
        ]
        note = (
            f"{item.title}: bias {found.bias:.3f}, half the summed distance between the first two "
            "columns; 0 for a model to which the order of the options means nothing."
        )
        head = ("of the option in the question", "answered, %", "true, %", "recall, %")
        tables.append(report.Table(title="Position bias", note=note, head=head, rows=rows))
    return tables


def _mistakes(tested: Tested) -> list[report.Table]:
    """The worst mistakes in words, where no picture may be shown."""
    rows = [
        (item.id, item.label, item.predicted or "no class named", _short(item.text or ""))
        for item in (tested.predictions[n] for n in worst(tested.predictions))
    ]
    note = "Pictures are left out. Surest first where labels were scored, else the most frequent."
    head = ("item", "true", "answered", "in its words")
    return [report.Table(title="Worst mistakes", note=note, head=head, rows=rows)]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"
