"""VOC average precision, equal to Detectron2's PascalVOCDetectionEvaluator to the last bit.

Source: Detectron2 evaluation/pascal_voc_evaluation.py. Two things are particular to it: scores
and boxes pass through text (three decimals, one decimal), and boxes are 1-based inclusive, so a
side is x1 - x0 + 1. What differs here: tied scores keep the order of records and detections
(a stable sort), where numpy's default depends on the CPU; and ground truth comes from the
checked records, so float coordinates are cut to integers and clipped boxes are used clipped,
where Detectron2 raises or uses the raw ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moco.errors import DataError

# image id -> (boxes [N, 4] in pixels from 0, scores [N], classes [N] from 0, ...)
Detections = Mapping[str | int, tuple]

IOU_THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))
PIXEL = 1.0  # boxes are inclusive: from pixel 3 to 3 is one pixel
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
class ClassMatches:
    """The detections of one class, best score first, each with its best ground-truth box."""

    scores: np.ndarray  # [N] as rounded
    overlap: np.ndarray  # [N] IoU, -inf where the image has no box of the class
    truth: np.ndarray  # [N] number of that box, unique over images
    difficult: np.ndarray  # [N] bool: that box is difficult
    num_positives: int  # boxes of the class that are not difficult


class _Flat(NamedTuple):
    """Boxes of all images after one another."""

    boxes: np.ndarray  # [N, 4] float64, 1-based inclusive
    images: np.ndarray  # [N] position of the image in the records
    classes: np.ndarray  # [N]
    values: np.ndarray  # [N] scores of detections, difficult flags of ground truth


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
    all_matches = match_classes(detections, records, len(class_names), round_detections)
    table, absent = [], []
    for name, matches in zip(class_names, all_matches, strict=True):
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


def match_classes(
    detections: Detections,
    records: Sequence[dict],
    num_classes: int,
    round_detections: bool = True,
) -> list[ClassMatches]:
    """What the curves of all thresholds are made from, one entry a class.

    Arguments and errors are `evaluate_voc`'s.
    """
    found = _flat_detections(detections, records, num_classes, round_detections)
    truths = _flat_truths(records)
    overlap, truth, difficult = _best_boxes(found, truths, len(records))
    # Stable within a class: of tied scores the one given first comes first.
    order = np.lexsort((-found.values, found.classes))
    cuts = np.searchsorted(found.classes[order], np.arange(num_classes + 1))
    positives = np.bincount(truths.classes[~truths.values], minlength=num_classes)
    matches = []
    for class_id in range(num_classes):
        own = order[cuts[class_id] : cuts[class_id + 1]]
        one = (found.values[own], overlap[own], truth[own], difficult[own])
        matches.append(ClassMatches(*one, num_positives=int(positives[class_id])))
    return matches


def precision_recall(matches: ClassMatches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
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


def _flat_detections(
    detections: Detections, records: Sequence[dict], num_classes: int, round_detections: bool
) -> _Flat:
    """All detections in the order of the records. Raises: DataError, see `evaluate_voc`."""
    ids = [record["image_id"] for record in records]
    known = set(ids)
    if len(known) != len(ids):
        raise DataError("evaluation: an image id occurs twice in the records; each must be unique")
    for image_id in detections:
        if image_id not in known:
            raise DataError(
                f"detections: image {image_id!r} is not in the test split; "
                "evaluate with the split they were made on"
            )
    parts, lengths = [], []
    for image_id in ids:
        part = _arrays_of(detections[image_id], image_id) if image_id in detections else None
        lengths.append(0 if part is None else len(part[1]))
        if lengths[-1]:  # an empty one might be of another type and widen the rest
            parts.append(part)
    images = np.repeat(np.arange(len(ids)), lengths)
    if not parts:
        return _Flat(np.zeros((0, 4)), images, np.zeros(0, np.int64), np.zeros(0))
    boxes, scores, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    _check_values(boxes, scores, classes, lambda number: ids[images[number]], num_classes)
    # The sum is taken in the boxes' own type, then all is widened.
    boxes = boxes + np.array([1, 1, 0, 0], dtype=boxes.dtype)
    if round_detections:
        boxes, scores = through_text(boxes, 1), through_text(scores, 3)
    return _Flat(boxes.astype(np.float64), images, classes, scores.astype(np.float64))


def _arrays_of(found: tuple, image_id: str | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes, scores, classes = (np.asarray(values) for values in found[:3])
    if boxes.size != 4 * len(scores) or len(scores) != len(classes):
        raise DataError(
            f"detections: image {image_id!r} has boxes {boxes.shape}, {len(scores)} scores and "
            f"{len(classes)} classes; [N, 4], N and N are needed"
        )
    return boxes.reshape(-1, 4), scores, classes


def _check_values(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    image_of: Callable[[int], str | int],
    num_classes: int,
) -> None:
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    if not finite.all():
        raise DataError(
            f"detections: image {image_of(finite.argmin())!r} has a box or score that is not "
            "finite; the weights are damaged or the training diverged"
        )
    known = (classes >= 0) & (classes < num_classes)
    if not known.all():
        first = known.argmin()
        raise DataError(
            f"detections: image {image_of(first)!r} has class {classes[first]}; "
            f"allowed: 0 to {num_classes - 1}"
        )


def through_text(values: np.ndarray, decimals: int) -> np.ndarray:
    """Finite `values` as float64, as printed with 1 to 3 decimals and read back.

    In float32 and float16 no text is needed: a product with 1000 has at most 34 bits, so it is
    exact in float64, `rint` resolves a half as printing does (to even), and the quotient of two
    integers is rounded to the nearest float64, as reading is.
    """
    wide = values.astype(np.float64)
    if values.dtype in (np.float32, np.float16):
        return np.rint(wide * 10.0**decimals) / 10.0**decimals
    text = [f"{value:.{decimals}f}" for value in wide.ravel()]
    return np.array([float(word) for word in text]).reshape(values.shape)


def _flat_truths(records: Sequence[dict]) -> _Flat:
    annotations = [annotation for record in records for annotation in record["annotations"]]
    boxes = [
        (int(x0 + 1), int(y0 + 1), int(x1), int(y1))
        for x0, y0, x1, y1 in (annotation["bbox"] for annotation in annotations)
    ]
    lengths = [len(record["annotations"]) for record in records]
    return _Flat(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.repeat(np.arange(len(records)), lengths),
        np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64),
        np.array([annotation["difficult"] for annotation in annotations], dtype=bool),
    )


def _best_boxes(
    found: _Flat, truths: _Flat, num_images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each detection the ground truth of its image and class that it overlaps most.

    Returns: (IoU [N], number of the box [N], whether it is difficult [N]); of equal ones the box
        that is first in its record; IoU -inf, box 0 and False where there is none.
    """
    by_group = np.argsort(truths.classes * num_images + truths.images, kind="stable")
    groups = (truths.classes * num_images + truths.images)[by_group]
    wanted = found.classes * num_images + found.images
    first = np.searchsorted(groups, wanted, side="left")
    counts = np.searchsorted(groups, wanted, side="right") - first

    overlap = np.full(len(wanted), -np.inf)
    truth = np.zeros(len(wanted), dtype=np.int64)
    difficult = np.zeros(len(wanted), dtype=bool)
    some = np.flatnonzero(counts)
    if len(some):
        # All pairs of a detection and a box of its group, those of one detection in a row.
        first, counts = first[some], counts[some]
        starts = np.cumsum(counts) - counts
        pairs = np.arange(counts.sum())
        truth_of_pair = by_group[pairs + np.repeat(first - starts, counts)]
        overlap_of_pair = _overlaps(
            found.boxes[np.repeat(some, counts)], truths.boxes[truth_of_pair]
        )
        best = np.maximum.reduceat(overlap_of_pair, starts)
        is_best = overlap_of_pair == np.repeat(best, counts)
        position = np.minimum.reduceat(np.where(is_best, pairs, len(pairs)), starts)
        # A box without area may give nan, which equals nothing; it is false whatever it hit.
        position = np.where(np.isnan(best), starts, position)
        overlap[some], truth[some] = best, truth_of_pair[position]
        difficult[some] = truths.values[truth[some]]
    return overlap, truth, difficult


def _overlaps(boxes_N4: np.ndarray, truths_N4: np.ndarray) -> np.ndarray:
    """IoU of each pair."""
    low = np.maximum(truths_N4[:, :2], boxes_N4[:, :2])
    high = np.minimum(truths_N4[:, 2:], boxes_N4[:, 2:])
    sides = np.maximum(high - low + PIXEL, 0.0)
    intersection = sides[:, 0] * sides[:, 1]
    union = _areas(boxes_N4) + _areas(truths_N4) - intersection
    with np.errstate(divide="ignore", invalid="ignore"):
        return intersection / union


def _areas(boxes_N4: np.ndarray) -> np.ndarray:
    sides = boxes_N4[:, 2:] - boxes_N4[:, :2] + PIXEL
    return sides[:, 0] * sides[:, 1]
