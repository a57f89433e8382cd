"""R8: a skipped collective, another sample, one changed bit on one rank: found, and it is named.

Three processes, as of two nobody can say who is right.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import skip_collective
from pretrain_runs import Ranks, arguments, make_images

from moco import lost_rank
from moco.data import two_views
from moco.training import trainer
from moco.training.shares import Shares

pytestmark = pytest.mark.faults
WITHIN = 50  # steps
AT = 7  # the step of the fault


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 24)


def skip(name: str, call: int, odd: int, rank: int) -> None:
    """The odd rank leaves out a call of one of torch.distributed's functions."""
    if rank == odd:
        skip_collective(name, call)


def swap_sample(odd: int, rank: int) -> None:
    """The odd rank reads another image once."""
    batch, count = two_views.TwoViews.batch, 0

    def other(self, keys):
        nonlocal count
        count += 1
        if count == AT:
            epoch, index = keys[0]
            keys = [(epoch, (index + 1) % 24), *keys[1:]]
        return batch(self, keys)

    if rank == odd:
        two_views.TwoViews.batch = other


def flip_bit(part: str, odd: int, rank: int) -> None:
    """One bit of a tensor of the odd rank changes after a step."""

    train_step = trainer.train_step

    def flipping(model, method, optimizer, batch, *, step, **kwargs):
        result = train_step(model, method, optimizer, batch, step=step, **kwargs)
        if step + 1 == AT:
            tensor = method.state_dict().get(part)
            if tensor is None:
                tensor = optimizer.state[next(method.encoder_q.parameters())][part]
            with torch.no_grad():
                tensor.view(torch.uint8).view(-1)[2] ^= 1  # of the mantissa: no rounding undoes it
        return result

    if rank == odd:
        trainer.train_step = flipping


ELSEWHERE = r"error: step \d+: ranks are not at the same collective: rank {} at step \d+, "
GONE = r"error: step \d+: rank \d lost contact with rank {} \(process \d+ is gone\)"
OTHER_IMAGES = r"error: step \d+: images that are not its share were read by rank {} \(\S+ \S+\) s"
DIFFERS = r"error: step \d+: rank {} \(host \S+\) differs from the 2 ranks that agree, in "
FAULTS = {
    "skipped: findings of a step": (partial(skip, "all_reduce", 6), ELSEWHERE),
    "skipped: keys": (partial(skip, "all_gather", 9), ELSEWHERE),
    # gloo ends the process that gets more bytes than it waits for.
    "skipped: images": (partial(skip, "all_to_all_single", 9), f"{GONE}|{ELSEWHERE}"),
    "another sample": (swap_sample, OTHER_IMAGES),
    "bit of a weight": (partial(flip_bit, "encoder_q.layer1.0.conv1.weight"), DIFFERS),
    "bit of the key encoder": (partial(flip_bit, "encoder_k.fc.2.weight"), DIFFERS),
    "bit of the queue": (partial(flip_bit, "queue"), DIFFERS),
    "bit of the momentum": (partial(flip_bit, "momentum_buffer"), DIFFERS),
}


def is_found(images: Path, base: Path, name: str, rank: int, *broken) -> bool:
    """Whether the job ends within 50 steps of the fault, and only that rank is named."""
    fault, pattern = FAULTS[name]
    base.mkdir(parents=True)
    words = arguments(images, base / "run", "--collective-timeout", "4", TRAIN__BATCH_SIZE=6,
                      TRAIN__EPOCHS=16, MODEL__BN_SPLITS=1, MOCO__QUEUE_SIZE=600,
                      CHECKPOINT__PERIOD=16)  # fmt: skip
    ranks = Ranks(words, base / "log", 3, arms=[partial(fault, rank), *broken])
    codes = ranks.join(60)
    said = "\n".join(ranks.output(number) for number in range(3))
    named = [n for n in range(3) if re.search(pattern.replace("{}", str(n)), said)]
    steps = [int(step) for step in re.findall(r"error: step (\d+):", said)]
    return 0 not in codes and named == [rank] and max(steps) <= AT + WITHIN


def test_the_fault_of_one_rank_is_found_and_the_rank_named(images, tmp_path, observed, long):
    cases = [(name, number % 2 + 1) for number, name in enumerate(FAULTS)]
    if long:
        cases += [(name, rank) for name in FAULTS if "skipped" not in name for rank in range(3)]
    failed = [
        (name, rank)
        for number, (name, rank) in enumerate(cases)
        if not is_found(images, tmp_path / str(number), name, rank)
    ]
    assert not failed
    observed("R8", len(cases) - len(failed), len(cases))


def unchecked_shares(rank: int) -> None:
    Shares.check = lambda self, step: None


def unchecked_ranks(rank: int) -> None:
    trainer.check_ranks = lambda *args: None


def unasked_ranks(rank: int) -> None:
    lost_rank._odd_ones = lambda *args: ""


@pytest.mark.parametrize(
    "name, broken",
    [
        ("another sample", unchecked_shares),
        ("bit of the queue", unchecked_ranks),
        ("skipped: keys", unasked_ranks),
    ],
)
def test_control_without_its_check_the_rank_is_not_named(images, tmp_path, name, broken, observed):
    found = is_found(images, tmp_path / "a", name, 1, broken)
    observed("R8", int(not found), 1, control=True)
