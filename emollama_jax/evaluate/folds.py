"""Folds: DFEW and MAFW are means over five official folds, never one of them.

MAFW's fold 1 lies 11 to 16 points of WAR below its fold 4: a number from fewer folds is another
number. So the mean is only there when every fold is.
"""

import dataclasses
from collections.abc import Sequence

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import label_space, parse
from emollama_jax.errors import UserError
from emollama_jax.evaluate import groups, metrics
from emollama_jax.evaluate.protocol import Prediction, folds_of
from emollama_jax.evaluate.result import Answers, Result, Settings


def names(source: str, fold: str | None, *, without: str | None = None) -> list[tuple[int, str]]:
    """The folds to test as (number, name); number 0 where the set has none.

    Args:
        source: the set, e.g. "raf_db", "dfew" or "dfew/fold1".
        fold: its number, or "all"; None: as `source` says.
        without: split of a second number, which is there for one fold only.

    Raises:
        UserError: no such fold, or none named.
    """
    builder, view = parse(source)
    count = folds_of(source)
    if count == 1:
        if fold is not None:
            raise UserError(f"--fold {fold}: {source} has no folds")
        return [(0, source)]
    if view and fold is None:
        fold = view.removeprefix("fold")
    if fold is None:
        raise UserError(f"{source} has {count} folds: name one with --fold 1, or --fold all")
    if fold == "all":
        if without is not None:
            raise UserError(f"--without {without}: works for one fold, not for all")
        return [(number, f"{builder}/fold{number}") for number in range(1, count + 1)]
    if not fold.isdigit() or not 1 <= int(fold) <= count:
        raise UserError(f"--fold {fold}: {builder} has the folds 1 … {count}, or all")
    return [(int(fold), f"{builder}/fold{int(fold)}")]


def title_of(source: str) -> str:
    """Title of a set in headings."""
    return label_space(source).title


def mean_of(folds: Sequence[Answers], source: str) -> metrics.Folds:
    """Mean and standard deviation over the official folds of a set, in their order.

    Raises:
        UserError: a fold is missing, or there is one too many.
    """
    wanted = folds_of(source)
    if len(folds) != wanted:
        missing = ", ".join(map(str, range(len(folds) + 1, wanted + 1)))
        extra = ", ".join(map(str, range(wanted + 1, len(folds) + 1)))
        what = f"missing fold {missing}" if missing else f"unknown fold {extra}"
        raise UserError(
            f"{title_of(source)} is the mean over {wanted} folds, found "
            f"{len(folds)} ({what}): evaluate every fold, or name one with --fold"
        )
    return metrics.over_folds([fold.evaluation.confusion for fold in folds])


def pool(folds: Sequence[Answers], space: LabelSpace) -> groups.ByGroup:
    """Errors by group of all folds' items together."""
    every = [one for fold in folds for one in fold.predictions]
    return groups.by_group(every, groups.joined(fold.seen for fold in folds), space)


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


def join(results: Sequence[Result], source: str, *, what: str, command: str) -> Result:
    """The mean over the folds, each of which is written in `fold1`, `fold2`, … of its folder.

    Args:
        results: one for each fold, in order; their headlines count.
        source: the set.
        what: heading of the page.
        command: command that made them.

    Raises:
        UserError: a fold is missing, or two test the same item.
    """
    folds = [result.headline for result in results]
    mean = mean_of(folds, source)
    check_disjoint([fold.predictions for fold in folds])
    space = label_space(source)
    return Result(
        title=f"{what}, {len(folds)} folds",
        lede="The mean over the official folds, each tested by itself.",
        source=source,
        answers=[
            dataclasses.replace(fold, title=f"fold {number}")
            for number, fold in enumerate(folds, 1)
        ],
        mean=mean,
        pooled=pool(folds, space),
        predictions={},
        settings=Settings(
            command, "# of each fold: see its own report\n", results[0].settings.versions
        ),
        trace={
            f"fold{number}/predictions.jsonl": result.trace["predictions.jsonl"]
            for number, result in enumerate(results, 1)
        },
    )
