"""What an evaluation is: a `Result`, with its predictions, its settings and its trace.

There are three ways to make one: of a trained run (`of_run.py`), of anyone's predictions in a file
(`of_file.py`) and of a remote model (`of_remote.py`); and one way to write it (`publish.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.evaluate.copies import Copies, Without, leave_out
from emollama_jax.evaluate.groups import ByGroup, Seen, by_group
from emollama_jax.evaluate.metrics import Folds, plain
from emollama_jax.evaluate.protocol import Evaluation, Prediction, evaluate, unparsed_warning
from emollama_jax.evaluate.report import Exhibit, Table

NO_SET = Seen({}, why="the predictions belong to no prepared set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """One set of predictions and its numbers: a way of answering, or a fold."""

    title: str
    predictions: Sequence[Prediction]
    evaluation: Evaluation
    seen: Seen  # what the face priors say of the items
    groups: ByGroup
    without: Without | None  # the second number, where it was asked for

    @classmethod
    def of(
        cls,
        title: str,
        predictions: Sequence[Prediction],
        space: LabelSpace,
        *,
        seen: Seen = NO_SET,
        copies: Copies | None = None,
    ) -> "Answers":
        """The numbers of predictions, also by group and without items of another split.

        Args:
            title: the way of answering, or the fold.
            predictions: every item once.
            space: the classes that count.
            seen: face priors' attributes of the items.
            copies: items to leave out of a second number; None: there is none.
        """
        return cls(
            title=title,
            predictions=predictions,
            evaluation=evaluate(predictions, space),
            seen=seen,
            groups=by_group(predictions, seen, space),
            without=None if copies is None else leave_out(predictions, copies, space),
        )

    def summary(self) -> dict[str, Any]:
        """The numbers; also those by group and without some items, where there are any."""
        found = self.evaluation.summary()
        if self.without is not None:
            found["without"] = self.without.to_dict()
        if not self.groups.why:
            found["groups"] = self.groups.to_dict()
        return found


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a result, enough to reproduce it."""

    command: str
    config: str  # YAML
    versions: Mapping[str, str]  # of packages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """An evaluation.

    Attributes:
        title: heading of its page.
        lede: summary of what was done, in a sentence or two.
        source: the set, e.g. "dfew/fold1"; selects the published numbers to compare with.
        answers: each way of answering, the headline first; or each fold, with `mean`.
        mean: mean and standard deviation over the folds; None where `answers` are no folds.
        pooled: groups of the items of all folds together.
        predictions: records by the name of their file.
        settings: settings of the evaluation.
        trace: origin of the numbers: what → file or hash.
        notes: more tables for the page.
        mistakes: pictures of the worst mistakes, where they may be shown.
    """

    title: str
    lede: str
    source: str
    answers: Sequence[Answers]
    mean: Folds | None = None
    pooled: ByGroup | None = None
    predictions: Mapping[str, Sequence[Prediction]]
    settings: Settings
    trace: Mapping[str, str]
    notes: Sequence[Table] = ()
    mistakes: Sequence[Exhibit] = ()

    @property
    def headline(self) -> Answers:
        """The first way of answering, or the first fold."""
        return self.answers[0]

    @property
    def groups(self) -> ByGroup:
        """Errors by group, of all folds together where there are folds."""
        return self.pooled or self.headline.groups

    @property
    def warning(self) -> str:
        """That many answers of the headline, or of all folds, name no class; "" where few do."""
        counted = self.answers if self.mean else [self.headline]
        return unparsed_warning([item.evaluation for item in counted])

    def summary(self) -> dict[str, Any]:
        """Content of `--json`: shares, 0 … 1."""
        if self.mean is not None:
            groups = {} if self.groups.why else {"groups": self.groups.to_dict()}
            return _over_folds([item.evaluation for item in self.answers], self.mean) | groups
        found = self.headline.summary()
        if len(self.answers) > 1:
            found["ways"] = {item.title: item.summary() for item in self.answers}
        return found

    def lines(self, home: object) -> str:
        """Lines for a command to print: the numbers, and the page in the folder `home`."""
        mean, e, without = self.mean, self.headline.evaluation, self.headline.without
        if mean is not None:
            return (
                f"WAR {mean.war:.4f} ± {mean.war_std:.4f}  UAR {mean.uar:.4f} ± "
                f"{mean.uar_std:.4f}  {len(mean.wars)} folds: {home}/report.html"
            )
        line = f"WAR {e.war:.4f}  UAR {e.uar:.4f}  n {e.n}: {home}/report.html"
        second = "" if without is None else without.line(lambda share: f"{share:.4f}")
        return "\n".join(filter(None, [self.warning, line, second]))


def _over_folds(evaluations: Sequence[Evaluation], mean: Folds) -> dict[str, Any]:
    """The means as `Evaluation.summary` gives one fold's numbers, and each fold beside them.

    A class's recall is the mean over the folds in which it occurs.
    """
    recalls: dict[str, float] = {}
    for c, name in enumerate(evaluations[0].classes):
        found = [e.per_class.recall[c] for e in evaluations if e.per_class.support[c]]
        if found:
            recalls[name] = float(np.mean(found))
    total = sum(e.n for e in evaluations)
    return {
        "WAR": mean.war,
        "UAR": mean.uar,
        "n": total,
        "unparsed": sum(e.unparsed * e.n for e in evaluations) / total,
        "recall": recalls,
        "std": plain({"WAR": mean.war_std, "UAR": mean.uar_std}),
        "folds": [
            {"WAR": war, "UAR": uar, "n": e.n}
            for war, uar, e in zip(mean.wars, mean.uars, evaluations, strict=True)
        ],
    }
