"""Joining folds: DFEW and MAFW are means over five official folds, never one of them.

MAFW's fold 1 lies 11 to 16 points of WAR below its fold 4: a number from fewer folds is another
number. So the mean is only there when every fold is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.data.sets import label_space, parse
from emollama_jax.errors import UserError
from emollama_jax.evaluate import groups, metrics
from emollama_jax.evaluate.protocol import (
    Evaluation,
    Prediction,
    Protocol,
    protocol_of,
    read_predictions,
)
from emollama_jax.evaluate.publish import Tested, write_results
from emollama_jax.evaluate.trace import file_hash
from emollama_jax.paths import as_path


def names(source: str, fold: str | None) -> list[tuple[int, str]]:
    """The folds to test as (number, name); number 0 where the set has none.

    Args:
        source: the set, e.g. "raf_db", "dfew" or "dfew/fold1".
        fold: its number, or "all"; None: as `source` says.

    Raises:
        UserError: no such fold, or none named.
    """
    builder, view = parse(source)
    protocol = protocol_of(source)
    count = protocol.folds if protocol else 1
    if count == 1:
        if fold is not None:
            raise UserError(f"--fold {fold}: {source} has no folds")
        return [(0, source)]
    if view and fold is None:
        fold = view.removeprefix("fold")
    if fold is None:
        raise UserError(f"{source} has {count} folds: name one with --fold 1, or --fold all")
    if fold == "all":
        return [(number, f"{builder}/fold{number}") for number in range(1, count + 1)]
    if not fold.isdigit() or not 1 <= int(fold) <= count:
        raise UserError(f"--fold {fold}: {builder} has the folds 1 … {count}, or all")
    return [(int(fold), f"{builder}/fold{int(fold)}")]


def join(evaluations: Mapping[int, Evaluation], source: str) -> metrics.Folds:
    """Mean and standard deviation over the official folds.

    Args:
        evaluations: by fold, from 1.
        source: the set, e.g. "dfew".

    Raises:
        UserError: a fold is missing, or there is one too many.
    """
    protocol = _protocol(source)
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


def write_joined(
    home: epath.PathLike,
    evaluations: Mapping[int, Evaluation],
    *,
    source: str,
    split: str,
    model: str = "",
    seen: groups.Seen,
    command: str,
    versions: Mapping[str, str],
) -> metrics.Folds:
    """Writes the mean over the folds, whose own results lie in `fold1`, `fold2`, … of the folder.

    Args:
        home: the folder; gets what `write_results` writes.
        evaluations: by fold, from 1.
        source: the set.
        split: of it.
        model: its name, where it is not a run of this package.
        seen: what the face priors say of all folds' items.
        command: that did it.
        versions: of packages.

    Raises:
        UserError: a fold is missing, or two test the same item.
    """
    home = as_path(home)
    mean = join(evaluations, source)
    files = {number: home / f"fold{number}" / "predictions.jsonl" for number in evaluations}
    items = {number: read_predictions(file) for number, file in files.items()}
    check_disjoint(list(items.values()))
    every = [one for found in items.values() for one in found]
    what = f"{_protocol(source).space.title}, {split}, {len(evaluations)} folds"
    write_results(
        home,
        title=f"{model} on {what}" if model else what,
        lede="The mean over the official folds, each tested by itself.",
        source=source,
        tested=[
            Tested(title=f"fold {number}", predictions=items[number], evaluation=e)
            for number, e in evaluations.items()
        ],
        folds=mean,
        pooled=groups.by_group(every, seen, label_space(source)),
        command=command,
        config="# of each fold: see its own report\n",
        versions=versions,
        trace={f"{file.parent.name}/{file.name}": file_hash(file) for file in files.values()},
    )
    return mean


def line(mean: metrics.Folds, home: epath.PathLike) -> str:
    """What a command prints of the mean."""
    return (
        f"WAR {mean.war:.4f} ± {mean.war_std:.4f}  UAR {mean.uar:.4f} ± {mean.uar_std:.4f}  "
        f"{len(mean.wars)} folds: {home}/report.html"
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


def _protocol(source: str) -> Protocol:
    protocol = protocol_of(source)
    assert protocol is not None  # only sets with a protocol have folds
    return protocol


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _list(folds: Sequence[int]) -> str:
    return "fold " + ", ".join(map(str, folds))
