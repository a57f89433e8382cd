"""InfoNCE against a queue, loss and gradient in one pass over it: no [B, 1 + K] logits are kept.

The softmax is summed block by block with a running maximum, as attention kernels do (arXiv
1805.02867; 2205.14135). The gradient with respect to the queries needs the same blocks, so it is
made with the loss. `info_nce_logits` and `info_nce_loss` are the reference's form of the same
function; the two differ by rounding.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from moco.kernels.info_nce import info_nce

# Logits of a block: on a CPU they and their negatives should stay in its cache, on a GPU a block
# should fill it.
_BLOCK_VALUES = {"cpu": 2**18, "cuda": 2**24}
_LEAST_BLOCK = 1024


def fused_info_nce(
    q_BD: torch.Tensor,
    k_BD: torch.Tensor,
    negatives_DK: torch.Tensor,
    temperature: float,
    *,
    block: int | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Mean InfoNCE loss (MoCo v1, eq. 1), with gradient to the queries alone.

    Args:
        q_BD, k_BD: unit vectors in float32 or better, row i of both from the same image.
        negatives_DK: unit vectors in columns, equal for all queries.
        block: negatives at a time; None chooses by the device.
        compiled: by a kernel for CPUs, in float32, with its own blocks.
    Raises: ValueError where keys or negatives want a gradient.
    """
    if k_BD.requires_grad or negatives_DK.requires_grad:
        raise ValueError("fused_info_nce gives no gradient to keys or negatives; detach them")
    if compiled:
        return _CompiledInfoNCE.apply(q_BD, k_BD, negatives_DK, temperature)
    if block is None:
        values = _BLOCK_VALUES.get(q_BD.device.type, _BLOCK_VALUES["cuda"])
        block = max(_LEAST_BLOCK, values // max(1, len(q_BD)))
    with torch.autocast(q_BD.device.type, enabled=False):
        return _FusedInfoNCE.apply(q_BD, k_BD, negatives_DK, temperature, block)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, k_BD, negatives_DK, temperature, block):
        scaled_BD = q_BD / temperature
        positive_B1 = (scaled_BD * k_BD).sum(1, keepdim=True)
        # Of what was seen so far: the largest logit, and relative to it the sum of exponentials
        # and the sum of the negatives weighed with them.
        largest_B1, total_B1 = positive_B1, torch.ones_like(positive_B1)
        weighed_DB = torch.zeros_like(q_BD).T.contiguous()
        for negatives in negatives_DK.split(block, dim=1):
            logits = scaled_BD @ negatives
            new_B1 = torch.maximum(largest_B1, logits.amax(1, keepdim=True))
            logits.sub_(new_B1).exp_()
            shrink_B1 = (largest_B1 - new_B1).exp_()
            total_B1 = total_B1 * shrink_B1 + logits.sum(1, keepdim=True)
            weighed_DB.mul_(shrink_B1.T).addmm_(negatives, logits.T)
            largest_B1 = new_B1
        log_sum_B1 = largest_B1 + total_B1.log()
        probability_B1 = (positive_B1 - log_sum_B1).exp_()
        gradient = weighed_DB.T / total_B1 + (probability_B1 - 1) * k_BD
        ctx.save_for_backward(gradient / (temperature * len(q_BD)))
        return (log_sum_B1 - positive_B1).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient_BD,) = ctx.saved_tensors
        return gradient_BD * upstream, None, None, None, None


class _CompiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, k_BD, negatives_DK, temperature):
        loss, gradient_BD = info_nce(q_BD, k_BD, negatives_DK, temperature)
        ctx.save_for_backward(gradient_BD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient_BD,) = ctx.saved_tensors
        return gradient_BD * upstream, None, None, None
