"""Joining folds: DFEW and MAFW are means over five official folds, never one of them.

MAFW's fold 1 lies 11 to 16 points of WAR below its fold 4: a number from fewer folds is another
number. So the mean is only there when every fold is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.evaluate import metrics
from emollama_jax.evaluate.protocol import Evaluation, Prediction, Protocol


def join(evaluations: Mapping[int, Evaluation], protocol: Protocol) -> metrics.Folds:
    """Mean and standard deviation over the official folds.

    Args:
        evaluations: by fold, from 1.
        protocol: of the set.

    Raises:
        UserError: a fold is missing, or there is one too many.
    """
    wanted = range(1, protocol.folds + 1)
    missing = [fold for fold in wanted if fold not in evaluations]
    extra = [fold for fold in evaluations if fold not in wanted]
    if missing or extra:
        what = f"missing {_list(missing)}" if missing else f"unknown {_list(extra)}"
        raise UserError(
            f"{protocol.space.title} is the mean over {protocol.folds} folds, found "
            f"{len(evaluations)} ({what}): evaluate every fold, or name one with --fold"
        )
    return metrics.over_folds([evaluations[fold].confusion for fold in wanted])


def check_disjoint(folds: Sequence[Sequence[Prediction]]) -> None:
    """Refuses folds that test the same item: in five-fold cross-validation none is tested twice.

    Raises:
        UserError: with the item's name and the two folds.
    """
    seen: dict[str, int] = {}
    for number, predictions in enumerate(folds, 1):
        for item in predictions:
            before = seen.setdefault(item.id, number)
            if before != number:
                raise UserError(
                    f"item {item.id} is tested in fold {before} and in fold {number}: the folds of "
                    "a set share no test item; is a file given twice?"
                )


def summary(evaluations: Sequence[Evaluation], folds: metrics.Folds) -> dict[str, Any]:
    """The means as `predictions.summary` gives one fold's numbers, and each fold beside them.

    A class's recall is the mean over the folds in which it occurs.
    """
    recalls: dict[str, float] = {}
    for c, name in enumerate(evaluations[0].classes):
        found = [e.per_class.recall[c] for e in evaluations if e.per_class.support[c]]
        if found:
            recalls[name] = float(np.mean(found))
    total = sum(e.n for e in evaluations)
    return {
        "WAR": folds.war,
        "UAR": folds.uar,
        "n": total,
        "unparsed": sum(e.unparsed * e.n for e in evaluations) / total,
        "recall": recalls,
        "std": {"WAR": _plain(folds.war_std), "UAR": _plain(folds.uar_std)},
        "folds": [
            {"WAR": war, "UAR": uar, "n": e.n}
            for war, uar, e in zip(folds.wars, folds.uars, evaluations, strict=True)
        ],
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _list(folds: Sequence[int]) -> str:
    return "fold " + ", ".join(map(str, folds))
