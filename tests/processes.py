"""Functions run in several gloo processes.

The processes are forked from a server that has imported torch once: a start takes no seconds.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torchvision", "matplotlib.backends.backend_agg", "matplotlib.figure",
     "moco.training.trainer", "detection.train_net"]  # fmt: skip
)


def _entry(rank, function, folder, num, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num
    )
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(function: Callable, folder: Path, *args, num: int = 2) -> list:
    """What `function(rank, *args)` returns in each of `num` processes: tensors, plain values."""
    folder = tempfile.mkdtemp(dir=folder)
    torch.multiprocessing.start_processes(
        _entry, args=(function, folder, num, args), nprocs=num, start_method="forkserver"
    )
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(num)]
