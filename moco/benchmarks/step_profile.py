"""Where the time of a step goes, by groups of operations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from moco.contrast import fused
from moco.kernels import convolution, norm, residual
from moco.models import momentum
from moco.training import step

REST = "rest"
# group -> beginnings of operations' names; the first group that fits has it.
_GROUPS = {
    "convolution backward": (
        "aten::convolution_backward", "aten::cudnn_convolution_backward", "_ConvolveBackward",
        "kernel: gradient to",
    ),
    "convolution forward": (
        "_Convolve", "kernel: convolution",
        "aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::_convolution",
        "aten::slow_conv2d",
    ),
    "batch norm (compiled: with shortcut and ReLU)": (
        "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::batch_norm", "kernel: norm",
        "_NormRelu",
    ),
    "ReLU": ("aten::clamp_min", "aten::relu", "aten::threshold_backward"),
    "pooling": ("aten::max_pool", "aten::mean", "aten::adaptive_avg", "aten::_adaptive_avg"),
    "matrix products (heads, logits)": ("kernel: InfoNCE", "aten::mm", "aten::addmm", "aten::bmm"),
    "softmax and accuracy": (
        "aten::_log_softmax", "aten::log_softmax", "aten::nll", "aten::topk", "aten::exp",
        "aten::amax", "aten::cat",
    ),
    "moving average, one pass": ("kernel: moving", "aten::lerp", "aten::_foreach_lerp"),
    "optimizer, one pass": ("aten::_fused_sgd", "aten::_fused_adam", "Optimizer.step"),
    "additions and multiplications (shortcuts; average and optimizer where they have no pass)": (
        "aten::add", "aten::mul", "aten::sub", "aten::div", "aten::_foreach",
    ),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::to", "aten::_to_copy"),
    "gradient norm": ("aten::linalg_vector_norm", "aten::norm", "kernel: gradient norm"),
}  # fmt: skip

_KERNELS = (  # module, its function, the name the profiler is told
    (norm, "forward", "norm"),
    (norm, "backward", "norm"),
    (convolution, "forward", "convolution"),
    (convolution, "input_gradient", "gradient to an input"),
    (convolution, "weight_gradient", "gradient to weights"),
    (fused, "info_nce", "InfoNCE"),
    (step, "total_norm", "gradient norm"),
    (momentum, "move_", "moving average"),
)


def group_of(operation: str) -> str:
    """The group an operation of the profiler's belongs to."""
    for group, beginnings in _GROUPS.items():
        if operation.startswith(beginnings):
            return group
    return REST


def profile(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of `work` by group; on a GPU those its kernels ran. What is left of it is "rest"."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with contextlib.ExitStack() as stack:
        for module, function, name in _KERNELS:
            recorded = _recorded(getattr(module, function), name)
            stack.enter_context(mock.patch.object(module, function, recorded))
        profiler = stack.enter_context(torch_profile(activities=activities))
        before = residual.seconds()
        started = time.perf_counter()
        work()
        total = time.perf_counter() - started
    groups: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        group = group_of(event.key)
        if group != REST:
            groups[group] = groups.get(group, 0.0) + own / 1e6
    for name, seconds in residual.seconds().items():
        group = group_of(f"kernel: {name}")
        groups[group] = groups.get(group, 0.0) + seconds - before.get(name, 0.0)
    groups[REST] = max(0.0, total - sum(groups.values()))
    return dict(sorted(groups.items(), key=lambda item: -item[1]))


def _recorded(function: Callable, name: str) -> Callable:
    """Kernels are called past torch's dispatcher, so the profiler must be told."""

    def recorded(*args, **options):
        with record_function(f"kernel: {name}"):
            return function(*args, **options)

    return recorded
