from __future__ import annotations

import textwrap

import pytest

from detection.config import get_defaults, load_detection_config
from detection.config_keys import EXTRA_KEYS, UNSUPPORTED
from moco.errors import ConfigError


def leaves(node: dict, prefix: str = "") -> dict[str, object]:
    out = {}
    for key, value in node.items():
        dotted = prefix + key
        out.update(leaves(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value})
    return out


@pytest.mark.detectron2
def test_every_default_is_detectron2_s_own():
    config = pytest.importorskip("detectron2.config")
    theirs = leaves(config.get_cfg())
    ours = leaves(get_defaults())
    assert set(ours) - set(theirs) == set(EXTRA_KEYS)
    for key in set(ours) - set(EXTRA_KEYS):
        assert (ours[key], type(ours[key])) == (theirs[key], type(theirs[key])), key
    # What is left out belongs to other architectures only.
    sections = ("FPN", "RETINANET", "SEM_SEG_HEAD", "PANOPTIC_FPN")
    sections += ("ROI_KEYPOINT_HEAD", "ROI_BOX_CASCADE_HEAD")
    rest = {f"MODEL.{name}" for name in sections} | {"MODEL.ANCHOR_GENERATOR.ANGLES", "GLOBAL"}
    for key in set(theirs) - set(ours):
        assert any(key == name or key.startswith(f"{name}.") for name in rest), key


def test_extra_keys_have_their_defaults():
    ours = leaves(get_defaults())
    assert {key: ours[key] for key in EXTRA_KEYS} == {
        "DATASETS.VOC_ROOT": "",
        "DATASETS.VOC_CLASSES": (),
        "DATASETS.VOC_METRIC": 2007,
        "DATASETS.COCO_FILES": (),
        "INPUT.SIXTEEN_BIT_RANGE": (0, 65535),
        "INPUT.MAX_IMAGE_PIXELS": 178956970,
        "TEST.ROUND_DETECTIONS": True,
        "TEST.AMP.ENABLED": False,
        "MODEL.CHANNELS_LAST": False,
        "MODEL.COMPILE": "eager",
        "MODEL.RESET_PREDICTORS": False,
        "SOLVER.PROGRESS_PERIOD": 20,
        "DATALOADER.STREAM": "stateless",
        "LOG.TENSORBOARD": True,
    }


def test_defaults_are_fresh_valid_and_frozen_once_loaded():
    get_defaults().MODEL.PIXEL_MEAN.append(7.0)
    assert get_defaults().MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    cfg = load_detection_config(None)
    assert leaves(cfg) == leaves(get_defaults())
    with pytest.raises(AttributeError):
        cfg.SEED = 3


