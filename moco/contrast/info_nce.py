"""InfoNCE (MoCo v1, eq. 1): classify a query's own key among negatives.

Logits are made in full precision under autocast too: bfloat16 has three digits, and similarities
are divided by a small temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit_vectors(x_BD: torch.Tensor) -> torch.Tensor:
    """Rows of L2 norm 1, in float32 or better (a network under autocast gives bfloat16)."""
    return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=1)


def info_nce_logits(
    q_BD: torch.Tensor, k_BD: torch.Tensor, negatives_DK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Similarities divided by the temperature, [B, 1 + K]; column 0 is the positive.

    Values and gradients are the reference's, bit for bit (moco/builder.py, MoCo.forward).

    Args:
        q_BD, k_BD: unit vectors, row i of both from the same image.
        negatives_DK: unit vectors in columns, equal for all queries.
    """
    with _full_precision(q_BD):
        positive_B1 = torch.einsum("bd,bd->b", q_BD, k_BD).unsqueeze(1)
        # q_BD @ negatives_DK is another product in torch: few rows or columns differ in a last bit.
        negative_BK = torch.einsum("bd,dk->bk", q_BD, negatives_DK)
        return torch.cat([positive_B1, negative_BK], dim=1) / temperature


def _full_precision(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def info_nce_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy with label 0. Equal similarities give log(1 + K)."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


def in_batch_logits(
    q_BD: torch.Tensor, k_ND: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, N] of queries against the N keys of a global batch, and the positives' columns.

    Args:
        q_BD: unit vectors, queries number `first` .. `first` + B - 1 of the batch.
        k_ND: unit vectors, key i from the image of query i.
    """
    labels = torch.arange(first, first + len(q_BD), device=q_BD.device)
    with _full_precision(q_BD):
        return q_BD @ k_ND.T / temperature, labels


def nt_xent_logits(
    q_BD: torch.Tensor,
    k_BD: torch.Tensor,
    q_ND: torch.Tensor,
    k_ND: torch.Tensor,
    first: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2B, 2N] of both views against all views, and the positives' columns (SimCLR, eq. 1).

    A row's own column is minus infinity. The mean cross-entropy over the rows is NT-Xent.

    Args:
        q_BD, k_BD: this process's unit vectors; q_ND, k_ND: those of all processes.
        first: number of this process's first image in the global batch.
    """
    own = torch.arange(first, first + len(q_BD), device=q_BD.device)
    columns, labels = torch.cat([own, own + len(q_ND)]), torch.cat([own + len(q_ND), own])
    with _full_precision(q_BD):
        logits = torch.cat([q_BD, k_BD]) @ torch.cat([q_ND, k_ND]).T / temperature
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, columns[:, None], True)
    return logits.masked_fill(itself, -torch.inf), labels


@torch.no_grad()
def contrast_accuracy(
    logits: torch.Tensor, labels: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Share (percent) of queries whose positive is first, or among the first five.

    Args:
        labels: the positives' columns [B]; None for column 0.
    """
    if labels is None:
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    rank_of_positive = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
    return {
        "acc1": (rank_of_positive < 1).float().mean() * 100,
        "acc5": (rank_of_positive < 5).float().mean() * 100,
    }
