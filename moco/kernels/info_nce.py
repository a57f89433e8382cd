"""InfoNCE against a queue with its gradient, compiled for CPUs: `info_nce.cpp`."""

from __future__ import annotations

import ctypes

import torch

from moco.kernels.compiler import kernel


class _Sizes(ctypes.Structure):
    """`Sizes` of info_nce.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("queries", "dimensions", "negatives", "threads")),
        ("temperature", ctypes.c_double),
    ]


def info_nce(
    q_BD: torch.Tensor, k_BD: torch.Tensor, negatives_DK: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss (MoCo v1, eq. 1) and its gradient to the queries, [B, D].

    NaN or infinity in an argument gives a loss of NaN.

    Args:
        q_BD, k_BD: float32 on a CPU. negatives_DK: in columns, equal for all queries.
    Raises: ValueError for another type or device.
    """
    given = [t.detach().contiguous() for t in (q_BD, k_BD, negatives_DK)]
    for tensor in given:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"compiled InfoNCE takes float32 on a CPU, got {tensor.dtype} on {tensor.device}"
            )
    loss, gradient_BD = given[0].new_empty(()), torch.empty_like(given[0])
    sizes = _Sizes(*q_BD.shape, negatives_DK.shape[1], torch.get_num_threads(), temperature)
    function = kernel("info_nce", "info_nce_float32", 5, ctypes.POINTER(_Sizes))
    function(sizes, *(tensor.data_ptr() for tensor in (*given, loss, gradient_BD)))
    return loss, gradient_BD
