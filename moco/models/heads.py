"""Projection heads: what stands in for the classifier `fc` during pretraining."""

from __future__ import annotations

import torch.nn as nn


def replace_by_mlp(encoder: nn.Module) -> None:
    """MoCo v2's head (paper, section 2): fc becomes Linear(d, d) - ReLU - the old fc.

    State-dict names are the reference's: `fc.0.*` and `fc.2.*`.
    """
    dim = encoder.fc.in_features
    encoder.fc = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), encoder.fc)
