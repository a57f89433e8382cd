"""Checks of the global batch against processes, batch-norm groups and images."""

from __future__ import annotations

from moco.cfgnode import CfgNode
from moco.data.images import ImageSource
from moco.errors import ConfigError

WHOLE_BATCH_WARNING = (
    "batch norm sees the whole batch at once: shuffle BN has no effect and the loss can "
    "be lowered through batch statistics; MODEL.BN_SPLITS 8 with MODEL.NORM BN imitates 8 GPUs"
)


def check_batch(cfg: CfgNode, source: ImageSource, world_size: int) -> None:
    """Raises: ConfigError where the batch cannot be shared, grouped or filled."""
    train, model = cfg.TRAIN, cfg.MODEL
    if train.BATCH_SIZE % world_size:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE {train.BATCH_SIZE} (global) cannot be shared by {world_size} "
            "processes; give a multiple of their number"
        )
    if train.BATCH_SIZE // world_size % model.BN_SPLITS:
        raise ConfigError(
            f"MODEL.BN_SPLITS {model.BN_SPLITS} does not divide the "
            f"{train.BATCH_SIZE // world_size} images of a process; give a divisor"
        )
    if len(source) < train.BATCH_SIZE:
        raise ConfigError(
            f"{source.root}: {len(source)} images do not fill one batch of "
            f"{train.BATCH_SIZE}; lower TRAIN.BATCH_SIZE"
        )


def sees_whole_batch(cfg: CfgNode, world_size: int) -> bool:
    """Whether batch norm normalises the global batch as one group."""
    return cfg.MODEL.NORM == "SyncBN" or world_size * cfg.MODEL.BN_SPLITS == 1
