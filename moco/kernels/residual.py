"""A residual block on a CPU as one function, of autograd too.

Gradients of the block's two branches are added where the last of them is made, gradients that
nobody else sees are overwritten, and Python and autograd are asked once a block instead of once a
layer.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

from moco.kernels.compiler import TYPES, computes, is_compiled, kernel, library
from moco.kernels.convolution import Convolution, in_order, output_shape, runs
from moco.kernels.norm import check_values

Pair = Sequence[nn.Module]  # a convolution and its norm
_ALIGNMENT = 64  # bytes, of a cache line


def has_kernels(pairs: Sequence[Pair], x_BCHW: torch.Tensor) -> bool:
    """Whether `residual` can be asked for: all layers compute by kernels, none adds a bias."""
    training = pairs[0][0].training
    return all(
        convolution.bias is None
        and norm is not None
        and norm.training == convolution.training == training
        and computes(norm)
        and computes(convolution)
        and runs(convolution, x_BCHW)
        for convolution, norm in pairs
    )


def residual(
    pairs: Sequence[Pair], downsample: Pair | None, x_BCHW: torch.Tensor, groups: int = 1
) -> torch.Tensor:
    """relu(layers(x) + shortcut(x)): ReLU also between the layers; the shortcut is x itself or,
    without ReLU, `downsample`. In training running statistics are updated, else they are used.

    Args:
        x_BCHW: of a type that `has_kernels` accepts. The result is channels-last.
        groups: image i is normalised in group i % groups.
    Raises: ValueError as `norm.norm_relu`.
    """
    layers = [*pairs, *([downsample] if downsample else [])]
    geometry = tuple(
        (*convolution.weight.shape[::2], convolution.stride[0], convolution.padding[0])
        for convolution, _ in layers
    )
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    plan = _plan(
        x_BCHW.shape, x_BCHW.dtype, geometry, downsample is not None, groups,
        not layers[0][0].training, torch.get_num_threads(),
    )  # fmt: skip
    norms = [norm for _, norm in layers]
    parameters = [p for conv, norm in layers for p in (conv.weight, norm.weight, norm.bias)]
    if torch.is_grad_enabled():
        return _Residual.apply(plan, norms, x_BCHW, *parameters)
    return _forward(plan, norms, x_BCHW, parameters, keep=False)[0]


def seconds() -> dict[str, float]:
    """What the kernels of all blocks of this process took so far, by what they compute; nothing
    before they are compiled."""
    if not is_compiled():
        return {}
    names = "convolution", "norm", "gradient to an input", "gradient to weights"
    values = (ctypes.c_double * len(names)).in_dll(library("residual"), "residual_seconds")
    return dict(zip(names, values, strict=True))


class _Kernels(ctypes.Structure):
    """`Kernels` of residual.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("convolution", "weight_gradient", "norm_forward", "norm_backward")
    ]


class _Block(ctypes.Structure):
    """`Block` of residual.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "has_downsample", "groups", "evaluating")),
        ("convolutions", ctypes.POINTER(Convolution)),
        ("kernels", _Kernels),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of residual.cpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        *((name, ctypes.c_void_p) for name in ("kernel", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var", "tracked")),
        *((name, ctypes.c_void_p) for name in ("convolved", "normalised", "stats")),
    ]


class _Gradients(ctypes.Structure):
    """`Gradients` of residual.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("kernel", "weight", "bias", "convolved")]


@dataclass(frozen=True)
class _Plan:
    """What is the same in all steps. Offsets are bytes in the buffer of a step."""

    block: _Block
    out_shape: Sequence[int]
    stats: Sequence[int]  # offsets, of each layer
    inner: Sequence[int]  # of what each layer but the last one computes
    kept: Sequence[int]  # of what the backward pass reads besides; in the end of the buffer
    size: int
    size_without_kept: int
    gradients: Sequence[int]  # in a buffer of the backward pass
    gradients_size: int


