"""The evaluation protocol: a record per item, the folds, and the numbers.

Classes go by name everywhere, never by number: several number orders circulate for the same set.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from etils import epath

from emollama_jax import foreign_json
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import known_family
from emollama_jax.errors import UserError
from emollama_jax.evaluate import metrics
from emollama_jax.evaluate.parse import Reading
from emollama_jax.paths import as_path, write_whole


def folds_of(source: str) -> int:
    """The number of a set's official folds; 1 where it has none, or is not known."""
    family = known_family(source)
    return 1 if family is None else family.folds or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One item of a predictions file, one JSON object a line, with these keys."""

    id: str  # of the item in its source
    source: str  # data set and split, e.g. "actionfaces/images:test"
    label: str  # the true class
    predicted: str | None  # the answered class; None: unparsed
    text: str | None  # what the model wrote; None if labels were scored
    scores: dict[str, float] | None  # class → log-likelihood; None if text was generated
    parsed: Reading
    subject: str | None = None  # whose face, where the set says so: for clustered intervals
    options: tuple[str, ...] | None = None  # as the question listed them; None: native order


def subject_of(example: Mapping[str, Any]) -> str | None:
    """Subject of a prepared example; None where the set does not say."""
    subject = int(example["subject"])
    return str(subject) if subject >= 0 else None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one run over one set; shares are 0 … 1."""

    classes: tuple[str, ...]
    n: int
    war: float
    uar: float
    war_interval: metrics.Interval
    uar_interval: metrics.Interval
    level: float  # of the intervals
    clustered: bool  # intervals by subject
    confusion: np.ndarray  # int64 [C, C + 1], the last column unparsed
    per_class: metrics.PerClass
    recall_interval: tuple[metrics.Interval, ...]  # Wilson's, of each class
    unparsed: float  # share of answers that named no class
    parsed: dict[str, int]  # how answers were read → how many

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what has no value (nan) becomes None."""
        tree = dataclasses.asdict(self)
        tree["classes"] = list(self.classes)
        tree["confusion"] = self.confusion.tolist()
        tree["per_class"] = {
            name: dict(zip(self.classes, values.tolist(), strict=True))
            for name, values in vars(self.per_class).items()
        }
        tree["recall_interval"] = dict(zip(self.classes, tree["recall_interval"], strict=True))
        return metrics.plain(tree)

    def summary(self) -> dict[str, Any]:
        """The numbers that `emollama eval --json` prints; recalls of the classes that occur."""
        recall = zip(self.classes, self.per_class.recall.tolist(), strict=True)
        return {
            "WAR": self.war,
            "UAR": self.uar,
            "n": self.n,
            "unparsed": self.unparsed,
            "recall": {name: value for name, value in recall if not math.isnan(value)},
        }


def evaluate(
    predictions: Sequence[Prediction],
    space: LabelSpace,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Evaluation:
    """WAR, UAR and the rest of one run.

    Args:
        predictions: every item of the test set once.
        space: the classes that count.
        samples: bootstrap samples; drawn by subject if every item names one.
        seed: random seed of the bootstrap.
        level: confidence level of the intervals.

    Raises:
        UserError: no predictions, an item twice, or a class that the space does not have.
    """
    _check(predictions, space)
    number = {name: n for n, name in enumerate(space.classes)}
    labels = np.array([number[item.label] for item in predictions])
    predicted = np.array([number.get(item.predicted, metrics.UNPARSED) for item in predictions])
    confusion = metrics.confusion_matrix(labels, predicted, classes=len(number))
    subjects = [item.subject for item in predictions]
    clustered = None not in subjects
    intervals = metrics.bootstrap(
        labels,
        predicted,
        classes=len(number),
        samples=samples,
        seed=seed,
        level=level,
        clusters=subjects if clustered else None,
    )
    scores = metrics.per_class(confusion)
    return Evaluation(
        classes=tuple(space.classes),
        n=len(predictions),
        war=metrics.war(confusion),
        uar=metrics.uar(confusion),
        war_interval=intervals["war"],
        uar_interval=intervals["uar"],
        level=level,
        clustered=clustered,
        confusion=confusion,
        per_class=scores,
        recall_interval=tuple(
            metrics.wilson(int(right), int(items), level=level)
            for right, items in zip(np.diagonal(confusion), scores.support, strict=True)
        ),
        unparsed=float(np.mean(predicted == metrics.UNPARSED)),
        parsed=dict(Counter(item.parsed for item in predictions)),
    )


def _check(predictions: Sequence[Prediction], space: LabelSpace) -> None:
    if not predictions:
        raise UserError("no predictions: nothing to evaluate")
    seen = Counter((item.source, item.id) for item in predictions)
    (source, item_id), times = seen.most_common(1)[0]
    if times > 1:
        raise UserError(f"{source}: item {item_id} is predicted {times} times, wanted once")
    for item in predictions:
        for role, name in (("label", item.label), ("predicted", item.predicted)):
            if name is not None and name not in space.classes:
                raise UserError(
                    f"item {item.id}: {role} {name!r} is not a class of {space.title} "
                    f"(wanted one of {', '.join(space.classes)})"
                )


SHARE = 0.1  # of unparsed answers, from which it is said
_UNPARSED = {
    "ambiguous": "name two classes, or two scores are equal",
    "none": "name no class",
    "foreign": "have a best label that is not a class",
    "refusal": "are refusals",
    "unfinished": "stop in mid-reasoning",
}


def unparsed_warning(evaluations: Sequence[Evaluation]) -> str:
    """A sentence to print before the numbers; "" where few answers are unparsed.

    Args:
        evaluations: evaluations of one set, or of its folds.
    """
    total = sum(e.n for e in evaluations)
    lost = sum(round(e.unparsed * e.n) for e in evaluations)
    if lost < SHARE * total:
        return ""
    read = sum((Counter(e.parsed) for e in evaluations), Counter())
    why = ", ".join(f"{read[how]:,} {text}" for how, text in _UNPARSED.items() if read[how])
    if lost == total:
        return f"All of the {total:,} answers are unparsed, so every number is 0: {why}."
    return f"{lost:,} of {total:,} answers are unparsed and count as wrong: {why}."


# ---- predictions files


def dump_predictions(predictions: Iterable[Prediction]) -> str:
    """The text of a predictions file: one JSON object a line."""
    return "".join(
        json.dumps(dataclasses.asdict(item), ensure_ascii=False, allow_nan=False) + "\n"
        for item in predictions
    )


def write_predictions(path: epath.PathLike, predictions: Iterable[Prediction]) -> None:
    """Writes a predictions file; it appears whole or not at all."""
    write_whole(as_path(path), dump_predictions(predictions))


def read_predictions(path: epath.PathLike) -> list[Prediction]:
    """Reads a predictions file.

    Raises:
        UserError: no such file, or a line that is no prediction; the line is named.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such predictions file (`emollama eval` writes one)")
    items = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                items.append(_read(foreign_json.parse(line.rstrip())))
                _check_scores(items[0].scores, items[-1].scores)
            except json.JSONDecodeError as error:
                why = f"not JSON ({error.msg}, column {error.colno})"
                raise UserError(f"{path}, line {number}: {why}") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    return items


