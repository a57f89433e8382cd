"""SVM classification: AP against worked and independent ones, costs, ignored images, refusals."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moco.errors import ConfigError, DataError
from moco.evaluation.svm import (
    COSTS,
    average_precision,
    classify,
    normalize_rows,
    require_scikit_learn,
)


def data(num, seed, classes=2):
    """Features around a centre for each label, and labels [num, classes] with some -1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num, classes)) < 0.4).astype(np.int8)
    centres = np.random.default_rng(99).normal(size=(classes, 5))
    features = labels @ centres + rng.normal(size=(num, 5))
    labels[rng.random((num, classes)) < 0.1] = -1
    return normalize_rows(features), labels


def test_average_precision_worked_by_hand():
    # Right, wrong, right, wrong: precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1.
    positive, scores = np.array([True, False, True, False]), np.array([4.0, 3.0, 2.0, 1.0])
    area, eleven = average_precision(positive, scores)
    assert area == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert average_precision(positive, -scores)[0] == pytest.approx(0.5 * 1 / 2 + 0.5 * 1 / 2)
    assert average_precision(np.array([False, True]), np.array([1.0, 2.0])) == (1.0, 1.0)


def curve_area(positive, scores):
    """Another formula: for each positive, the best precision at its recall or beyond."""
    hits = positive[np.argsort(-scores)]
    precision = [hits[: i + 1].mean() for i in range(len(hits))]
    return np.mean([max(precision[i:]) for i in np.flatnonzero(hits)])


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_against_another_formula(seed):
    rng = np.random.default_rng(seed)
    positive, scores = rng.random(60) < 0.3, rng.normal(size=60)
    area, eleven = average_precision(positive, scores)
    assert area == pytest.approx(curve_area(positive, scores))
    assert eleven == pytest.approx(voc_2007(positive, scores))
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    raw = sklearn_metrics.average_precision_score(positive, scores)
    assert raw <= area + 1e-12  # theirs does not make the curve fall first


def voc_2007(positive, scores):
    """The detection benchmark's function, which equals Detectron2's."""
    from detection.evaluation.voc_ap import average_precision as detection_ap

    hits = positive[np.argsort(-scores)]
    recall = np.cumsum(hits) / hits.sum()
    return detection_ap(recall, np.cumsum(hits) / np.arange(1, len(hits) + 1), 2007)


def test_equal_scores_keep_their_order():
    positive = np.array([True, False] * 10)
    assert average_precision(positive, np.zeros(20))[0] == pytest.approx(curve_area_of_order())


def curve_area_of_order():
    hits = np.array([True, False] * 10)
    precision = [hits[: i + 1].mean() for i in range(20)]
    return np.mean([max(precision[i:]) for i in np.flatnonzero(hits)])


def run(train, test, **options):
    options = {"costs": (0.01, 1.0), "say": lambda line: None, **options}
    return classify(train, test, ["cat", "dog"], **options)


def test_the_cost_is_chosen_by_cross_validation_alone():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    train, test = data(90, 0), data(80, 1)
    results, unconverged = run(train, test, costs=(1e-4, 0.1, 5.0))
    assert unconverged == 0 and [r.name for r in results] == ["cat", "dog"]
    for number, result in enumerate(results):
        target = np.where(train[1][:, number] == 1, 1, -1)
        means = {}
        for cost in (1e-4, 0.1, 5.0):
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0,
                            dual=True)  # fmt: skip
            scores = cross_val_score(svm, *(train[0], target), cv=3, scoring="average_precision")
            means[cost] = 100 * scores.mean()
        assert result.cross_validation == pytest.approx(max(means.values()), abs=1e-6)
        assert result.cost == max(means, key=means.get)
        svm.set_params(C=result.cost).fit(train[0], target)
        counted = test[1][:, number] != -1
        expected = curve_area(
            test[1][counted, number] == 1, svm.decision_function(test[0][counted])
        )
        assert result.ap == pytest.approx(100 * expected)
        assert result.num_positives == (test[1][:, number] == 1).sum()


def test_an_ignored_test_image_does_not_count():
    pytest.importorskip("sklearn")
    train, test = data(90, 0), data(80, 1)
    ignored = test[1] == -1
    scrambled = test[0].copy()
    only_cat = ignored[:, 0]
    assert only_cat.any()
    scrambled[only_cat] = -scrambled[only_cat]
    before, after = run(train, test)[0], run(train, (scrambled, test[1]))[0]
    assert before[0] == after[0]
    assert before[1] != after[1]  # a negative control: for the dog they do count


def test_an_ignored_training_image_is_a_negative():
    pytest.importorskip("sklearn")
    train, test = data(90, 0), data(80, 1)
    as_negative = np.where(train[1] == -1, 0, train[1])
    as_positive = np.where(train[1] == -1, 1, train[1])
    found = run(train, test)[0]
    assert found == run((train[0], as_negative), test)[0]
    assert found != run((train[0], as_positive), test)[0]


def test_the_same_seed_gives_the_same_scores_in_any_number_of_processes():
    pytest.importorskip("sklearn")
    train, test = data(60, 2), data(40, 3)
    assert run(train, test)[0] == run(train, test, num_jobs=2)[0]


def test_fits_that_do_not_converge_are_counted():
    pytest.importorskip("sklearn")
    train, test = data(60, 2), data(40, 3)
    assert run((1e4 * train[0], train[1]), test, costs=(1e3,))[1] > 0


def test_the_costs_are_goyals():
    assert len(COSTS) == 26 and min(COSTS) == pytest.approx(1e-7) and max(COSTS) == 100
    assert 2**-19 in COSTS and 2**-4 in COSTS


def test_too_few_positives_are_refused():
    train, test = data(60, 2), data(40, 3)
    few = train[1].copy()
    few[:, 1] = 0
    few[:2, 1] = 1
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match="'dog' is in 2 training images; allowed: 3 or more"):
        run((train[0], few), test)
    with pytest.raises(DataError, match="'cat' is in 0 test images"):
        run(train, (test[0], np.minimum(test[1], 0)))
    with pytest.raises(ConfigError, match="costs are"):
        run(train, test, costs=(0.0,))


def test_without_scikit_learn_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="pip install 'scikit-learn") as caught:
        require_scikit_learn()
    assert "\n" not in str(caught.value)
