"""The norm of many tensors together, by all threads: `gradient_norm.cpp`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from moco.kernels.compiler import kernel


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all values, a scalar. NaN or infinity if one of them is.

    Args:
        tensors: float32 on a CPU, in any memory order without gaps.
    """
    count = len(tensors)
    addresses = (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))
    sizes = (ctypes.c_int64 * count)(*(tensor.numel() for tensor in tensors))
    total = ctypes.c_double()
    function = kernel("gradient_norm", "squares_float32", 3, ctypes.c_int64, ctypes.c_int64)
    function(count, torch.get_num_threads(), addresses, sizes, ctypes.byref(total))
    return torch.tensor(math.sqrt(total.value), dtype=torch.float32)
