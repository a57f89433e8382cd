"""Reading and checking the configuration of the detection benchmark (`config_keys` lists it)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from detection.config_keys import DEFAULTS, EXTRA_NORM_HEADS, UNSUPPORTED, has_basic_blocks
from moco.cfgnode import CfgNode, get_key, load_config
from moco.data.rgb import FULL_RANGE
from moco.errors import ConfigError


def get_defaults() -> CfgNode:
    """A fresh node with every known key at Detectron2's default, and the `EXTRA_KEYS`."""
    return _node(DEFAULTS)


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


def check_processes(cfg: CfgNode, num_processes: int, device_type: str) -> None:
    """Raise ConfigError for what these processes cannot compute, before it fails in torch.

    Args:
        device_type: "cpu" or "cuda".
    """
    if cfg.MODEL.RESNETS.NORM == "SyncBN" and num_processes > 1 and device_type == "cpu":
        raise ConfigError(
            f"MODEL.RESNETS.NORM is 'SyncBN' with {num_processes} processes on a CPU, where "
            "torch's SyncBatchNorm does not run; allowed there: naiveSyncBN (batch norm over all "
            "processes), BN, FrozenBN; set MODEL.RESNETS.NORM naiveSyncBN"
        )
    if cfg.MODEL.COMPILE == "kernels" and device_type != "cpu":
        raise ConfigError(
            f"MODEL.COMPILE is 'kernels', which are for CPUs, on {device_type}; set MODEL.COMPILE "
            "eager, or train on a CPU"
        )


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


