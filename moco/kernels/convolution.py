"""Convolutions of residual networks on CPUs: what oneDNN does slowly, by kernels of our own.

A training step changes all weights, so torch casts them to bfloat16 and oneDNN reorders them in
each call; and oneDNN's gradients to weights run at half of a matrix product's speed.
`convolution.cpp` rounds and packs float32 weights in one pass, `weight_gradient.cpp` gives float32
gradients that were never rounded. Figures: docs/PERFORMANCE.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moco.kernels.compiler import TYPES, computes, has_kernel, kernel

_CHANNELS = 32  # the kernels take multiples of it


class Convolution(ctypes.Structure):
    """`Convolution` of convolution.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "images", "in_channels", "height", "width", "out_channels", "out_height", "out_width",
            "kernel", "stride", "padding", "threads",
        )
    ]  # fmt: skip


def convolve(convolution: nn.Conv2d, x_BCHW: torch.Tensor) -> torch.Tensor:
    """convolution(x), by kernels where they are to be used and exist (`has_kernels`).

    Then the result is channels-last, and gradients to weights are float32 sums.
    """
    if has_kernels(convolution, x_BCHW):
        return by_kernels(convolution, x_BCHW)
    return convolution(x_BCHW)


def has_kernels(convolution: nn.Conv2d, x_BCHW: torch.Tensor) -> bool:
    """Whether `use_kernels_` chose the layer for what it does now, and the kernels have it.

    They are for float32 on a processor with AVX2, and under autocast for bfloat16 on one that has
    it in AVX-512 and no AMX; for multiples of 32 channels, squares, no groups and no dilation.
    """
    return computes(convolution) and runs(convolution, x_BCHW)


def by_kernels(convolution: nn.Conv2d, x_BCHW: torch.Tensor) -> torch.Tensor:
    """`convolve` where `has_kernels`."""
    geometry = convolution.stride[0], convolution.padding[0]
    return _convolved(x_BCHW, convolution.weight, convolution.bias, *geometry)


def linear(layer: nn.Linear, x_BC: torch.Tensor) -> torch.Tensor:
    """layer(x), as a 1x1 convolution on the same terms as `convolve`."""
    if not (computes(layer) and runs(layer, x_BC)):
        return F.linear(x_BC, layer.weight, layer.bias)
    pixels, weight = x_BC[:, :, None, None], layer.weight[:, :, None, None]
    return _convolved(pixels, weight, layer.bias, 1, 0)[:, :, 0, 0]


def suits(layer: nn.Module) -> bool:
    """Whether the kernels have this layer."""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return False
    weight = layer.weight
    if weight.dtype != torch.float32 or any(n % _CHANNELS for n in weight.shape[:2]):
        return False
    return isinstance(layer, nn.Linear) or _is_plain(layer)


def _is_plain(convolution: nn.Conv2d) -> bool:
    weight = convolution.weight
    return (
        weight.shape[2] == weight.shape[3]
        and convolution.stride[0] == convolution.stride[1]
        and convolution.padding in [(n, n) for n in range(weight.shape[2])]
        and convolution.padding_mode == "zeros"
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )


def runs(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the kernels have these types on this machine."""
    if x.device.type != "cpu" or layer.weight.dtype != torch.float32:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    return x.dtype == dtype in TYPES and has_kernel("convolution", f"convolution_{TYPES[dtype]}")


def forward(x_BCHW, weight_KCRS, stride: int, padding: int) -> torch.Tensor:
    """The convolution."""
    channels, kernel_size = weight_KCRS.shape[0], weight_KCRS.shape[2]
    y_BKHW = torch.empty(
        output_shape(x_BCHW.shape, channels, kernel_size, stride, padding),
        dtype=x_BCHW.dtype, memory_format=torch.channels_last,
    )  # fmt: skip
    layer = _describe(x_BCHW, y_BKHW, kernel_size, stride, padding)
    _call("convolution", x_BCHW, (layer, False, False), x_BCHW, in_order(weight_KCRS), y_BKHW)
    return y_BKHW


def output_shape(
    x_shape: Sequence[int], channels: int, kernel_size: int, stride: int, padding: int
) -> tuple[int, ...]:
    """[B, channels, H', W'] of the convolution of a tensor [B, C, H, W]."""
    batch, _, *sizes = x_shape
    return batch, channels, *((n + 2 * padding - kernel_size) // stride + 1 for n in sizes)


def in_order(weight_KCRS: torch.Tensor) -> torch.Tensor:
    """The weights as the kernels read them."""
    return weight_KCRS.contiguous(memory_format=torch.channels_last)


def input_gradient(x_BCHW, dy_BKHW, weight_KCRS, stride: int, padding: int) -> torch.Tensor:
    """The gradient to x."""
    dx_BCHW = torch.empty_like(x_BCHW)
    layer = _describe(dy_BKHW, dx_BCHW, weight_KCRS.shape[2], stride, padding)
    _call("convolution", x_BCHW, (layer, True, False), dy_BKHW, in_order(weight_KCRS), dx_BCHW)
    return dx_BCHW


def weight_gradient(x_BCHW, dy_BKHW, weight_KCRS, stride: int, padding: int) -> torch.Tensor:
    """The gradient to the weights, float32, channels-last."""
    dweight = torch.empty_like(weight_KCRS, memory_format=torch.channels_last)
    layer = _describe(x_BCHW, dy_BKHW, weight_KCRS.shape[2], stride, padding)
    _call("weight_gradient", x_BCHW, (layer,), x_BCHW, dy_BKHW, dweight)
    return dweight


def _convolved(x_BCHW, weight_KCRS, bias_K, stride: int, padding: int) -> torch.Tensor:
    """The convolution, with its gradients where they are wanted."""
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    function = _Convolve.apply if torch.is_grad_enabled() else forward
    y_BKHW = function(x_BCHW, weight_KCRS, stride, padding)
    return y_BKHW if bias_K is None else y_BKHW + bias_K.to(y_BKHW.dtype).view(-1, 1, 1)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.geometry = stride, padding
        ctx.save_for_backward(x, weight)
        return forward(x, weight, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(x, dy, weight, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(x, dy, weight, *ctx.geometry)
        return dx, dweight, None, None


def _describe(x, y, kernel_size: int, stride: int, padding: int) -> Convolution:
    (images, *inputs), (_, *outputs) = x.shape, y.shape
    return Convolution(
        images, *inputs, *outputs, kernel_size, stride, padding, torch.get_num_threads()
    )


def _call(name: str, x: torch.Tensor, sizes: tuple, *tensors: torch.Tensor) -> None:
    types = ctypes.POINTER(Convolution), *[ctypes.c_int64] * (len(sizes) - 1)
    function = kernel(name, f"{name}_{TYPES[x.dtype]}", len(tensors), *types)
    function(*sizes, *(tensor.data_ptr() for tensor in tensors))
