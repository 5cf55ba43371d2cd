"""The field's numbers as pure functions: confusion matrix, WAR, UAR, per-class scores, intervals.

WAR (weighted average recall) is the share of right answers, UAR (unweighted average recall) the
mean of the per-class recalls. Everything is computed from the confusion matrix, never from a
label list, so that a number can be checked by eye. All scores are shares, 0 … 1.

Arrays of NumPy and JAX are taken alike; what comes back is NumPy arrays and plain floats.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

UNPARSED = -1  # stands where an answer named no class: wrong, whatever the label


@dataclasses.dataclass(frozen=True)
class PerClass:
    """Scores of each class; nan where a score has no denominator.

    Attributes:
        support: test items of the class.
        recall: right answers / items; nan for a class without items.
        precision: right answers / answers; nan for a class that was never answered.
        f1: 2·right / (items + answers); nan for a class with neither.
    """

    support: Int[np.ndarray, " c"]
    recall: Float[np.ndarray, " c"]
    precision: Float[np.ndarray, " c"]
    f1: Float[np.ndarray, " c"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Folds:
    """The result of a cross-validated set: the mean of the folds' scores, as DFEW and MAFW ask."""

    war: float
    uar: float
    wars: tuple[float, ...]
    uars: tuple[float, ...]


def confusion_matrix(
    labels: ArrayLike, predicted: ArrayLike, *, classes: int
) -> Int[np.ndarray, "c c_plus_1"]:
    """Counts of (true class, answered class).

    Args:
        labels: int [N], each 0 … classes - 1.
        predicted: int [N], each 0 … classes - 1, or UNPARSED.
        classes: number of classes C.

    Returns:
        int64 [C, C + 1]; a row is a true class, the last column counts unparsed answers.

    Raises:
        ValueError: other shapes, or a number that names no class.
    """
    cells = np.bincount(_cells(labels, predicted, classes), minlength=classes * (classes + 1))
    return cells.reshape(classes, classes + 1)


def war(confusion: ArrayLike) -> float:
    """Weighted average recall: the share of right answers among all items."""
    return float(_war(np.asarray(confusion)))


def uar(confusion: ArrayLike) -> float:
    """Unweighted average recall: the mean recall of the classes that occur in the labels.

    A class without test items has no recall; it is left out of the mean (as scikit-learn's
    `balanced_accuracy_score` does), not counted as zero.
    """
    return float(_uar(np.asarray(confusion)))


def per_class(confusion: ArrayLike) -> PerClass:
    """Support, recall, precision and F1 of each class."""
    confusion = np.asarray(confusion)
    classes = confusion.shape[0]
    right = np.diagonal(confusion)
    items, answers = confusion.sum(1), confusion[:, :classes].sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that PerClass promises
        return PerClass(
            support=items,
            recall=right / items,
            precision=right / answers,
            f1=2 * right / (items + answers),
        )


def bootstrap(
    labels: ArrayLike,
    predicted: ArrayLike,
    *,
    classes: int,
    samples: int,
    seed: int,
    level: float,
    clusters: Sequence[object] | None = None,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of WAR and UAR.

    Drawing N items with replacement only changes how often each cell of the confusion matrix is
    hit, so the cells are drawn at once from their multinomial distribution. With clusters, whole
    clusters are drawn: the honest interval where one person gives several items.

    Args:
        labels: int [N].
        predicted: int [N], UNPARSED allowed.
        classes: number of classes C.
        samples: resamples.
        seed: of the draws.
        level: e.g. 0.95.
        clusters: one hashable per item, e.g. the subject.

    Returns:
        {"war": Interval, "uar": Interval}.
    """
    cells = _cells(labels, predicted, classes)
    rng = np.random.default_rng(seed)
    if clusters is None:
        counts = np.bincount(cells, minlength=classes * (classes + 1))
        drawn = rng.multinomial(len(cells), counts / len(cells), size=samples)
    else:
        if len(clusters) != len(cells):
            raise ValueError(f"{len(clusters)} clusters for {len(cells)} items: wanted one each")
        number = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
        members = np.zeros((len(number), classes * (classes + 1)))
        np.add.at(members, ([number[cluster] for cluster in clusters], cells), 1)
        share = np.full(len(number), 1 / len(number))
        drawn = rng.multinomial(len(number), share, size=samples) @ members
    resampled = drawn.reshape(samples, classes, classes + 1)
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: Interval(*map(float, np.quantile(score(resampled), tails)))
        for name, score in (("war", _war), ("uar", _uar))
    }


def over_folds(confusions: Sequence[ArrayLike]) -> Folds:
    """Mean WAR and mean UAR over the folds, each fold counting alike."""
    if not confusions:
        raise ValueError("no folds: wanted one confusion matrix per fold")
    wars, uars = tuple(map(war, confusions)), tuple(map(uar, confusions))
    return Folds(war=float(np.mean(wars)), uar=float(np.mean(uars)), wars=wars, uars=uars)


def _war(confusion: np.ndarray) -> np.ndarray:
    """WAR of each matrix of [..., C, C + 1]."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1)
    return right / confusion.sum((-2, -1))


def _uar(confusion: np.ndarray) -> np.ndarray:
    """UAR of each matrix of [..., C, C + 1]: a resample may miss a class too."""
    items = confusion.sum(-1)
    recall = np.diagonal(confusion, axis1=-2, axis2=-1) / np.maximum(items, 1)
    return recall.sum(-1) / (items > 0).sum(-1)


def _cells(labels: ArrayLike, predicted: ArrayLike, classes: int) -> Int[np.ndarray, " n"]:
    """Each item's place in the flattened confusion matrix."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim != 1 or labels.shape != predicted.shape or not labels.size:
        raise ValueError(
            f"labels {labels.shape} and predictions {predicted.shape}: wanted two equal, "
            "non-empty rows of numbers"
        )
    for name, values, lowest in (("label", labels, 0), ("prediction", predicted, UNPARSED)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"{name}s are {values.dtype}, wanted class numbers (int)")
        wrong = values[(values < lowest) | (values >= classes)]
        if wrong.size:
            raise ValueError(f"{name} {wrong[0]}: wanted {lowest} … {classes - 1}")
    columns = np.where(predicted == UNPARSED, classes, predicted)
    return labels.astype(np.int64) * (classes + 1) + columns
