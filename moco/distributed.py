"""Processes: set-up from torchrun or a launcher of our own, gathering, and shuffle BN.

One process drives one device. The environment variables are torchrun's (`RANK`, `WORLD_SIZE`,
`LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`); without them the process runs alone.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import inspect
import os
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moco.errors import DistributedError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

@dataclass(frozen=True)
class ProcessInfo:
    """Where this process stands: its rank, the number of processes, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup_process(device: str = "auto", timeout_s: float = 1800.0) -> ProcessInfo:
    """Join the process group torchrun describes, or run alone.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        timeout_s: how long a collective may wait for a rank, in seconds.
    Raises:
        DistributedError: the device does not exist, or a rank variable is missing.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DistributedError(f"device {device!r} is unknown; allowed: auto, cpu, cuda")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DistributedError("device 'cuda' was asked for, torch sees no GPU; use --device cpu")
    use_cuda = has_cuda and device != "cpu"
    rank, world_size, local_rank = _read_rank_variables()
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"rank {rank}: local rank {local_rank} needs {local_rank + 1} GPUs on this "
                f"machine, torch sees {torch.cuda.device_count()}; lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    torch_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if not use_cuda:
        _keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return ProcessInfo(rank, world_size, local_rank, torch_device)


def _read_rank_variables() -> tuple[int, int, int]:
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    values = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name)
        if text is None or not text.isdigit():
            raise DistributedError(
                f"environment: {name} is {text!r} while WORLD_SIZE is set; start with torchrun, "
                "which sets RANK, WORLD_SIZE and LOCAL_RANK"
            )
        values.append(int(text))
    return tuple(values)


def _keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks, which it otherwise returns to the system at once.

    Each step would fault the same activations in again: about a quarter of a CPU step (ResNet-18).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def launch(
    worker: Callable[..., None],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Run `worker(*args)` in `num_processes` processes of this machine, as torchrun would.

    Alone (one process in total) it is called directly. The processes get torchrun's variables,
    so `setup_process` works the same under both.

    Args:
        dist_url: "auto" (one machine, a free port) or "tcp://HOST:PORT" of machine 0.
    """
    total = num_processes * num_machines
    if total <= 1:
        worker(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise DistributedError(
                "--dist-url auto works on one machine only; give tcp://HOST:PORT of machine 0"
            )
        host, port = "127.0.0.1", _free_port()
    else:
        host, port = _parse_dist_url(dist_url)
    torch.multiprocessing.spawn(
        _spawned,
        args=(worker, num_processes, total, machine_rank, host, port, args),
        nprocs=num_processes,
        join=True,
    )


def _spawned(local_rank, worker, per_machine, total, machine_rank, host, port, args) -> None:
    os.environ.update(
        RANK=str(machine_rank * per_machine + local_rank),
        WORLD_SIZE=str(total),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    worker(*args)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _parse_dist_url(dist_url: str) -> tuple[str, int]:
    scheme, _, address = dist_url.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit():
        raise DistributedError(f"--dist-url {dist_url!r}: allowed are 'auto' and tcp://HOST:PORT")
    return host, int(port)


@torch.no_grad()
def all_gather_cat(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors of all ranks joined along dim 0 in rank order; no gradient, equal shapes."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather_cat(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = all_reduce_sum(gradient.contiguous().clone())
        return gradient.view(world_size(), -1, *gradient.shape[1:])[rank()]


def all_gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """`all_gather_cat` through which gradients flow.

    A rank receives the sum of what all ranks' losses send to its part. So, averaged over ranks by
    DistributedDataParallel, the gradient is that of the mean of the ranks' losses.
    """
    return tensor if world_size() == 1 else _GatherWithGradient.apply(tensor)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank as soon as `flag` is true on one of them."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


@torch.no_grad()
def batch_shuffle(images_BCHW: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Shuffle BN (MoCo v1, section 3.3): this rank's share of the permuted global batch.

    Args:
        images_BCHW: this rank's images; every rank holds the same number.
        permutation: [world_size * B] permutation of the global batch, equal on all ranks.
    """
    gathered = all_gather_cat(images_BCHW)
    return gathered[_own_part(permutation.to(gathered.device))]


@torch.no_grad()
def batch_unshuffle(keys_BD: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Undo `batch_shuffle` on what was computed from the shuffled images: this rank's own keys."""
    gathered = all_gather_cat(keys_BD)
    inverse = torch.argsort(permutation.to(gathered.device))
    return gathered[_own_part(inverse)]


def _own_part(indices: torch.Tensor) -> torch.Tensor:
    return indices.view(world_size(), -1)[rank()]


@torch.no_grad()
def broadcast_state(module: torch.nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers (once, with broadcast_buffers=False)."""
    if world_size() == 1:
        return
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


def data_parallel(module: torch.nn.Module, process: ProcessInfo) -> torch.nn.Module:
    """DistributedDataParallel that sends no buffers in a forward (MoCo's queue has 32 MiB).

    Call `broadcast_state` first: equal buffers then stay equal, since all ranks compute the same;
    batch-norm statistics are each rank's own, as in the reference and in Detectron2.
    """
    ddp = torch.nn.parallel.DistributedDataParallel
    # torch >= 2.13 renames the option and warns about the old name.
    names = inspect.signature(ddp.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    devices = [process.device] if process.device.type == "cuda" else None
    return ddp(module, device_ids=devices, **{option: False})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes: equal digests mean bitwise equal states."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        sha.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        sha.update(data.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def check_equal_across_ranks(
    tensors: Mapping[str, torch.Tensor], what: str, device: torch.device
) -> None:
    """Raise DistributedError, naming the ranks, where a rank's tensors differ from rank 0's."""
    if world_size() == 1:
        return
    own = torch.tensor(list(bytes.fromhex(tensors_digest(tensors))), dtype=torch.uint8)
    digests = all_gather_cat(own.to(device)[None]).cpu()
    differing = [r for r in range(world_size()) if not torch.equal(digests[r], digests[0])]
    if differing:
        raise DistributedError(
            f"{what}: ranks {differing} differ from rank 0; stop the job and resume from its last "
            "checkpoint"
        )
