"""The measurement of both engines' networks: same images, all sides in the table, the file."""

from __future__ import annotations

import json

import pytest
import torch

from detection.benchmarks import detection
from detection.data.shapes import make_shapes_dataset
from detection.engines.d2 import Detectron2Engine
from moco.errors import ConfigError

TINY = """
MODEL:
  DEVICE: cpu
  RESNETS: {{NORM: BN, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  BACKBONE: {{FREEZE_AT: 0}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TRAIN: 30, POST_NMS_TOPK_TEST: 20}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm, NUM_CLASSES: 1, BATCH_SIZE_PER_IMAGE: 16}}
INPUT: {{MIN_SIZE_TRAIN: [69], MIN_SIZE_TEST: 69}}
DATASETS: {{VOC_ROOT: "{root}", VOC_CLASSES: [circle], TRAIN: [train], TEST: [test]}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001}}
"""

SIDES = {"embedded fp32", "embedded fp32, kernels", "embedded fast, eager", "embedded fast"}


@pytest.fixture
def config(tmp_path):
    root = make_shapes_dataset(
        tmp_path / "shapes", num_train=4, num_test=2, num_unlabelled=0, size=64, seed=0,
        class_names=("circle",),
    )  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(TINY.format(root=root))
    return str(tmp_path / "tiny.yaml")


def measure(config, output, **changes):
    options = {"num_rounds": 3, "device": "cpu", "output": output, **changes}
    detection.run(config, [], **options)
    return json.loads(output.read_text())


def test_without_detectron2_this_project_is_measured_alone(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detectron2Engine, "unavailable_reason", lambda self: "not installed")
    content = measure(config, tmp_path / "d.json")
    for what in ("training iteration", "test image"):
        assert set(content[what]) == SIDES
        assert content[what]["embedded fp32"]["speedup"] == 1.0
        assert content[what]["embedded fast"]["rounds"] == 3
    out = capsys.readouterr().out
    assert "Detectron2 is left out: not installed" in out and "| embedded fast |" in out
    assert content["settings"]["embedded fast"]["MODEL.COMPILE"] == "kernels"
    assert content["settings"]["embedded fp32"] == {}
    assert content["images_per_batch"] == 2 and "cpu" in content["machine"]


@pytest.mark.detectron2
def test_both_engines_are_measured_on_the_same_images(config, tmp_path):
    pytest.importorskip("detectron2")
    content = measure(config, tmp_path / "d.json")
    assert set(content["test image"]) == {"detectron2 fp32", *SIDES}
    assert "detectron2" in content["versions"]


def test_negative_control_other_images_are_noticed():
    ours = [[{"image": torch.zeros(3, 4, 4)}]]
    detection._check_same_images(ours, ours)
    with pytest.raises(AssertionError, match="batch 0"):
        detection._check_same_images(ours, [[{"image": torch.ones(3, 4, 4)}]])


def test_too_few_rounds_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="--rounds 2: at least 3"):
        measure(config, tmp_path / "d.json", num_rounds=2)
