"""Processes: set-up from torchrun or a launcher of our own, gathering, and shuffle BN.

One process drives one device. The environment variables are torchrun's (`RANK`, `WORLD_SIZE`,
`LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`); without them the process runs alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moco.checksum import checksum, checksums
from moco.child_processes import run_processes
from moco.devices import CHOICES, ONE_PROCESS, only_device, send
from moco.errors import DistributedError, MocoError
from moco.process_group import gpu_of, join_group, rank_variables
from moco.shuffle import ExchangePlan, exchange_plan

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MADV_HUGEPAGE, _HEAP_STEP, _PAGE = 14, 1 << 29, 1 << 21


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
    """Join the process group that torchrun or srun describes, or run alone.

    Args:
        device: "auto" (a CUDA GPU where there is one), or another of `moco.devices.CHOICES`.
        timeout_s: how long a collective may wait for a rank, in seconds; more than rank 0 ever
            works alone (kNN evaluation, checkpoint). To start, ranks have 10 minutes or more.
    Raises:
        DistributedError: the device does not exist, a variable is missing, or a rank does not come.
    """
    if device not in CHOICES:
        raise DistributedError(f"device {device!r} is unknown; allowed: {', '.join(CHOICES)}")
    if timeout_s <= 0:
        raise DistributedError(f"collective timeout is {timeout_s:g}; allowed: seconds above 0")
    if device in ONE_PROCESS:
        return ProcessInfo(0, 1, 0, only_device(device, num_processes=rank_variables()[1]))
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DistributedError("device 'cuda' was asked for, torch sees no GPU; use --device cpu")
    use_cuda = has_cuda and device != "cpu"
    rank, world_size, local_rank = rank_variables()
    torch_device = torch.device("cpu")
    if use_cuda:
        gpu = gpu_of(local_rank, torch.cuda.device_count())
        if gpu is None:
            raise DistributedError(
                f"rank {rank}: local rank {local_rank} needs {local_rank + 1} GPUs on this "
                f"machine, torch sees {torch.cuda.device_count()}; lower --nproc-per-node"
            )
        torch.cuda.set_device(gpu)
        torch_device = torch.device("cuda", gpu)
    if not use_cuda:
        _keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        device_id = torch_device if use_cuda else None
        join_group("nccl" if use_cuda else "gloo", rank, world_size, timeout_s, device_id)
    return ProcessInfo(rank, world_size, local_rank, torch_device)


def _keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks, which it otherwise returns to the system at once.

    Each step would fault the same activations in again: about a quarter of a CPU step (ResNet-18).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        _advise_huge_pages(libc)


def _advise_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the heap's next 1.5 GiB be of huge pages where the system leaves that to programs: fewer
    misses in the page table, a few percent of a CPU step. Addresses only; memory is taken when it
    is used."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = [block for _ in range(3) if (block := libc.malloc(_HEAP_STEP))]
    for block in blocks:
        begin = -(-block // _PAGE) * _PAGE
        libc.madvise(begin, (block + _HEAP_STEP - begin) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    for block in reversed(blocks):  # back to the top of the heap, from which all else is taken
        libc.free(block)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def on_main(work: Callable[[], None]) -> None:
    """Run `work()` on rank 0 while the others wait; an error of the user is raised on all ranks."""
    error = None
    if rank() == 0:
        try:
            work()
        except MocoError as caught:
            error = caught
    if world_size() > 1:
        box = [error]
        dist.broadcast_object_list(box, src=0)
        error = box[0]
    if error is not None:
        raise error


def launch(
    worker: Callable[..., None],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> int:
    """Run `worker(*args)` in `num_processes` processes of this machine, as torchrun would.

    Alone (one process in total) it is called directly. The processes get torchrun's variables,
    so `setup_process` works the same under both.

    Args:
        dist_url: "auto" (one machine, a free port) or "tcp://HOST:PORT" of machine 0.
    Returns: the exit status, as `child_processes.run_processes`.
    """
    total = num_processes * num_machines
    if total <= 1:
        worker(*args)
        return 0
    if dist_url == "auto":
        if num_machines > 1:
            raise DistributedError(
                "--dist-url auto works on one machine only; give tcp://HOST:PORT of machine 0"
            )
        host, port = "127.0.0.1", _free_port()
    else:
        host, port = _parse_dist_url(dist_url)
    given = (worker, num_processes, total, machine_rank, host, port, args)
    return run_processes(_spawned, num_processes, given)


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


def gather_objects(own: object) -> list:
    """What each rank gives, in rank order, on all of them; for a few plain values (pickled)."""
    if world_size() == 1:
        return [own]
    everyone: list = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return everyone


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

    Each rank receives only the images of its share, B (W - 1) / W on average, where the reference
    gathers all B (W - 1). Under autocast they travel in its type, to which the first convolution
    would cast them anyway; the memory format (channels_last) is kept.

    Args:
        images_BCHW: this rank's images; every rank holds the same number.
        permutation: [world_size * B] permutation of the global batch, equal on all ranks.
    """
    device_type = images_BCHW.device.type
    if images_BCHW.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        images_BCHW = images_BCHW.to(torch.get_autocast_dtype(device_type))
    return _exchange(images_BCHW, permutation)


