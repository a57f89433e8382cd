"""VOC average precision, equal to Detectron2's PascalVOCDetectionEvaluator to the last bit.

Source: Detectron2 evaluation/pascal_voc_evaluation.py. Two things are particular to it: scores
and boxes pass through text (three decimals, one decimal), and boxes are 1-based inclusive, so a
side is x1 - x0 + 1. What differs here: tied scores keep the order of records and detections
(a stable sort), where numpy's default depends on the CPU; and ground truth comes from the
checked records, so float coordinates are cut to integers and clipped boxes are used clipped,
where Detectron2 raises or uses the raw ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moco.errors import DataError

# image id -> (boxes [N, 4] in pixels from 0, scores [N], classes [N] from 0)
Detections = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

IOU_THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))
_AT_50, _AT_75 = IOU_THRESHOLDS.index(0.5), IOU_THRESHOLDS.index(0.75)


@dataclass(frozen=True)
class VocResult:
    """AP in percent: mean over IoU 0.50 to 0.95, at 0.50 and at 0.75; means over all classes.

    `absent_classes` have no (non-difficult) ground truth. As in Detectron2 each counts as 0 in
    the mean, or makes it nan under the 2012 metric if it has detections.
    """

    ap: float
    ap50: float
    ap75: float
    per_class: dict[str, dict[str, float]]
    absent_classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ImageTruth:
    boxes: np.ndarray  # [G, 4] float64, 1-based inclusive
    classes: np.ndarray  # [G]
    difficult: np.ndarray  # [G] bool


@dataclass(frozen=True)
class _Matches:
    """The detections of one class, best score first, each with its best ground-truth box."""

    overlap: np.ndarray  # [N] IoU, -inf where the image has no box of the class
    truth: np.ndarray  # [N] number of that box, unique over images
    difficult: np.ndarray  # [N] bool
    num_positives: int


def evaluate_voc(
    detections: Detections,
    records: Sequence[dict],
    class_names: Sequence[str],
    metric_year: int,
    round_detections: bool = True,
) -> VocResult:
    """Score detections against the records' boxes.

    Args:
        detections: see `Detections`; an image that is absent has none.
        records: Detectron2's form (`detection.data.voc.load_records`).
        metric_year: 2007 (11 points of recall) or 2012 (area under the envelope).
        round_detections: pass scores and boxes through text, as Detectron2 does.
    Raises: DataError for detections of an unknown image, of an unknown class, of mismatched
        lengths or not finite; ValueError for another year.
    """
    if metric_year not in (2007, 2012):
        raise ValueError(f"metric_year: {metric_year!r} is given; allowed: 2007 or 2012")
    _check(detections, records, len(class_names))
    truths = [_image_truth(record) for record in records]
    rows = [_detection_rows(detections, record["image_id"], round_detections) for record in records]
    table, absent = [], []
    for class_id, name in enumerate(class_names):
        matches = _match_class(rows, truths, class_id)
        if matches.num_positives == 0:
            absent.append(name)
        # A class that is absent divides by zero, on purpose: see VocResult.
        with np.errstate(divide="ignore", invalid="ignore"):
            curves = [precision_recall(matches, threshold) for threshold in IOU_THRESHOLDS]
            table.append([average_precision(*curve, metric_year) * 100 for curve in curves])
    # One mean a threshold over a plain list, as Detectron2: another order of sums differs in
    # the last bit.
    means = [np.mean([row[t] for row in table]) for t in range(len(IOU_THRESHOLDS))]
    per_class = {
        name: {"AP": float(np.mean(row)), "AP50": float(row[_AT_50]), "AP75": float(row[_AT_75])}
        for name, row in zip(class_names, table, strict=True)
    }
    return VocResult(
        float(np.mean(means)), float(means[_AT_50]), float(means[_AT_75]), per_class, tuple(absent)
    )


def precision_recall(matches: _Matches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(recall [N], precision [N]) after each detection, at one IoU threshold.

    A detection is matched only with its best box, and only above the threshold (strictly). If
    that box is difficult it is ignored; if a better-scored detection took it, it is false.
    """
    over = matches.overlap > threshold
    candidates = np.flatnonzero(over & ~matches.difficult)
    true_positive = np.zeros(len(over))
    first_of_each = np.unique(matches.truth[candidates], return_index=True)[1]
    true_positive[candidates[first_of_each]] = 1.0
    false_positive = np.ones(len(over)) - true_positive
    false_positive[over & matches.difficult] = 0.0
    tp, fp = np.cumsum(true_positive), np.cumsum(false_positive)
    recall = tp / float(matches.num_positives)
    return recall, tp / np.maximum(tp + fp, np.finfo(np.float64).eps)