_FIELDS = {field.name: field for field in dataclasses.fields(Prediction)}


def _read(tree: Any) -> Prediction:
    """One line; every fault is a ValueError that says what was wanted."""
    if not isinstance(tree, dict):
        raise ValueError(f"found a {type(tree).__name__}, wanted an object with an id")
    required = {name for name, f in _FIELDS.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - tree.keys()):
        raise ValueError(f"{', '.join(missing)} missing")
    if unknown := sorted(tree.keys() - _FIELDS.keys()):
        raise ValueError(f"unknown key {unknown[0]} (known: {', '.join(_FIELDS)})")
    for name in ("id", "source", "label"):
        _demand(isinstance(tree[name], str), name, tree[name], "a text")
    for name in ("predicted", "text", "subject"):
        value = tree.get(name)
        _demand(value is None or isinstance(value, str), name, value, "a text or null")
    _demand(
        tree["parsed"] in get_args(Reading), "parsed", tree["parsed"], f"one of {get_args(Reading)}"
    )
    scores = tree["scores"]
    good = scores is None or (
        isinstance(scores, dict)
        and all(isinstance(v, float | int) and math.isfinite(v) for v in scores.values())
    )
    _demand(good, "scores", scores, "class → finite number, or null")
    options = tree.get("options")
    if options is not None:
        good = isinstance(options, list) and all(isinstance(name, str) for name in options)
        _demand(good, "options", options, "a list of texts, or null")
        tree = tree | {"options": tuple(options)}
    return Prediction(**tree)


def _check_scores(first: Mapping[str, float] | None, found: Mapping[str, float] | None) -> None:
    if first and found and first.keys() != found.keys():
        raise ValueError(
            f"scores of {', '.join(found)}, wanted the classes of line 1: {', '.join(first)}"
        )


def _demand(good: bool, name: str, found: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: found {found!r}, wanted {wanted}")
