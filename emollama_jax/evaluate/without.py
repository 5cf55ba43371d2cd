"""A second number: the same answers without the items that also stand in another split.

Official lists hold pictures twice: FERPlus' test list has 288 that its train list has too. The
official list is what others report; without them is what nobody could have learned by heart.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.errors import UserError
from emollama_jax.evaluate import report
from emollama_jax.evaluate.predictions import summary
from emollama_jax.evaluate.protocol import Evaluation, Prediction, evaluate


@dataclasses.dataclass(frozen=True)
class Without:
    """The numbers of the items that are left."""

    split: str  # in which the others stand too
    left_out: int
    evaluation: Evaluation


def without(
    predictions: Sequence[Prediction], items: Collection[str], space: LabelSpace, *, split: str
) -> Without:
    """The numbers without some items.

    Args:
        predictions: of the whole split.
        items: names of those that also stand elsewhere, of `data.duplicates`.
        space: the classes that count.
        split: where.

    Raises:
        UserError: none is left.
    """
    items = set(items)
    kept = [one for one in predictions if one.id not in items]
    if not kept:
        raise UserError(f"--without {split}: every item also stands in it; nothing is left")
    return Without(split, len(predictions) - len(kept), evaluate(kept, space))


def line(found: Without) -> str:
    """For the terminal, shares as in the line above it."""
    e = found.evaluation
    return (
        f"without the {found.left_out:,} that also stand in {found.split}: "
        f"WAR {e.war:.4f}  UAR {e.uar:.4f}  n {e.n}"
    )


def tree(found: Without) -> dict[str, Any]:
    """Plain values for JSON, with the keys of `predictions.summary`."""
    return {"split": found.split, "left_out": found.left_out, **summary(found.evaluation)}


def table(title: str, whole: Evaluation, found: Without) -> report.Table:
    """Both numbers side by side, with the recall of each class."""
    left = found.evaluation

    def row(name: str, *cells: tuple[float, Any]) -> tuple[str, ...]:
        shown = [(report.percent(share), report.spread(interval)) for share, interval in cells]
        return (name, *(text for pair in shown for text in pair))

    rows = [
        ("items", f"{whole.n:,}", "", f"{left.n:,}", ""),
        row("WAR", (whole.war, whole.war_interval), (left.war, left.war_interval)),
        row("UAR", (whole.uar, whole.uar_interval), (left.uar, left.uar_interval)),
    ]
    for c, name in enumerate(whole.classes):
        cells = [(e.per_class.recall[c], e.recall_interval[c]) for e in (whole, left)]
        rows.append(row(f"recall of {name}", *cells))
    interval = f"{100 * whole.level:g} %"
    return report.Table(
        title=f"Without what also stands in {found.split}: {title}",
        note=f"{found.left_out:,} items have a name or a content that {found.split} has too.",
        head=("%", "all", interval, f"not in {found.split}", interval),
        rows=rows,
        own=(1, 2),
    )
