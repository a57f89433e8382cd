"""COCO's average precision of boxes and masks, by pycocotools, as Detectron2 computes it.

Source of the conventions: Detectron2 evaluation/coco_evaluation.py. The annotation file itself
is the ground truth, not the records: crowds count, boxes are not clipped. What differs, and
changes no score of a file that Detectron2 scores well: annotations are numbered anew (pycocotools
takes number 0 for "not found"), a missing area or crowd flag has a stand-in, and a run without a
single detection scores 0 where Detectron2 gives NaN.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.coco_check import read_segmentation
from detection.data.coco_json import scored_content
from moco.errors import DataError

RESULTS_FILE = "coco_instances_results.json"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_DETECTIONS = 100  # an image; the most confident ones
# Indices into pycocotools' areas (all, small, medium, large) and IoUs (0.50 to 0.95).
_ALL_AREAS, _AT_50, _AT_75 = 0, 0, 5


@dataclass(frozen=True)
class CocoScores:
    """Scores in percent, nan where there is no ground truth to find.

    Attributes:
        overall: `METRICS` -> score. s, m, l: areas under 32², to 96², over 96² pixels.
        per_class: class name -> {"AP", "AP50", "AP75"}.
        precision: pycocotools' [10 IoUs, 101 recalls, K classes, 4 areas, 3 limits], -1 for none.
    """

    overall: dict[str, float]
    per_class: dict[str, dict[str, float]]
    precision: np.ndarray


def coco_results(
    detections: Mapping[int, tuple], records: Sequence[dict], category_ids: Sequence[int]
) -> list[dict]:
    """The detections in COCO's result format, in the order of the records.

    Args:
        detections: image id -> (boxes float32 [N, 4] x0 y0 x1 y1, scores [N], classes [N][, N
            COCO RLEs]); an absent image has none.
        category_ids: COCO's category id of each class id.
    Returns: dicts {"image_id", "category_id", "bbox" [x, y, width, height], "score"} and, with
        masks, "segmentation" (its counts as text): what `RESULTS_FILE` holds.
    Raises: DataError for detections of another image or class, or ones that are not finite.
    """
    results, left = [], set(detections)
    for record in records:
        image_id = record["image_id"]
        if image_id not in detections:
            continue
        left.discard(image_id)
        found = detections[image_id]
        boxes = np.array(found[0], dtype=np.float32).reshape(-1, 4)
        scores, classes = np.asarray(found[1]), np.asarray(found[2])
        _check_values(image_id, boxes, scores, classes, len(category_ids))
        boxes[:, 2:] -= boxes[:, :2]
        masks = found[3] if len(found) > 3 else [None] * len(scores)
        rows = zip(boxes.tolist(), scores.tolist(), classes.tolist(), masks, strict=True)
        for box, score, index, mask in rows:
            result = {
                "image_id": image_id,
                "category_id": category_ids[index],
                "bbox": box,
                "score": score,
            }
            if mask is not None:
                counts = mask["counts"]
                text = counts.decode("ascii") if isinstance(counts, bytes) else counts
                result["segmentation"] = {"size": list(mask["size"]), "counts": text}
            results.append(result)
    if left:
        raise DataError(
            f"detections: image {min(left, key=str)!r} is not in the test data; evaluate with the "
            "data they were made on"
        )
    return results


def _check_values(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, num_classes: int
) -> None:
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(
            f"detections: image {image_id} has a box or score that is not finite; the weights are "
            "damaged or the training diverged"
        )
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if wrong.size:
        raise DataError(
            f"detections: image {image_id} has class {wrong[0]}; allowed: 0 to {num_classes - 1}"
        )


def evaluate_coco(
    results: Sequence[dict],
    coco_json: Path,
    records: Sequence[dict],
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    *,
    with_masks: bool = False,
) -> dict[str, CocoScores]:
    """Score detections against an annotation file.

    Args:
        results: see `coco_results`.
        coco_json: the file that the records are of.
        class_names: by ascending category id.
        category_ids: of these classes; the file's other categories are no classes. None: all are.
        with_masks: score the masks too.
    Returns: {"bbox": ...} and, with masks, {"segm": ...}.
    Raises: DataError if the file is no longer the one that was checked.
    """
    wanted = {r["image_id"]: (r["height"], r["width"]) for r in records}
    tasks = ("bbox", "segm") if with_masks else ("bbox",)
    try:
        content, _ = scored_content(coco_json, category_ids)
        sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
        if sizes != wanted:
            raise ValueError("its images differ")
        numbered = list(enumerate(content["annotations"], start=1))
        truths = [[_truth(task, n, a, sizes) for n, a in numbered] for task in tasks]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{coco_json}: changed after the check ({' '.join(str(error).split())}); start again"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress
        return {
            task: _scores(task, _api(content, truth), results, class_names)
            for task, truth in zip(tasks, truths, strict=True)
        }


def _scores(
    task: str, truth: COCO, results: Sequence[dict], class_names: Sequence[str]
) -> CocoScores:
    # pycocotools writes into what it is given; and only without a box is a mask's area its own.
    left_out = "segmentation" if task == "bbox" else "bbox"
    found = [{k: v for k, v in result.items() if k != left_out} for result in results]
    detected = truth.loadRes(found) if found else _api(truth.dataset, [])
    metric = COCOeval(truth, detected, task)
    metric.params.maxDets = [1, 10, MAX_DETECTIONS]
    metric.evaluate()
    metric.accumulate()
    metric.summarize()
    precision = metric.eval["precision"]
    overall = {
        name: float(value * 100) if value >= 0 else float("nan")
        for name, value in zip(METRICS, metric.stats, strict=False)
    }
    per_class = {}
    for index, name in enumerate(class_names):
        of_class = precision[:, :, index, _ALL_AREAS, -1]
        per_class[name] = {
            "AP": _mean(of_class),
            "AP50": _mean(of_class[_AT_50]),
            "AP75": _mean(of_class[_AT_75]),
        }
    return CocoScores(overall, per_class, precision)


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(np.mean(known) * 100) if known.size else float("nan")


def _api(content: dict, annotations: list[dict]) -> COCO:
    api = COCO()
    api.dataset = {
        "info": {},  # some versions copy it
        "images": content["images"],
        "categories": content["categories"],
        "annotations": annotations,
    }
    api.createIndex()
    return api


def _truth(task: str, number: int, annotation: dict, sizes: Mapping[int, tuple]) -> dict:
    box = annotation["bbox"]
    truth = {
        "id": number,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "area": annotation.get("area", box[2] * box[3]),
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if task == "segm":
        mask = read_segmentation(annotation["segmentation"], *sizes[annotation["image_id"]])
        if isinstance(mask, str) or not mask:
            raise ValueError(f"annotation {annotation.get('id')} has {mask or 'no polygon'}")
        truth["segmentation"] = mask
    return truth
