"""The memory bank (MoCo v1, figure 2b; Wu et al. 2018): one stored feature for every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco.contrast.info_nce import info_nce_logits


def initial_bank(num_images: int, dim: int) -> torch.Tensor:
    """[M, D] normal noise with unit rows, drawn from torch's global generator."""
    return F.normalize(torch.randn(num_images, dim), dim=1)


def draw_negatives(
    num_images: int, num_negatives: int, generator: torch.Generator
) -> torch.Tensor:
    """Numbers of K images [K], uniform, with repetition; on the CPU, where the generator is."""
    return torch.randint(num_images, (num_negatives,), generator=generator)


def bank_logits(
    q_BD: torch.Tensor,
    index_B: torch.Tensor,
    bank_MD: torch.Tensor,
    negatives_K: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Similarities of queries with stored features, [B, 1 + K]; column 0 is the image's own.

    A negative that is the query's own image counts as none: its logit is minus infinity.
    """
    logits = info_nce_logits(q_BD, bank_MD[index_B], bank_MD[negatives_K].T, temperature)
    own = index_B[:, None] == negatives_K
    return logits.masked_fill(F.pad(own, (1, 0)), -torch.inf)


@torch.no_grad()
def update_bank_(
    bank_MD: torch.Tensor,
    index_N: torch.Tensor,
    features_ND: torch.Tensor,
    momentum: float,
    skip: torch.Tensor | None = None,
) -> None:
    """bank[i] <- momentum * bank[i] + (1 - momentum) * feature, of unit length again; in place.

    Args:
        index_N: numbers of N different images.
        skip: a scalar on the device; where it is true nothing is written.
    """
    old = bank_MD[index_N]
    mixed = F.normalize(momentum * old + (1.0 - momentum) * features_ND.to(bank_MD.dtype), dim=1)
    bank_MD[index_N] = mixed if skip is None else torch.where(skip, old, mixed)
