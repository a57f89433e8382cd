"""The queue of keys (MoCo v1, section 3.2): a ring buffer of the newest K."""

from __future__ import annotations

import torch


def initial_queue(dim: int, queue_size: int) -> torch.Tensor:
    """[D, K] normal noise with unit columns, drawn from torch's global generator."""
    return torch.nn.functional.normalize(torch.randn(dim, queue_size), dim=0)


@torch.no_grad()
def enqueue_(
    queue_DK: torch.Tensor,
    pointer: torch.Tensor,
    keys_ND: torch.Tensor,
    skip: torch.Tensor | None = None,
) -> None:
    """Write N keys over the oldest N, in place, and move the pointer; wraps at the end.

    Args:
        queue_DK: unit vectors in columns, N <= K.
        pointer: int64 [1], the column of the oldest key.
        skip: a scalar on the device; where it is true nothing is written or moved.
    """
    num_keys, queue_size = len(keys_ND), queue_DK.shape[1]
    if num_keys > queue_size:
        raise ValueError(f"{num_keys} keys do not fit a queue of {queue_size}")
    columns = (pointer + torch.arange(num_keys, device=pointer.device)) % queue_size
    keys_DN, moved = keys_ND.T.to(queue_DK.dtype), (pointer + num_keys) % queue_size
    if skip is not None:
        keys_DN = torch.where(skip, queue_DK[:, columns], keys_DN)
        moved = torch.where(skip, pointer, moved)
    queue_DK[:, columns] = keys_DN
    pointer.copy_(moved)