def test_every_unsupported_key_exists_and_allows_its_default():
    ours = leaves(get_defaults())
    for key, allowed in UNSUPPORTED.items():
        assert ours[key] in allowed, key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.KEYPOINT_ON", "True"),
        ("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead"),
        ("MODEL.ROI_MASK_HEAD.NORM", "GN"),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "28"),
        ("INPUT.MASK_FORMAT", "rle"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.RESNETS.DEPTH", "20"),
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.RES5_DILATION", "2"),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
        ("MODEL.RPN.IN_FEATURES", "['res5']"),
        ("INPUT.CROP.ENABLED", "True"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "8"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
        ("TEST.AUG.ENABLED", "True"),
        ("DATASETS.VOC_METRIC", "2010"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key, value):
    with pytest.raises(ConfigError) as caught:
        load_detection_config(None, [key, value])
    message = str(caught.value)
    assert message.startswith(f"command line: {key} is ") and "allowed: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"),
        ("MODEL.PIXEL_MEAN", "[1.0]"),
        ("MODEL.PIXEL_MEAN", "['a', 'b', 'c']"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, -1.0]]"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", "1.0"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.4, 0.5]"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(1.0, 1.0)"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", "-1"),
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.BASE_LR", "0.0"),
        ("SOLVER.STEPS", "(20, 10)"),
        ("SOLVER.STEPS", "(20, '30')"),
        ("INPUT.MIN_SIZE_TRAIN", "(480, 'large')"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("TEST.PRECISE_BN.NUM_ITER", "0"),
        ("TEST.EVAL_PERIOD", "-1"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0"),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "-1.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"command line: {key} is .*; allowed: "):
        load_detection_config(None, [key, value])


def test_basic_blocks_have_one_width_and_one_group():
    basic = ["MODEL.RESNETS.DEPTH", "18"]
    with pytest.raises(ConfigError, match="RES2_OUT_CHANNELS is 256; allowed: 64 with DEPTH 18"):
        load_detection_config(None, basic)
    basic += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    assert load_detection_config(None, basic).MODEL.RESNETS.DEPTH == 18
    with pytest.raises(ConfigError, match="NUM_GROUPS is 2; allowed: 1 with DEPTH 18"):
        load_detection_config(None, [*basic, "MODEL.RESNETS.NUM_GROUPS", "2"])


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(
        ConfigError, match="VOC_CLASSES is .'a',.; allowed: .*NUM_CLASSES = 2 names"
    ):
        load_detection_config(
            None,
            ["DATASETS.VOC_ROOT", "x", "DATASETS.VOC_CLASSES", "('a',)"]
            + ["MODEL.ROI_HEADS.NUM_CLASSES", "2"],
        )
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is ''; allowed: a norm"):
        load_detection_config(
            None, ["MODEL.RESNETS.NORM", "", "MODEL.ROI_HEADS.NAME", "Res5ROIHeadsExtraNorm"]
        )


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'BASE_LR'"):
        load_detection_config(None, ["SOLVER.BASE_RL", "0.1"])


def test_lists_and_tuples_are_one(tmp_path):
    cfg = load_detection_config(None, ["MODEL.RPN.IN_FEATURES", "('res4',)"])
    assert list(cfg.MODEL.RPN.IN_FEATURES) == ["res4"]


def test_steps_beyond_the_end_are_warned_of():
    with pytest.warns(UserWarning, match=r"SOLVER.STEPS \[30000\] lie beyond SOLVER.MAX_ITER 60"):
        load_detection_config(None, ["SOLVER.MAX_ITER", "60"])


# A file in Detectron2's own style: a base, tuples as text, keys that are at their default.
BASE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  RPN: {PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TEST: 1000}
  ROI_HEADS: {NAME: "Res5ROIHeadsExtraNorm"}
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {NORM: "SyncBN"}
TEST:
  PRECISE_BN: {ENABLED: True}
SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.02}
VERSION: 2
"""
CHILD = """
_BASE_: "base.yaml"
MODEL:
  WEIGHTS: "x.pth"
  MASK_ON: False
  RESNETS: {DEPTH: 50, STRIDE_IN_1X1: False}
  ROI_HEADS: {NUM_CLASSES: 20}
INPUT:
  MIN_SIZE_TRAIN: (480, 512, 544)
DATASETS:
  TRAIN: ('voc_2007_trainval', 'voc_2012_trainval')
  TEST: ('voc_2007_test',)
SOLVER:
  STEPS: (18000, 22000)
  MAX_ITER: 24000
"""


def write_yaml(folder) -> str:
    (folder / "base.yaml").write_text(textwrap.dedent(BASE))
    (folder / "child.yaml").write_text(textwrap.dedent(CHILD))
    return str(folder / "child.yaml")


def test_a_file_in_detectron2_s_style_loads(tmp_path):
    cfg = load_detection_config(write_yaml(tmp_path), ["SEED", "5"])
    assert cfg.DATASETS.TRAIN == ("voc_2007_trainval", "voc_2012_trainval")
    assert cfg.INPUT.MIN_SIZE_TRAIN == (480, 512, 544)
    assert cfg.MODEL.RESNETS.NORM == "SyncBN" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.TEST.PRECISE_BN.ENABLED is True
    assert (cfg.SOLVER.BASE_LR, cfg.SEED) == (0.02, 5)
    assert set(leaves(cfg)) == set(leaves(get_defaults()))


def test_errors_name_the_file(tmp_path):
    path = write_yaml(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_detection_config(path, ["MODEL.KEYPOINT_ON", "True"])
    assert str(caught.value).startswith(f"{path} + command line: MODEL.KEYPOINT_ON is True")


@pytest.mark.detectron2
def test_a_file_reads_as_detectron2_reads_it(tmp_path):
    config = pytest.importorskip("detectron2.config")
    path = write_yaml(tmp_path)
    theirs = config.get_cfg()
    theirs.merge_from_file(path)
    theirs = leaves(theirs)
    ours = leaves(load_detection_config(path))
    assert {k: v for k, v in ours.items() if k not in EXTRA_KEYS} == {
        key: theirs[key] for key in ours if key not in EXTRA_KEYS
    }
