"""The order "blocks": every image once, in few blocks at a time, mixed nearly as a uniform one."""

from __future__ import annotations

import itertools

import pytest
import torch

from moco.data.sampler import BlockOrder, EpochStream, epoch_order
from moco.errors import ConfigError

N, BLOCK, IN_FLIGHT = 20_000, 50, 20  # 400 blocks
BATCH = 100


def block_order(n=N, block=BLOCK, in_flight=IN_FLIGHT, storage_order=None):
    storage = torch.arange(n) if storage_order is None else storage_order
    return BlockOrder(storage, block, in_flight)


@pytest.mark.parametrize(
    ("n", "block", "in_flight"),
    [(1, 1, 1), (7, 3, 2), (100, 100, 1), (100, 1000, 5), (101, 10, 3), (1000, 7, 143),
     (64, 1, 64)],
)  # fmt: skip
def test_each_image_comes_once_whatever_the_sizes(n, block, in_flight):
    for epoch in range(3):
        order = block_order(n, block, in_flight)(n, seed=5, epoch=epoch)
        assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(n))


def test_it_is_a_pure_function_of_seed_and_epoch():
    order = block_order()
    torch.manual_seed(0)
    first = order(N, 3, 1)
    torch.manual_seed(1)
    assert torch.equal(order(N, 3, 1), first)
    for other in (order(N, 4, 1), order(N, 3, 2), block_order(in_flight=21)(N, 3, 1)):
        assert not torch.equal(other, first)


def test_blocks_are_of_storage():
    """What lies together is read together; the numbers of the images do not matter."""
    storage = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    stored = block_order(storage_order=storage)(N, 3, 1)
    assert torch.equal(stored, storage[block_order()(N, 3, 1)])


def places_of_blocks(order, block=BLOCK):
    """For each block the positions of its images in the order: [number of blocks, BLOCK]."""
    position = torch.empty(N, dtype=torch.int64)
    position[order] = torch.arange(N)
    return position.view(-1, block)


def test_at_any_moment_few_blocks_are_read():
    places = places_of_blocks(block_order()(N, 3, 1))
    span = places.max(1).values - places.min(1).values + 1
    inside = span < N // 2  # the others go round the end of the epoch
    assert inside.sum() >= len(places) - 2 * IN_FLIGHT
    # A block is spread over the places of IN_FLIGHT blocks, and a little for the mixing.
    assert span[inside].max() < 1.25 * IN_FLIGHT * BLOCK
    # Negative control: in a uniform order every block is spread over everything.
    uniform = places_of_blocks(epoch_order(N, 3, 1))
    assert (uniform.max(1).values - uniform.min(1).values > 0.8 * N).all()


def test_blocks_begin_one_after_another_not_in_bursts():
    """Between two places a block's length apart, about one block is begun."""
    starts = places_of_blocks(block_order()(N, 3, 1)).min(1).values
    begun = torch.bincount(starts // (10 * BLOCK), minlength=N // (10 * BLOCK))
    # The first places hold what goes round the end of the epoch, which the last ones lack.
    assert begun[0] >= 10 + IN_FLIGHT // 2
    assert begun[1:-3].min() >= 8 and begun[1:-3].max() <= 12


def batches(order):
    return order[: N // BATCH * BATCH].view(-1, BATCH)


def repeated_mates(orders) -> float:
    """Chance that two images of a batch are together again in the next epoch."""
    position = torch.empty(N, dtype=torch.int64)
    position[orders[1]] = torch.arange(N)
    again = position[batches(orders[0])] // BATCH
    pairs = sum((torch.bincount(row) ** 2).sum().item() - BATCH for row in again)
    return pairs / (len(again) * BATCH * (BATCH - 1))


def test_what_it_costs_in_randomness():
    """The table of docs/PACKED_DATA.md, small."""
    order = block_order()
    blocks, uniform = [order(N, 3, e) for e in (0, 1)], [epoch_order(N, 3, e) for e in (0, 1)]
    # An image's place is as free as in a uniform order: it moves by a third of all places.
    for orders in (blocks, uniform):
        place = [torch.argsort(o) for o in orders]
        moved = (place[0] - place[1]).abs().float().mean().item() / N
        assert moved == pytest.approx(1 / 3, abs=0.02)
    # A batch holds images of about all blocks in flight.
    held = [len(set((batch // BLOCK).tolist())) for batch in batches(blocks[0])]
    assert IN_FLIGHT <= sum(held) / len(held) <= 1.5 * IN_FLIGHT
    # Images that lie together meet more often; in all, a pair meets again a few times as often.
    chance = BATCH / N
    assert repeated_mates(uniform) == pytest.approx(chance, rel=0.15)
    assert 1.5 * chance < repeated_mates(blocks) < 2 / IN_FLIGHT**2 + chance
    # With every block in flight nothing is left of that.
    whole = block_order(in_flight=N // BLOCK)
    assert repeated_mates([whole(N, 3, e) for e in (0, 1)]) == pytest.approx(chance, rel=0.15)


def stream(**changes):
    arguments = dict(
        num_images=203, global_batch=8, rank=0, world_size=1, seed=7, first_step=0, last_step=60,
        order=block_order(203, 10, 4),
    )  # fmt: skip
    return EpochStream(**{**arguments, **changes})


def test_world_size_and_resuming_change_no_batch():
    alone = list(stream())
    assert alone != list(stream(order=epoch_order))
    ranks = [list(stream(rank=r, world_size=4)) for r in range(4)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == alone
    for first in (1, 24, 25, 26, 59):
        assert list(stream(first_step=first)) == alone[first:]


def test_sizes_below_one_are_refused():
    for changes in ({"block": 0}, {"in_flight": 0}):
        with pytest.raises(ConfigError, match="allowed: 1 or more"):
            block_order(**changes)
