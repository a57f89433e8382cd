"""The arithmetic limit of this machine, measured: the fastest matrix product and convolution."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SIDE = {"cpu": 2048, "cuda": 8192}


def matrix_peak(
    dtype: torch.dtype, device: torch.device, *, side: int | None = None, rounds: int = 9
) -> dict[str, float]:
    """Operations per second (an addition and a multiplication are two) of the best round.

    Libraries differ in how near they come to the processor's limit, so two computations are
    timed: a square matrix product and a 3x3 convolution, channels last, of 256 channels.

    Args:
        side: of the matrices; None for the device's own. The convolution does half as much.
    Returns: {"matrix product", "convolution", "best"}.
    """
    side = _SIDE[device.type] if side is None else side
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    a, b = values(side, side), values(side, side)
    # 2 * N * 14 * 14 * 256 * 256 * 9 operations.
    num_images = max(1, round(side**3 / (2 * 14 * 14 * 256 * 256 * 9)))
    images = values(num_images, 256, 14, 14).to(memory_format=torch.channels_last)
    weight = values(256, 256, 3, 3).to(memory_format=torch.channels_last)
    convolution_ops = 2 * num_images * 14 * 14 * 256 * 256 * 9
    found = {
        "matrix product": 2 * side**3 / _best(lambda: a @ b, device, rounds),
        "convolution": convolution_ops
        / _best(lambda: torch.conv2d(images, weight, padding=1), device, rounds),
    }
    return {**found, "best": max(found.values())}


def _best(work: Callable[[], torch.Tensor], device: torch.device, rounds: int) -> float:
    seconds = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return min(seconds[2:])
