"""Errors by group: how often a model is right about faces of one age, gender or race.

Groups are what the face network says of the faces (the priors of the prepared set), which may be
wrong; nobody told their age. Faces of which it is unsure, and items without a face, are a group of
their own, `unknown`. Nothing is ranked, and small groups are shown: their intervals are wide.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.face_labels import AGE_LABELS, GENDER_LABELS, RACE_LABELS
from emollama_jax.errors import UserError
from emollama_jax.evaluate import metrics
from emollama_jax.evaluate.protocol import Prediction
from emollama_jax.evaluate.report import Table, percent, spread

ATTRIBUTES = ("age", "gender", "race")
UNKNOWN = "unknown"
SURE = 0.5  # probability below which the face network's class counts as unknown
SAMPLES, SEED, LEVEL = 2000, 0, 0.95  # of the bootstrap of UAR, as in `protocol.evaluate`

RaceLabels = Literal["measured", "as_published", "untaught"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Attributes of a split's items, as the face network sees them.

    Attributes:
        groups: item → its group by attribute, in the order of `ATTRIBUTES`.
        race_labels: naming of the race classes.
        why: why nothing is known; "" where it is.
    """

    groups: Mapping[str, tuple[str, ...]]
    race_labels: RaceLabels = "measured"
    why: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The numbers of one group; shares are 0 … 1."""

    attribute: str
    name: str
    n: int
    classes: int  # of the tested set that occur in the group
    war: float  # nan for a group without items, as are the other numbers
    war_interval: metrics.Interval  # Wilson's
    uar: float  # nan where a class that the whole set has does not occur
    uar_interval: metrics.Interval  # bootstrap


@dataclasses.dataclass(frozen=True)
class ByGroup:
    """The numbers of all groups of one result.

    Attributes:
        groups: in the order of the face network's classes, `unknown` last.
        classes: classes that occur in the whole set.
        why: why there are none; "" where there are.
    """

    groups: tuple[Group, ...] = ()
    classes: int = 0
    why: str = ""

    def to_dict(self) -> dict[str, Any] | None:
        """Plain values for JSON: attribute → group → numbers; None where there are none."""
        if self.why:
            return None
        tree: dict[str, Any] = {}
        for group in self.groups:
            numbers = dataclasses.asdict(group)
            attribute, name = numbers.pop("attribute"), numbers.pop("name")
            shown = {_KEYS.get(key, key): value for key, value in numbers.items()}
            tree.setdefault(attribute, {})[name] = metrics.plain(shown)
        return tree

    def table(self, title: str) -> Table:
        """The numbers as a table of the page."""
        if self.why:
            return Table(title=_TITLE, note="", head=("none",), rows=[(self.why,)])
        rows = [
            (
                f"{group.attribute}: {group.name}",
                f"{group.n:,}",
                f"{group.classes} of {self.classes}",
                percent(group.war),
                spread(group.war_interval),
                percent(group.uar),
                spread(group.uar_interval),
            )
            for group in self.groups
        ]
        attributes = {group.attribute for group in self.groups}
        note = _NOTE + ("" if "race" in attributes else " It is not sure of anyone's race.")
        head = (
            *("as the face network sees it", "items", "classes"),
            *("WAR, %", "95 %", "UAR, %", "95 %"),
        )
        return Table(title=f"{_TITLE}: {title}", note=note, head=head, rows=rows)


def read_seen(
    data_dir: epath.PathLike, name: str, split: str, *, race_labels: RaceLabels = "measured"
) -> Seen:
    """Attributes in the priors of a prepared split, or why there are none."""
    from emollama_jax.data.split import Split  # TFDS, which plain files need not

    try:
        there = Split(data_dir, name, split)
        priors, ids = there.priors, there.index.ids
    except (UserError, OSError) as error:
        return Seen({}, race_labels, str(error))
    groups = {}
    for number, item in enumerate(ids):
        prior = priors[number]
        groups[item] = _groups(prior.agr, prior.agr_probability, race_labels)
    return Seen(groups, race_labels)


def item_names(data_dir: epath.PathLike, name: str, split: str) -> Sequence[str]:
    """The names of a prepared split's items, in its order.

    Raises:
        UserError: not prepared.
    """
    from emollama_jax.data.split import Split  # TFDS, which plain files need not

    return Split(data_dir, name, split).index.ids


def joined(parts: Iterable[Seen]) -> Seen:
    """Attributes of several folds' items."""
    parts = list(parts)
    why = next((part.why for part in parts if part.why), "")
    groups = {item: names for part in parts for item, names in part.groups.items()}
    return Seen({} if why else groups, parts[0].race_labels, why)


