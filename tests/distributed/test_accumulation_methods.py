"""Micro-batches are virtual ranks: W processes with A of them each are W * A processes with one.

Every method whose keys have no gradient, over several steps; and what naive accumulation gives.
"""

import pytest
import torch
from accumulated import VARIANTS, largest_difference, run
from processes import in_processes
from tiny import method_config
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from moco.data.augment import normalize
from moco.distributed import ProcessInfo, data_parallel
from moco.methods import build_method
from moco.methods.base import Method
from moco.seeding import torch_generator
from moco.training.optimizer import build_optimizer
from moco.training.step import StepResult, train_step


def _reductions(rank, parts):
    """How often each bucket of gradients is averaged over the processes in one step."""
    cfg = method_config("moco", MODEL__BN_SPLITS=1, TRAIN__ACCUMULATION_STEPS=parts)
    process, reduced = ProcessInfo(rank, 2, 0, torch.device("cpu")), []
    method = build_method(cfg)
    model = data_parallel(method, process)

    def count(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    views = torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    train_step(
        model, method, build_optimizer(cfg, method), (*views, torch.arange(4)), step=0, lr=0.1,
        momentum=0.9, cfg=cfg, process=process,
    )  # fmt: skip
    return reduced


def _in_two(rank):
    """Each variant in two processes: bitwise case (float32), and 2 x 2 in float64."""
    return {f"reductions, {parts} parts": _reductions(rank, parts) for parts in (1, 2)} | {
        variant: {
            "1 part": run(variant, parts=1, rank=rank, num=2),
            "2 parts": run(variant, parts=2, rank=rank, num=2, double=True),
        }
        for variant in VARIANTS
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(_in_two, tmp_path_factory.mktemp("accumulation"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_of_2_parts_is_two_processes_bitwise(two, variant):
    losses, learned = run(variant, parts=2)
    ranks = [rank[variant]["1 part"] for rank in two]
    assert torch.equal(losses, (ranks[0][0] + ranks[1][0]) / 2)
    for _, there in ranks:
        assert there.keys() == learned.keys()
        differing = [n for n in learned if not torch.equal(learned[n], there[n])]
        assert differing == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_of_4_parts_is_two_of_2_parts(two, variant):
    losses, learned = run(variant, parts=4, double=True)
    ranks = [rank[variant]["2 parts"] for rank in two]
    torch.testing.assert_close(losses, (ranks[0][0] + ranks[1][0]) / 2, rtol=1e-10, atol=1e-12)
    for _, there in ranks:
        assert largest_difference(learned, there) < 1e-8


def test_gradients_travel_once_a_step(two):
    for rank in two:
        once = rank["reductions, 1 parts"]
        assert len(once) == len(set(once)) >= 1
        assert rank["reductions, 2 parts"] == once


@pytest.mark.parametrize("variant", VARIANTS)
def test_negative_control_the_number_of_parts_matters(variant):
    """Batch norm sees other groups, so 4 parts are not 2; nor is one step less the same."""
    _, two_parts = run(variant, parts=2, double=True)
    _, four_parts = run(variant, parts=4, double=True)
    _, shorter = run(variant, parts=2, double=True, num_steps=3)
    assert largest_difference(two_parts, four_parts) > 1e-3
    assert largest_difference(two_parts, shorter) > 1e-3


def naive_step(model, method: Method, optimizer, batch, *, step, lr, momentum, cfg, process):
    """What accumulation usually is: each micro-batch a step of its own but for the optimizer's."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = cfg.TRAIN.ACCUMULATION_STEPS
    generator = torch_generator(cfg.SEED, "method-step", step)
    optimizer.zero_grad()
    losses = []
    inputs = (normalize(batch[0]), normalize(batch[1]), batch[2])
    for view_q, view_k, index in zip(*(t.chunk(parts) for t in inputs), strict=True):
        output = model(view_q, view_k, index, momentum=momentum, generator=generator)
        (output.loss / parts).backward()
        method.after_step(output, index)
        losses.append(output.loss.detach())
    optimizer.step()
    return StepResult(torch.stack(losses).mean(), {})


@pytest.mark.parametrize("variant", ("moco", "moco_symmetric", "moco_v3"))
def test_negative_control_naive_accumulation(two, variant):
    losses, learned = run(variant, parts=2, step_function=naive_step)
    there = two[0][variant]["1 part"][1]
    assert largest_difference(there, learned) > 1e-3
    # With a single part it is the step itself.
    _, naive = run(variant, parts=1, step_function=naive_step)
    _, whole = run(variant, parts=1)
    assert largest_difference(whole, naive) < 1e-6
