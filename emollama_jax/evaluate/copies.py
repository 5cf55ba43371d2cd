"""A second number: the same answers without the items that are also in another split.

Official lists hold pictures twice: FERPlus' test list has 288 that its train list has too. The
official list is what others report; without them is what nobody could have learned by heart.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.errors import UserError
from emollama_jax.evaluate.protocol import Evaluation, Prediction, evaluate
from emollama_jax.evaluate.report import Table, percent, spread


@dataclasses.dataclass(frozen=True)
class Copies:
    """Items of a set that are also in another split, by their name or their content."""

    split: str  # the other
    items: Collection[str]


@dataclasses.dataclass(frozen=True)
class Without:
    """The numbers of the items that are left."""

    split: str  # in which the others stand too
    left_out: int
    evaluation: Evaluation

    def line(self, shown: Callable[[float], str]) -> str:
        """For the terminal; `shown` writes a share as the line above it does."""
        e = self.evaluation
        return (
            f"without the {self.left_out:,} that are also in {self.split}: "
            f"WAR {shown(e.war)}  UAR {shown(e.uar)}  n {e.n}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the keys of `Evaluation.summary`."""
        return {
            "split": self.split,
            "left_out": self.left_out,
            **self.evaluation.summary(),
        }

    def table(self, title: str, whole: Evaluation) -> Table:
        """Both numbers side by side, with the recall of each class."""
        left = self.evaluation

        def row(name: str, *cells: tuple[float, Any]) -> tuple[str, ...]:
            shown = [(percent(share), spread(interval)) for share, interval in cells]
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
        return Table(
            title=f"Without items that are also in {self.split}: {title}",
            note=f"{self.left_out:,} items share their name or content with {self.split}.",
            head=("%", "all", interval, f"not in {self.split}", interval),
            rows=rows,
            own=(1, 2),
        )


def find_copies(folder: str, name: str, split: str, other: str | None) -> Copies | None:
    """The items of a prepared split that are also in another; None where none is named.

    Raises:
        UserError: no such split, or the tested one itself.
    """
    if other is None:
        return None
    from emollama_jax.data.split import Split  # TFDS, which plain files need not

    return Copies(other, Split(folder, name, split).also_in(other))


def leave_out(predictions: Sequence[Prediction], copies: Copies, space: LabelSpace) -> Without:
    """The numbers without some items.

    Args:
        predictions: predictions of the whole split.
        copies: items to leave out.
        space: the classes that count.

    Raises:
        UserError: none is left.
    """
    items = set(copies.items)
    kept = [one for one in predictions if one.id not in items]
    if not kept:
        raise UserError(f"--without {copies.split}: every item is also in it; nothing is left")
    return Without(copies.split, len(predictions) - len(kept), evaluate(kept, space))
