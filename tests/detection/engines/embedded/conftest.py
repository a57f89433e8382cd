"""A detector with an eighth of the widths, and a batch whose sides are no multiples of 16."""

from __future__ import annotations

import pytest
import torch

from detection.config import load_detection_config

TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
}


@pytest.fixture
def tiny_cfg():
    """tiny_cfg(KEY=value ...) with dots written as two underscores."""

    def make(**changes):
        settings = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
        return load_detection_config(None, [item for pair in settings.items() for item in pair])

    return make


@pytest.fixture
def batch() -> list[dict]:
    """Two images of 117 x 165 and 131 x 93 pixels (height x width) with two and one boxes."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        for size in ((117, 165), (131, 93))
    ]
    boxes = ([[10.0, 20.0, 70.0, 90.0], [80.0, 5.0, 160.0, 60.0]], [[0.0, 0.0, 50.0, 40.0]])
    classes = ([0, 2], [1])
    return [
        {
            "image": image,
            "height": 2 * image.shape[1],
            "width": 3 * image.shape[2],
            "gt_boxes": torch.tensor(boxes_i),
            "gt_classes": torch.tensor(classes_i),
        }
        for image, boxes_i, classes_i in zip(images, boxes, classes, strict=True)
    ]
