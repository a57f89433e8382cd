"""Detectron2's own evaluators on data as exporters and people write them."""

from __future__ import annotations

import numpy as np
import pytest
from coco_files import annotation, content, make
from voc_files import box, make_cfg, make_voc

pytest.importorskip("detectron2")

from detection.config import load_detection_config  # noqa: E402
from detection.data.datasets import check_and_load  # noqa: E402
from detection.engines.base import Run  # noqa: E402
from detection.engines.d2 import Detectron2Engine  # noqa: E402
from detection.scoring import score_detections  # noqa: E402
from moco.distributed import setup_process  # noqa: E402

pytestmark = [pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")]


def second_opinion(cfg, tmp_path, of_class=None) -> tuple[dict, dict]:
    """The scores of the test records' own boxes, by Detectron2's evaluator and by ours."""
    data = check_and_load(cfg, "detectron2")
    detections = {
        record["image_id"]: (
            np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4),
            np.ones(len(record["annotations"]), np.float32),
            np.array([a["category_id"] if of_class is None else of_class
                      for a in record["annotations"]], dtype=np.int64),
        )
        for record in data.test_records
    }  # fmt: skip
    run = Run(cfg=cfg, data=data, output_dir=tmp_path / "run", seed=0,
              process=setup_process("cpu"), config_digest="", progress=False)  # fmt: skip
    theirs = Detectron2Engine().second_opinion(run, data.test_records, detections)
    return theirs, score_detections(data, cfg, detections, None)


@pytest.mark.parametrize("split", ["b.jpg\n", "\ufeffb\r\n"])
def test_voc_splits(tmp_path, split):
    root = make_voc(tmp_path / "voc", objects=box() + box(name="dog"))
    (root / "ImageSets/Main/test.txt").write_bytes(split.encode())
    theirs, ours = second_opinion(make_cfg(root), tmp_path)
    assert theirs == {score: ours[score] for score in theirs}
    assert theirs["AP"] == pytest.approx(50)  # no cat is there
    wrong, _ = second_opinion(make_cfg(root), tmp_path, of_class=0)
    assert wrong["AP"] == 0  # control


def test_coco_files(tmp_path):
    categories = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 3, "name": "cat", "supercategory": "cells"},
        {"id": 12, "name": "dog", "supercategory": "cells"},
    ]
    entries = [annotation(1.0), annotation(2, category_id=12.0), annotation(3, image_id=55)]
    spec = make(tmp_path / "x", content(*entries, categories=categories))
    files = tuple((name, str(spec.json_file), str(tmp_path / "x")) for name in ("a", "b"))
    cfg = load_detection_config(None, [
        "DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", "2",
    ])  # fmt: skip
    theirs, ours = second_opinion(cfg, tmp_path)
    assert theirs["AP"] == pytest.approx(100) == ours["AP"] and "reason" not in theirs
    wrong, _ = second_opinion(cfg, tmp_path, of_class=0)
    assert wrong["AP"] < 60  # control