@functools.lru_cache(maxsize=1024)
def _plan(
    x_shape: torch.Size,
    dtype: torch.dtype,
    geometry: tuple[tuple[int, int, int, int], ...],
    has_downsample: bool,
    groups: int,
    evaluating: bool,
    threads: int,
) -> _Plan:
    """geometry: of each layer (outputs, kernel size, stride, padding); last is the downsample's."""
    num_layers = len(geometry) - has_downsample
    convolutions, shapes, made = [], [], x_shape
    for number, layer in enumerate(geometry):
        given = x_shape if number == num_layers else made
        made = output_shape(given, *layer)
        if not evaluating:
            check_values(made, groups)
        shapes.append(made)
        convolutions.append(Convolution(*given, *made[1:], *layer[1:], threads))
    functions = [
        kernel(source, f"{function}_{TYPES[dtype]}", 0)
        for source, function in (
            ("convolution", "convolution"), ("weight_gradient", "weight_gradient"),
            ("batch_norm", "forward"), ("batch_norm", "backward"),
        )
    ]  # fmt: skip
    block = _Block(
        num_layers, has_downsample, groups, evaluating,
        (Convolution * len(geometry))(*convolutions),
        _Kernels(*(ctypes.cast(function, ctypes.c_void_p) for function in functions)),
    )  # fmt: skip
    last, bytes_ = num_layers - 1, [math.prod(shape) * dtype.itemsize for shape in shapes]
    stats, size = _offsets(4 * 4 * groups * shape[1] for shape in shapes)
    inner, size = _offsets((0 if n == last else bytes_[n] for n in range(len(shapes))), size)
    kept, whole = _offsets(bytes_[:num_layers], size)
    gradients, gradients_size = _offsets(bytes_[:num_layers])
    return _Plan(block, shapes[last], stats, inner, kept, whole, size, gradients, gradients_size)


def _offsets(sizes: Iterable[int], first: int = 0) -> tuple[list[int], int]:
    """Where parts of so many bytes begin if the first does at `first`, and where they end."""
    steps = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
    *offsets, end = itertools.accumulate(steps, initial=first)
    return offsets, end


def _forward(
    plan: _Plan, norms: Sequence[nn.Module], x: torch.Tensor, parameters, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's output, and the buffer of what its gradient needs, if it is to `keep` that."""
    size = plan.size if keep else plan.size_without_kept
    buffer = torch.empty(size, dtype=torch.uint8)
    out, shortcut = _like(plan, x), None
    if keep and plan.block.has_downsample:
        shortcut = _like(plan, x)
    kernels = [in_order(weight) for weight in parameters[::3]]
    layers = _layers(plan, norms, parameters, kernels, buffer, out, shortcut, keep)
    function = kernel("residual", "residual_forward", 1, _BLOCK, _LAYERS)
    function(plan.block, layers, x.data_ptr())
    return out, buffer


def _like(plan: _Plan, x: torch.Tensor) -> torch.Tensor:
    return torch.empty(plan.out_shape, dtype=x.dtype, memory_format=torch.channels_last)


def _layers(plan, norms, parameters, kernels, buffer, out, shortcut, keep: bool) -> ctypes.Array:
    """shortcut: of the downsample, where it is kept apart from what the norm is applied to."""
    base, last, layers = buffer.data_ptr(), plan.block.layers - 1, []
    for number, norm in enumerate(norms):
        if number == last:
            normalised = out.data_ptr()
            convolved = base + plan.kept[number] if keep else normalised
        else:
            convolved = normalised = base + plan.inner[number]
            if keep and number < last:
                normalised = base + plan.kept[number]
            elif shortcut is not None:
                normalised = shortcut.data_ptr()
        weight, bias = parameters[3 * number + 1 : 3 * number + 3]
        tensors = weight, bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
        layers.append((
            norm.eps, norm.momentum, kernels[number].data_ptr(), *(t.data_ptr() for t in tensors),
            convolved, normalised, base + plan.stats[number],
        ))  # fmt: skip
    return (_Layer * len(layers))(*layers)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, norms, x, *parameters):
        out, buffer = _forward(plan, norms, x, parameters, keep=True)
        ctx.plan, ctx.norms = plan, norms
        ctx.save_for_backward(out, buffer, x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        out, buffer, x, *parameters = ctx.saved_tensors
        plan, kernels = ctx.plan, [in_order(weight) for weight in parameters[::3]]
        layers = _layers(plan, ctx.norms, parameters, kernels, buffer, out, None, keep=True)
        dout = dout.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        gated = torch.empty_like(out) if plan.block.has_downsample else dx
        scratch = torch.empty(plan.gradients_size, dtype=torch.uint8)
        offsets = [*(scratch.data_ptr() + offset for offset in plan.gradients), None]
        dparameters = [
            torch.empty_like(p, memory_format=torch.channels_last if p.dim() == 4 else None)
            for p in parameters
        ]
        addresses = [gradient.data_ptr() for gradient in dparameters]
        gradients = [(*addresses[3 * n : 3 * n + 3], offsets[n]) for n in range(len(kernels))]
        function = kernel("residual", "residual_backward", 4, _BLOCK, _LAYERS, _GRADIENTS)
        function(
            plan.block, layers, (_Gradients * len(gradients))(*gradients), x.data_ptr(),
            dout.data_ptr(), gated.data_ptr(), dx.data_ptr(),
        )  # fmt: skip
        return None, None, dx, *dparameters


_BLOCK, _LAYERS, _GRADIENTS = map(ctypes.POINTER, (_Block, _Layer, _Gradients))
