"""Defaults of every pretraining key, and the checks that need no data.

A config file holds `_BASE_` and the few keys that differ from here; the command line adds
`KEY VALUE` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from moco.cfgnode import CfgNode, get_key, load_config
from moco.errors import ConfigError

# What may differ between a run and its continuation: none of it changes a number.
DIGEST_EXCLUDE = (
    "DATA.NUM_WORKERS",
    "CHECKPOINT",
    "LOG",
    "KNN",
)


def get_defaults() -> CfgNode:
    """The defaults tree: MoCo v2 for 200 epochs on ImageNet (paper, section 2)."""
    return CfgNode(
        METHOD="moco",
        SEED=0,
        MODEL=CfgNode(
            ARCH="resnet50",
            WIDTH=1.0,  # factor on all channel counts; 1.0 is torchvision's network
            STEM="imagenet",  # or "cifar": 3x3 convolution, no max-pool
            HEAD="mlp",  # "mlp" (v2) or "linear" (v1)
            DIM=128,
            BN_SPLITS=1,  # groups batch norm sees in one process (8 imitates 8 GPUs)
        ),
        MOCO=CfgNode(
            QUEUE_SIZE=65536,
            MOMENTUM=0.999,
            TEMPERATURE=0.2,
        ),
        DATA=CfgNode(
            RECIPE="v2",  # "v1" or "v2"
            SIZE=224,
            CROP_SCALE=(0.2, 1.0),
            BLUR_PROBABILITY=0.5,  # v1 has none: its config sets 0
            MEAN=(0.485, 0.456, 0.406),
            STD=(0.229, 0.224, 0.225),
            NUM_WORKERS=4,  # per process
        ),
        TRAIN=CfgNode(
            EPOCHS=200,
            BATCH_SIZE=256,  # global: over all processes and machines
            LR=0.03,
            SCHEDULE="cosine",  # "cosine" (v2) or "step" (v1), both per epoch
            MILESTONES=(120, 160),  # epochs at which "step" multiplies the rate by 0.1
            SGD_MOMENTUM=0.9,
            WEIGHT_DECAY=1e-4,
            AMP=False,  # bfloat16 autocast; logits, loss and weights stay float32
            CHANNELS_LAST=False,
        ),
        CHECKPOINT=CfgNode(
            PERIOD=1,  # epochs between checkpoints; the last epoch is always saved
            KEEP_LAST=3,
            MILESTONE=50,  # epochs; their checkpoints are never removed. 0: none
        ),
        LOG=CfgNode(
            PERIOD=20,  # steps between log records
            TENSORBOARD=True,
        ),
        KNN=CfgNode(
            PERIOD=1,  # epochs between kNN evaluations (only where images carry labels). 0: off
            K=200,
            TEMPERATURE=0.1,
            FEATURES="backbone",  # or "head": the two are not comparable
            BATCH_SIZE=256,
        ),
    )


_CHOICES = {
    "MODEL.STEM": ("imagenet", "cifar"),
    "MODEL.HEAD": ("mlp", "linear"),
    "DATA.RECIPE": ("v1", "v2"),
    "TRAIN.SCHEDULE": ("cosine", "step"),
    "KNN.FEATURES": ("backbone", "head"),
}
_AT_LEAST = {
    "MODEL.DIM": 1,
    "MODEL.BN_SPLITS": 1,
    "MOCO.QUEUE_SIZE": 1,
    "DATA.SIZE": 1,
    "DATA.NUM_WORKERS": 0,
    "TRAIN.EPOCHS": 1,
    "TRAIN.BATCH_SIZE": 1,
    "TRAIN.WEIGHT_DECAY": 0,
    "CHECKPOINT.PERIOD": 1,
    "CHECKPOINT.KEEP_LAST": 1,
    "CHECKPOINT.MILESTONE": 0,
    "LOG.PERIOD": 1,
    "KNN.PERIOD": 0,
    "KNN.K": 1,
    "KNN.BATCH_SIZE": 1,
}
_POSITIVE = ("MODEL.WIDTH", "MOCO.TEMPERATURE", "TRAIN.LR", "KNN.TEMPERATURE")


def load_pretrain_config(config_file: str | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file with its `_BASE_` chain, then `KEY VALUE` pairs, checked and frozen.

    Raises: ConfigError naming the key, the value given and what is allowed.
    """
    cfg = load_config(get_defaults(), config_file, overrides)
    where = config_file or "command line"
    for key, allowed in _CHOICES.items():
        _require(where, key, get_key(cfg, key), get_key(cfg, key) in allowed, ", ".join(allowed))
    for key, least in _AT_LEAST.items():
        _require(where, key, get_key(cfg, key), get_key(cfg, key) >= least, f"{least} or more")
    for key in _POSITIVE:
        _require(where, key, get_key(cfg, key), get_key(cfg, key) > 0, "a number above 0")
    momentum = cfg.MOCO.MOMENTUM
    _require(where, "MOCO.MOMENTUM", momentum, 0 <= momentum < 1, "0 <= momentum < 1")
    if cfg.MOCO.QUEUE_SIZE < cfg.TRAIN.BATCH_SIZE:
        raise ConfigError(
            f"{where}: MOCO.QUEUE_SIZE {cfg.MOCO.QUEUE_SIZE} does not hold the keys of one step "
            f"(TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE}); the queue must be at least the global "
            "batch: raise the one or lower the other"
        )
    return cfg


def _require(where: str, key: str, given: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: {key} is {given!r}; allowed: {allowed}")
