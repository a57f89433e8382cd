"""Classification with several labels an image by linear SVMs, as others report VOC07.

For each class: an SVM for each cost, 3-fold cross-validation on the training images chooses the
cost, and the SVM of that cost on all of them is scored by average precision on the test images
(Goyal et al. 2019, arXiv 1905.01235; facebookresearch/fair_self_supervision_benchmark and vissl).
scikit-learn is imported here only.

Labels are int [N, C]: 1 the image shows the class, 0 it does not, -1 it is not counted (only
difficult objects of it). As in both of those codes, -1 is a negative in training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moco.child_processes import end_with_parent
from moco.errors import ConfigError, DataError

FOLDS = 3
# Goyal et al.'s: decades, and 2^-4 to 2^-19.
COSTS = (*(10.0**p for p in range(-7, 3)), *(2.0**-p for p in range(4, 20)))
_POSITIVE_WEIGHT = 2
_MOST_ITERATIONS = 2000


@dataclass(frozen=True)
class ClassResult:
    """One class. ap, ap_11: on the test images, in percent, by the area under the curve and by the
    11 points of VOC 2007; cost: chosen by cross_validation, the mean AP of the folds in percent."""

    name: str
    cost: float
    cross_validation: float
    ap: float
    ap_11: float
    num_positives: int


def require_scikit_learn() -> None:
    """Raises: ConfigError that says how to install it."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the SVM needs scikit-learn, which is not installed here; install it with "
            "pip install 'scikit-learn>=1.4' (or this project's extra: pip install '.[probes]')"
        ) from error


def normalize_rows(features_ND: np.ndarray) -> np.ndarray:
    """x / (|x| + 1e-5) as float64, as both codes do."""
    features_ND = features_ND.astype(np.float64)
    return features_ND / (np.linalg.norm(features_ND, axis=1, keepdims=True) + 1e-5)


def average_precision(positive: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """AP in [0, 1] of one class by its two definitions.

    Args:
        positive: bool [N]; scores: [N]. Equal scores keep their order.
    Returns: (area under the curve whose precision was made to fall, which other projects report
        for this task; mean of the best precision at 11 recalls, VOC 2007's own).
    """
    hits = positive[np.argsort(-scores, kind="stable")]
    true_positives = np.cumsum(hits)
    precision = true_positives / np.arange(1, len(hits) + 1)
    recall = true_positives / hits.sum()
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    area = float(np.sum(falling * np.diff(recall, prepend=0.0)))
    # As in detection.evaluation.voc_ap: the fourth point is 0.30000000000000004.
    points = [falling[recall >= p].max(initial=0.0) for p in np.arange(0.0, 1.1, 0.1)]
    return area, float(np.mean(points))


def classify(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: Sequence[str],
    *,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
    num_jobs: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[list[ClassResult], int]:
    """Cross-validate, train and score the SVMs of all classes.

    Args:
        train, test: (features [N, D], labels [N, C]); rows should have unit length.
        num_jobs: processes that fit at the same time.
    Returns: (a result a class, number of fits that had not converged after 2000 iterations).
    Raises: ConfigError without scikit-learn or for bad costs; DataError for a class with fewer
        positive training images than folds, or no positive test image.
    """
    require_scikit_learn()
    from joblib import Parallel, delayed

    if not costs or min(costs) <= 0:
        raise ConfigError(f"SVM: costs are {tuple(costs)}; allowed: numbers above 0, at least one")
    _check_positives(train[1], test[1], class_names)
    results, unconverged = [], 0
    with Parallel(n_jobs=num_jobs) as parallel:
        for number, name in enumerate(class_names):
            target = np.where(train[1][:, number] == 1, 1, -1)
            found = parallel(
                delayed(_in_worker)(os.getpid(), train[0], target, cost, seed) for cost in costs
            )
            validated, failures = zip(*found, strict=True)
            best = int(np.argmax(validated))  # the first of equals
            svm, failed = _fit(_svm(costs[best], seed), train[0], target)
            unconverged += sum(failures) + failed
            counted = test[1][:, number] != -1
            ap, ap_11 = average_precision(
                test[1][counted, number] == 1, svm.decision_function(test[0][counted])
            )
            results.append(
                ClassResult(
                    name, costs[best], 100 * validated[best], 100 * ap, 100 * ap_11,
                    int((test[1][:, number] == 1).sum()),
                )
            )  # fmt: skip
            say(f"{number + 1}/{len(class_names)} {name}: AP {100 * ap:.2f}, cost {costs[best]:g}")
    return results, unconverged


def _svm(cost: float, seed: int):
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: _POSITIVE_WEIGHT, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=_MOST_ITERATIONS,
        random_state=seed,
    )


def _in_worker(parent: int, *args) -> tuple[float, int]:
    """`_cross_validate` in a process of joblib's, which does not outlive the one it works for."""
    if os.getpid() != parent:  # with one job it is the same
        end_with_parent(parent=parent)
    return _cross_validate(*args)


def _cross_validate(features, target, cost: float, seed: int) -> tuple[float, int]:
    """(mean AP of the folds, scikit-learn's; number of fits that did not converge)."""
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    values, failures = [], 0
    for own, held_out in StratifiedKFold(FOLDS).split(features, target):
        svm, failed = _fit(_svm(cost, seed), features[own], target[own])
        scores = svm.decision_function(features[held_out])
        values.append(average_precision_score(target[held_out], scores))
        failures += failed
    return float(np.mean(values)), failures


def _fit(svm, features, target) -> tuple[object, int]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        svm.fit(features, target)
    return svm, sum(issubclass(w.category, ConvergenceWarning) for w in caught)


def _check_positives(train_labels, test_labels, class_names: Sequence[str]) -> None:
    for what, labels, least in (
        ("training", train_labels, FOLDS),
        ("test", test_labels, 1),
    ):
        for name, column in zip(class_names, labels.T, strict=True):
            count = int((column == 1).sum())
            if count < least:
                raise DataError(
                    f"SVM: class {name!r} is in {count} {what} images; allowed: {least} or more; "
                    "leave the class out or give more images"
                )