@torch.no_grad()
def batch_unshuffle(keys_BD: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Undo `batch_shuffle` on what was computed from the shuffled images: this rank's own keys."""
    return _exchange(keys_BD, torch.argsort(permutation))


def _exchange(rows: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """This rank's share of the permuted rows of all ranks, bitwise as if all were gathered."""
    num_ranks = world_size()
    assert len(permutation) == num_ranks * len(rows), (len(permutation), num_ranks, len(rows))
    plan = exchange_plan(permutation.cpu(), rank(), num_ranks)
    is_channels_last = (
        rows.dim() == 4
        and rows.is_contiguous(memory_format=torch.channels_last)
        and not rows.is_contiguous()
    )
    if is_channels_last:
        rows = rows.permute(0, 2, 3, 1)
    rows = rows.index_select(0, send(plan.rows_to_send, rows.device))
    if num_ranks > 1:
        rows = _all_to_all(rows, plan)
        rows = rows.index_select(0, send(plan.places, rows.device))
    return rows.permute(0, 3, 1, 2) if is_channels_last else rows


def _all_to_all(rows: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
    # As bytes: gloo does not know bfloat16 in every version, and none has to be known.
    sent = rows.reshape(len(rows), -1).view(torch.uint8)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, plan.receive_counts, plan.send_counts)
    return received.view(rows.dtype).view(rows.shape)


@torch.no_grad()
def broadcast_state(module: torch.nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers (once, with broadcast_buffers=False)."""
    if world_size() == 1:
        return
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)


@torch.no_grad()
def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give all ranks rank 0's buffers."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def data_parallel(module: torch.nn.Module, process: ProcessInfo) -> torch.nn.Module:
    """DistributedDataParallel that sends no buffers in a forward (MoCo's queue has 32 MiB).

    Call `broadcast_state` first: equal buffers then stay equal, since all ranks compute the same;
    batch-norm statistics are each rank's own, as in the reference and in Detectron2.
    """
    ddp = torch.nn.parallel.DistributedDataParallel
    # torch >= 2.13 renames the option and warns about the old name.
    names = inspect.signature(ddp.__init__).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    assert next(module.parameters()).device == process.device
    # No device_ids: with them it would copy to the GPU, waiting, what a method keeps on the CPU.
    return ddp(module, **{option: False})


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
    """Raise DistributedError on all ranks, naming those that differ, where tensors are not equal.

    Compared are checksums, computed where the tensors are; 16 bytes of each rank are gathered.

    Args:
        what: begins the message, for example "step 200".
        device: of the process group.
    """
    if world_size() == 1:
        return
    sums = checksums(tensors, device)
    digests = all_gather_cat(torch.stack([sums[0], checksum(sums)])[None])
    if (digests != digests[0]).any():
        raise DistributedError(f"{what}: {_disagreement(digests, sums, list(tensors))}")


def _disagreement(digests: torch.Tensor, sums: torch.Tensor, names: list[str]) -> str:
    """Who differs from whom, and in what. Called on all ranks: they exchange more."""
    hosts = gather_objects(socket.gethostname())
    holders: dict[int, list[int]] = {}
    for number, digest in enumerate(digests[:, 1].tolist()):
        holders.setdefault(digest, []).append(number)
    (_, agreeing), *others = sorted(holders.items(), key=lambda item: -len(item[1]))
    where = "names, shapes or types of the tensors"
    if (digests[:, 0] == digests[0, 0]).all():
        all_sums = all_gather_cat(sums[None])[:, 1:]
        differing = (all_sums != all_sums[agreeing[0]]).any(dim=0).tolist()
        found = [name for name, differs in zip(names, differing, strict=True) if differs]
        where = found[0] + (f" and {len(found) - 1} more tensors" if found[1:] else "")
    if len(agreeing) > len(others[0][1]):
        odd = sorted(number for _, ranks in others for number in ranks)
        who = ", ".join(f"rank {number} (host {hosts[number]})" for number in odd)
        text = f"{who} differs from the {len(agreeing)} ranks that agree"
    else:
        sides = "; ".join(
            f"checksum {digest & (1 << 64) - 1:016x} on "
            + ", ".join(f"rank {number} (host {hosts[number]})" for number in ranks)
            for digest, ranks in sorted(holders.items(), key=lambda item: item[1])
        )
        text = f"no majority of ranks agrees: {sides}"
    return (
        f"{text}, in {where}. Resume the job from its last checkpoint; if it is the same rank "
        "again, suspect its machine"
    )
