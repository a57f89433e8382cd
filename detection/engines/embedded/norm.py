"""Normalisation layers by Detectron2's names (detectron2/layers/batch_norm.py).

`build_norm` knows BN, FrozenBN, SyncBN, naiveSyncBN and "" (none).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moco.distributed import world_size
from moco.errors import ConfigError


class FrozenBatchNorm2d(nn.Module):
    """Batch norm as a fixed affine map: its statistics, weight and bias are buffers.

    A fresh one is the identity: its running variance is 1 - eps. `num_batches_tracked` is kept
    only where the layer was converted from a trainable one, as in Detectron2.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    @classmethod
    def converted_from(cls, trained: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """A frozen layer with the values of `trained`."""
        frozen = cls(trained.num_features, trained.eps)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(frozen, name, getattr(trained, name).detach().clone())
        return frozen

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not x_BCHW.requires_grad:
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        # batch_norm would keep what it needs for gradients of weight and bias, which are fixed.
        gain = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * gain
        gain, shift = (v.view(1, -1, 1, 1).to(x_BCHW.dtype) for v in (gain, shift))
        return x_BCHW * gain + shift

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return _gathered_sum(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _gathered_sum(gradient)


def _gathered_sum(values: torch.Tensor) -> torch.Tensor:
    # Gathered and then added in rank order: every rank gets the same bits.
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts).sum(dim=0)


class NaiveSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over all ranks, each rank weighing the same whatever its image sizes.

    Alone it is plain batch norm. With several ranks the variance is E[x^2] - E[x]^2, and the
    *biased* one enters `running_var`, as in Detectron2; `nn.SyncBatchNorm` weighs by pixels
    and keeps the unbiased one. Also runs on CPU ranks.
    """

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x_BCHW)
        # Squares summed in half precision would lose the variance.
        x = x_BCHW.float() if x_BCHW.dtype in (torch.float16, torch.bfloat16) else x_BCHW
        own_moments = torch.cat([x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))])
        moments = _SumOverRanks.apply(own_moments) * (1.0 / world_size())
        mean, square_mean = moments.chunk(2)
        variance = square_mean - mean * mean
        gain = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * gain
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (variance - self.running_var)
        out = x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return out.to(x_BCHW.dtype)


_NORMS = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm2d,
}
TRAINABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def build_norm(name: str, num_channels: int) -> nn.Module | None:
    """The layer called `name` in `MODEL.RESNETS.NORM`; None for "".

    Raises: ConfigError for another name.
    """
    if name == "":
        return None
    if name not in _NORMS:
        raise ConfigError(
            f"MODEL.RESNETS.NORM is {name!r}; allowed: {', '.join(_NORMS)} or ''; change the value"
        )
    return _NORMS[name](num_channels)


def freeze(module: nn.Module) -> None:
    """Fix all weights in `module` and turn its trainable norms into FrozenBN, in place."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TRAINABLE_NORMS):
                setattr(parent, name, FrozenBatchNorm2d.converted_from(child))
