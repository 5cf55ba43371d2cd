"""Metrics: by hand, against published numbers, and against the definition of the bootstrap."""

import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from emollama_jax.evaluate import metrics

# GPT-4V's first answers on two public test sets (one item of each missing); last column unparsed.
# Rows: surprise, fear, disgust, happiness, sadness, anger, neutral.
GPT4V_RAFDB = [
    [276, 13, 7, 0, 1, 4, 28, 0],
    [27, 34, 4, 2, 2, 1, 4, 0],
    [7, 2, 79, 3, 16, 17, 36, 0],
    [38, 5, 33, 917, 17, 4, 171, 0],
    [5, 25, 34, 10, 357, 9, 38, 0],
    [14, 9, 14, 4, 1, 115, 5, 0],
    [15, 3, 10, 7, 80, 16, 547, 1],
]
# Rows: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt.
GPT4V_FERPLUS = [
    [597, 20, 26, 500, 99, 7, 18, 10, 0],
    [64, 794, 39, 19, 6, 3, 4, 0, 0],
    [27, 19, 344, 17, 7, 1, 31, 0, 0],
    [28, 16, 11, 332, 31, 7, 22, 0, 1],
    [9, 26, 45, 27, 193, 9, 13, 4, 0],
    [1, 3, 2, 3, 11, 3, 0, 0, 0],
    [5, 2, 35, 15, 5, 0, 32, 0, 0],
    [10, 1, 1, 9, 6, 2, 0, 0, 0],
]
LABELS = [0, 0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, metrics.UNPARSED, 1, 0, 1]


