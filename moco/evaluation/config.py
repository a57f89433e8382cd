"""Defaults of every key of linear classification and fine-tuning, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moco.cfgnode import CfgNode, get_key, load_config
from moco.errors import ConfigError

# What may differ between a run and its continuation: none of it changes a number.
DIGEST_EXCLUDE = ("DATA.NUM_WORKERS", "CHECKPOINT", "LOG")
OF_THE_WEIGHTS = ()  # of DATA.MEAN and DATA.STD: what the weights were trained with


def get_defaults() -> CfgNode:
    """The defaults tree: the reference's linear classification (facebookresearch/moco,
    main_lincls.py) on ImageNet."""
    return CfgNode(
        SEED=0,
        DATA=CfgNode(
            SIZE=224,
            RESIZE=0,  # shorter side before the central crop in evaluation; 0: SIZE * 256 / 224
            CROP_SCALE=(0.08, 1.0),  # random resized crop in training
            FLIP_PROBABILITY=0.5,
            BACKEND="pil",  # the reference's pixels; "opencv": nearly these, faster
            MEAN=OF_THE_WEIGHTS,  # (): what the weights were trained with, else ImageNet's
            STD=OF_THE_WEIGHTS,
            LABELS_FRACTION=1.0,  # share of each class's training images
            LABELS_SEED=0,  # which ones
            LABELS_LIST="",  # or a file that names the training images
            NUM_WORKERS=4,  # per process
        ),
        TRAIN=CfgNode(
            EPOCHS=100,
            BATCH_SIZE=256,  # global: over all processes
            LR=30.0,  # of the classifier, not scaled with the batch
            SCHEDULE="step",  # per epoch; or "cosine"
            MILESTONES=(60, 80),  # epochs at which "step" multiplies the rate by DECAY
            DECAY=0.1,
            SGD_MOMENTUM=0.9,
            WEIGHT_DECAY=0.0,
            INIT_STD=0.01,  # of the classifier's initial weights; its bias starts at 0
            AMP=False,  # bfloat16 in the backbone; the classifier and the loss stay float32
            CHANNELS_LAST=False,
        ),
        FINETUNE=CfgNode(
            ENABLED=False,  # train the backbone too, its batch norm over all processes' images
            BACKBONE_LR=0.01,
        ),
        EVAL=CfgNode(
            PERIOD=1,  # epochs between evaluations; the last epoch always is one
            BATCH_SIZE=256,  # per process
        ),
        CACHED=CfgNode(  # of --cached-features alone
            LRS=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),  # instead of TRAIN.LR
            WEIGHT_DECAYS=(0.0,),  # instead of TRAIN.WEIGHT_DECAY
            NORMALIZE=False,  # features to unit length
            DTYPE="float32",  # of the stored features, or "float16"
        ),
        CHECKPOINT=CfgNode(PERIOD=1, KEEP_LAST=1),  # epochs
        LOG=CfgNode(PERIOD=10),  # steps
    )


_CHOICES = {
    "DATA.BACKEND": ("pil", "opencv"),
    "TRAIN.SCHEDULE": ("step", "cosine"),
    "CACHED.DTYPE": ("float32", "float16"),
}
_AT_LEAST = {
    "DATA.SIZE": 1,
    "DATA.NUM_WORKERS": 0,
    "TRAIN.EPOCHS": 1,
    "TRAIN.BATCH_SIZE": 1,
    "TRAIN.WEIGHT_DECAY": 0,
    "TRAIN.INIT_STD": 0,
    "EVAL.PERIOD": 1,
    "EVAL.BATCH_SIZE": 1,
    "CHECKPOINT.PERIOD": 1,
    "CHECKPOINT.KEEP_LAST": 1,
    "LOG.PERIOD": 1,
}
_POSITIVE = ("TRAIN.LR", "TRAIN.DECAY", "FINETUNE.BACKBONE_LR")
_NUMBERS = {"CACHED.LRS": 1e-12, "CACHED.WEIGHT_DECAYS": 0.0}  # lists, and the least value


def load_linear_config(config_file: str | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file with its `_BASE_` chain, then `KEY VALUE` pairs, checked and frozen.

    Raises: ConfigError naming the key, the value given and what is allowed.
    """
    cfg = load_config(get_defaults(), config_file, overrides)
    where = config_file or "command line"

    def require(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{where}: {key} is {get_key(cfg, key)!r}; allowed: {allowed}")

    for key, choices in _CHOICES.items():
        require(key, get_key(cfg, key) in choices, ", ".join(choices))
    for key, least in _AT_LEAST.items():
        require(key, get_key(cfg, key) >= least, f"{least} or more")
    for key in _POSITIVE:
        require(key, get_key(cfg, key) > 0, "a number above 0")
    for key, least in _NUMBERS.items():
        values = get_key(cfg, key)
        ok = len(values) > 0 and all(isinstance(v, int | float) and v >= least for v in values)
        require(key, ok, f"numbers {'of 0 or more' if not least else 'above 0'}, at least one")
    require("TRAIN.SGD_MOMENTUM", 0 <= cfg.TRAIN.SGD_MOMENTUM < 1, "0 <= momentum < 1")
    require("DATA.LABELS_FRACTION", 0 < cfg.DATA.LABELS_FRACTION <= 1, "above 0, up to 1")
    require("DATA.RESIZE", cfg.DATA.RESIZE in (0,) or cfg.DATA.RESIZE >= cfg.DATA.SIZE,
            f"0, or DATA.SIZE ({cfg.DATA.SIZE}) or more")  # fmt: skip
    for key in ("DATA.MEAN", "DATA.STD"):
        value, floor = get_key(cfg, key), 0 if key == "DATA.STD" else -math.inf
        ok = len(value) in (0, 1, 3, 4)
        ok = ok and all(type(v) in (int, float) and floor < v < math.inf for v in value)
        require(key, ok, f"a number{' above 0' if floor == 0 else ''} for each channel, or ()")
    scale = cfg.DATA.CROP_SCALE
    ok = len(scale) == 2 and 0 < scale[0] <= scale[-1] <= 1
    require("DATA.CROP_SCALE", ok, "two shares of the area, ascending")
    require("DATA.FLIP_PROBABILITY", 0 <= cfg.DATA.FLIP_PROBABILITY <= 1, "0 to 1")
    both = bool(cfg.DATA.LABELS_LIST) and cfg.DATA.LABELS_FRACTION < 1
    require("DATA.LABELS_FRACTION", not both, "1.0 together with DATA.LABELS_LIST")
    return cfg
