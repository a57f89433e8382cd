"""What differs between kinds of devices: names, precision, memory, and how to send them data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moco.errors import DeviceMemoryError, DistributedError

# Apple's and Intel's: float32, and one process. No such hardware was at hand; that they work is
# what torch's documentation says.
ONE_PROCESS = ("mps", "xpu")
CHOICES = ("auto", "cpu", "cuda", *ONE_PROCESS)  # of `--device`


def only_device(kind: str, *, num_processes: int) -> torch.device:
    """The device of a job of one process. Raises: DistributedError where it cannot be."""
    if num_processes > 1:
        raise DistributedError(
            f"device {kind!r}: allowed is one process, WORLD_SIZE is {num_processes}; start "
            "without torchrun, or use --device cpu"
        )
    backend = torch.backends.mps if kind == "mps" else torch.xpu
    if not backend.is_available():
        raise DistributedError(f"device {kind!r} was asked for, torch sees none; use --device cpu")
    return torch.device(kind, 0)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. From a CPU to a GPU it goes through pinned memory: a copy from any
    other memory makes the process wait until the GPU has done what it was given before."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def set_arithmetic(device: torch.device, *, tf32: bool = False, fixed_shapes: bool = True) -> None:
    """What a GPU's float32 means, for all that follows in this process; elsewhere nothing.

    Args:
        tf32: let matrix products and convolutions of float32 drop to TF32, from Ampere on. torch's
            own default is yes for convolutions and no for products.
        fixed_shapes: let cuDNN try its algorithms for each shape and keep the fastest. Which of
            them wins may differ from start to start, and with it the last bits.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = fixed_shapes


@contextmanager
def out_of_memory_as_error(
    where: Callable[[], str], remedy: Callable[[], str]
) -> Iterator[None]:
    """Turn CUDA's "out of memory" into one line.

    Args: `where` begins it, then comes torch's account of what was asked for and what the card has,
        then `remedy`: what to lower. Both are called on failure only.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).split(" Of the allocated memory")[0]
        raise DeviceMemoryError(f"{where()}: {reason} {remedy()}") from error


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory
