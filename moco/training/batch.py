"""The global batch: how it is shared out and checked, and its loader."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from moco.cfgnode import CfgNode
from moco.config import OWN_VALUE
from moco.data.augment import build_view_recipes
from moco.data.bad_images import BadImages
from moco.data.images import ImageSource
from moco.data.loader import SeenObserver, build_pretrain_loader
from moco.data.sampler import BlockOrder, epoch_order
from moco.data.shards import ShardSource
from moco.distributed import ProcessInfo
from moco.errors import ConfigError

WHOLE_BATCH_WARNING = (
    "batch norm sees the whole batch at once: shuffle BN has no effect and the loss can "
    "be lowered through batch statistics; with MODEL.NORM BN, MODEL.BN_SPLITS 8 imitates 8 GPUs, "
    "and so does TRAIN.ACCUMULATION_STEPS 8 in less memory"
)


def check_batch(cfg: CfgNode, source: ImageSource, world_size: int) -> None:
    """Raises: ConfigError where the batch cannot be shared, grouped, filled or read in order."""
    train, model = cfg.TRAIN, cfg.MODEL
    if cfg.DATA.ORDER == "blocks" and not isinstance(source, ShardSource):
        raise ConfigError(
            f"DATA.ORDER blocks: {source.root} is a folder of single files, which have no blocks; "
            "pack them with tools/pack_images.py, or set DATA.ORDER uniform"
        )
    if train.BATCH_SIZE % world_size:
        raise ConfigError(
            f"TRAIN.BATCH_SIZE {train.BATCH_SIZE} (global) cannot be shared by {world_size} "
            "processes; give a multiple of their number"
        )
    _check_accumulation(cfg, train.BATCH_SIZE // world_size)
    images = images_per_forward(cfg, world_size)
    if images % model.BN_SPLITS:
        of = "a process" if train.ACCUMULATION_STEPS == 1 else "a micro-batch"
        raise ConfigError(
            f"MODEL.BN_SPLITS {model.BN_SPLITS} does not divide the {images} images of {of}; "
            "give a divisor"
        )
    if len(source) < train.BATCH_SIZE:
        raise ConfigError(
            f"{source.root}: {len(source)} images do not fill one batch of "
            f"{train.BATCH_SIZE}; lower TRAIN.BATCH_SIZE"
        )


def _check_accumulation(cfg: CfgNode, per_process: int) -> None:
    steps = cfg.TRAIN.ACCUMULATION_STEPS
    if steps == 1:
        return
    if per_process % steps:
        raise ConfigError(
            f"TRAIN.ACCUMULATION_STEPS {steps} does not divide the {per_process} images of a "
            "process; give a divisor"
        )
    if cfg.MODEL.NORM == "SyncBN":
        raise ConfigError(
            f"TRAIN.ACCUMULATION_STEPS {steps}: MODEL.NORM SyncBN allows 1 only. It normalises "
            "over the global batch, which no micro-batch holds; set MODEL.NORM BN, where each "
            "micro-batch has its own statistics, or lower TRAIN.BATCH_SIZE"
        )


def images_per_forward(cfg: CfgNode, world_size: int) -> int:
    """Images of a micro-batch: of one forward and backward of a process."""
    return cfg.TRAIN.BATCH_SIZE // world_size // cfg.TRAIN.ACCUMULATION_STEPS


def sees_whole_batch(cfg: CfgNode, world_size: int) -> bool:
    """Whether batch norm normalises the global batch as one group."""
    groups = world_size * cfg.TRAIN.ACCUMULATION_STEPS * cfg.MODEL.BN_SPLITS
    return cfg.MODEL.NORM == "SyncBN" or groups == 1


def build_loader(
    cfg: CfgNode,
    source: ImageSource,
    process: ProcessInfo,
    *,
    first_step: int,
    last_step: int,
    output_dir: Path | None = None,
    seen: SeenObserver | None = None,
) -> DataLoader:
    """`build_pretrain_loader` as the configuration has it: this process's share of each step.

    Args:
        output_dir: where unreadable images are listed; without it they are errors, whatever
            DATA.MAX_BAD_FRACTION says.
        seen: receives the hashes of images that are seen for the first time.
    """
    data, blur = cfg.DATA, cfg.DATA.BLUR_PROBABILITY
    order, bad_images = epoch_order, None
    if data.ORDER == "blocks":
        storage_order = torch.from_numpy(source.storage_order)
        order = BlockOrder(storage_order, data.BLOCK_SIZE, data.BLOCKS_IN_FLIGHT)
        source = source.reading_ahead(data.BLOCK_SIZE, data.BLOCKS_IN_FLIGHT)
    if data.MAX_BAD_FRACTION and output_dir is not None:
        bad_images = BadImages(
            len(source), source.root, seed=cfg.SEED, max_fraction=data.MAX_BAD_FRACTION,
            folder=output_dir, rank=process.rank,
        )  # fmt: skip
    recipes = build_view_recipes(
        data.RECIPE,
        channels=data.CHANNELS,
        size=data.SIZE,
        crop_scale=data.CROP_SCALE,
        blur_probability=None if blur == OWN_VALUE else blur,
    )
    return build_pretrain_loader(
        source,
        recipes,
        seed=cfg.SEED,
        global_batch=cfg.TRAIN.BATCH_SIZE,
        rank=process.rank,
        world_size=process.world_size,
        first_step=first_step,
        last_step=last_step,
        num_workers=data.NUM_WORKERS,
        worker_timeout_s=data.WORKER_TIMEOUT,
        pin_memory=process.device.type == "cuda",
        backend=cfg.AUGMENT.BACKEND,
        decode=cfg.AUGMENT.DECODE,
        resident=cfg.AUGMENT.RESIDENT,
        device=process.device,
        order=order,
        bad_images=bad_images,
        channels=data.CHANNELS,
        seen=seen,
    )