def average_precision(recall: np.ndarray, precision: np.ndarray, metric_year: int) -> float:
    """AP in [0, 1] of one curve; see `evaluate_voc` for the two metrics."""
    if metric_year == 2007:
        total = 0.0
        # arange gives 0.30000000000000004: a recall of exactly 0.3 does not reach that point.
        for point in np.arange(0.0, 1.1, 0.1):
            reached = precision[recall >= point]
            total += (reached.max() if reached.size else 0.0) / 11.0
        return total
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(envelope[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return np.sum((recall[steps + 1] - recall[steps]) * envelope[steps + 1])


def _check(detections: Detections, records: Sequence[dict], num_classes: int) -> None:
    known = {record["image_id"] for record in records}
    if len(known) != len(records):
        raise DataError("evaluation: an image id occurs twice in the records; each must be unique")
    for image_id, (boxes, scores, classes) in detections.items():
        if image_id not in known:
            raise DataError(
                f"detections: image {image_id!r} is not in the test split; "
                "evaluate with the split they were made on"
            )
        boxes, scores, classes = np.asarray(boxes), np.asarray(scores), np.asarray(classes)
        if boxes.size != 4 * len(scores) or len(scores) != len(classes):
            raise DataError(
                f"detections: image {image_id!r} has boxes {boxes.shape}, {len(scores)} scores and "
                f"{len(classes)} classes; [N, 4], N and N are needed"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise DataError(
                f"detections: image {image_id!r} has a box or score that is not finite; "
                "the weights are damaged or the training diverged"
            )
        if len(classes) and not (0 <= classes.min() and classes.max() < num_classes):
            raise DataError(
                f"detections: image {image_id!r} has class {classes.min()} to {classes.max()}; "
                f"allowed: 0 to {num_classes - 1}"
            )


def _image_truth(record: dict) -> _ImageTruth:
    annotations = record["annotations"]
    boxes = [
        (int(x0 + 1), int(y0 + 1), int(x1), int(y1))
        for x0, y0, x1, y1 in (annotation["bbox"] for annotation in annotations)
    ]
    return _ImageTruth(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64),
        np.array([annotation["difficult"] for annotation in annotations], dtype=bool),
    )


def _detection_rows(
    detections: Detections, image_id: str, round_detections: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image's detections as float64, 1-based inclusive."""
    if image_id not in detections:
        return np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64)
    boxes, scores, classes = (np.asarray(value) for value in detections[image_id])
    boxes = boxes.reshape(-1, 4) + np.array([1, 1, 0, 0], dtype=boxes.dtype)
    # The sum is taken in the boxes' own type, then all is widened.
    boxes, scores = boxes.astype(np.float64), scores.astype(np.float64)
    if round_detections:
        boxes = np.array([float(f"{x:.1f}") for x in boxes.ravel()]).reshape(-1, 4)
        scores = np.array([float(f"{x:.3f}") for x in scores])
    return boxes, scores, classes


def _match_class(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    truths: Sequence[_ImageTruth],
    class_id: int,
) -> _Matches:
    overlaps, numbers, difficults, all_scores = [], [], [], []
    num_truths = num_positives = 0
    for (boxes, scores, classes), truth in zip(rows, truths, strict=True):
        own = truth.classes == class_id
        difficult = truth.difficult[own]
        chosen = classes == class_id
        if chosen.any():
            best, overlap = _best_overlap(boxes[chosen], truth.boxes[own])
            overlaps.append(overlap)
            numbers.append(best + num_truths)
            difficults.append(difficult[best] if len(difficult) else np.zeros(len(best), bool))
            all_scores.append(scores[chosen])
        num_truths += len(difficult)
        num_positives += int((~difficult).sum())
    if not overlaps:
        nothing = np.zeros(0)
        return _Matches(nothing, nothing.astype(int), nothing.astype(bool), num_positives)
    order = np.argsort(-np.concatenate(all_scores), kind="stable")
    return _Matches(
        np.concatenate(overlaps)[order],
        np.concatenate(numbers)[order],
        np.concatenate(difficults)[order],
        num_positives,
    )


def _best_overlap(boxes_N4: np.ndarray, truths_G4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index [N] of the best box, its IoU [N]); index 0 and -inf where there is no box."""
    if not len(truths_G4):
        return np.zeros(len(boxes_N4), dtype=np.int64), np.full(len(boxes_N4), -np.inf)
    boxes, truths = boxes_N4[:, None], truths_G4[None]
    low = np.maximum(truths[..., :2], boxes[..., :2])
    high = np.minimum(truths[..., 2:], boxes[..., 2:])
    sides = np.maximum(high - low + 1.0, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _area(boxes) + _area(truths) - intersection
    with np.errstate(divide="ignore", invalid="ignore"):
        overlap = intersection / union
    best = overlap.argmax(axis=1)
    return best, overlap[np.arange(len(best)), best]


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = boxes[..., 2:] - boxes[..., :2] + 1.0
    return sides[..., 0] * sides[..., 1]
