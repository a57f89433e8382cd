"""Batch shuffle by all-to-all: the plan alone for 1 to 64 ranks, then bitwise against gather-all in
gloo processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from processes import in_processes

from moco import distributed
from moco.benchmarks.communication import gather_all_shuffle, gather_all_unshuffle
from moco.models.backbone import build_backbone
from moco.shuffle import exchange_plan


def draw(num: int, seed: int) -> torch.Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def deliver(plans, share):
    """What each rank holds after all plans are carried out on images numbered globally."""
    world = len(plans)
    boxes = []  # boxes[sender][receiver]
    for sender, plan in enumerate(plans):
        assert sum(plan.send_counts) == sum(plan.receive_counts) == share
        rows = plan.rows_to_send + sender * share
        boxes.append(torch.split(rows, plan.send_counts))
    held = []
    for receiver, plan in enumerate(plans):
        parts = [boxes[sender][receiver] for sender in range(world)]
        assert [len(part) for part in parts] == plan.receive_counts
        held.append(torch.cat(parts)[plan.places])
    return torch.cat(held)


@pytest.mark.parametrize("share", [1, 4, 7])
def test_plans_of_1_to_64_ranks_are_gather_all(share):
    for world in range(1, 65):
        for seed in range(3):
            permutation = draw(world * share, seed)
            plans = [exchange_plan(permutation, rank, world) for rank in range(world)]
            assert torch.equal(deliver(plans, share), permutation)
            own = [plan.send_counts[rank] for rank, plan in enumerate(plans)]
            moved = sum(plan.num_from_others(rank) for rank, plan in enumerate(plans))
            assert moved == world * share - sum(own)


@pytest.mark.parametrize("permutation", [torch.arange(12), torch.arange(12).flip(0)], ids=str)
def test_plans_of_orders_that_random_ones_miss(permutation):
    plans = [exchange_plan(permutation, rank, 4) for rank in range(4)]
    assert torch.equal(deliver(plans, 3), permutation)
    if permutation[0] == 0:
        assert all(plan.num_from_others(rank) == 0 for rank, plan in enumerate(plans))


@pytest.mark.parametrize("field", ["rows_to_send", "places"])
def test_negative_control_a_wrong_plan_is_another_order(field):
    permutation = draw(24, 0)
    plans = [exchange_plan(permutation, rank, 4) for rank in range(4)]
    wrong = getattr(plans[2], field)[[1, 0, 2, 3, 4, 5]]
    plans[2] = dataclasses.replace(plans[2], **{field: wrong})
    assert not torch.equal(deliver(plans, 6), permutation)


def test_images_that_do_not_divide_among_the_ranks_are_refused():
    with pytest.raises(AssertionError, match="10 images over 4 ranks"):
        exchange_plan(torch.arange(10), 0, 4)


# In processes. 6 images each, so that counts are uneven.

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)


def images_of(rank, dtype):
    draws = torch.Generator().manual_seed(rank)
    return (torch.randn(6, 3, 5, 4, generator=draws) * 50).to(dtype)


def _same(a, b):
    """Bitwise, with type and memory format."""
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def _network_agrees(rank, permutation):
    """Whether features under autocast are bitwise those of images gathered in float32."""
    torch.manual_seed(0)
    network = build_backbone("resnet18", num_classes=8, width=0.125, stem="cifar")
    images = images_of(rank, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        features = network(distributed.batch_shuffle(images, permutation))
        return _same(features, network(gather_all_shuffle(images, permutation)))


def _every_case(rank):
    world = distributed.world_size()
    found = {}
    for seed in range(4):
        permutation = draw(6 * world, seed)
        for dtype in TYPES:
            for format_ in (torch.contiguous_format, torch.channels_last):
                images = images_of(rank, dtype).to(memory_format=format_)
                expected = gather_all_shuffle(images, permutation)
                shuffled = distributed.batch_shuffle(images, permutation)
                name = f"{dtype} {format_} {seed}"
                found[name] = _same(shuffled, expected)
                found[f"{name} kept"] = shuffled.is_contiguous(memory_format=format_)
                # Micro-batches of two: cut after the exchange, what virtual ranks would hold.
                virtual = gather_all_shuffle(images, permutation).chunk(3)
                found[f"{name} cut"] = all(map(_same, shuffled.chunk(3), virtual))
                keys = shuffled.float().flatten(1)[:, :8]
                restored = distributed.batch_unshuffle(keys, permutation)
                found[f"{name} back"] = _same(restored, gather_all_unshuffle(keys, permutation))
                found[f"{name} own"] = torch.equal(restored, images.float().flatten(1)[:, :8])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shuffled = distributed.batch_shuffle(images_of(rank, torch.float32), permutation)
            keys = distributed.batch_unshuffle(torch.ones(6, 8), permutation)
        expected = gather_all_shuffle(images_of(rank, torch.float32).bfloat16(), permutation)
        found[f"autocast {seed}"] = _same(shuffled, expected)
        found[f"autocast keys {seed}"] = keys.dtype == torch.float32
        found[f"autocast network {seed}"] = _network_agrees(rank, permutation)
        other = gather_all_shuffle(images_of(rank, torch.float32), draw(6 * world, seed + 9))
        found[f"control {seed}"] = not torch.equal(shuffled.float(), other)
    return found


@pytest.mark.parametrize("num", [1, 2, 4])
def test_bitwise_what_gather_all_gives(tmp_path, num):
    for found in in_processes(_every_case, tmp_path, num=num):
        assert len(found) == 4 * (4 * 2 * 5 + 4)
        assert [name for name, good in found.items() if not good] == []


def _wrong_plan(rank):
    """Rank 1 sends two of its images in each other's place."""
    plan_of = distributed.exchange_plan

    def wrong(permutation, rank, world_size):
        plan = plan_of(permutation, rank, world_size)
        swapped = plan.rows_to_send[[5, 1, 2, 3, 4, 0]]
        return dataclasses.replace(plan, rows_to_send=swapped) if rank == 1 else plan

    distributed.exchange_plan = wrong
    images, permutation = images_of(rank, torch.float32), draw(12, 0)
    shuffled = distributed.batch_shuffle(images, permutation)
    return torch.equal(shuffled, gather_all_shuffle(images, permutation))


def test_negative_control_a_wrong_plan_is_noticed_in_processes(tmp_path):
    assert not all(in_processes(_wrong_plan, tmp_path))
