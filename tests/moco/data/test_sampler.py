from __future__ import annotations

import itertools

import pytest

from moco.data.sampler import EpochStream
from moco.errors import ConfigError


def stream(**changes):
    arguments = dict(
        num_images=23, global_batch=4, rank=0, world_size=1, seed=7, first_step=0, last_step=10
    )
    return EpochStream(**{**arguments, **changes})


def test_each_epoch_covers_its_images_once_and_drops_the_rest():
    steps = list(stream(num_images=24))
    assert len(steps) == len(stream()) == 10 and stream().steps_per_epoch == 5
    first_epoch = list(itertools.chain(*steps[:6]))
    assert sorted(first_epoch) == [(0, index) for index in range(24)]
    assert {epoch for keys in steps[6:] for epoch, _ in keys} == {1}
    dropped = list(itertools.chain(*list(stream())[:5]))
    assert len(set(dropped)) == 20 and {epoch for epoch, _ in dropped} == {0}


def test_order_depends_on_epoch_and_seed():
    steps = list(stream())
    first, second = ([i for keys in part for _, i in keys] for part in (steps[:5], steps[5:]))
    assert first != second
    assert list(stream(seed=8)) != steps
    assert list(stream()) == steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_changes_no_global_batch(world_size):
    alone = list(stream())
    ranks = [list(stream(rank=r, world_size=world_size)) for r in range(world_size)]
    joined = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert joined == alone
    ranks_swapped = [list(itertools.chain(*parts)) for parts in zip(*ranks[::-1], strict=True)]
    assert ranks_swapped != alone


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 7, 10])
def test_starting_in_the_middle_gives_the_tail(first_step):
    tail = list(stream(first_step=first_step))
    assert tail == list(stream())[first_step:]
    assert len(stream(first_step=first_step)) == len(tail)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"global_batch": 24}, ("24", "23 images", "1 processes")),
        ({"global_batch": 6, "world_size": 4}, ("6", "23 images", "4 processes", "multiple of 4")),
        ({"global_batch": 0}, ("0", "23 images")),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes, numbers):
    with pytest.raises(ConfigError) as caught:
        stream(**changes)
    message = str(caught.value)
    assert "\n" not in message and all(number in message for number in numbers)
