"""Precision-recall curves of one trial, at IoU 0.50 and 0.75, on a grid of recalls.

Every metric's curves are kept in one form, so that trials can be averaged and engines compared:
at each of 101 recalls the best precision at that recall or beyond. That is what the metrics
average too: COCO's over the 101 recalls, VOC 2007's over every tenth of them, VOC 2012's as the
area under it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.evaluation.voc_ap import Detections, match_classes, precision_recall
from moco.errors import CheckpointError
from moco.training.checkpoint import write_atomic

CURVES_FILE = "pr_curves.npz"
IOUS = (0.5, 0.75)
RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's grid


@dataclass(frozen=True)
class PrCurves:
    """`precision` [2 IoUs, K classes, 101 recalls] from 0 to 1; nan for a class without ground
    truth, which has no recall."""

    class_names: tuple[str, ...]
    precision: np.ndarray


def voc_curves(
    detections: Detections,
    records: Sequence[dict],
    class_names: Sequence[str],
    round_detections: bool = True,
) -> PrCurves:
    """The curves behind `evaluate_voc`, whose arguments and errors these are."""
    precision = np.full((len(IOUS), len(class_names), len(RECALLS)), np.nan)
    all_matches = match_classes(detections, records, len(class_names), round_detections)
    for class_id, matches in enumerate(all_matches):
        if matches.num_positives:
            for number, iou in enumerate(IOUS):
                precision[number, class_id] = on_grid(*precision_recall(matches, iou))
    return PrCurves(tuple(class_names), precision)


def coco_curves(precision_TRKAM: np.ndarray, class_names: Sequence[str]) -> PrCurves:
    """The curves of pycocotools' `COCOeval.eval["precision"]`, with its default parameters.

    Args:
        precision_TRKAM: [10 IoUs from 0.50, 101 recalls, K classes, areas with "all" first,
            detections an image with the most last]; -1 where there is no ground truth.
    """
    of_all = np.asarray(precision_TRKAM, dtype=np.float64)[:, :, :, 0, -1]
    at_50_and_75 = of_all[[0, 5]].transpose(0, 2, 1)
    return PrCurves(tuple(class_names), np.where(at_50_and_75 < 0, np.nan, at_50_and_75))


def on_grid(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The best precision at each of `RECALLS` or beyond, 0 where no detection gets so far.

    Args:
        recall, precision: [N] after each detection, recall ascending.
    """
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(recall, RECALLS, side="left")]


def mean_over_classes(precision: np.ndarray) -> np.ndarray:
    """Mean [..., 101] of curves [..., K, 101] over the classes that have one; nan without any."""
    known = ~np.isnan(precision).any(axis=-1)
    total = np.where(known[..., None], precision, 0.0).sum(axis=-2)
    count = known.sum(axis=-1)[..., None]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def write_curves(curves: PrCurves, folder: str | os.PathLike) -> Path:
    """Write pr_curves.npz: arrays precision, iou, recall and class_names."""
    path = Path(folder) / CURVES_FILE
    arrays = {
        "precision": curves.precision,
        "iou": np.array(IOUS),
        "recall": RECALLS,
        "class_names": np.array(curves.class_names, dtype=np.str_),
    }
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))
    return path


def read_curves(path: str | os.PathLike) -> PrCurves:
    """Read what `write_curves` wrote. Raises: CheckpointError for another or a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["class_names"])
            precision = arrays["precision"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: holds no curves ({reason}); remove it") from error
    if precision.shape != (len(IOUS), len(names), len(RECALLS)):
        raise CheckpointError(
            f"{path}: has curves of shape {precision.shape} for {len(names)} classes; "
            f"({len(IOUS)}, {len(names)}, {len(RECALLS)}) is needed; remove it"
        )
    return PrCurves(names, precision)
