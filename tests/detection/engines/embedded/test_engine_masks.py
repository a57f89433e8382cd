"""The embedded engine with MODEL.MASK_ON: records with polygons in, RLE masks out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import Run
from detection.engines.embedded.engine import EmbeddedEngine
from moco.distributed import ProcessInfo
from moco.training.checkpoint import read_torch_file

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = ("circle", "square", "triangle", "cross")
TINY = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (64, 72),
    "INPUT.MIN_SIZE_TEST": 72,
    "DATASETS.VOC_CLASSES": CLASSES,
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 1,
}


def diamond(box: list[float]) -> list[list[float]]:
    x0, y0, x1, y1 = box
    return [[(x0 + x1) / 2, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1, x0, (y0 + y1) / 2]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(
        folder, num_train=4, num_test=2, num_unlabelled=0, size=80, seed=0, class_names=CLASSES
    )


def make_run(root, output_dir, **keys) -> Run:
    """As from a COCO file: image ids are numbers, each object has polygons."""
    settings = {**TINY, "DATASETS.VOC_ROOT": str(root)}
    settings |= {key.replace("__", "."): value for key, value in keys.items()}
    cfg = load_detection_config(None, [str(w) for pair in settings.items() for w in pair])
    data = check_and_load(cfg)
    for number, record in enumerate(data.train_records + data.test_records):
        record["image_id"] = number
        for annotation in record["annotations"]:
            annotation["segmentation"] = diamond(annotation["bbox"])
    output_dir.mkdir(parents=True, exist_ok=True)
    process = ProcessInfo(0, 1, 0, torch.device("cpu"))
    return Run(cfg, data, output_dir, 3, process, "digest", progress=False)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_train_and_predict_masks_the_same_with_workers_and_after_a_resume(
    root, tmp_path, mask_format
):
    engine = EmbeddedEngine()
    run = make_run(root, tmp_path / "a", INPUT__MASK_FORMAT=mask_format, DATALOADER__NUM_WORKERS=0)
    engine.train(run)
    state = read_torch_file(run.output_dir / "model_final.pth")["model"]
    assert "roi_heads.mask_head.predictor.weight" in state
    other = make_run(
        root, tmp_path / "b", INPUT__MASK_FORMAT=mask_format, DATALOADER__NUM_WORKERS=1
    )
    engine.train(other)
    (other.output_dir / "model_final.pth").unlink()
    (other.output_dir / "model_0000002.pth").unlink()
    engine.train(replace(other, resume=True))
    again = read_torch_file(other.output_dir / "model_final.pth")["model"]
    assert all(torch.equal(state[name], again[name]) for name in state)

    found = engine.predict(run, run.data.test_records)
    assert list(found) == [4, 5]
    for record in run.data.test_records:
        boxes, scores, classes, masks = found[record["image_id"]]
        assert len(boxes) == len(scores) == len(classes) == len(masks) > 0
        assert all(m["size"] == [record["height"], record["width"]] for m in masks)
        assert all(isinstance(m["counts"], bytes) for m in masks)
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = np.nonzero(coco_mask.decode(mask))
            if len(rows):
                assert columns.min() >= box[0] - 1 and columns.max() <= box[2]
                assert rows.min() >= box[1] - 1 and rows.max() <= box[3]
