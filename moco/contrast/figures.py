"""Figures that tell whether contrast works: accuracy, similarities, spread of the features."""

from __future__ import annotations

import torch

from moco.contrast.info_nce import contrast_accuracy


@torch.no_grad()
def contrast_figures(
    features_ND: torch.Tensor,
    logits_BN: torch.Tensor,
    labels_B: torch.Tensor | None = None,
    *,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """Scalars to log: acc1, acc5, positive_similarity, negative_similarity, and feature_std where
    there are two features at least.

    Args:
        features_ND: queries, unit vectors. logits_BN: their similarities divided by `temperature`;
            minus infinity where two are not compared.
        labels_B: the positives' columns; None for column 0.
    """
    if labels_B is None:
        labels_B = torch.zeros(len(logits_BN), dtype=torch.long, device=logits_BN.device)
    positive, negative = mean_similarities(logits_BN, labels_B, temperature)
    figures = {
        **contrast_accuracy(logits_BN, labels_B),
        "positive_similarity": positive,
        "negative_similarity": negative,
    }
    if len(features_ND) > 1:
        figures["feature_std"] = feature_std(features_ND)
    return figures


def mean_similarities(
    logits_BN: torch.Tensor, labels_B: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine of the queries with their positives, and with all their negatives (0 where
    there are none)."""
    positive_B = logits_BN.gather(1, labels_B[:, None])[:, 0]
    compared = logits_BN != -torch.inf
    total = logits_BN.masked_fill(~compared, 0.0).sum() - positive_B.sum()
    num_negatives = compared.sum() - len(logits_BN)
    return positive_B.mean() * temperature, total / num_negatives.clamp(min=1) * temperature


def feature_std(features_ND: torch.Tensor) -> torch.Tensor:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(D).

    About 1 where they lie all over the sphere, 0 where all are one vector (collapse).
    """
    return features_ND.std(0).mean() * features_ND.shape[1] ** 0.5
