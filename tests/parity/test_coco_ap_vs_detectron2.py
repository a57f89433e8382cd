"""COCO's AP here and from Detectron2's COCOEvaluator, over random files and detections.

Equal to the last bit to its official implementation, and to 1e-12 to its faster one.

A run makes 120 cases; COCO_AP_CASES=1000 in the environment makes so many. Half of them have
masks. Cases have crowds, categories without ground truth, images without objects or detections,
tied scores and over 100 detections an image.
"""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from detection.data.coco import CocoSpec, load_records
from detection.evaluation import coco_ap
from detection.evaluation.coco_ap import METRICS, RESULTS_FILE

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore"),  # of Detectron2 and pycocotools
]
NUM_CASES = int(os.environ.get("COCO_AP_CASES", "120"))
NAMES = ("cat", "dog", "bird")
CATEGORY_IDS = (2, 5, 11)


def polygon(box) -> list[float]:
    x, y, w, h = box
    corners = ((x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2))
    return [coordinate for corner in corners for coordinate in corner]


def make_case(rng: np.random.Generator, folder) -> tuple[CocoSpec, dict]:
    """An annotation file, and detections near and far from its boxes (in Detectron2's form)."""
    images, annotations, detections = [], [], {}
    for image_id in rng.permutation(np.arange(1, 40))[: rng.integers(1, 6)].tolist():
        height, width = (int(side) for side in rng.integers(60, 240, 2))
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
        )
        boxes = []
        for _ in range(rng.integers(0 if annotations else 1, 7)):
            w, h = rng.uniform(4, 0.7 * width), rng.uniform(4, 0.7 * height)
            box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
            box = [round(float(value), 2) for value in box]
            boxes.append(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    # The last category often has no ground truth.
                    "category_id": CATEGORY_IDS[int(rng.choice(3, p=(0.5, 0.45, 0.05)))],
                    "bbox": box,
                    "area": round(box[2] * box[3] / 2, 3),
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": [polygon(box)],
                }
            )
        detections[image_id] = make_detections(rng, boxes, height, width)
    rng.shuffle(annotations)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name}
            for number, name in reversed(list(zip(CATEGORY_IDS, NAMES, strict=True)))
        ],
    }
    path = folder / "case.json"
    path.write_text(json.dumps(content))
    return CocoSpec("case", path, folder), detections


def make_detections(rng, boxes, height, width) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = [np.array(box) for box in boxes for _ in range(rng.integers(0, 4))]
    count = 130 if rng.random() < 0.1 else int(rng.integers(0, 4))
    found += [rng.uniform(0, min(height, width) / 2, 4) for _ in range(count)]
    found = np.array(found, dtype=np.float64).reshape(-1, 4)
    found[:, :2] += rng.normal(0, 2, found[:, :2].shape)
    found[:, 2:] *= rng.uniform(0.8, 1.2, found[:, 2:].shape)
    corners = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)
    limits = [width, height, width, height]
    corners = np.minimum(corners.clip(min=0), limits).astype(np.float32)
    # One decimal ties many scores.
    scores = rng.random(len(found)).round(int(rng.choice([1, 6]))).astype(np.float32)
    return corners, scores, rng.choice(3, len(found), p=(0.5, 0.4, 0.1)).astype(np.int64)


