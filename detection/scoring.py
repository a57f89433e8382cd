"""From the detections of a test set to the scores in result.json, by the metric of its format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from detection.data.datasets import DetectionData
from detection.engines.base import Detections
from detection.evaluation.coco_ap import (
    MAX_DETECTIONS,
    RESULTS_FILE,
    coco_results,
    evaluate_coco,
)
from detection.evaluation.pr_curves import PrCurves, coco_curves, voc_curves, write_curves
from detection.evaluation.voc_ap import evaluate_voc
from detection.trial_results import SCORES
from moco.cfgnode import CfgNode
from moco.training.checkpoint import write_json_atomic


def score_detections(
    data: DetectionData, cfg: CfgNode, detections: Detections, folder: Path | None
) -> dict:
    """Score the detections of `data.test_records`.

    Args:
        folder: where to write the curves (`evaluation.pr_curves`) and, of COCO data, the
            detections in COCO's result format; None writes nothing.
    Returns: {"AP", "AP50", "AP75", "per_class": {class: the three}} of boxes in percent, None
        where undefined; of COCO data also "coco": {"bbox": {"AP", ..., "APl"}} and, with
        MODEL.MASK_ON, the same of masks as "segm".
    Raises: DataError for detections of other images or classes, or that are not finite.
    """
    if data.metric == "coco":
        scores, curves = _score_coco(data, cfg, detections, folder)
    else:
        scores, curves = _score_voc(data, cfg, detections)
    if folder is not None:
        write_curves(curves, folder)
    return scores


def flat_scores(scores: Mapping) -> dict[str, float | None]:
    """What `score_detections` returns by the names that Detectron2 records: bbox/AP, segm/AP50 ...,
    and with COCO's metric of several classes bbox/AP-<class>."""
    if "coco" not in scores:
        return {f"bbox/{name}": scores[name] for name in SCORES}
    tasks = scores["coco"].items()
    named = {f"{task}/{name}": value for task, of in tasks for name, value in of.items()}
    if len(scores["per_class"]) > 1:
        named |= {f"bbox/AP-{name}": of["AP"] for name, of in scores["per_class"].items()}
    return named


def metric_in_words(data: DetectionData, cfg: CfgNode) -> str:
    """The metric of AP, AP50 and AP75, for results and reports."""
    if data.metric == "coco":
        what = "boxes and masks" if cfg.MODEL.MASK_ON else "boxes"
        return f"COCO, {what} (101 points, {MAX_DETECTIONS} detections an image)"
    year = data.metric_year
    rounded = "rounded" if cfg.TEST.ROUND_DETECTIONS else "not rounded"
    return f"VOC {year} ({'11-point' if year == 2007 else 'area'}), detections {rounded}"


def _score_voc(
    data: DetectionData, cfg: CfgNode, detections: Detections
) -> tuple[dict, PrCurves]:
    records, names, rounded = data.test_records, data.class_names, cfg.TEST.ROUND_DETECTIONS
    voc = evaluate_voc(detections, records, names, data.metric_year, rounded)
    overall = _numbers({"AP": voc.ap, "AP50": voc.ap50, "AP75": voc.ap75})
    per_class = {name: _numbers(scores) for name, scores in voc.per_class.items()}
    curves = voc_curves(detections, records, names, rounded)
    return {**overall, "per_class": per_class}, curves


def _score_coco(
    data: DetectionData, cfg: CfgNode, detections: Detections, folder: Path | None
) -> tuple[dict, PrCurves]:
    results = coco_results(detections, data.test_records, data.category_ids)
    if folder is not None:
        write_json_atomic(folder / RESULTS_FILE, results)
    found = evaluate_coco(
        results,
        data.coco_json,
        data.test_records,
        data.class_names,
        data.category_ids,
        with_masks=cfg.MODEL.MASK_ON,
    )
    tasks = {task: _numbers(scores.overall) for task, scores in found.items()}
    boxes = found["bbox"]
    scores = {
        **{score: tasks["bbox"][score] for score in SCORES},
        "per_class": {name: _numbers(values) for name, values in boxes.per_class.items()},
        "coco": tasks,
    }
    return scores, coco_curves(boxes.precision, data.class_names)


def _numbers(scores: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN, which stands for a score of a class without ground truth."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}
