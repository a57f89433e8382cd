"""The Detectron2 engine on COCO data with masks: its test pipeline and its COCO evaluator."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from pycocotools import mask as coco_mask  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.data.datasets import check_and_load  # noqa: E402
from detection.data.shapes_coco import make_coco_shapes  # noqa: E402
from detection.engines.base import Run  # noqa: E402
from detection.engines.d2 import Detectron2Engine  # noqa: E402
from detection.engines.embedded.engine import EmbeddedEngine  # noqa: E402
from detection.evaluation.coco_ap import coco_results, evaluate_coco  # noqa: E402
from moco.distributed import ProcessInfo  # noqa: E402

pytestmark = pytest.mark.detectron2

CLASSES = ("circle", "square")
TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 5,
    "INPUT.MIN_SIZE_TRAIN": (61,),
    "INPUT.MIN_SIZE_TEST": 69,
    "DATASETS.TRAIN": ("shapes_train",),
    "DATASETS.TEST": ("shapes_test",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.PROGRESS_PERIOD": 1,
}


def make_run(root, output_dir, **keys):
    files = tuple(
        (f"shapes_{split}", str(root / f"{split}.json"), str(root / "images"))
        for split in ("train", "test")
    )
    keys = {**TINY, "DATASETS.COCO_FILES": files, **keys}
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    output_dir.mkdir()
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=output_dir,
        seed=3,
        process=ProcessInfo(0, 1, 0, torch.device("cpu")),
        config_digest="digest",
        eval_only=bool(cfg.MODEL.WEIGHTS),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    root = make_coco_shapes(
        folder / "data", num_train=4, num_test=4, size=80, seed=1, class_names=CLASSES
    )
    run = make_run(root, folder / "run")
    Detectron2Engine().train(run)
    return root, run


def test_masks_are_the_embedded_engines(finished, tmp_path):
    root, run = finished
    records = run.data.test_records
    theirs = Detectron2Engine().predict(run, records)
    weights = run.output_dir / "model_final.pth"
    evaluated = make_run(root, tmp_path / "eval", **{"MODEL.WEIGHTS": weights})
    ours = EmbeddedEngine().predict(evaluated, records)
    for record in records:
        found, same = theirs[record["image_id"]], ours[record["image_id"]]
        assert len(found) == 4 and len(found[0]) == len(found[3]) > 0
        assert all(map(np.array_equal, found[:3], same[:3]))
        assert found[3] == same[3]
        assert found[3][0]["size"] == [record["height"], record["width"]]


def near_the_truth(records):
    """Boxes and masks of the objects, moved a little; most of them found."""
    rng = np.random.default_rng(2)
    detections = {}
    for record in records:
        found = [a for a in record["annotations"] if rng.random() < 0.9]
        boxes = np.array([a["bbox"] for a in found], np.float32).reshape(-1, 4)
        moves = rng.integers(-4, 5, (len(found), 2)).astype(np.float32)
        masks = []
        for annotation, move in zip(found, moves, strict=True):
            polygons = [
                (np.reshape(p, (-1, 2)) + move).ravel().tolist() for p in annotation["segmentation"]
            ]
            rles = coco_mask.frPyObjects(polygons, record["height"], record["width"])
            masks.append(coco_mask.merge(rles))
        detections[record["image_id"]] = (
            boxes + np.tile(moves, 2),
            rng.random(len(found)).astype(np.float32),
            np.array([a["category_id"] for a in found], np.int64),
            masks,
        )
    return detections


def test_its_evaluator_gives_our_scores(finished, capsys):
    _, run = finished
    records = run.data.test_records
    detections = near_the_truth(records)
    theirs = Detectron2Engine().second_opinion(run, records, detections)
    masks = theirs.pop("segm")
    results = coco_results(detections, records, run.data.category_ids)
    names = run.data.class_names
    ours = evaluate_coco(results, run.data.coco_json, records, names, with_masks=True)
    for task, found in (("bbox", theirs), ("segm", masks)):
        assert 5 < found["AP"] < found["AP50"]
        for score in ("AP", "AP50", "AP75"):
            assert found[score] == pytest.approx(ours[task].overall[score], abs=1e-9)
    assert capsys.readouterr().out == ""


def test_no_detection_at_all_has_no_score(finished):
    _, run = finished
    nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [])
    detections = {record["image_id"]: nothing for record in run.data.test_records}
    opinion = Detectron2Engine().second_opinion(run, run.data.test_records, detections)
    assert opinion["AP"] is None and opinion["segm"]["AP50"] is None