def masks_of(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [N, H, W]: the diamond in each box."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x0, y0, x1, y1 = (boxes[:, k, None, None].astype(np.float64) for k in range(4))
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    half_x, half_y = np.maximum((x1 - x0) / 2, 1e-3), np.maximum((y1 - y0) / 2, 1e-3)
    return abs(x - middle_x) / half_x + abs(y - middle_y) / half_y <= 1


def detectron2s_results(spec, records, detections, masks, fast: bool, folder) -> dict:
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    metadata = MetadataCatalog.get("moco_coco_case")
    metadata.set(
        json_file=str(spec.json_file),
        thing_classes=list(NAMES),
        thing_dataset_id_to_contiguous_id={n: k for k, n in enumerate(CATEGORY_IDS)},
    )
    tasks = ("bbox",) if masks is None else ("bbox", "segm")
    try:
        evaluator = COCOEvaluator("moco_coco_case", tasks, False, str(folder), use_fast_impl=fast)
        evaluator.reset()
        for record in records:
            boxes, scores, classes = detections[record["image_id"]]
            found = Instances((record["height"], record["width"]))
            found.pred_boxes = Boxes(torch.from_numpy(boxes))
            found.scores, found.pred_classes = torch.from_numpy(scores), torch.from_numpy(classes)
            if masks is not None:
                found.pred_masks = torch.from_numpy(masks[record["image_id"]])
            evaluator.process([record], [{"instances": found}])
        return evaluator.evaluate()
    finally:
        MetadataCatalog.remove("moco_coco_case")


def ours(spec, records, detections, masks) -> tuple[dict, list]:
    from pycocotools import mask as coco_mask

    if masks is not None:
        detections = {
            image_id: (
                *found,
                [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in masks[image_id]],
            )
            for image_id, found in detections.items()
        }
    results = coco_ap.coco_results(detections, records, CATEGORY_IDS)
    with_masks = masks is not None
    scores = coco_ap.evaluate_coco(results, spec.json_file, records, NAMES, with_masks=with_masks)
    flat = {}
    for task, found in scores.items():
        per_class = {f"AP-{name}": values["AP"] for name, values in found.per_class.items()}
        flat[task] = {**found.overall, **per_class}
    return flat, results


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        a[k] == pytest.approx(b[k], rel=tolerance, abs=0.0, nan_ok=True) for k in a
    )


@pytest.fixture(scope="module", autouse=True)
def detectron2():
    return pytest.importorskip("detectron2.evaluation")


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    def run(seed: int, fast: bool) -> tuple[dict, dict]:
        rng = np.random.default_rng(seed)
        spec, detections = make_case(rng, tmp_path)
        monkeypatch.setattr("detection.data.coco._check_image_files", lambda *args: None)
        loaded = load_records(spec, for_scoring=True, with_masks=True)
        assert not loaded.report.problems and loaded.class_names == NAMES
        masks = None
        if seed % 2:
            sizes = {r["image_id"]: (r["height"], r["width"]) for r in loaded.records}
            masks = {i: masks_of(found[0], *sizes[i]) for i, found in detections.items()}
        capsys.readouterr()
        mine, results = ours(spec, loaded.records, detections, masks)
        assert capsys.readouterr().out == ""  # pycocotools' progress is kept back
        theirs = detectron2s_results(spec, loaded.records, detections, masks, fast, tmp_path)
        assert not results or len(results) == len(json.loads((tmp_path / RESULTS_FILE).read_text()))
        return mine, theirs, results

    return run


def test_equal_over_random_cases(compare, tmp_path):
    num_undefined = 0
    for seed in range(NUM_CASES):
        fast = seed % 3 == 0
        mine, theirs, results = compare(seed, fast)
        if results:
            assert json.loads((tmp_path / RESULTS_FILE).read_text()) == results
        assert mine.keys() == theirs.keys(), seed
        for task in mine:
            undefined = [m for m in METRICS if math.isnan(theirs[task][m])]
            num_undefined += len(undefined)
            if len(undefined) == len(METRICS):
                continue  # no detections or no ground truth
            # Detectron2's implementation in C++ sums in another order than pycocotools.
            assert same(mine[task], theirs[task], 1e-12 if fast else 0.0), (seed, task)
    assert num_undefined


def test_negative_controls(compare, monkeypatch):
    """Another rule in one place is seen."""
    original = coco_ap.coco_results

    def inclusive(*args):
        results = original(*args)
        for result in results:
            result["bbox"] = [*result["bbox"][:2], *(side + 1 for side in result["bbox"][2:])]
        return results

    changes = {"coco_results": inclusive, "MAX_DETECTIONS": 2, "METRICS": METRICS[::-1]}
    seeds = range(1, 20, 2)
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(coco_ap, name, value)
            compared = [compare(seed, False) for seed in seeds]
        equal = [all(same(mine[t], theirs[t]) for t in mine) for mine, theirs, _ in compared]
        assert equal.count(False) > len(seeds) / 2, name
