"""VOC AP: Detectron2's numbers on a worked example, and edge cases.

Live, on thousands of generated cases: tests/parity/test_voc_ap_vs_detectron2.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from detection.evaluation.voc_ap import (
    evaluate_voc,
    match_classes,
    precision_recall,
    through_text,
)
from moco.errors import DataError

NAMES = ("cat", "dog")


def record(image_id, *objects) -> dict:
    """Objects: (class, xmin, ymin, xmax, ymax[, difficult]), 1-based inclusive."""
    annotations = [
        {
            "category_id": o[0],
            "bbox": [o[1] - 1.0, o[2] - 1.0, float(o[3]), float(o[4])],
            "bbox_mode": 0,
            "difficult": o[5] if len(o) > 5 else 0,
        }
        for o in objects
    ]
    return {"image_id": image_id, "annotations": annotations}


def detections(*rows) -> dict:
    """Rows: (image id, class, score, x0, y0, x1, y1), boxes from 0."""
    out = {}
    for image_id in dict.fromkeys(r[0] for r in rows):
        own = [r for r in rows if r[0] == image_id]
        out[image_id] = (
            np.array([r[3:] for r in own], dtype=np.float32),
            np.array([r[2] for r in own], dtype=np.float32),
            np.array([r[1] for r in own]),
        )
    return out


RECORDS = [
    record(
        "000001",
        (0, 11, 11, 110, 110),
        (0, 201, 51, 300, 150),
        (1, 301, 201, 400, 300, 1),
    ),
    record("000002", (0, 51, 51, 150, 250), (1, 11, 201, 110, 300)),
    record("000003"),
]
FOUND = detections(
    ("000001", 0, 0.90, 10, 10, 110, 110),
    ("000003", 0, 0.85, 0, 0, 40, 40),
    ("000001", 0, 0.80, 10, 10, 110, 100),
    ("000001", 0, 0.70, 220, 50, 320, 150),
    ("000002", 0, 0.60, 50, 50, 150, 210),
    ("000001", 1, 0.95, 300, 200, 400, 300),
    ("000002", 1, 0.50, 10, 210, 110, 310),
    ("000003", 1, 0.40, 0, 0, 40, 40),
)


def score(found, records=RECORDS, names=NAMES, year=2007, **options):
    result = evaluate_voc(found, records, names, year, **options)
    return result.ap, result.ap50, result.ap75


@pytest.mark.parametrize(
    ("names", "year", "expected"),
    [
        (NAMES, 2007, (61.909090909090914, 87.2727272727273, 73.63636363636365)),
        (NAMES, 2012, (60.999999999999986, 86.66666666666667, 73.33333333333333)),
        ((*NAMES, "bird"), 2007, (41.27272727272729, 58.181818181818194, 49.0909090909091)),
    ],
)
def test_golden_example(names, year, expected):
    """Numbers printed by Detectron2; equal to the last bit."""
    assert score(FOUND, names=names, year=year) == expected


def test_golden_example_per_class():
    result = evaluate_voc(FOUND, RECORDS, (*NAMES, "bird"), 2007)
    # By hand: cat (4 x 1 + 7 x 0.6) / 11 at 0.5, (4 x 1 + 3 x 0.4) / 11 at 0.75
    assert result.per_class["cat"]["AP50"] == pytest.approx(100 * 8.2 / 11)
    assert result.per_class["cat"]["AP75"] == pytest.approx(100 * 5.2 / 11)
    assert result.per_class["dog"]["AP50"] == pytest.approx(100)
    assert result.per_class["dog"]["AP"] == pytest.approx(70)  # found at 7 of 10 thresholds
    assert result.per_class["bird"] == {"AP": 0, "AP50": 0, "AP75": 0}
    assert result.absent_classes == ("bird",)


def test_control_one_changed_detection_changes_the_number():
    boxes, scores, classes = FOUND["000002"]
    moved = {**FOUND, "000002": (boxes + [[20, 0, 20, 0], [0, 0, 0, 0]], scores, classes)}
    assert score(moved) != score(FOUND)
    hard = [record("000001", (0, 11, 11, 110, 110)), *RECORDS[1:]]
    assert score(FOUND, records=hard) != score(FOUND)


SQUARE = [record("a", (0, 1, 1, 100, 100))]


def ap50(found, records=SQUARE, **options) -> float:
    return score(found, records, ("cat",), **options)[1]


def test_overlap_must_exceed_the_threshold():
    # 100 x 50 of 100 x 100: IoU is exactly 0.5
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 50))) == 0
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 51))) == pytest.approx(100)


def test_boxes_and_scores_pass_through_text():
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 50.04))) == 0
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 50.06))) == pytest.approx(100)
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 50.04)), round_detections=False) > 99
    # 0.9004 and 0.9001 tie at three decimals, so the first given stays first.
    rows = [("a", 0, 0.9001, 200, 200, 300, 300), ("a", 0, 0.9004, 0, 0, 100, 100)]
    assert ap50(detections(*rows)) == pytest.approx(50)
    assert ap50(detections(*rows), round_detections=False) == pytest.approx(100)


def test_three_of_ten_do_not_reach_recall_point_three():
    records = [record(f"{k}", (0, 1, 1, 100, 100)) for k in range(10)]
    found = detections(*((f"{k}", 0, 0.9 - k / 10, 0, 0, 100, 100) for k in range(3)))
    assert ap50(found, records) == 27.27272727272727


def test_second_best_box_is_never_taken():
    records = [record("a", (0, 1, 1, 100, 100), (0, 11, 1, 110, 100))]
    rows = [("a", 0, 0.9, 0, 0, 100, 100), ("a", 0, 0.8, 3, 0, 103, 100)]
    # Both are closest to the first box; the other box stays unfound.
    assert ap50(detections(*rows), records) == pytest.approx(100 * 6 / 11)


def test_difficult_boxes_neither_help_nor_hurt():
    records = [record("a", (0, 1, 1, 100, 100, 1), (0, 201, 1, 300, 100))]
    hit = ("a", 0, 0.5, 200, 0, 300, 100)
    ignored = [("a", 0, 0.9, 0, 0, 100, 100), ("a", 0, 0.8, 0, 0, 100, 99)]
    assert ap50(detections(*ignored, hit), records) == pytest.approx(100)
    assert ap50(detections(*ignored), records) == 0


def test_float_ground_truth_is_cut_to_integers():
    truth = record("a")
    truth["annotations"] = [
        {"category_id": 0, "bbox": [0.9, 0.2, 100.7, 50.99], "bbox_mode": 0, "difficult": 0}
    ]
    # (1.9, 1.2, 100.7, 50.99) is read as (1, 1, 100, 50), and 100 x 100 overlaps it by half.
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 100)), [truth]) == 0
    assert ap50(detections(("a", 0, 0.9, 0, 0, 100, 99)), [truth]) == pytest.approx(100)


def test_nothing_found_and_no_ground_truth():
    assert score({}) == (0, 0, 0)
    assert score({}, year=2012) == (0, 0, 0)
    found = detections(("a", 1, 0.9, 0, 0, 10, 10))
    assert score(found, SQUARE, NAMES) == (0, 0, 0)
    # Detectron2's way: under the 2012 metric a class without ground truth makes the mean nan.
    assert all(math.isnan(x) for x in score(found, SQUARE, NAMES, 2012))
    assert evaluate_voc(found, SQUARE, NAMES, 2012).absent_classes == ("dog",)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (detections(("x", 0, 0.9, 0, 0, 9, 9)), "'x' is not in the test split"),
        (detections(("a", 1, 0.9, 0, 0, 9, 9)), "allowed: 0 to 0"),
        (detections(("a", 0, 0.9, 0, 0, 9, np.nan)), "not finite"),
        ({"a": (np.zeros((2, 4)), np.zeros(1), np.zeros(1, int))}, "1 scores"),
    ],
)
def test_wrong_detections_are_data_errors(found, words):
    with pytest.raises(DataError, match=words):
        ap50(found)


def test_repeated_ids_and_unknown_years():
    with pytest.raises(DataError, match="occurs twice"):
        ap50({}, SQUARE * 2)
    with pytest.raises(ValueError, match="2007 or 2012"):
        score({}, year=2010)


def test_numbers_instead_of_text_for_single_precision():
    """Rounding by `rint` is exact for float32 and float16; see `through_text`."""
    rng = np.random.default_rng(0)
    for decimals, scale in ((3, 1.0), (1, 1000.0), (1, 1e9), (3, 1e-4), (1, 3e38)):
        halves = (rng.integers(-4000, 4000, 3000) + 0.5) / 10**decimals
        eighths = rng.integers(-80000, 80000, 3000) / 8  # exact halves among them
        values = np.concatenate([rng.uniform(-scale, scale, 20_000), halves, eighths, [0.0, -0.0]])
        for dtype in (np.float32, np.float16):
            given = values[np.abs(values) <= np.finfo(dtype).max].astype(dtype)
            text = [float(f"{float(value):.{decimals}f}") for value in given]
            assert given.size > 5000 and through_text(given, decimals).tobytes() == (
                np.array(text).tobytes()
            )


def test_double_precision_goes_through_text():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.uniform(0, 1000, 5000), (rng.integers(0, 9000, 5000) + 0.5) / 10])
    text = np.array([float(f"{value:.1f}") for value in values])
    assert np.array_equal(through_text(values, 1), text)
    # Control: the shortcut is wrong there, since 10 x has more bits than float64 keeps.
    assert not np.array_equal(np.rint(values * 10) / 10, text)


def test_masks_beside_the_boxes_are_ignored():
    with_masks = {image_id: (*arrays, ["mask"]) for image_id, arrays in FOUND.items()}
    assert score(with_masks) == score(FOUND)


def test_curves_for_plots():
    cat, dog = match_classes(FOUND, RECORDS, 2)
    assert cat.num_positives == 3 and dog.num_positives == 1
    assert cat.scores.tolist() == [0.9, 0.85, 0.8, 0.7, 0.6]
    recall, precision = precision_recall(cat, 0.5)
    assert recall == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 1])
    assert precision == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2, 3 / 5])
