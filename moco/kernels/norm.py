"""Compiled batch norm for CPUs: normalisation, shortcut and ReLU in one pass over the memory.

On a CPU batch norm, the addition of the shortcut and ReLU are bound by memory, and torch runs them
one after the other. `batch_norm.cpp` joins them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moco.kernels.compiler import TYPES, computes, kernel


class _Norm(ctypes.Structure):
    """`Norm` of batch_norm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "groups")),
        *((name, ctypes.c_int64) for name in ("threads", "relu", "evaluating")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var")),
        ("tracked", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("mean", "var", "scale", "shift")),
    ]


_POINTER = ctypes.POINTER(_Norm)


def norm_relu(
    norm: nn.BatchNorm2d,
    x_BCHW: torch.Tensor,
    *,
    groups: int = 1,
    relu: bool = True,
    shortcut_BCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """relu(norm(x) + shortcut): in one pass over the memory where the norm is to compute so, else
    by torch.

    Args:
        x_BCHW: may be overwritten. For one pass it is float32 or bfloat16 on a CPU, and the result
            is channels-last.
        groups: image i is normalised in group i % groups; torch leaves that to the norm.
        relu: for one pass there must be no shortcut without it.
    Raises: ValueError for one value a channel and group, as torch, or another type.
    """
    if not computes(norm):
        y_BCHW = norm(x_BCHW)
        if shortcut_BCHW is not None:
            y_BCHW += shortcut_BCHW
        return F.relu(y_BCHW, inplace=True) if relu else y_BCHW
    if x_BCHW.dtype not in TYPES or x_BCHW.device.type != "cpu":
        raise ValueError(
            f"compiled batch norm takes {', '.join(TYPES.values())} on a CPU, got {x_BCHW.dtype} "
            f"on {x_BCHW.device}"
        )
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    if shortcut_BCHW is not None:
        assert relu and shortcut_BCHW.dtype == x_BCHW.dtype
        shortcut_BCHW = shortcut_BCHW.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():
        return _NormRelu.apply(x_BCHW, shortcut_BCHW, norm.weight, norm.bias, norm, groups, relu)
    return forward(norm, x_BCHW, groups, relu, shortcut_BCHW, out=x_BCHW)[0]


def check_values(shape: Sequence[int], groups: int) -> None:
    """Raises: ValueError for one value a channel and group, as torch."""
    batch, _, height, width = shape
    if batch // groups * height * width < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {list(shape)} in "
            f"{groups} group(s)"
        )


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs besides tensors; `layer` points into `stats`."""

    layer: _Norm
    stats_4GC: torch.Tensor


def forward(
    norm: nn.BatchNorm2d, x_BCHW, groups: int, relu: bool, shortcut_BCHW, out: torch.Tensor
) -> tuple[torch.Tensor, Saved]:
    """`norm_relu` of channels-last tensors into `out`, which may be x."""
    batch, channels, height, width = x_BCHW.shape
    if norm.training:
        check_values(x_BCHW.shape, groups)
    stats = torch.empty(4, groups, channels, dtype=torch.float32)
    first, step = stats.data_ptr(), 4 * groups * channels
    parameters = (
        norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    )  # fmt: skip
    layer = _Norm(
        batch, height * width, channels, groups, torch.get_num_threads(), relu,
        not norm.training, norm.eps, norm.momentum, *map(_address, parameters),
        *range(first, first + 4 * step, step),
    )  # fmt: skip
    function = kernel("batch_norm", f"forward_{TYPES[x_BCHW.dtype]}", 3, _POINTER)
    function(layer, x_BCHW.data_ptr(), _address(shortcut_BCHW), out.data_ptr())
    return out, Saved(layer, stats)


def backward(
    saved: Saved, x_BCHW, dy_BCHW, dx_BCHW, dweight, dbias, *, y_BCHW=None, gated_BCHW=None
) -> None:
    """Fill dx, which may be dy, and the parameters' gradients.

    y_BCHW, gated_BCHW: where a shortcut was added, the output, and room for its gradient. Else the
    ReLU's gate is computed from x again.
    """
    function = kernel("batch_norm", f"backward_{TYPES[x_BCHW.dtype]}", 7, _POINTER)
    tensors = (x_BCHW, y_BCHW, dy_BCHW, dx_BCHW, gated_BCHW, dweight, dbias)
    function(saved.layer, *map(_address, tensors))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, norm, groups, relu):
        y, ctx.saved = forward(norm, x, groups, relu, shortcut, out=torch.empty_like(x))
        ctx.save_for_backward(x, None if shortcut is None else y, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, gated = torch.empty_like(x), None if y is None else torch.empty_like(x)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        backward(ctx.saved, x, dy, dx, dweight, dbias, y_BCHW=y, gated_BCHW=gated)
        return dx, gated, dweight, dbias, None, None, None