def by_group(predictions: Sequence[Prediction], seen: Seen, space: LabelSpace) -> ByGroup:
    """The numbers of each group.

    Args:
        predictions: predictions of a set, each about an item that `seen` knows.
        seen: attributes that the face network reads.
        space: the classes that count.
    """
    if seen.why:
        return ByGroup(why=seen.why)
    number = {name: n for n, name in enumerate(space.classes)}
    labels = np.array([number[item.label] for item in predictions])
    answers = np.array([number.get(item.predicted, metrics.UNPARSED) for item in predictions])
    occur = len(np.unique(labels))
    found = []
    for place, attribute in enumerate(ATTRIBUTES):
        mine = np.array([seen.groups[item.id][place] for item in predictions])
        names = [*_names(attribute, seen.race_labels), UNKNOWN]
        if attribute == "race" and set(mine) == {UNKNOWN}:
            continue  # a face network that was never taught race
        for name in names:
            chosen = mine == name
            if chosen.any() or name == UNKNOWN:
                items = (labels[chosen], answers[chosen])
                found.append(_group(attribute, name, *items, classes=len(number), occur=occur))
    return ByGroup(tuple(found), occur)


_TITLE = "Errors by group"
_KEYS = {  # as `predictions.summary` writes them
    "war": "WAR",
    "war_interval": "WAR_interval",
    "uar": "UAR",
    "uar_interval": "UAR_interval",
}
_NOTE = (
    "Age, gender and race are predictions of the face network, right or wrong, not what people "
    "say of themselves. Unknown: no face was found, or the network is less than "
    f"{100 * SURE:g} % sure. "
    "Intervals of WAR are Wilson's, of UAR bootstrap; two groups whose intervals overlap may not "
    "differ. UAR is left out where a class of the set does not occur in the group."
)


def _groups(agr: np.ndarray, probability: np.ndarray, race_labels: RaceLabels) -> tuple[str, ...]:
    sure = [p >= SURE for p in probability]
    sure[ATTRIBUTES.index("race")] &= race_labels != "untaught"
    return tuple(
        _names(attribute, race_labels)[int(agr[place])] if sure[place] else UNKNOWN
        for place, attribute in enumerate(ATTRIBUTES)
    )


def _names(attribute: str, race_labels: RaceLabels) -> tuple[str, ...]:
    return {"age": AGE_LABELS, "gender": GENDER_LABELS, "race": RACE_LABELS[race_labels]}[attribute]


def _group(
    attribute: str, name: str, labels: np.ndarray, answers: np.ndarray, *, classes: int, occur: int
) -> Group:
    """The numbers of some items; `occur` of the `classes` do in the whole set."""
    nowhere = metrics.Interval(float("nan"), float("nan"))
    war, uar, uar_interval = float("nan"), float("nan"), nowhere
    here, right = len(np.unique(labels)), int((labels == answers).sum())
    if len(labels):
        confusion = metrics.confusion_matrix(labels, answers, classes=classes)
        war = metrics.war(confusion)
        if here == occur:
            uar = metrics.uar(confusion)
            uar_interval = metrics.bootstrap(
                labels, answers, classes=classes, samples=SAMPLES, seed=SEED, level=LEVEL
            )["uar"]
    return Group(
        attribute=attribute,
        name=name,
        n=len(labels),
        classes=here,
        war=war,
        war_interval=metrics.wilson(right, len(labels), level=LEVEL),
        uar=uar,
        uar_interval=uar_interval,
    )
