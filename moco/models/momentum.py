"""The key encoder as an exponential moving average of the query encoder (MoCo v1, eq. 2)."""

from __future__ import annotations

import torch
import torch.nn as nn

from moco.kernels.moving_average import move_, suits


def init_key_encoder_(key: nn.Module, query: nn.Module) -> None:
    """Copy the query's parameters into `key` and exclude them from the gradient."""
    for param_k, param_q in zip(key.parameters(), query.parameters(), strict=True):
        param_k.data.copy_(param_q.data)
        param_k.requires_grad_(False)


@torch.no_grad()
def ema_update_(
    key: nn.Module,
    query: nn.Module,
    momentum: float,
    *,
    fused: bool = False,
    compiled: bool = False,
) -> None:
    """key <- momentum * key + (1 - momentum) * query, over parameters only.

    Batch-norm buffers are not averaged: the key encoder keeps its own statistics. The two
    products are rounded before the sum, as in the reference, so results are bitwise equal to it.
    A frozen parameter is equal in both encoders and left alone, or rounding would move it.

    Args:
        fused: one pass over the weights, key + (1 - momentum) * (query - key), instead of three.
            It rounds otherwise, and less.
        compiled: that pass by a kernel, where it has the tensors; see moco.kernels.choose.
    """
    pairs = zip(key.parameters(), query.parameters(), strict=True)
    pairs = [(param_k, param_q) for param_k, param_q in pairs if param_q.requires_grad]
    if not pairs:
        return
    keys, queries = map(list, zip(*pairs, strict=True))
    if fused and compiled and suits(keys, queries):
        move_(keys, queries, 1.0 - momentum)
        return
    if fused:
        torch._foreach_lerp_(keys, queries, 1.0 - momentum)
        return
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, torch._foreach_mul(queries, 1.0 - momentum))
