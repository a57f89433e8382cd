"""The moving average of many tensors in one call: `moving_average.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from moco.kernels.compiler import kernel


def suits(keys: Sequence[torch.Tensor], queries: Sequence[torch.Tensor]) -> bool:
    """Whether `move_` has these: float32 on a CPU, a pair of them in one memory order."""
    return all(
        key.dtype == query.dtype == torch.float32
        and key.device.type == query.device.type == "cpu"
        and key.stride() == query.stride()
        for key, query in zip(keys, queries, strict=True)
    )


def move_(keys: Sequence[torch.Tensor], queries: Sequence[torch.Tensor], weight: float) -> None:
    """keys <- keys + weight * (queries - keys).

    Args:
        keys, queries: as `suits` accepts them, without gaps in memory.
    """
    count = len(keys)
    addresses = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in group))
                 for group in (keys, queries)]  # fmt: skip
    sizes = (ctypes.c_int64 * count)(*(key.numel() for key in keys))
    types = ctypes.c_int64, ctypes.c_int64, ctypes.c_float
    function = kernel("moving_average", "move_float32", 3, *types)
    function(count, torch.get_num_threads(), weight, *addresses, sizes)
