"""InfoNCE (MoCo v1, eq. 1): classify a query's own key among negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce_logits(
    q_BD: torch.Tensor, k_BD: torch.Tensor, negatives_DK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Similarities divided by the temperature, [B, 1 + K]; column 0 is the positive.

    Args:
        q_BD, k_BD: unit vectors, row i of both from the same image.
        negatives_DK: unit vectors in columns, equal for all queries.
    """
    positive_B1 = torch.einsum("bd,bd->b", q_BD, k_BD).unsqueeze(1)
    negative_BK = q_BD @ negatives_DK
    return torch.cat([positive_B1, negative_BK], dim=1) / temperature


def info_nce_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy with label 0. Equal similarities give log(1 + K)."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def contrast_accuracy(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Share (percent) of queries whose positive is first, or among the first five."""
    rank_of_positive = (logits[:, 1:] >= logits[:, :1]).sum(1)
    return {
        "acc1": (rank_of_positive < 1).float().mean() * 100,
        "acc5": (rank_of_positive < 5).float().mean() * 100,
    }
