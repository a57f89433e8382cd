"""Which images each rank sends where in a batch shuffle: pure functions of the permutation.

All ranks draw the same permutation of the global batch, so each knows what the others want and no
plan has to be sent. N = W * B images: W ranks of B each; image g is held by rank g // B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank sends and receives in an all-to-all.

    rows_to_send: [B] own rows, those for rank 0 first, then those for rank 1, ...
    send_counts, receive_counts: rows to and from each rank, W numbers that sum to B.
    places: [B] received row of each place of the result.
    """

    rows_to_send: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    places: torch.Tensor

    def num_from_others(self, rank: int) -> int:
        """Rows that travel to this rank; its own stay in its memory."""
        return sum(self.receive_counts) - self.receive_counts[rank]


def exchange_plan(permutation: torch.Tensor, rank: int, world_size: int) -> ExchangePlan:
    """Plan after which `rank` holds its share of the permuted batch, in the permutation's order.

    Args:
        permutation: [N] on the CPU, equal on all ranks. N must be a multiple of `world_size`.
    """
    share, rest = divmod(len(permutation), world_size)
    assert rest == 0, f"{len(permutation)} images over {world_size} ranks"
    holders = permutation // share
    # What goes to one rank stays in the order of its places there: sender and receiver agree.
    sent_to = (holders == rank).nonzero().flatten()
    wanted_from = holders[rank * share : (rank + 1) * share]
    arrival = torch.argsort(wanted_from, stable=True)
    return ExchangePlan(
        rows_to_send=permutation[sent_to] - rank * share,
        send_counts=torch.bincount(sent_to // share, minlength=world_size).tolist(),
        receive_counts=torch.bincount(wanted_from, minlength=world_size).tolist(),
        places=torch.argsort(arrival),
    )
