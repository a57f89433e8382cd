"""Bytes a process receives in collectives, counted in two ways that know nothing of each other.

`CountedTraffic` sees every c10d operation, those that DistributedDataParallel starts in C++ too,
and takes from its arguments what it must deliver. `socket_bytes` asks the kernel what arrived on
this process's TCP connections (Linux; gloo).
"""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_TCP_INFO, _TCP_INFO_BYTES = 11, 256
_BYTES_RECEIVED = struct.Struct("Q"), 128  # tcpi_bytes_received of linux/tcp.h, and its offset


class CountedTraffic(TorchDispatchMode):
    """While entered, adds up what this process receives, by kind.

    received: kind -> bytes. The kind of what runs in `kind(...)` is given; else broadcasts are
    "buffers", sums of floats "gradients", and the rest "findings" (see training/guard.py).
    Raises: NotImplementedError at a collective it does not know, rather than miss it.
    """

    def __init__(self):
        super().__init__()
        self.received: Counter[str] = Counter()
        self._kind: str | None = None

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        outer, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = outer

    def counted(self, function: Callable, name: str) -> Callable:
        """`function`, whose collectives are of kind `name`."""

        def wrapper(*args, **kwargs):
            with self.kind(name):
                return function(*args, **kwargs)

        return wrapper

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.received[self._kind or _usual_kind(name, args)] += received_bytes(name, args)
        return func(*args, **(kwargs or {}))


def _usual_kind(name: str, args: tuple) -> str:
    if name == "broadcast_":
        return "buffers"
    is_sum = name == "allreduce_" and args[0][0].is_floating_point()
    return "gradients" if is_sum else "findings"


def received_bytes(name: str, args: tuple) -> float:
    """What a c10d operation must bring to this rank.

    Sums: 2 (W - 1) / W of the tensor, the least that any algorithm needs and what a ring takes.
    Broadcasts: the tensor, nothing on the rank that has it.
    """
    num_ranks, own = dist.get_world_size(), dist.get_rank()
    if name == "barrier":
        return 0
    if name == "allreduce_":
        return 2 * (num_ranks - 1) / num_ranks * _num_bytes(args[0])
    if name == "broadcast_":
        return 0 if args[2] == own else _num_bytes(args[0])
    if name == "allgather_":
        return (num_ranks - 1) * _num_bytes(args[1])
    if name == "alltoall_base_":
        output, counts = args[0], args[3]
        return output.nbytes * (sum(counts) - counts[own]) / sum(counts)
    raise NotImplementedError(f"c10d::{name}: its bytes are not counted yet")


def _num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def socket_bytes() -> int | None:
    """Bytes received so far on all TCP connections of this process; None where it is not told."""
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        return None
    total, found = 0, False
    for name in os.listdir(folder):
        try:
            if not os.readlink(f"{folder}/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # closed meanwhile, or not TCP
            continue
        layout, offset = _BYTES_RECEIVED
        if len(info) >= offset + layout.size:
            total, found = total + layout.unpack_from(info, offset)[0], True
    return total if found else None
