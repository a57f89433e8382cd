"""Curves on the grid of recalls: by hand, and that the metrics' AP can be read off them."""

import numpy as np
import pytest

from detection.evaluation.pr_curves import (
    IOUS,
    RECALLS,
    PrCurves,
    coco_curves,
    mean_over_classes,
    on_grid,
    read_curves,
    voc_curves,
    write_curves,
)
from detection.evaluation.voc_ap import evaluate_voc
from moco.errors import CheckpointError

NAMES = ("cat", "dog", "absent")


def test_grid_by_hand():
    # 4 objects: hit, miss, hit, miss, hit; recall 1/4, 1/4, 2/4, 2/4, 3/4.
    recall = np.array([0.25, 0.25, 0.5, 0.5, 0.75])
    precision = np.array([1.0, 0.5, 2 / 3, 0.5, 0.6])
    curve = on_grid(recall, precision)
    assert curve.shape == (101,)
    assert set(curve[:26]) == {1.0}  # up to a recall of exactly 0.25
    assert set(curve[26:51]) == {2 / 3}
    assert set(curve[51:76]) == {0.6}  # not 0.5: a better precision comes later
    assert set(curve[76:]) == {0.0}
    assert set(on_grid(np.zeros(0), np.zeros(0))) == {0.0}


def random_case(seed, num_images=40):
    """Ground truth of two of three classes, and detections round it, worse with every step."""
    rng = np.random.default_rng(seed)
    records, detections = [], {}
    for image_id in range(num_images):
        corners = rng.uniform(0, 100, (6, 2)).round()
        truths = np.concatenate([corners, corners + rng.uniform(30, 60, (6, 2)).round()], axis=1)
        classes = rng.integers(0, 2, 6)
        records.append({
            "image_id": image_id,
            "annotations": [
                {"bbox": box.tolist(), "category_id": int(c), "difficult": int(rng.random() < 0.1)}
                for box, c in zip(truths, classes, strict=True)
            ],
        })  # fmt: skip
        found = truths + rng.normal(0, 3, truths.shape)
        scores = rng.uniform(0.05, 1, 6).astype(np.float32)
        guessed = np.where(rng.random(6) < 0.8, classes, 1 - classes)
        detections[image_id] = (found.astype(np.float32), scores, guessed)
    return detections, records


@pytest.mark.parametrize("rounded", [True, False])
def test_the_metric_can_be_read_off_the_curves(rounded):
    detections, records = random_case(0)
    curves = voc_curves(detections, records, NAMES, rounded)
    area = evaluate_voc(detections, records, NAMES, 2012, rounded).per_class
    points = evaluate_voc(detections, records, NAMES, 2007, rounded).per_class
    for number, score in enumerate(("AP50", "AP75")):
        for class_id, name in enumerate(NAMES[:2]):
            curve = curves.precision[number, class_id]
            assert (np.diff(curve) <= 0).all() and 0.2 < curve[0] <= 1
            assert curve[:-1].mean() == pytest.approx(area[name][score] / 100, abs=0.01)
            assert curve[::10].mean() == pytest.approx(points[name][score] / 100, abs=1e-12)
    # Negative control: the two thresholds have different curves.
    assert abs(curves.precision[0, 0] - curves.precision[1, 0]).max() > 0.1
    assert np.isnan(curves.precision[:, 2]).all()  # no ground truth, no recall
    assert curves.class_names == NAMES


def test_a_class_with_ground_truth_that_is_never_found_is_zero():
    _, records = random_case(1)
    assert (voc_curves({}, records, NAMES).precision[:, :2] == 0).all()


def test_coco_array_is_cut_at_its_places():
    shape = (10, 101, 3, 4, 3)  # IoUs, recalls, classes, areas, numbers of detections
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    array[:, :, 2] = -1
    curves = coco_curves(array, NAMES)
    assert curves.precision.shape == (2, 3, 101)
    assert curves.precision[0, 1, 7] == array[0, 7, 1, 0, 2]
    assert curves.precision[1, 0, 100] == array[5, 100, 0, 0, 2]
    assert np.isnan(curves.precision[:, 2]).all()


def test_mean_leaves_classes_without_ground_truth_out():
    precision = np.zeros((2, 3, 101))
    precision[:, 0], precision[:, 1], precision[:, 2] = 1.0, 0.5, np.nan
    assert (mean_over_classes(precision) == 0.75).all()
    assert np.isnan(mean_over_classes(np.full((1, 2, 101), np.nan))).all()


def test_files_are_read_back_and_others_refused(tmp_path):
    detections, records = random_case(2)
    curves = voc_curves(detections, records, NAMES)
    path = write_curves(curves, tmp_path)
    again = read_curves(path)
    assert again.class_names == NAMES
    np.testing.assert_array_equal(again.precision, curves.precision)
    with np.load(path) as arrays:
        assert arrays["iou"].tolist() == list(IOUS)
        np.testing.assert_array_equal(arrays["recall"], RECALLS)
    write_curves(PrCurves(NAMES, curves.precision[:, :, :50]), tmp_path)
    with pytest.raises(CheckpointError, match=r"shape \(2, 3, 50\)"):
        read_curves(path)
    for content in (b"", b"nothing", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="pr_curves.npz: holds no curves"):
            read_curves(path)
