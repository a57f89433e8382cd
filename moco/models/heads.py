"""Projection heads: what stands in for the classifier `fc` during pretraining."""

from __future__ import annotations

import torch
import torch.nn as nn

from moco.kernels.convolution import linear
from moco.models.norm import SyncBatchNorm


class Linear(nn.Linear):
    """torch's, but that it may run compiled in training (`moco.kernels.choose`)."""

    def forward(self, x_BC: torch.Tensor) -> torch.Tensor:
        return linear(self, x_BC)


def replace_by_mlp(encoder: nn.Module) -> None:
    """MoCo v2's head (paper, section 2): fc becomes Linear(d, d) - ReLU - the old fc.

    State-dict names are the reference's: `fc.0.*` and `fc.2.*`.
    """
    dim = encoder.fc.in_features
    encoder.fc = nn.Sequential(Linear(dim, dim), nn.ReLU(), encoder.fc)


def mlp_with_norm(
    dims: list[int], *, norm: str = "BN", last_affine: bool = False
) -> nn.Sequential:
    """MoCo v3's heads (arXiv 2104.02057, section 5): batch norm after every layer, ReLU between.

    Args:
        dims: of input, hidden layers and output.
        norm: "BN" or "SyncBN". last_affine: whether the last norm has weight and bias; as in the
            public implementations of v3 it has not.
    """
    kind = {"BN": nn.BatchNorm1d, "SyncBN": SyncBatchNorm}[norm]
    layers: list[nn.Module] = []
    for i, (dim_in, dim_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(dim_in, dim_out, bias=False))
        layers.append(kind(dim_out, affine=last_affine or not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
