"""Configuration of the detection benchmark: Detectron2's keys in use, with Detectron2's defaults.

A YAML file that loads here also loads in Detectron2, except for the few `EXTRA_KEYS`. Keys of
other architectures (FPN, RetinaNet, masks, key points, panoptic heads) are unknown here. A key
that Detectron2 acts on and this project does not is listed in `UNSUPPORTED`: setting it to
anything else than the listed values is an error, never ignored.

Source of names and defaults: detectron2/config/defaults.py (Detectron2 0.6).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from moco.cfgnode import CfgNode, get_key, load_config
from moco.errors import ConfigError

EXTRA_KEYS = (
    "DATASETS.VOC_ROOT",
    "DATASETS.VOC_CLASSES",
    "DATASETS.VOC_METRIC",
    "TEST.ROUND_DETECTIONS",
    "SOLVER.PROGRESS_PERIOD",
)

_RESNETS = dict(
    DEPTH=50,
    OUT_FEATURES=["res4"],
    NORM="FrozenBN",
    NUM_GROUPS=1,
    WIDTH_PER_GROUP=64,
    STEM_OUT_CHANNELS=64,
    RES2_OUT_CHANNELS=256,
    STRIDE_IN_1X1=True,
    RES5_DILATION=1,
    DEFORM_ON_PER_STAGE=[False, False, False, False],
    DEFORM_MODULATED=False,
    DEFORM_NUM_GROUPS=1,
)
_RPN = dict(
    HEAD_NAME="StandardRPNHead",
    IN_FEATURES=["res4"],
    CONV_DIMS=[-1],
    BOUNDARY_THRESH=-1,
    IOU_THRESHOLDS=[0.3, 0.7],
    IOU_LABELS=[0, -1, 1],
    BATCH_SIZE_PER_IMAGE=256,
    POSITIVE_FRACTION=0.5,
    BBOX_REG_LOSS_TYPE="smooth_l1",
    BBOX_REG_LOSS_WEIGHT=1.0,
    BBOX_REG_WEIGHTS=(1.0, 1.0, 1.0, 1.0),
    SMOOTH_L1_BETA=0.0,
    LOSS_WEIGHT=1.0,
    PRE_NMS_TOPK_TRAIN=12000,
    PRE_NMS_TOPK_TEST=6000,
    POST_NMS_TOPK_TRAIN=2000,
    POST_NMS_TOPK_TEST=1000,
    NMS_THRESH=0.7,
)
_ROI_HEADS = dict(
    NAME="Res5ROIHeads",
    NUM_CLASSES=80,
    IN_FEATURES=["res4"],
    IOU_THRESHOLDS=[0.5],
    IOU_LABELS=[0, 1],
    BATCH_SIZE_PER_IMAGE=512,
    POSITIVE_FRACTION=0.25,
    PROPOSAL_APPEND_GT=True,
    SCORE_THRESH_TEST=0.05,
    NMS_THRESH_TEST=0.5,
)
_ROI_BOX_HEAD = dict(
    NAME="",
    NUM_FC=0,
    FC_DIM=1024,
    NUM_CONV=0,
    CONV_DIM=256,
    NORM="",
    POOLER_TYPE="ROIAlignV2",
    POOLER_RESOLUTION=14,
    POOLER_SAMPLING_RATIO=0,
    CLS_AGNOSTIC_BBOX_REG=False,
    BBOX_REG_LOSS_TYPE="smooth_l1",
    BBOX_REG_LOSS_WEIGHT=1.0,
    BBOX_REG_WEIGHTS=(10.0, 10.0, 5.0, 5.0),
    SMOOTH_L1_BETA=0.0,
    TRAIN_ON_PRED_BOXES=False,
    USE_FED_LOSS=False,
    USE_SIGMOID_CE=False,
    FED_LOSS_FREQ_WEIGHT_POWER=0.5,
    FED_LOSS_NUM_CLASSES=50,
)
_SOLVER = dict(
    IMS_PER_BATCH=16,
    BASE_LR=0.001,
    BASE_LR_END=0.0,
    MAX_ITER=40000,
    LR_SCHEDULER_NAME="WarmupMultiStepLR",
    STEPS=(30000,),
    GAMMA=0.1,
    NUM_DECAYS=3,
    WARMUP_METHOD="linear",
    WARMUP_ITERS=1000,
    WARMUP_FACTOR=1.0 / 1000,
    RESCALE_INTERVAL=False,
    MOMENTUM=0.9,
    NESTEROV=False,
    WEIGHT_DECAY=0.0001,
    WEIGHT_DECAY_NORM=0.0,
    WEIGHT_DECAY_BIAS=None,
    BIAS_LR_FACTOR=1.0,
    REFERENCE_WORLD_SIZE=0,
    CHECKPOINT_PERIOD=5000,
    CLIP_GRADIENTS=dict(ENABLED=False, CLIP_TYPE="value", CLIP_VALUE=1.0, NORM_TYPE=2.0),
    AMP=dict(ENABLED=False),
    PROGRESS_PERIOD=20,
)
_DEFAULTS = dict(
    VERSION=2,
    MODEL=dict(
        META_ARCHITECTURE="GeneralizedRCNN",
        DEVICE="cuda",
        WEIGHTS="",
        PIXEL_MEAN=[103.53, 116.28, 123.675],
        PIXEL_STD=[1.0, 1.0, 1.0],
        MASK_ON=False,
        KEYPOINT_ON=False,
        LOAD_PROPOSALS=False,
        BACKBONE=dict(NAME="build_resnet_backbone", FREEZE_AT=2),
        RESNETS=_RESNETS,
        ANCHOR_GENERATOR=dict(
            NAME="DefaultAnchorGenerator",
            SIZES=[[32, 64, 128, 256, 512]],
            ASPECT_RATIOS=[[0.5, 1.0, 2.0]],
            OFFSET=0.0,
        ),
        PROPOSAL_GENERATOR=dict(NAME="RPN", MIN_SIZE=0),
        RPN=_RPN,
        ROI_HEADS=_ROI_HEADS,
        ROI_BOX_HEAD=_ROI_BOX_HEAD,
    ),
    INPUT=dict(
        FORMAT="BGR",
        MIN_SIZE_TRAIN=(800,),
        MIN_SIZE_TRAIN_SAMPLING="choice",
        MAX_SIZE_TRAIN=1333,
        MIN_SIZE_TEST=800,
        MAX_SIZE_TEST=1333,
        RANDOM_FLIP="horizontal",
        CROP=dict(ENABLED=False, TYPE="relative_range", SIZE=[0.9, 0.9]),
        MASK_FORMAT="polygon",
    ),
    DATASETS=dict(
        TRAIN=(),
        TEST=(),
        PROPOSAL_FILES_TRAIN=(),
        PROPOSAL_FILES_TEST=(),
        PRECOMPUTED_PROPOSAL_TOPK_TRAIN=2000,
        PRECOMPUTED_PROPOSAL_TOPK_TEST=1000,
        VOC_ROOT="",
        VOC_CLASSES=(),
        VOC_METRIC=2007,
    ),
    DATALOADER=dict(
        NUM_WORKERS=4,
        ASPECT_RATIO_GROUPING=True,
        SAMPLER_TRAIN="TrainingSampler",
        REPEAT_THRESHOLD=0.0,
        REPEAT_SQRT=True,
        FILTER_EMPTY_ANNOTATIONS=True,
    ),
    SOLVER=_SOLVER,
    TEST=dict(
        EVAL_PERIOD=0,
        DETECTIONS_PER_IMAGE=100,
        EXPECTED_RESULTS=[],
        KEYPOINT_OKS_SIGMAS=[],
        AUG=dict(
            ENABLED=False,
            MIN_SIZES=(400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
            MAX_SIZE=4000,
            FLIP=True,
        ),
        PRECISE_BN=dict(ENABLED=False, NUM_ITER=200),
        ROUND_DETECTIONS=True,
    ),
    OUTPUT_DIR="./output",
    SEED=-1,
    CUDNN_BENCHMARK=False,
    FLOAT32_PRECISION="",
    VIS_PERIOD=0,
)

_NORMS = ("BN", "FrozenBN", "SyncBN", "naiveSyncBN", "")
_EXTRA_NORM_HEADS = "Res5ROIHeadsExtraNorm"

# Only the default is implemented.
_DEFAULT_ONLY = (
    "VERSION",
    "MODEL.META_ARCHITECTURE",
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.RESNETS.RES5_DILATION",
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
    "MODEL.RESNETS.DEFORM_MODULATED",
    "MODEL.RESNETS.DEFORM_NUM_GROUPS",
    "MODEL.ANCHOR_GENERATOR.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.RPN.HEAD_NAME",
    "MODEL.RPN.IN_FEATURES",
    "MODEL.RPN.CONV_DIMS",
    "MODEL.RPN.BOUNDARY_THRESH",
    "MODEL.RPN.IOU_LABELS",
    "MODEL.RPN.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_HEADS.IN_FEATURES",
    "MODEL.ROI_HEADS.IOU_LABELS",
    "MODEL.ROI_BOX_HEAD.NAME",
    "MODEL.ROI_BOX_HEAD.NUM_FC",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_BOX_HEAD.CONV_DIM",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "INPUT.CROP.ENABLED",
    "INPUT.CROP.TYPE",
    "INPUT.CROP.SIZE",
    "INPUT.MASK_FORMAT",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.REPEAT_SQRT",
    "SOLVER.NUM_DECAYS",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.CLIP_GRADIENTS.ENABLED",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.AUG.ENABLED",
    "TEST.AUG.MIN_SIZES",
    "TEST.AUG.MAX_SIZE",
    "TEST.AUG.FLIP",
    "FLOAT32_PRECISION",
    "VIS_PERIOD",
)


# Dotted key -> the values that are implemented.
UNSUPPORTED: dict[str, tuple] = {
    **{key: (get_key(_DEFAULTS, key),) for key in _DEFAULT_ONLY},
    "MODEL.DEVICE": ("cuda", "cpu"),
    "MODEL.RESNETS.DEPTH": (50, 101, 152),
    "MODEL.RESNETS.NORM": _NORMS,
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.ROI_HEADS.NAME": ("Res5ROIHeads", _EXTRA_NORM_HEADS),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "none"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "DATASETS.VOC_METRIC": (2007, 2012),
}


def get_defaults() -> CfgNode:
    """A fresh node with every known key at Detectron2's default, and the `EXTRA_KEYS`."""
    return _node(_DEFAULTS)


