"""Convolutions of residual networks on CPUs: what oneDNN does slowly, by kernels of our own.

A training step changes all weights, so torch casts them to bfloat16 and oneDNN reorders them in
each call; and oneDNN's gradients to weights run at half of a matrix product's speed.
`pointwise.cpp` rounds and packs float32 weights in one pass, `weight_gradient.cpp` gives float32
gradients that were never rounded. Figures: docs/PERFORMANCE.md.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moco.kernels.compiler import has_kernel, kernel

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_CHANNELS = 32  # the kernels take multiples of it


class _Convolution(ctypes.Structure):
    """`Convolution` of convolution.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "images", "in_channels", "height", "width", "out_channels", "out_height", "out_width",
            "kernel", "stride", "padding", "threads",
        )
    ]  # fmt: skip


def convolve(convolution: nn.Conv2d, x_BCHW: torch.Tensor) -> torch.Tensor:
    """convolution(x), in training by kernels where `use_kernels_` said so and they have them.

    They are for float32 on a processor with AVX2, and under autocast for bfloat16 on one that has
    it in AVX-512 and no AMX; for multiples of 32 channels, squares, no groups, dilation or bias.
    The result is channels-last. Gradients to weights are float32 sums.
    """
    if (
        convolution.training
        and getattr(convolution, "compiled", False)
        and runs(convolution, x_BCHW)
    ):
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        stride, padding = convolution.stride[0], convolution.padding[0]
        if torch.is_grad_enabled():
            return _Convolve.apply(x_BCHW, convolution.weight, stride, padding)
        if _is_pointwise(convolution.weight, padding):
            return _pointwise(x_BCHW, convolution.weight, stride)
    return convolution(x_BCHW)


def linear(layer: nn.Linear, x_BC: torch.Tensor) -> torch.Tensor:
    """layer(x), in training by the 1x1 convolution's kernels on the same terms as `convolve`."""
    chosen = layer.training and getattr(layer, "compiled", False)
    if not (chosen and runs(layer, x_BC)):
        return F.linear(x_BC, layer.weight, layer.bias)
    pixels = x_BC[:, :, None, None].contiguous(memory_format=torch.channels_last)
    weight = layer.weight[:, :, None, None]
    if torch.is_grad_enabled():
        y_BK = _Convolve.apply(pixels, weight, 1, 0)[:, :, 0, 0]
    else:
        y_BK = _pointwise(pixels, weight, 1)[:, :, 0, 0]
    return y_BK if layer.bias is None else y_BK + layer.bias.to(y_BK.dtype)


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
        and convolution.bias is None
    )


def runs(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the kernels have these types on this machine."""
    if x.device.type != "cpu" or layer.weight.dtype != torch.float32:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    return x.dtype == dtype in _TYPES and has_kernel("pointwise", f"pointwise_{_TYPES[dtype]}")


def _is_pointwise(weight_KCRS: torch.Tensor, padding: int) -> bool:
    return weight_KCRS.shape[2] == 1 and padding == 0


def forward(x_BCHW, weight_KCRS, stride: int, padding: int):
    """The convolution, and what `input_gradient` needs of the weights."""
    if _is_pointwise(weight_KCRS, padding):
        return _pointwise(x_BCHW, weight_KCRS, stride), None
    cast = weight_KCRS.to(x_BCHW.dtype)
    y_BKHW = torch.conv2d(x_BCHW, cast, stride=stride, padding=padding)
    return y_BKHW.contiguous(memory_format=torch.channels_last), cast


def input_gradient(x_BCHW, dy_BKHW, weight_KCRS, cast, stride: int, padding: int, onto=None):
    """The gradient to x, added to `onto` where that is given.

    cast: of `forward`.
    """
    if cast is None and (stride == 1 or onto is not None):
        return _pointwise(dy_BKHW, weight_KCRS, stride, transposed=True, onto=onto)
    cast = weight_KCRS.to(x_BCHW.dtype) if cast is None else cast
    dx_BCHW = torch.ops.aten.convolution_backward(
        dy_BKHW, x_BCHW, cast, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    if onto is None:
        return dx_BCHW.contiguous(memory_format=torch.channels_last)
    return onto.add_(dx_BCHW)


def weight_gradient(x_BCHW, dy_BKHW, weight_KCRS, stride: int, padding: int) -> torch.Tensor:
    """The gradient to the weights, float32, channels-last."""
    dweight = torch.empty_like(weight_KCRS, memory_format=torch.channels_last)
    layer = _describe(x_BCHW, dy_BKHW, weight_KCRS.shape[2], stride, padding)
    _call("weight_gradient", x_BCHW, (layer,), x_BCHW, dy_BKHW, dweight)
    return dweight


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.geometry = stride, padding
        y, cast = forward(x, weight, stride, padding)
        ctx.save_for_backward(x, weight, cast)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, cast = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(x, dy, weight, cast, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(x, dy, weight, *ctx.geometry)
        return dx, dweight, None, None


def _pointwise(
    x_BCHW, weight_KC11, stride: int, *, transposed: bool = False, onto=None
) -> torch.Tensor:
    """The 1x1 convolution, added to `onto` where that is given.

    transposed: with weights [C, K], as for the gradient to its input, which needs `onto` where
    there is a stride.
    """
    batch, _, height, width = x_BCHW.shape
    channels = weight_KC11.shape[1 if transposed else 0]
    y_BKHW = onto
    if onto is None:
        y_BKHW = torch.empty(
            (batch, channels, (height - 1) // stride + 1, (width - 1) // stride + 1),
            dtype=x_BCHW.dtype, memory_format=torch.channels_last,
        )  # fmt: skip
    sizes = _describe(x_BCHW, y_BKHW, 1, stride, 0), transposed, onto is not None
    _call("pointwise", x_BCHW, sizes, x_BCHW, weight_KC11.contiguous(), y_BKHW)
    return y_BKHW


def _describe(x, dy, kernel_size: int, stride: int, padding: int) -> _Convolution:
    (images, *inputs), (_, *outputs) = x.shape, dy.shape
    return _Convolution(
        images, *inputs, *outputs, kernel_size, stride, padding, torch.get_num_threads()
    )


def _call(name: str, x: torch.Tensor, sizes: tuple, *tensors: torch.Tensor) -> None:
    types = ctypes.POINTER(_Convolution), *[ctypes.c_int64] * (len(sizes) - 1)
    function = kernel(name, f"{name}_{_TYPES[x.dtype]}", len(tensors), *types)
    function(*sizes, *(tensor.data_ptr() for tensor in tensors))
