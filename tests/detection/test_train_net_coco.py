"""The command line on generated COCO-format data, with tiny models, by both engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection import train_net
from detection.data.shapes_coco import make_coco_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIG = (
    Path(train_net.__file__).resolve().parents[1] / "configs/detection/coco_R_50_C4_2x_moco.yaml"
)
TINY = """
_BASE_: "{base}"
MODEL:
  MASK_ON: False
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TRAIN: 30, PRE_NMS_TOPK_TEST: 100}}
  ROI_HEADS: {{NUM_CLASSES: 2, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}}
  ROI_MASK_HEAD: {{CONV_DIM: 8}}
INPUT: {{MIN_SIZE_TRAIN: [68], MIN_SIZE_TEST: 68}}
DATASETS:
  COCO_FILES:
    - [shapes_train, "{root}/train.json", "{root}/images"]
    - [shapes_test, "{root}/test.json", "{root}/images"]
  TRAIN: [shapes_train]
  TEST: [shapes_test]
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1, BASE_LR: 0.01}}
TEST: {{PRECISE_BN: {{NUM_ITER: 1}}, DETECTIONS_PER_IMAGE: 20}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    root = make_coco_shapes(
        folder / "s", num_train=4, num_test=2, size=68, seed=0, class_names=("circle", "square")
    )
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(base=CONFIG, root=root))
    return path


def call(config, *words, engine="embedded") -> int:
    flags = ["--config-file", config, "--device", "cpu", "--engine", engine, *words]
    with pytest.raises(SystemExit) as exit_:
        train_net.main([str(word) for word in flags])
    return exit_.value.code


def test_trials_with_boxes(config, tmp_path, capsys):
    assert call(config, "--trials", "2", "OUTPUT_DIR", tmp_path) == 0
    out = capsys.readouterr().out
    assert "4 training images (shapes_train), 2 test images (shapes_test), 2 classes" in out
    assert "creating index" not in out and len(out.splitlines()) < 40
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metric"] == "COCO, boxes (101 points, 100 detections an image)"
    assert results["num_finished"] == 2 and results["mean"]["AP"] is not None
    for k, trial in enumerate(results["trials"]):
        assert trial["coco"].keys() == {"bbox"} and trial["AP"] == trial["coco"]["bbox"]["AP"]
        assert trial["per_class"].keys() == {"circle", "square"}
        found = json.loads((tmp_path / f"trial_{k}/coco_instances_results.json").read_text())
        assert {entry["image_id"] for entry in found} <= {5, 6} and found
        assert {entry["category_id"] for entry in found} <= {1, 3}
    text = (tmp_path / "results.md").read_text()
    assert "| boxes |" in text and "| masks |" not in text and "No published rows" in text
    assert sorted(p.name for p in (tmp_path / "trial_0/pictures").iterdir()) == [
        "5.png", "6.png", "contact_sheet.png"
    ]  # fmt: skip
    assert call(config, "--trials", "2", "OUTPUT_DIR", tmp_path) == 0
    assert capsys.readouterr().out.count("finished already") == 2
    weights, again = tmp_path / "trial_0/model_final.pth", tmp_path / "eval"
    assert call(config, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", again) == 0
    evaluated = json.loads((again / "eval_only.json").read_text())
    assert evaluated["coco"] == results["trials"][0]["coco"]


@pytest.mark.parametrize("engine", ["embedded", pytest.param("detectron2", marks=[
    pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")
])])  # fmt: skip
def test_a_run_with_masks(config, tmp_path, engine):
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    assert call(config, "MODEL.MASK_ON", "True", "OUTPUT_DIR", tmp_path, engine=engine) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metric"].startswith("COCO, boxes and masks")
    assert result["coco"].keys() == {"bbox", "segm"}
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert found and all(isinstance(f["segmentation"]["counts"], str) for f in found)
    if engine == "detectron2":
        mine, theirs = result["coco"], result["detectron2_evaluator"]
        for score in ("AP", "AP50", "AP75"):
            assert mine["bbox"][score] == pytest.approx(theirs[score], rel=1e-12)
            assert mine["segm"][score] == pytest.approx(theirs["segm"][score], rel=1e-12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "NUM_CLASSES: 80 is given, but the data has 2"),
        (["DATASETS.TEST", "('coco_2017_test',)"], "set the environment variable DETECTRON2_DATA"),
        (["DATASETS.TEST", "('shapes_tset',)"], "did you mean 'shapes_test'"),
        (["DATASETS.TEST", "('voc_2007_test',)"], "they are not mixed"),
        (["DATASETS.COCO_FILES", "(('a', 'b'),)"], "triples (name, annotation file, image folder)"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(config, tmp_path, capsys, words, message):
    assert call(config, *words, "OUTPUT_DIR", tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
