"""The key encoder as an exponential moving average of the query encoder (MoCo v1, eq. 2)."""

from __future__ import annotations

import torch
import torch.nn as nn


def init_key_encoder_(key: nn.Module, query: nn.Module) -> None:
    """Copy the query's parameters into `key` and exclude them from the gradient."""
    for param_k, param_q in zip(key.parameters(), query.parameters(), strict=True):
        param_k.data.copy_(param_q.data)
        param_k.requires_grad_(False)


@torch.no_grad()
def ema_update_(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """key <- momentum * key + (1 - momentum) * query, over parameters only.

    Batch-norm buffers are not averaged: the key encoder keeps its own statistics. The two
    products are rounded before the sum, as in the reference, so results are bitwise equal to it.
    A frozen parameter is equal in both encoders and left alone, or rounding would move it.
    """
    for param_k, param_q in zip(key.parameters(), query.parameters(), strict=True):
        if param_q.requires_grad:
            param_k.mul_(momentum).add_(param_q * (1.0 - momentum))
