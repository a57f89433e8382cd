"""VOC AP: Detectron2's numbers on a worked example, edge cases, and live on random ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from detection.data.voc import DatasetSpec, load_records
from detection.evaluation.voc_ap import evaluate_voc
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


def random_case(rng, folder, names, num_images=12):
    """A VOC folder and detections of it: near, doubled, far, of wrong classes."""
    found = {}
    for sub in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / sub).mkdir(parents=True)
    ids = [f"{k:06d}" for k in range(num_images)]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(ids) + "\n")
    from PIL import Image

    for image_id in ids:
        Image.new("L", (120, 100)).save(folder / f"JPEGImages/{image_id}.jpg")
        lines, boxes, classes = [], [], []
        for _ in range(rng.integers(0, 5)):
            x, y = rng.integers(1, 80), rng.integers(1, 60)
            right, low = x + rng.integers(0, 40), y + rng.integers(5, 40)
            label = int(rng.integers(len(names) - 1))  # the last class is absent
            lines.append(
                f"<object><name>{names[label]}</name><pose>x</pose><truncated>0</truncated>"
                f"<difficult>{int(rng.random() < 0.2)}</difficult><bndbox><xmin>{x}</xmin>"
                f"<ymin>{y}</ymin><xmax>{right}</xmax><ymax>{low}</ymax></bndbox></object>"
            )
            for _ in range(rng.integers(0, 4)):
                boxes.append(np.array([x - 1, y - 1, right, low]) + rng.normal(0, 3, 4))
                classes.append(label if rng.random() < 0.8 else int(rng.integers(len(names))))
        size = "<size><width>120</width><height>100</height><depth>1</depth></size>"
        text = f"<annotation>{size}{''.join(lines)}</annotation>"
        (folder / f"Annotations/{image_id}.xml").write_text(text)
        scores = rng.uniform(0, 1, len(boxes)).astype(np.float32)
        boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        found[image_id] = (boxes, scores, np.array(classes, dtype=np.int64))
    return found


@pytest.mark.detectron2
@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("trial", range(6))
def test_equals_detectron2_to_the_last_bit(tmp_path, monkeypatch, trial, year):
    voc = pytest.importorskip("detectron2.evaluation.pascal_voc_evaluation")
    data = pytest.importorskip("detectron2.data")
    structures = pytest.importorskip("detectron2.structures")
    import torch

    rng = np.random.default_rng(100 * year + trial)
    names = tuple("abcde")[: 2 + trial % 4]
    found = random_case(rng, tmp_path, names)
    name = f"random_{year}_{trial}_{tmp_path.name}"
    data.MetadataCatalog.get(name).set(
        dirname=str(tmp_path), split="test", year=year, thing_classes=list(names)
    )
    evaluator = voc.PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    records, _ = load_records(DatasetSpec("x", str(tmp_path), "test", names, year))
    for image_id, (boxes, scores, classes) in found.items():
        instances = structures.Instances((100, 120))
        instances.pred_boxes = structures.Boxes(torch.from_numpy(boxes))
        instances.scores = torch.from_numpy(scores)
        instances.pred_classes = torch.from_numpy(classes)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    # Only the order of tied scores is ours; with it, no digit may differ.
    stable = SimpleNamespace(**{k: getattr(np, k) for k in dir(np) if not k.startswith("__")})
    stable.argsort = lambda values: np.argsort(values, kind="stable")
    monkeypatch.setattr(voc, "np", stable)
    with np.errstate(all="ignore"):
        theirs = evaluator.evaluate()["bbox"]
    expected = np.array([theirs["AP"], theirs["AP50"], theirs["AP75"]])
    assert np.array_equal(score(found, records, names, year), expected, equal_nan=True)
    if not np.isnan(expected).any():
        moved = {k: (b + np.float32(4), s, c) for k, (b, s, c) in found.items()}  # control
        assert not np.array_equal(score(moved, records, names, year), expected)
