"""Batch norm over groups of a process's batch, or over the batches of all processes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from moco.distributed import all_gather_with_gradient, world_size
from moco.errors import ConfigError
from moco.kernels import norm as kernels


def choose_norm(norm: str, bn_splits: int) -> Callable[[int], nn.Module]:
    """Batch norm of images: the class to call with the number of channels.

    Args:
        norm: "BN" (each process normalises its own images) or "SyncBN" (all images together).
        bn_splits: groups that "BN" normalises separately in one process.
    Raises: ConfigError for "SyncBN" with groups.
    """
    if norm == "SyncBN":
        if bn_splits > 1:
            raise ConfigError(
                f"MODEL.NORM is SyncBN and MODEL.BN_SPLITS {bn_splits}: one normalises over all "
                "images, the other over groups of them; set BN_SPLITS 1 or NORM BN"
            )
        return SyncBatchNorm
    if bn_splits > 1:
        return functools.partial(SplitBatchNorm2d, num_splits=bn_splits)
    return nn.BatchNorm2d


def norm_relu(
    norm: nn.Module,
    x_BCHW: torch.Tensor,
    shortcut_BCHW: torch.Tensor | None = None,
    *,
    relu: bool = True,
) -> torch.Tensor:
    """relu(norm(x) + shortcut): what follows a convolution of a residual network.

    In one pass over the memory where `use_kernels_` said so; x may be overwritten.
    """
    groups = groups_of(norm, len(x_BCHW))
    return kernels.norm_relu(norm, x_BCHW, groups=groups, relu=relu, shortcut_BCHW=shortcut_BCHW)


def groups_of(norm: nn.Module, batch: int) -> int:
    """Groups of the images that are normalised separately."""
    is_split = isinstance(norm, SplitBatchNorm2d) and norm.training
    return norm.groups_of(batch) if is_split else 1


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises `num_splits` groups of the batch separately.

    It gives one process the statistics several GPUs would have, which shuffle BN needs (MoCo v1,
    section 3.3). Sample i belongs to group i % num_splits. In evaluation it is plain batch norm;
    the running statistics are the mean of the groups'.
    """

    def __init__(self, num_features: int, *, num_splits: int):
        super().__init__(num_features)
        self.num_splits = num_splits

    def groups_of(self, batch: int) -> int:
        """Groups of a batch of that many images. Raises: ConfigError where they do not divide."""
        if batch % self.num_splits:
            raise ConfigError(
                f"MODEL.BN_SPLITS {self.num_splits} does not divide the {batch} images of a "
                "process; choose a divisor"
            )
        return self.num_splits

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        batch, channels, height, width = x_BCHW.shape
        splits = self.groups_of(batch)
        memory_format = _memory_format(x_BCHW)
        self.num_batches_tracked += 1
        mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        # Groups become channels. Channels-last this is a copy, back again another.
        groups = x_BCHW.reshape(batch // splits, splits * channels, height, width)
        y = nn.functional.batch_norm(
            groups.contiguous(memory_format=memory_format),
            mean,
            var,
            self.weight.repeat(splits),
            self.bias.repeat(splits),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        with torch.no_grad():
            self.running_mean.copy_(mean.view(splits, channels).mean(0))
            self.running_var.copy_(var.view(splits, channels).mean(0))
        y_BCHW = y.reshape(batch, channels, height, width)
        return y_BCHW.contiguous(memory_format=memory_format)


def _memory_format(x_BCHW: torch.Tensor) -> torch.memory_format:
    channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    plain = x_BCHW.is_contiguous()
    return torch.channels_last if channels_last and not plain else torch.contiguous_format


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, for [B, C] and [B, C, H, W].

    On a CUDA GPU it is torch's, which has kernels for it; elsewhere the same statistics by ordinary
    operations. It does not derive from torch's: DistributedDataParallel refuses those on a CPU. All
    processes must hold equally many values. Alone, and in evaluation, it is plain batch norm.
    """

    # What torch's forward asks of itself.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"SyncBatchNorm takes [B, C] or [B, C, H, W], got {list(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)
        if not self.training or world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        over = [0, *range(2, x.dim())]
        own_var, own_mean = torch.var_mean(values, over, correction=0)
        # One message: a mean and a variance of each process. Joining them so never subtracts
        # two large squares.
        stats_W2C = all_gather_with_gradient(torch.stack([own_mean, own_var])[None])
        mean = stats_W2C[:, 0].mean(0)
        var = (stats_W2C[:, 1] + (stats_W2C[:, 0] - mean) ** 2).mean(0)
        self._track(mean, var, num_values=world_size() * values.numel() // values.shape[1])
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = [1, -1] + [1] * (x.dim() - 2)
        return (values * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, var: torch.Tensor, num_values: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * num_values / (num_values - 1), self.momentum)
