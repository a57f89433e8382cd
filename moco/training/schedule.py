"""Schedules as pure functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
