"""Detectron2's catalogs of data sets, and its evaluators of VOC's and COCO's metric.

It and `detection.engines.d2` alone import Detectron2, and only when they are used.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from detection.data.coco_json import scored_file
from detection.data.masks import decode_rle
from detection.data.voc import resolve_datasets, scored_folder
from detection.engines.base import Detections, Run
from detection.engines.d2_session import with_box_modes
from moco.errors import DataError

SCORES = ("AP", "AP50", "AP75")
# What Detectron2's evaluators raise for files that this project accepts.
UNREADABLE = (AssertionError, AttributeError, LookupError, OSError, SyntaxError, ValueError)


@contextlib.contextmanager
def registered(run: Run, part: str, records: Sequence[dict], **metadata) -> Iterator[str]:
    """Detectron2's catalogs know `records` for the time of the context, by the name yielded."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    # Trials follow each other in one process: the name must be of this run alone.
    name = f"{part} of {run.output_dir}, seed {run.seed}, {run.config_digest}"
    DatasetCatalog.register(name, partial(with_box_modes, records))
    MetadataCatalog.get(name).set(thing_classes=list(run.data.class_names), **metadata)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def voc_scores(
    run: Run, records: Sequence[dict], detections: Detections, *, read_anew: bool = True
) -> dict:
    """By PascalVOCDetectionEvaluator, which reads Annotations/<id>.xml of the test set itself; not
    `read_anew`: it takes them as it remembers them from an earlier call."""
    from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation

    (spec,) = resolve_datasets(run.cfg, "TEST")
    read_xml = pascal_voc_evaluation.parse_rec
    if read_anew:
        read_xml.cache_clear()  # it remembers every file by its name
    for record in records:
        path = os.path.join(spec.root, "Annotations", f"{record['image_id']}.xml")
        try:
            read_xml(path)
        except UNREADABLE as error:
            raise DataError(f"{path}: {type(error).__name__}: {error}") from error
    metadata = {"split": spec.split, "year": spec.metric_year}
    with scored_folder(spec, records) as metadata["dirname"], registered(
        run, "test data", records, **metadata
    ) as name, np.errstate(all="ignore"):
        evaluator = PascalVOCDetectionEvaluator(name)
        # evaluate() joins the detections of all ranks.
        _feed(evaluator, records if run.process.is_main else (), detections)
        scores = evaluator.evaluate()
    return {} if scores is None else _overall(scores["bbox"])


def coco_scores(run: Run, records: Sequence[dict], detections: Detections) -> dict:
    """By COCOEvaluator, which reads the annotation file of the test set itself."""
    from detectron2.evaluation import COCOEvaluator

    if not run.process.is_main:
        return {}
    category_ids = {category: index for index, category in enumerate(run.data.category_ids)}
    metadata = {"thing_dataset_id_to_contiguous_id": category_ids}
    tasks = ("bbox", "segm") if run.cfg.MODEL.MASK_ON else ("bbox",)
    file = scored_file(run.data.coco_json, category_ids)
    with file as metadata["json_file"], registered(run, "test data", records, **metadata) as name:
        evaluator = COCOEvaluator(name, tasks, distributed=False)
        _feed(evaluator, records, detections)
        scores = evaluator.evaluate()
    boxes, *masks = (_overall(scores[task]) for task in tasks)
    return {**boxes, "segm": masks[0]} if masks else boxes


def _feed(evaluator, records: Sequence[dict], detections: Detections) -> None:
    """Give the detections to a Detectron2 evaluator, as its model would."""
    from detectron2.structures import Boxes, Instances

    evaluator.reset()
    for record in records:
        boxes, scores, classes, *masks = detections[record["image_id"]]
        size = record["height"], record["width"]
        found = Instances(size, pred_boxes=Boxes(torch.as_tensor(boxes)))
        found.scores, found.pred_classes = torch.as_tensor(scores), torch.as_tensor(classes)
        if masks:
            found.pred_masks = torch.from_numpy(decode_rle(masks[0], *size))
        evaluator.process([record], [{"instances": found}])


def _overall(scores: dict) -> dict[str, float | None]:
    return {key: None if math.isnan(scores[key]) else float(scores[key]) for key in SCORES}
