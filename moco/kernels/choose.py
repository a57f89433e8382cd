"""Which modules of a network compute by kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn as nn

from moco.kernels.compiler import compile_kernels, has_kernel
from moco.kernels.convolution import suits


def use_kernels_(network: nn.Module, *, evaluation: bool = False) -> int:
    """Let `network` compute by kernels: its plain and split batch norms, the convolutions and
    linear layers the kernels have, and itself where it is a method.

    Args:
        evaluation: also in evaluation mode without gradient, not in training only.
    Returns: how many layers do.
    Raises: ConfigError as `compile_kernels`.
    """
    compile_kernels()
    layers = [
        module
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d) or suits(module)
    ]
    if hasattr(network, "compiled"):
        network.compiled = has_kernel("info_nce", "info_nce_float32")
    for layer in layers:
        layer.compiled, layer.compiled_evaluation = True, evaluation
    return len(layers)


@contextlib.contextmanager
def evaluates_by_kernels(network: nn.Module) -> Iterator[None]:
    """Layers that train by kernels evaluate by them too inside the block."""
    layers = [m for m in network.modules() if getattr(m, "compiled_evaluation", None) is False]
    layers = [layer for layer in layers if layer.compiled]
    for layer in layers:
        layer.compiled_evaluation = True
    try:
        yield
    finally:
        for layer in layers:
            layer.compiled_evaluation = False
