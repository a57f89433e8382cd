"""Precise batch-norm statistics: those of the final weights, not a running average over
training ("Rethinking Batch in BatchNorm", section 3; fvcore/nn/precise_bn.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detection.engines.embedded.norm import TRAINABLE_NORMS, NaiveSyncBatchNorm2d
from moco.distributed import all_reduce_sum, world_size
from moco.errors import DataError

_SYNCED = (nn.SyncBatchNorm, NaiveSyncBatchNorm2d)


@torch.no_grad()
def update_bn_statistics(model: nn.Module, batches: Iterable, num_iters: int) -> None:
    """Set `running_mean` and `running_var` of every trainable batch norm, in place, from
    `num_iters` forward passes in train mode, each batch weighing as many pixels as it has.

    Alone this equals fvcore's `update_bn_stats`. With several ranks the pixels of all ranks
    count, so that all end with the same statistics (fvcore weighs by each rank's own pixels:
    detectron2 issue 5398). Momentum, train/eval flags and hooks are restored, also on an
    error; after an error the old statistics are back as well.

    Args:
        batches: what `model` is called with, for this rank.
    Raises:
        DataError: fewer than `num_iters` batches.
    """
    layers = [module for module in model.modules() if isinstance(module, TRAINABLE_NORMS)]
    if not layers:
        return
    estimates = [_Estimate(layer) for layer in layers]
    with _one_batch_statistics(model, layers) as num_pixels:
        num_done = 0
        for batch in itertools.islice(batches, num_iters):
            num_pixels.clear()
            model(batch)
            _add_batch(estimates, num_pixels)
            num_done += 1
        if num_done < num_iters:
            raise DataError(
                f"precise batch norm: the data ended after {num_done} batches; "
                f"TEST.PRECISE_BN.NUM_ITER = {num_iters} are needed; lower it or give more images"
            )
        for estimate in estimates:
            estimate.write()


class _Estimate:
    """Mean and mean square of one layer's input over all batches so far."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.mean = torch.zeros_like(layer.running_mean)
        self.square_mean = torch.zeros_like(layer.running_var)
        self.num_pixels = 0

    def batch_moments(self, num_pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and mean square of the last batch; its variance came with n / (n - 1)."""
        mean = self.layer.running_mean
        return mean, mean.square() + self.layer.running_var * ((num_pixels - 1) / num_pixels)

    def add(self, mean: torch.Tensor, square_mean: torch.Tensor, num_pixels: int) -> None:
        self.num_pixels += num_pixels
        part = num_pixels / self.num_pixels
        self.mean += (mean - self.mean) * part
        self.square_mean += (square_mean - self.square_mean) * part

    def write(self) -> None:
        if self.num_pixels:
            self.layer.running_mean.copy_(self.mean)
            self.layer.running_var.copy_(self.square_mean - self.mean.square())


def _add_batch(estimates: list[_Estimate], num_pixels: dict[nn.Module, int]) -> None:
    own_counts = [num_pixels.get(estimate.layer, 0) for estimate in estimates]
    if world_size() == 1:
        for estimate, count in zip(estimates, own_counts, strict=True):
            if count:
                estimate.add(*estimate.batch_moments(count), count)
        return
    device = estimates[0].mean.device
    counts = all_reduce_sum(torch.tensor(own_counts, device=device)).tolist()
    for estimate, own, total in zip(estimates, own_counts, counts, strict=True):
        if not total:
            continue
        # A synchronised layer's variance is that of all ranks' pixels, a plain one's its own.
        behind_variance = total if isinstance(estimate.layer, _SYNCED) else own
        sums = torch.zeros(2, len(estimate.mean), dtype=torch.float64, device=device)
        if own:
            sums += torch.stack(estimate.batch_moments(behind_variance)).double() * own
        mean, square_mean = (all_reduce_sum(sums) / total).to(estimate.mean.dtype)
        estimate.add(mean, square_mean, total)


@contextmanager
def _one_batch_statistics(
    model: nn.Module, layers: list[nn.Module]
) -> Iterator[dict[nn.Module, int]]:
    """Train mode with momentum 1, so that running statistics are those of the last batch.

    Yields a dict that a forward pass fills with the pixels (batch x height x width) each layer
    has seen.
    """
    num_pixels: dict[nn.Module, int] = {}

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert layer not in num_pixels, "a batch norm that is used twice has no single statistics"
        num_pixels[layer] = inputs[0].numel() // inputs[0].shape[1]

    flags = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    statistics = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        model.train()
        for layer in layers:
            layer.momentum = 1.0
        yield num_pixels
    except BaseException:
        for layer, (mean, variance) in zip(layers, statistics, strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in flags:
            module.training = training
