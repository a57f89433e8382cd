"""Schedules as pure functions of epoch or step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moco.cfgnode import CfgNode

BY_STEP = "cosine_by_step"


def learning_rate(
    schedule: str, base_lr: float, epoch: int, num_epochs: int, milestones: Sequence[int]
) -> float:
    """The rate of a whole epoch, numbered from 0 (main_moco.py, adjust_learning_rate).

    Args:
        schedule: "cosine": 0.5 (1 + cos(pi epoch / num_epochs)); "step": x0.1 at each milestone.
    """
    if schedule == "cosine":
        return base_lr * 0.5 * (1.0 + math.cos(math.pi * epoch / num_epochs))
    if schedule == "step":
        for milestone in milestones:
            base_lr *= 0.1 if epoch >= milestone else 1.0
        return base_lr
    raise ValueError(f"unknown schedule {schedule!r}")


def learning_rate_by_step(
    base_lr: float, step: int, *, warmup_steps: int, total_steps: int
) -> float:
    """Linear warm-up that reaches `base_lr` in the last of its steps, then a cosine to zero."""
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return base_lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def key_momentum(schedule: str, base: float, step: int, total_steps: int) -> float:
    """Momentum of the key encoder in a step.

    Args:
        schedule: "constant" (MoCo v1, v2); "cosine": 1 - (1 - base) (1 + cos(pi step / total)) / 2,
            from `base` to 1 (MoCo v3, appendix A).
    """
    if schedule == "constant":
        return base
    if schedule == "cosine":
        return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
    raise ValueError(f"unknown schedule {schedule!r}")


def step_values(cfg: CfgNode, step: int, steps_per_epoch: int) -> tuple[float, float]:
    """The learning rate and the key encoder's momentum of step `step`, from 0."""
    train, total_steps = cfg.TRAIN, cfg.TRAIN.EPOCHS * steps_per_epoch
    if train.SCHEDULE == BY_STEP:
        warmup_steps = train.WARMUP_EPOCHS * steps_per_epoch
        lr = learning_rate_by_step(
            train.LR, step, warmup_steps=warmup_steps, total_steps=total_steps
        )
    else:
        lr = learning_rate(
            train.SCHEDULE, train.LR, step // steps_per_epoch, train.EPOCHS, train.MILESTONES
        )
    return lr, key_momentum(cfg.MOCO.MOMENTUM_SCHEDULE, cfg.MOCO.MOMENTUM, step, total_steps)
