"""What NCCL demands of tensors, looked at in processes that talk through gloo.

`watch()` replaces the collectives of `torch.distributed` by ones that look at their tensors first
(ProcessGroupNCCL.cpp, check_gpu_single_tensor): a type NCCL has, memory without gaps in the order
of dimensions or channels last, and no inference tensor, which nothing may be written to later. It
cannot see what DistributedDataParallel sends from C++, sizes that differ between ranks, the order
of collectives, or anything of NCCL itself.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
_COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "all_to_all_single")
_TYPES = {
    torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
}  # fmt: skip


class Seen:
    """calls: (collective, type) -> how often; violations: "what at file:line" -> how often."""

    def __init__(self) -> None:
        self.calls: collections.Counter = collections.Counter()
        self.violations: collections.Counter = collections.Counter()

    def look_at(self, name: str, tensor: torch.Tensor) -> None:
        self.calls[name, str(tensor.dtype)] += 1
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        for what, is_bad in {
            f"{tensor.dtype}": tensor.dtype not in _TYPES,
            f"strides {tensor.stride()}": not (tensor.is_contiguous() or last),
            "an inference tensor": tensor.is_inference(),
        }.items():
            if is_bad:
                self.violations[f"{name}: {what} at {_place()}"] += 1


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None and "/moco/" not in frame.f_code.co_filename.replace(
        "/detection/", "/moco/"
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Look at all collectives of this process in the block."""
    seen = Seen()
    with contextlib.ExitStack() as stack:
        for name in _COLLECTIVES:
            original = getattr(dist, name)

            @functools.wraps(original)
            def looking(*args, _name=name, _original=original, **kwargs):
                for given in args[:2]:
                    for tensor in given if isinstance(given, list | tuple) else [given]:
                        if isinstance(tensor, torch.Tensor):
                            seen.look_at(_name, tensor)
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, looking))
        yield seen