def load_detection_config(config_file: str | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a detection YAML file and `KEY VALUE` pairs.

    Returns: a frozen node. `MODEL.WEIGHTS ""` means random initialisation.
    Raises: ConfigError for what `moco.cfgnode.load_config` refuses, for a value in no
        `UNSUPPORTED` row, and for values that contradict each other.
    Warns: of learning-rate steps beyond the last iteration, which Detectron2 ignores too.
    """
    overrides = list(overrides)
    cfg = load_config(get_defaults(), config_file, overrides)
    where = " + ".join(filter(None, (config_file, "command line" if overrides else "")))
    for key, allowed in UNSUPPORTED.items():
        value = get_key(cfg, key)
        if not any(_same(value, candidate) for candidate in allowed):
            raise ConfigError(
                f"{where}: {key} is {value!r}, which this project does not implement; allowed: "
                f"{', '.join(repr(a) for a in allowed)}; change or remove the key"
            )
    _check_model(cfg, where)
    _check_run(cfg, where)
    late = [step for step in cfg.SOLVER.STEPS if step > cfg.SOLVER.MAX_ITER]
    if late and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        warnings.warn(
            f"{where}: SOLVER.STEPS {late} lie beyond SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} and do "
            "nothing",
            stacklevel=2,
        )
    return cfg


def _node(tree: dict) -> CfgNode:
    node = CfgNode()
    for key, value in tree.items():
        if isinstance(value, dict):
            node[key] = _node(value)
        else:
            node[key] = list(value) if isinstance(value, list) else value
    return node


def _same(value: object, candidate: object) -> bool:
    """Equality that takes a list and a tuple of the same items as equal, as YAML users expect."""
    if isinstance(value, list | tuple) and isinstance(candidate, list | tuple):
        return len(value) == len(candidate) and all(map(_same, value, candidate))
    return value == candidate


def _require(ok: bool, where: str, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: {allowed}; change the value")


def _check_model(cfg: CfgNode, where: str) -> None:
    model = cfg.MODEL
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        ok = len(model[key]) == 3 and all(math.isfinite(v) for v in model[key])
        _require(ok, where, f"MODEL.{key}", model[key], "three finite numbers")
    _require(0 not in model.PIXEL_STD, where, "MODEL.PIXEL_STD", model.PIXEL_STD, "no zeros")
    for key in ("SIZES", "ASPECT_RATIOS"):
        value = model.ANCHOR_GENERATOR[key]
        ok = len(value) == 1 and isinstance(value[0], list | tuple) and len(value[0]) > 0
        ok = ok and all(v > 0 for v in value[0])
        _require(ok, where, f"MODEL.ANCHOR_GENERATOR.{key}", value, "one list of numbers above 0")
    offset = model.ANCHOR_GENERATOR.OFFSET
    _require(0 <= offset < 1, where, "MODEL.ANCHOR_GENERATOR.OFFSET", offset, "0 to below 1")
    for section, count in (("RPN", 2), ("ROI_HEADS", 1)):
        value = model[section].IOU_THRESHOLDS
        ok = len(value) == count and list(value) == sorted(value) and value[0] > 0
        wanted = f"{count} ascending number{'s' * (count > 1)} above 0"
        _require(ok, where, f"MODEL.{section}.IOU_THRESHOLDS", value, wanted)
    for section in ("RPN", "ROI_BOX_HEAD"):
        value = model[section].BBOX_REG_WEIGHTS
        ok = len(value) == 4 and all(v > 0 for v in value)
        _require(ok, where, f"MODEL.{section}.BBOX_REG_WEIGHTS", value, "four numbers above 0")
    num_classes = model.ROI_HEADS.NUM_CLASSES
    _require(num_classes >= 1, where, "MODEL.ROI_HEADS.NUM_CLASSES", num_classes, "1 or more")
    ok = model.RESNETS.NORM != "" or model.ROI_HEADS.NAME != _EXTRA_NORM_HEADS
    allowed = f"a norm, as MODEL.ROI_HEADS.NAME is {_EXTRA_NORM_HEADS}"
    _require(ok, where, "MODEL.RESNETS.NORM", "", allowed)


def _check_run(cfg: CfgNode, where: str) -> None:
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD", "PROGRESS_PERIOD"):
        value = cfg.SOLVER[key]
        _require(value >= 1, where, f"SOLVER.{key}", value, "1 or more")
    _require(cfg.SOLVER.BASE_LR > 0, where, "SOLVER.BASE_LR", cfg.SOLVER.BASE_LR, "above 0")
    steps = list(cfg.SOLVER.STEPS)
    ok = steps == sorted(set(steps)) and all(step >= 1 for step in steps)
    _require(ok, where, "SOLVER.STEPS", cfg.SOLVER.STEPS, "ascending iterations, 1 or more")
    num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
    _require(num_iter >= 1, where, "TEST.PRECISE_BN.NUM_ITER", num_iter, "1 or more")
    if cfg.DATASETS.VOC_ROOT:
        classes = cfg.DATASETS.VOC_CLASSES
        ok = len(classes) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        wanted = f"MODEL.ROI_HEADS.NUM_CLASSES = {cfg.MODEL.ROI_HEADS.NUM_CLASSES} names"
        _require(ok, where, "DATASETS.VOC_CLASSES", classes, wanted)
