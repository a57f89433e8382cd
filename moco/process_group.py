"""How a process finds the others: torchrun's variables, and the first meeting.

`RANK` counts over all nodes, `LOCAL_RANK` on one; MASTER_ADDR:MASTER_PORT is where all meet.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from moco.errors import DistributedError
from moco.fresh_store import fresh_store, hello_key

# For all ranks to appear: they import and list their files each at its own pace.
_MIN_START_SECONDS = 600.0
_store: dist.Store | None = None


def rank_variables() -> tuple[int, int, int]:
    """(rank, world size, local rank): torchrun's, or (0, 1, 0). Raises: DistributedError."""
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