def items(confusion) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions that give a confusion matrix."""
    confusion = np.asarray(confusion)
    rows, columns = np.indices(confusion.shape).reshape(2, -1).repeat(confusion.ravel(), axis=1)
    return rows, np.where(columns == len(confusion), metrics.UNPARSED, columns)


@pytest.mark.parametrize("array", [list, np.array, jnp.array, lambda x: np.array(x, np.int8)])
def test_by_hand(array):
    confusion = metrics.confusion_matrix(array(LABELS), array(PREDICTED), classes=4)
    assert confusion.tolist() == [[2, 1, 0, 0, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5]
    assert metrics.war(confusion) == 3 / 7
    assert metrics.uar(confusion) == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)  # class 3 has no items
    scores = metrics.per_class(confusion)
    assert scores.support.tolist() == [4, 2, 1, 0]
    np.testing.assert_array_equal(scores.recall, [0.5, 0.5, 0, np.nan])
    np.testing.assert_allclose(scores.precision, [2 / 3, 1 / 3, np.nan, np.nan])
    np.testing.assert_allclose(scores.f1, [4 / 7, 2 / 5, 0, np.nan])


@pytest.mark.parametrize(
    ("confusion", "published", "uar"),
    [(GPT4V_RAFDB, 75.81, 68.98), (GPT4V_FERPLUS, 64.25, 48.72)],
    ids=["RAF-DB", "FERPlus"],
)
def test_gpt4v_gives_its_published_accuracy(confusion, published, uar):
    labels, predicted = items(confusion)
    again = metrics.confusion_matrix(labels, predicted, classes=len(confusion))
    assert again.tolist() == confusion
    assert round(100 * metrics.war(again), 2) == published
    assert round(100 * metrics.uar(again), 2) == uar
    assert np.mean(metrics.per_class(again).recall) == pytest.approx(metrics.uar(again))


def test_answering_always_the_largest_class_has_the_uar_of_chance():
    labels, _ = items(GPT4V_RAFDB)
    confusion = metrics.confusion_matrix(labels, np.full_like(labels, 3), classes=7)
    assert metrics.war(confusion) == 1185 / 3067
    assert metrics.uar(confusion) == pytest.approx(1 / 7)


def test_bootstrap_equals_drawing_items_again():
    labels, predicted = items(np.array(GPT4V_RAFDB) // 8)
    fast = metrics.bootstrap(labels, predicted, classes=7, samples=4000, seed=1, level=0.9)
    rng = np.random.default_rng(2)
    drawn = []
    for _ in range(1500):
        chosen = rng.integers(0, len(labels), len(labels))
        confusion = metrics.confusion_matrix(labels[chosen], predicted[chosen], classes=7)
        drawn.append((metrics.war(confusion), metrics.uar(confusion)))
    want = np.quantile(drawn, [0.05, 0.95], axis=0)
    np.testing.assert_allclose([fast["war"].low, fast["war"].high], want[:, 0], atol=0.006)
    np.testing.assert_allclose([fast["uar"].low, fast["uar"].high], want[:, 1], atol=0.008)


def test_bootstrap_is_seeded_and_widens_with_the_level():
    labels, predicted = items(GPT4V_RAFDB)

    def interval(seed, level):
        settings = {"classes": 7, "samples": 500, "seed": seed, "level": level}
        return metrics.bootstrap(labels, predicted, **settings)["war"]

    assert interval(0, 0.95) == interval(0, 0.95)
    assert interval(0, 0.95) != interval(1, 0.95)
    wide, narrow = interval(0, 0.99), interval(0, 0.5)
    assert wide.low < narrow.low < 0.7581 < narrow.high < wide.high


def test_clusters_widen_the_interval_by_what_their_items_share():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(60), 20)
    labels = rng.integers(0, 2, 1200)
    right = np.repeat(rng.random(60) < 0.7, 20)  # a subject is right always or never
    predicted = np.where(right, labels, 1 - labels)
    settings = {"classes": 2, "samples": 2000, "seed": 0, "level": 0.95}
    free = metrics.bootstrap(labels, predicted, **settings)["war"]
    clustered = metrics.bootstrap(labels, predicted, clusters=subjects.tolist(), **settings)["war"]
    ratio = (clustered.high - clustered.low) / (free.high - free.low)
    assert ratio == pytest.approx(np.sqrt(20), rel=0.1)
    own = metrics.bootstrap(labels, predicted, clusters=range(1200), **settings)["war"]
    assert own.high - own.low == pytest.approx(free.high - free.low, rel=0.1)


def test_over_folds_is_the_mean_of_scores_not_the_score_of_the_sum():
    folds = [[[8, 2, 0], [1, 1, 0]], [[1, 1, 0], [0, 98, 0]]]
    result = metrics.over_folds(folds)
    assert result.wars == (0.75, 0.99)
    assert result.war == pytest.approx(0.87)
    assert result.uars == pytest.approx((0.65, 0.75))
    assert result.uar == pytest.approx(0.7)
    assert metrics.war(np.sum(folds, axis=0)) != pytest.approx(0.87, abs=0.05)
    assert result.war_std == pytest.approx(np.std([0.75, 0.99], ddof=1))
    assert result.uar_std == pytest.approx(np.std([0.65, 0.75], ddof=1))
    assert math.isnan(metrics.over_folds(folds[:1]).war_std)


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([0, 1], [0], "two equal"),
        ([], [], "non-empty"),
        ([0, 4], [0, 0], "label 4: wanted 0 … 3"),
        ([-1, 0], [0, 0], "label -1"),
        ([0, 1], [0, 4], "prediction 4: wanted -1 … 3"),
        ([0.0, 1.0], [0, 1], "labels are float64"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion_matrix(labels, predicted, classes=4)


def test_missing_clusters_and_folds_are_refused():
    with pytest.raises(ValueError, match="2 clusters for 7 items"):
        metrics.bootstrap(
            LABELS, PREDICTED, classes=3, samples=9, seed=0, level=0.9, clusters=[1, 2]
        )
    with pytest.raises(ValueError, match="no folds"):
        metrics.over_folds([])


@st.composite
def cases(draw):
    """Classes, and labels and answers that may miss some; answers may name nothing."""
    classes = draw(st.integers(2, 11))
    size = draw(st.integers(1, 60))
    present = draw(st.lists(st.integers(0, classes - 1), min_size=1, unique=True))
    labels = draw(st.lists(st.sampled_from(present), min_size=size, max_size=size))
    answers = st.integers(metrics.UNPARSED, classes - 1)
    if draw(st.booleans()):
        answers = st.just(metrics.UNPARSED)  # a model that says nothing at all
    return classes, labels, draw(st.lists(answers, min_size=size, max_size=size))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_scores_are_those_of_scikit_learn(case):
    classes, labels, answers = case
    confusion = metrics.confusion_matrix(labels, answers, classes=classes)
    known = [*range(classes), metrics.UNPARSED]
    want = sklearn.metrics.confusion_matrix(labels, answers, labels=known)
    np.testing.assert_array_equal(confusion, want[:classes])
    assert metrics.war(confusion) == pytest.approx(sklearn.metrics.accuracy_score(labels, answers))
    with warnings.catch_warnings():
        # It warns of answers that are no class of the labels, and of absent classes.
        warnings.simplefilter("ignore")
        balanced = sklearn.metrics.balanced_accuracy_score(labels, answers)
        precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
            labels, answers, labels=range(classes), zero_division=np.nan
        )
    assert metrics.uar(confusion) == pytest.approx(balanced)
    scores = metrics.per_class(confusion)
    np.testing.assert_array_equal(scores.support, support)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.f1, f1)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(right, items, low, high):
    found = metrics.wilson(right, items, level=0.95)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    mirrored = metrics.wilson(items - right, items, level=0.95)
    assert mirrored.low == pytest.approx(1 - found.high)
    assert math.isnan(metrics.wilson(0, 0, level=0.95).low)


def test_calibration_by_hand():
    scores = np.log([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    found = metrics.calibration([0, 1, 1, -1], scores - 100, bins=5)  # a constant changes nothing
    assert found.count.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(found.confidence, [np.nan, np.nan, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(found.accuracy, [np.nan, np.nan, 0, 1, 0.5])
    assert found.error == pytest.approx((0.5 + 0.3 + 2 * 0.4) / 4)


def test_calibration_error_of_honest_probabilities_is_small(rng):
    likelihood = rng.dirichlet([0.5] * 7, 20_000)
    labels = [rng.choice(7, p=row) for row in likelihood]
    assert metrics.calibration(labels, np.log(likelihood), bins=10).error < 0.02
    assert metrics.calibration(labels, 3 * np.log(likelihood), bins=10).error > 0.1  # too sure
