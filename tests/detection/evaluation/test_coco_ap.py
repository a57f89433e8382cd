"""COCO's AP on cases worked by hand; against Detectron2 in tests/parity."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detection.config import get_defaults
from detection.data.datasets import DetectionData
from detection.evaluation.coco_ap import METRICS, RESULTS_FILE, coco_results, evaluate_coco
from detection.evaluation.pr_curves import CURVES_FILE, read_curves
from detection.scoring import metric_in_words, score_detections
from moco.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES, CATEGORY_IDS = ("cat", "dog"), (3, 12)
RECORDS = [{"image_id": n, "height": 200, "width": 300, "annotations": []} for n in (7, 9)]


def truth(number, image_id, category_id, box, **changes) -> dict:
    x0, y0, x1, y1 = box
    entry = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
    }
    return {k: v for k, v in {**entry, **changes}.items() if v is not None}


@pytest.fixture
def score(tmp_path):
    def run(annotations, detections, *, with_masks=False):
        content = {
            "images": [{"id": n, "file_name": "x", "height": 200, "width": 300} for n in (9, 7)],
            "annotations": annotations,
            "categories": [{"id": 12, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        path = tmp_path / "x.json"
        path.write_text(json.dumps(content))
        results = coco_results(detections, RECORDS, CATEGORY_IDS)
        return evaluate_coco(results, path, RECORDS, NAMES, with_masks=with_masks)

    return run


def found(*rows, masks=None) -> tuple:
    """Rows (box, score, class) as an engine gives them."""
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    scores = np.array([row[1] for row in rows], np.float32)
    classes = np.array([row[2] for row in rows], np.int64)
    return (boxes, scores, classes) if masks is None else (boxes, scores, classes, masks)


def box_mask(x0, y0, x1, y1) -> dict:
    mask = np.zeros((200, 300), np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return coco_mask.encode(mask)


A, B = (10, 10, 110, 110), (150, 20, 250, 120)  # 10,000 pixels each: large


def test_two_of_two_found_with_a_false_alarm_between(score):
    scores = score(
        [truth(1, 7, 3, A), truth(2, 9, 3, B)],
        {7: found((A, 0.9, 0)), 9: found(((0, 80, 120, 190), 0.8, 0), (B, 0.7, 0))},
    )["bbox"]
    # Precision 1 up to recall 1/2 (51 of the 101 points), 2/3 beyond, at every IoU.
    expected = 100 * (51 + 50 * 2 / 3) / 101
    for name in ("AP", "AP50", "AP75", "APl"):
        assert scores.overall[name] == pytest.approx(expected, abs=1e-9)
    assert math.isnan(scores.overall["APs"]) and math.isnan(scores.overall["APm"])
    assert tuple(scores.overall) == METRICS
    assert scores.per_class["cat"]["AP"] == pytest.approx(expected, abs=1e-9)
    assert math.isnan(scores.per_class["dog"]["AP"])  # no ground truth: not in the mean


def test_iou_exactly_at_the_threshold_counts_unlike_vocs(score):
    # 100 x 75 of 100 x 100: IoU 0.75, without a pixel added to the sides.
    scores = score([truth(1, 7, 3, A)], {7: found(((10, 10, 110, 85), 0.9, 0))})["bbox"]
    assert (scores.overall["AP50"], scores.overall["AP75"]) == pytest.approx((100, 100))
    assert scores.overall["AP"] == pytest.approx(60)  # 0.50 to 0.75 of the ten thresholds
    assert scores.per_class["cat"] == pytest.approx({"AP": 60, "AP50": 100, "AP75": 100})


def test_areas(score):
    small, medium = (10, 10, 40, 40), (60, 60, 120, 120)
    scores = score(
        [truth(1, 7, 3, small), truth(2, 7, 3, medium), truth(3, 7, 3, B)],
        {7: found((small, 0.9, 0), (medium, 0.8, 0))},
    )["bbox"].overall
    assert (scores["APs"], scores["APm"], scores["APl"]) == pytest.approx((100, 100, 0))
    assert scores["AP"] == pytest.approx(100 * 67 / 101)  # recall 2/3: 67 points


def test_a_crowd_is_no_object_and_absorbs_detections(score):
    inside = [((160, 30 + n, 170, 40 + n), 0.9, 0) for n in range(5)]
    annotations = [truth(1, 7, 3, A), truth(2, 7, 3, B, iscrowd=1)]
    scores = score(annotations, {7: found(*inside, (A, 0.5, 0))})["bbox"].overall
    assert scores["AP"] == pytest.approx(100)
    annotations[1]["iscrowd"] = 0  # control
    assert score(annotations, {7: found(*inside, (A, 0.5, 0))})["bbox"].overall["AP"] < 20


def test_a_hundred_detections_of_an_image_count(score):
    others = [((0, 150, 10 + n / 10, 190), 0.9, 0) for n in range(100)]
    annotations = [truth(1, 7, 3, A)]
    assert score(annotations, {7: found(*others, (A, 0.5, 0))})["bbox"].overall["AP"] == 0
    assert score(annotations, {7: found(*others[1:], (A, 0.5, 0))})["bbox"].overall["AP"] > 0.9


def test_number_zero_and_missing_fields_lose_nothing(score):
    """pycocotools itself takes annotation 0 for "not found", and raises without the fields."""
    detections = {7: found((A, 0.9, 0)), 9: found((B, 0.8, 1))}
    annotations = [truth(0, 7, 3, A, area=None, iscrowd=None), truth(5, 9, 12, B)]
    scores = score(annotations, detections)["bbox"]
    assert scores.overall["AP"] == pytest.approx(100) == scores.overall["APl"]


def test_nothing_detected_is_zero_where_there_was_something_to_find(score):
    for detections in ({}, {7: found()}):
        scores = score([truth(1, 7, 3, A)], detections)["bbox"]
        assert (scores.overall["AP"], scores.overall["APl"]) == (0, 0)
        assert math.isnan(scores.overall["APs"]) and math.isnan(scores.per_class["dog"]["AP"])
    only_crowds = score([truth(1, 7, 3, A, iscrowd=1)], {7: found((A, 0.9, 0))})["bbox"]
    assert all(math.isnan(value) for value in only_crowds.overall.values())


def test_masks_have_scores_and_areas_of_their_own(score):
    left_half = truth(1, 7, 3, A, segmentation=[[10, 10, 60, 10, 60, 110, 10, 110]], area=5000)
    detections = {7: found((A, 0.9, 0), masks=[box_mask(10, 10, 60, 110)])}
    scores = score([left_half], detections, with_masks=True)
    assert scores["bbox"].overall["AP"] == scores["segm"].overall["AP"] == pytest.approx(100)
    assert scores["segm"].overall["APm"] == pytest.approx(100)  # 5000 pixels
    # Control: a mask of the whole box has IoU 0.5 with half of it.
    detections = {7: found((A, 0.9, 0), masks=[box_mask(*A)])}
    scores = score([left_half], detections, with_masks=True)
    assert (scores["bbox"].overall["AP"], scores["segm"].overall["AP"]) == pytest.approx((100, 10))
    # An unmatched mask of 10,000 pixels is no false alarm among the medium ones, though it would
    # be if it had no area of its own.
    other = {7: found((A, 0.9, 0), (B, 0.95, 0), masks=[box_mask(10, 10, 60, 110), box_mask(*B)])}
    assert score([left_half], other, with_masks=True)["segm"].overall["APm"] == pytest.approx(100)


def test_results_are_cocos(tmp_path):
    detections = {9: found(((1, 2, 4.5, 8), 0.5, 1), masks=[box_mask(1, 2, 4, 8)])}
    (result,) = coco_results(detections, RECORDS, CATEGORY_IDS)
    text = result["segmentation"].pop("counts")
    assert isinstance(text, str) and result == {
        "image_id": 9,
        "category_id": 12,
        "bbox": [1.0, 2.0, 3.5, 6.0],
        "score": 0.5,
        "segmentation": {"size": [200, 300]},
    }


@pytest.mark.parametrize(
    ("detections", "words"),
    [
        ({8: found((A, 0.9, 0))}, "image 8 is not in the test data"),
        ({7: found((A, 0.9, 2))}, "image 7 has class 2; allowed: 0 to 1"),
        ({7: found((A, float("nan"), 0))}, "image 7 has a box or score that is not finite"),
    ],
)
def test_other_detections_are_refused(detections, words):
    with pytest.raises(DataError, match=words):
        coco_results(detections, RECORDS, CATEGORY_IDS)


def test_a_changed_file_is_refused(score, tmp_path):
    score([truth(1, 7, 3, A)], {})
    path = tmp_path / "x.json"
    content = json.loads(path.read_text())
    for field, value in (("images", content["images"][:1]), ("annotations", [{}])):
        path.write_text(json.dumps({**content, field: value}))
        with pytest.raises(DataError, match="x.json: changed after the check .*; start again"):
            evaluate_coco([], path, RECORDS, NAMES)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        evaluate_coco([], path, RECORDS, NAMES)


def test_scores_of_a_trial(score, tmp_path, capsys):
    detections = {7: found((A, 0.9, 0), masks=[box_mask(*A)])}
    score([truth(1, 7, 3, A)], detections)
    data = DetectionData(
        [], RECORDS, NAMES, None, "x", SimpleNamespace(), "coco", tmp_path / "x.json", CATEGORY_IDS
    )
    cfg = get_defaults()
    cfg.MODEL.MASK_ON = True
    scores = score_detections(data, cfg, detections, tmp_path)
    assert capsys.readouterr().out == ""
    json.dumps(scores, allow_nan=False)
    assert scores["AP"] == scores["coco"]["bbox"]["AP"] == pytest.approx(100)
    assert scores["coco"]["segm"]["APs"] is None and scores["per_class"]["dog"]["AP50"] is None
    assert read_curves(tmp_path / CURVES_FILE).precision[0, 0].min() == pytest.approx(1)
    assert json.loads((tmp_path / RESULTS_FILE).read_text())[0]["category_id"] == 3
    assert metric_in_words(data, cfg) == (
        "COCO, boxes and masks (101 points, 100 detections an image)"
    )
    cfg.MODEL.MASK_ON = False
    assert score_detections(data, cfg, detections, None)["coco"].keys() == {"bbox"}
