"""The parity cases of the mask head: those of `parity.cases` with masks for every object."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from parity.cases import BOXES, CLASSES, SIZES, SUPERVISED_YAML, Case, make_batch
from pycocotools import mask as coco_mask

from detection.data.masks import transform_masks

MASK_SETTINGS = {"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.CONV_DIM": 16}
BITMASK = {"INPUT.MASK_FORMAT": "bitmask"}
THIN_BOXES = ([[30.25, 10.5, 30.3125, 50.0]], [[5.25, 40.5, 50.0, 40.5625]], BOXES[2])


def _case(settings: dict | None = None, **changes) -> Case:
    return Case(settings={**MASK_SETTINGS, **(settings or {})}, **changes)


MASK_CASES = {
    "polygon": _case(),
    "bitmask": _case(BITMASK),
    "class_agnostic": _case({"MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True}),
    "convolutions": _case({"MODEL.ROI_MASK_HEAD.NUM_CONV": 2}),
    "supervised": _case(
        {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.BACKBONE.FREEZE_AT": 2},
        yaml=SUPERVISED_YAML,
        gains={"stem.conv1.weight": 1 / 60},
    ),
    "no_ground_truth": _case(boxes=(BOXES[0], [], BOXES[2]), classes=(CLASSES[0], [], CLASSES[2])),
    "no_ground_truth_at_all": _case(boxes=([], [], []), classes=([], [], [])),
    "no_ground_truth_bitmask": _case(
        BITMASK, boxes=([], BOXES[1], []), classes=([], CLASSES[1], [])
    ),
    "thin_boxes": _case(boxes=THIN_BOXES, classes=([1], [2], CLASSES[2])),
    "thin_boxes_bitmask": _case(BITMASK, boxes=THIN_BOXES, classes=([1], [2], CLASSES[2])),
}


def with_other(case: Case, **settings) -> Case:
    """The case with more settings, dots written as two underscores."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return replace(case, settings={**case.settings, **dotted})


def segmentation(box: list[float], number: int, size: tuple[int, int]) -> list | dict:
    """One object's mask in a box: number 0 one polygon, 1 two of them, 2 an RLE."""
    x0, y0, x1, y1 = box
    middle, waist = (x0 + x1) / 2, y0 + 0.37 * (y1 - y0)
    polygons = [[x0, y0, middle, waist, x1, y0, x1 - 0.2 * (x1 - x0), y1, x0, waist]]
    if number == 1:
        polygons.append([middle, waist, x1, y1, x0, y1])
    if number == 2:
        return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return polygons


def mask_batch(case: Case, indices: tuple[int, ...] = (0, 1, 2), step: int = 0) -> list[dict]:
    """`make_batch` with gt_masks, in the embedded engine's form."""
    batch = make_batch(case, indices, step)
    mask_format = case.settings.get("INPUT.MASK_FORMAT", "polygon")
    for sample, index in zip(batch, indices, strict=True):
        size, kinds = SIZES[index], 3 if mask_format == "bitmask" else 2
        segmentations = [
            segmentation(box, number % kinds, size) for number, box in enumerate(case.boxes[index])
        ]
        sample["gt_masks"] = transform_masks(segmentations, mask_format, size, size, flip=False)
    return batch


def liven_masks(model: torch.nn.Module) -> None:
    """Predictions around zero: features are positive, so weights cancel in pairs."""
    with torch.no_grad():
        weight = model.roi_heads.mask_head.predictor.weight
        weight[:, 1::2] = -weight[:, 0::2]
        weight *= 2.0


def random_polygons(rng: np.random.Generator, scale: float) -> list[np.ndarray]:
    """One object: one to three polygons of three to nine corners."""
    counts = rng.integers(3, 10, size=rng.integers(1, 4))
    return [rng.uniform(-0.1, 1.1, 2 * count) * scale for count in counts]
