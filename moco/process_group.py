"""How a process finds the others: torchrun's or srun's variables, and the first meeting.

`RANK` counts over all nodes, `LOCAL_RANK` on one; MASTER_ADDR:MASTER_PORT is where all meet.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moco.errors import DistributedError, report
from moco.fresh_store import fresh_store, hello_key

# For all ranks to appear: they import and list their files each at its own pace.
_MIN_START_SECONDS = 600.0
# What srun gives each task, and the meeting place that the user names for it.
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_store: dist.Store | None = None


def is_rank() -> bool:
    """Whether a launcher started this process as one of several: torchrun or, where MASTER_ADDR is
    set, srun, whose variables alone may be those of an interactive shell."""
    return "WORLD_SIZE" in os.environ or {"MASTER_ADDR", *_SRUN} <= os.environ.keys()


def rank_variables() -> tuple[int, int, int]:
    """(rank, world size, local rank): torchrun's, those of srun, or (0, 1, 0).

    Raises: DistributedError.
    """
    if not is_rank():
        return 0, 1, 0
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if "WORLD_SIZE" in os.environ else _SRUN
    values = []
    for name in names:
        text = os.environ.get(name)
        if text is None or not text.isdigit():
            raise DistributedError(
                f"environment: {name} is {text!r} while {names[1]} is set; start with torchrun, "
                "which sets RANK, WORLD_SIZE and LOCAL_RANK"
            )
        values.append(int(text))
    return tuple(values)


def gpu_of(local_rank: int, num_visible: int) -> int | None:
    """Which of the visible GPUs is this process's; None where there are too few.

    A task of srun that sees one GPU (`--gpus-per-task 1`) sees its own, whatever its number on the
    machine. Processes that a task starts see the same one and cannot share it.
    """
    if local_rank < num_visible:
        return local_rank
    is_task = os.environ.get("SLURM_LOCALID") == str(local_rank)
    return 0 if is_task and num_visible == 1 else None


def join_group(
    backend: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    device_id: torch.device | None = None,
) -> None:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT; then `timeout_s` holds for collectives.

    Args:
        device_id: this rank's GPU. NCCL then connects at once, and not in the first collective,
            and a barrier does not have to guess it.
    Raises: DistributedError naming the ranks that did not come within 10 minutes (or `timeout_s`,
        where that is longer).
    """
    global _store
    patience = datetime.timedelta(seconds=max(timeout_s, _MIN_START_SECONDS))
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    keys = [hello_key(number) for number in range(world_size)]
    store = None
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
        _store = fresh_store(store, rank, world_size, patience)
        dist.init_process_group(
            backend,
            store=_store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device_id,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DistributedError(
            f"rank {rank} of {world_size}: no process group at {address}{_missing(store, keys)} "
            f"({reason}); check MASTER_ADDR and MASTER_PORT, and that every node runs the same "
            "torchrun command with one and the same --rdzv-endpoint"
        ) from error


@contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the process group after the block; where the block fails, end this process at once.

    NCCL waits for the other ranks to leave too, and they wait in a collective for this one: a rank
    that has failed must be seen to end by its launcher, which then ends the others. So the error
    is printed first, and neither the group nor Python's own exit, which waits for threads, is
    waited for. Everything inside the block that has to be closed is closed by then. Without a
    group nothing is done.
    """
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        _end_process(report(error))
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_process(code: int) -> None:
    for child in multiprocessing.active_children():  # loader workers, which exit would have ended
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def notes() -> dist.Store | None:
    """Where ranks that `join_group` joined can leave words for each other when collectives fail."""
    return dist.PrefixStore("notes", _store) if _store is not None else None


def _missing(store: dist.Store | None, keys: list[str]) -> str:
    """Which ranks have not come to the meeting, as far as it can be asked."""
    try:
        missing = [n for n, key in enumerate(keys) if store and not store.check([key])]
    except RuntimeError:  # the store went with its host
        return ""
    return f", ranks {missing} did not start" if missing else ""
