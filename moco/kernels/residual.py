"""A residual block for training on a CPU as one function of autograd.

The gradients of the block's two branches are added where the last of them is made, gradients that
nobody else sees are overwritten, and autograd is asked once a block instead of once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

from moco.kernels import convolution, norm
from moco.kernels.convolution import runs as kernel_runs


@dataclass(frozen=True)
class _Layer:
    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    groups: int

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        return self.convolution.weight, self.norm.weight, self.norm.bias

    @property
    def geometry(self) -> tuple[int, int]:
        """Stride and padding."""
        return self.convolution.stride[0], self.convolution.padding[0]


Pair = Sequence[nn.Module]  # a convolution and its norm


def has_kernels(pairs: Sequence[Pair], x_BCHW: torch.Tensor) -> bool:
    """Whether `residual` can be asked for: all layers compiled, in training, with gradient."""
    return torch.is_grad_enabled() and all(
        norm.training
        and getattr(norm, "compiled", False)
        and getattr(convolution, "compiled", False)
        and kernel_runs(convolution, x_BCHW)
        for convolution, norm in pairs
    )


def residual(
    pairs: Sequence[Pair], downsample: Pair | None, x_BCHW: torch.Tensor, groups: int = 1
) -> torch.Tensor:
    """relu(layers(x) + shortcut(x)): ReLU also between the layers; the shortcut is x itself or,
    without ReLU, `downsample`. Running statistics are updated.

    Args:
        x_BCHW: of a type that `has_kernels` accepts. The result is channels-last.
        groups: image i is normalised in group i % groups.
    Raises: ValueError as `norm.norm_relu`.
    """
    layers = [_Layer(*pair, groups) for pair in pairs]
    shortcut = None if downsample is None else _Layer(*downsample, groups)
    parameters = [
        p for layer in [*layers, *([shortcut] if shortcut else [])] for p in layer.parameters
    ]
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    return _Residual.apply(layers, shortcut, x_BCHW, *parameters)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, downsample, x, *parameters):
        runs, identity = [], x
        if downsample is not None:
            runs.append(_Run(downsample, x))
            identity = runs[0].normalise(relu=False)
        inner = x
        for layer in layers:
            runs.append(_Run(layer, inner))
            last = layer is layers[-1]
            inner = runs[-1].normalise(relu=True, shortcut=identity if last else None)
        ctx.has_downsample, ctx.runs = downsample is not None, runs
        tensors = [t for run in runs for t in (run.x, run.y, *run.layer.parameters)]
        ctx.save_for_backward(inner, *tensors)
        for run in runs:  # autograd keeps the tensors, and frees them in time
            run.release()
        return inner

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        out, *tensors = ctx.saved_tensors
        runs = ctx.runs
        for number, run in enumerate(runs):
            run.x, run.y = tensors[5 * number : 5 * number + 2]
        shortcut, *main = runs if ctx.has_downsample else (None, *runs)
        dout = dout.contiguous(memory_format=torch.channels_last)
        # `dout` may be another's too; what is made here is nobody else's, and overwritten.
        run, dy, gated = main[-1], torch.empty_like(out), torch.empty_like(out)
        run.norm_backward(dout, dy, y_BCHW=out, gated_BCHW=gated)
        for before in reversed(main[:-1]):
            run.differentiate(dy)
            dy = run.input_gradient(dy)
            before.norm_backward(dy, dy)
            run = before
        run.differentiate(dy)
        dx = run.input_gradient(dy, onto=gated if shortcut is None else None)
        if shortcut is not None:
            shortcut.norm_backward(gated, gated)
            shortcut.differentiate(gated)
            shortcut.input_gradient(gated, onto=dx)
        in_order = [*main, *runs[: ctx.has_downsample]]
        gradients = [gradient for run in in_order for gradient in run.gradients]
        for run in runs:
            run.release()
        return None, None, dx, *gradients


class _Run:
    """One layer in one step: its convolution at once, then its norm, later the gradients."""

    def __init__(self, layer: _Layer, x: torch.Tensor):
        self.layer, self.x = layer, x
        self.y = convolution.forward(x, layer.convolution.weight, *layer.geometry)

    def normalise(self, *, relu: bool, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty_like(self.y)
        out, self.saved = norm.forward(
            self.layer.norm, self.y, self.layer.groups, relu, shortcut, out
        )
        return out

    def norm_backward(self, dout, dy, **shortcut) -> None:
        self.dscale, self.dshift = (torch.empty_like(p) for p in self.layer.parameters[1:])
        norm.backward(self.saved, self.y, dout, dy, self.dscale, self.dshift, **shortcut)

    def differentiate(self, dy: torch.Tensor) -> None:
        weight = self.layer.convolution.weight
        self.dweight = convolution.weight_gradient(self.x, dy, weight, *self.layer.geometry)

    def input_gradient(self, dy, onto: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.layer.convolution.weight
        return convolution.input_gradient(self.x, dy, weight, *self.layer.geometry, onto=onto)

    @property
    def gradients(self) -> tuple[torch.Tensor, ...]:
        return self.dweight, self.dscale, self.dshift

    def release(self) -> None:
        self.x = self.y = self.dweight = self.dscale = self.dshift = None
