"""Which modules of a network compute by kernels."""

from __future__ import annotations

import torch.nn as nn

from moco.kernels.compiler import compile_kernels, has_kernel
from moco.kernels.convolution import suits


def use_kernels_(network: nn.Module) -> int:
    """Let `network` compute by kernels in training: its plain and split batch norms, the
    convolutions and linear layers the kernels have, and itself where it is a method.

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
        layer.compiled = True
    return len(layers)