def _are_numbers(values: Sequence) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _require(ok: bool, where: str, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: {allowed}; change the value")


def _check_model(cfg: CfgNode, where: str) -> None:
    model = cfg.MODEL
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        ok = len(model[key]) == 3 and _are_numbers(model[key])
        ok = ok and all(math.isfinite(v) for v in model[key])
        _require(ok, where, f"MODEL.{key}", model[key], "three finite numbers")
    _require(0 not in model.PIXEL_STD, where, "MODEL.PIXEL_STD", model.PIXEL_STD, "no zeros")
    for key in ("SIZES", "ASPECT_RATIOS"):
        value = model.ANCHOR_GENERATOR[key]
        ok = len(value) == 1 and isinstance(value[0], list | tuple) and len(value[0]) > 0
        ok = ok and _are_numbers(value[0]) and all(v > 0 for v in value[0])
        _require(ok, where, f"MODEL.ANCHOR_GENERATOR.{key}", value, "one list of numbers above 0")
    offset = model.ANCHOR_GENERATOR.OFFSET
    _require(0 <= offset < 1, where, "MODEL.ANCHOR_GENERATOR.OFFSET", offset, "0 to below 1")
    for section, count in (("RPN", 2), ("ROI_HEADS", 1)):
        value = model[section].IOU_THRESHOLDS
        ok = len(value) == count and _are_numbers(value)
        ok = ok and list(value) == sorted(value) and value[0] > 0
        wanted = f"{count} ascending number{'s' * (count > 1)} above 0"
        _require(ok, where, f"MODEL.{section}.IOU_THRESHOLDS", value, wanted)
    for section in ("RPN", "ROI_BOX_HEAD"):
        value = model[section].BBOX_REG_WEIGHTS
        ok = len(value) == 4 and _are_numbers(value) and all(v > 0 for v in value)
        _require(ok, where, f"MODEL.{section}.BBOX_REG_WEIGHTS", value, "four numbers above 0")
    num_classes = model.ROI_HEADS.NUM_CLASSES
    _require(num_classes >= 1, where, "MODEL.ROI_HEADS.NUM_CLASSES", num_classes, "1 or more")
    for key, least in (("NUM_CONV", 0), ("CONV_DIM", 1)):
        value = model.ROI_MASK_HEAD[key]
        _require(value >= least, where, f"MODEL.ROI_MASK_HEAD.{key}", value, f"{least} or more")
    if has_basic_blocks(cfg):  # Detectron2 asserts the same, at full width
        options = model.RESNETS
        for key, only in (("RES2_OUT_CHANNELS", options.STEM_OUT_CHANNELS), ("NUM_GROUPS", 1)):
            allowed = f"{only} with DEPTH {options.DEPTH} (basic blocks)"
            _require(options[key] == only, where, f"MODEL.RESNETS.{key}", options[key], allowed)
    ok = model.RESNETS.NORM != "" or model.ROI_HEADS.NAME != EXTRA_NORM_HEADS
    allowed = f"a norm, as MODEL.ROI_HEADS.NAME is {EXTRA_NORM_HEADS}"
    _require(ok, where, "MODEL.RESNETS.NORM", "", allowed)
    ok = model.CHANNELS_LAST or model.COMPILE != "kernels"
    allowed = "eager with MODEL.CHANNELS_LAST False; kernels with True"
    _require(ok, where, "MODEL.COMPILE", model.COMPILE, allowed)


def _check_run(cfg: CfgNode, where: str) -> None:
    for key in ("TRAIN", "TEST", "VOC_CLASSES"):
        value = cfg.DATASETS[key]
        ok = all(isinstance(name, str) for name in value)
        _require(ok, where, f"DATASETS.{key}", value, "names")
    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    ok = decay is None or _are_numbers([decay])
    _require(ok, where, "SOLVER.WEIGHT_DECAY_BIAS", decay, "a number, or None for no own one")
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD", "PROGRESS_PERIOD"):
        value = cfg.SOLVER[key]
        _require(value >= 1, where, f"SOLVER.{key}", value, "1 or more")
    _require(cfg.SOLVER.BASE_LR > 0, where, "SOLVER.BASE_LR", cfg.SOLVER.BASE_LR, "above 0")
    steps = list(cfg.SOLVER.STEPS)
    ok = _are_numbers(steps) and steps == sorted(set(steps)) and all(step >= 1 for step in steps)
    _require(ok, where, "SOLVER.STEPS", cfg.SOLVER.STEPS, "ascending iterations, 1 or more")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    for key in ("CLIP_VALUE", "NORM_TYPE"):
        _require(clip[key] > 0, where, f"SOLVER.CLIP_GRADIENTS.{key}", clip[key], "above 0")
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    ok = len(sizes) > 0 and _are_numbers(sizes) and all(size >= 1 for size in sizes)
    _require(ok, where, "INPUT.MIN_SIZE_TRAIN", sizes, "one or more sizes in pixels, 1 or more")
    period = cfg.TEST.EVAL_PERIOD
    _require(period >= 0, where, "TEST.EVAL_PERIOD", period, "iterations, or 0 for the end only")
    num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
    _require(num_iter >= 1, where, "TEST.PRECISE_BN.NUM_ITER", num_iter, "1 or more")
    ends = cfg.INPUT.SIXTEEN_BIT_RANGE
    ok = len(ends) == 2 and all(type(end) is int for end in ends)
    ok = ok and 0 <= ends[0] < ends[1] <= FULL_RANGE[1]
    allowed = "two whole numbers, 0 <= black < white <= 65535"
    _require(ok, where, "INPUT.SIXTEEN_BIT_RANGE", ends, allowed)
    ok = tuple(ends) == FULL_RANGE or cfg.DATALOADER.STREAM != "detectron2"
    allowed = f"{FULL_RANGE} with DATALOADER.STREAM detectron2, which reads images as Detectron2"
    _require(ok, where, "INPUT.SIXTEEN_BIT_RANGE", ends, allowed)
    limit = cfg.INPUT.MAX_IMAGE_PIXELS
    _require(limit >= 1, where, "INPUT.MAX_IMAGE_PIXELS", limit, "1 or more")
    if cfg.DATALOADER.STREAM == "detectron2":  # whose negative SEED means a new one each time
        allowed = "0 to 4000000000 with DATALOADER.STREAM detectron2: the SEED of the run to equal"
        _require(0 <= cfg.SEED <= 4 * 10**9, where, "SEED", cfg.SEED, allowed)
    files = cfg.DATASETS.COCO_FILES
    ok = all(isinstance(f, list | tuple) and list(map(type, f)) == [str] * 3 for f in files)
    ok = ok and all(all(file) for file in files)
    allowed = "triples (name, annotation file, image folder)"
    _require(ok, where, "DATASETS.COCO_FILES", files, allowed)
    if cfg.DATASETS.VOC_ROOT:
        classes = cfg.DATASETS.VOC_CLASSES
        ok = len(classes) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        wanted = f"MODEL.ROI_HEADS.NUM_CLASSES = {cfg.MODEL.ROI_HEADS.NUM_CLASSES} names"
        _require(ok, where, "DATASETS.VOC_CLASSES", classes, wanted)
