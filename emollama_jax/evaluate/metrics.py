"""The field's numbers as pure functions: confusion matrix, WAR, UAR, per-class scores, intervals.

WAR (weighted average recall) is the share of right answers, UAR (unweighted average recall) the
mean of the per-class recalls. Everything is computed from the confusion matrix, never from a
label list, so that a number can be checked by eye. All scores are shares, 0 … 1.

Arrays of NumPy and JAX are taken alike; what comes back is NumPy arrays and plain floats.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
    """The result of a cross-validated set: the mean of the folds' scores, as DFEW and MAFW ask.

    Standard deviations are those of a sample (n - 1 below the line); nan for a single fold.
    """

    war: float
    uar: float
    war_std: float
    uar_std: float
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
        seed: random seed of the draws.
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
        rows = [number[cluster] for cluster in clusters]
        np.add.at(members, (rows, cells), 1)  # ty: ignore[invalid-argument-type]  # stubs lack tuples
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
    spread = [statistics.stdev(x) if len(x) > 1 else math.nan for x in (wars, uars)]
    return Folds(
        war=float(np.mean(wars)),
        uar=float(np.mean(uars)),
        war_std=spread[0],
        uar_std=spread[1],
        wars=wars,
        uars=uars,
    )


def wilson(right: int, items: int, *, level: float) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); nan for a share of nothing.

    Unlike the normal approximation it stays within 0 … 1, and has a width at shares of 0 and 1:
    30 of 30 right answers are no proof of perfection.
    """
    if not items:
        return Interval(math.nan, math.nan)
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share, spread = right / items, z * z / items
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return Interval(
        max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))
    )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Distance of stated probabilities from the share of correct answers.

    Attributes:
        confidence: mean probability of the answered class, of each bin; nan for an empty one.
        accuracy: share of right answers of each bin; nan for an empty one.
        count: answers of each bin.
        error: the expected calibration error, Σ count/n · |accuracy - confidence| (Guo 2017).
    """

    confidence: Float[np.ndarray, " k"]
    accuracy: Float[np.ndarray, " k"]
    count: Int[np.ndarray, " k"]
    error: float


def calibration(labels: ArrayLike, log_likelihood: ArrayLike, *, bins: int) -> Calibration:
    """Calibration of label scoring; probabilities are a softmax over the labels.

    Args:
        labels: int [N], -1 where the true class is none of the scored ones.
        log_likelihood: float [N, C], natural logarithm.
        bins: number of bins of equal width between 0 and 1.
    """
    labels, scores = np.asarray(labels), np.asarray(log_likelihood, np.float64)
    likelihood = np.exp(scores - scores.max(1, keepdims=True))
    confidence = likelihood.max(1) / likelihood.sum(1)
    right = likelihood.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of an empty bin
        stated = np.bincount(place, confidence, minlength=bins) / count
        reached = np.bincount(place, right, minlength=bins) / count
    gap = np.abs(reached - stated)[count > 0]
    return Calibration(
        confidence=stated,
        accuracy=reached,
        count=count,
        error=float(gap @ count[count > 0] / len(labels)),
    )


@dataclasses.dataclass(frozen=True)
class Positions:
    """Effect of an option's position in the question; C positions.

    Attributes:
        answered: share of the answers that named the option at each place.
        true: share of the items whose true class stood there.
        recall: right answers among those; nan where there are none.
        bias: half the summed distance of `answered` from `true`: 0 for none, near 1 for a model
            that always takes the same place.
    """

    answered: Float[np.ndarray, " c"]
    true: Float[np.ndarray, " c"]
    recall: Float[np.ndarray, " c"]
    bias: float


def positions(true: ArrayLike, answered: ArrayLike, *, places: int) -> Positions:
    """Position bias of answers to questions whose options were shuffled.

    Args:
        true: int [N], the place of the true class among the options of its question.
        answered: int [N], the place of the answered class.
        places: C.
    """
    true, answered = np.asarray(true), np.asarray(answered)
    stood = np.bincount(true, minlength=places)
    right = np.bincount(true[true == answered], minlength=places)
    shares = [np.bincount(x, minlength=places) / len(x) for x in (answered, true)]
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that Positions promises
        recall = right / stood
    bias = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return Positions(answered=shares[0], true=shares[1], recall=recall, bias=bias)


def plain(tree: Any) -> Any:
    """Numbers as JSON takes them: arrays and tuples become lists, what has no value (nan) None."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray):
        return plain(tree.tolist())
    if isinstance(tree, tuple | list):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


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
