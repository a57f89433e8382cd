"""The benchmark's baseline computes what TRAIN.REFERENCE does, to the last bit.

TRAIN.REFERENCE is bitwise the public code (tests/parity/test_moco_vs_reference.py), and so is this.
"""

import pytest
import tiny
import torch

from moco.benchmarks.reference_step import ReferenceStep
from moco.data.augment import normalize
from moco.methods import build_method
from moco.seeding import torch_generator
from moco.training.acceleration import resolve
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step

NUM_STEPS = 3
CASES = {
    "split batch norm, CIFAR stem": {"MODEL__BN_SPLITS": 2, "MODEL__HEAD": "linear"},
    "torchvision's network": {"MODEL__STEM": "imagenet", "MODEL__BN_SPLITS": 1,
                              "MODEL__WIDTH": 1.0, "DATA__SIZE": 32},
}  # fmt: skip


def sides(changes, momentum):
    """State of both after NUM_STEPS; loss, top-1 and top-5 of both in each."""
    words = {**changes, "TRAIN__REFERENCE": True, "MOCO__QUEUE_SIZE": 24}
    cfg = resolve(tiny.config(**words), torch.device("cpu")).cfg
    method, baseline = build_method(cfg).train(), ReferenceStep(cfg).train()
    baseline.load_state_dict(method.state_dict())
    optimizer = build_optimizer(cfg, method)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for step in range(NUM_STEPS):
        shape = (2, 8, 3, cfg.DATA.SIZE, cfg.DATA.SIZE)
        views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        result = train_step(
            method, method, optimizer, (*views, torch.arange(8)), step=step, lr=cfg.TRAIN.LR,
            momentum=0.9, cfg=cfg, process=tiny.alone(),
        )  # fmt: skip
        images = [normalize(view, cfg.DATA.MEAN, cfg.DATA.STD) for view in views]
        draws = torch_generator(cfg.SEED, "method-step", step)
        loss, top1, top5 = baseline.step(*images, momentum=momentum, generator=draws)
        found = (result.loss, result.metrics["acc1"], result.metrics["acc5"])
        ours.append([value.item() for value in found])
        theirs.append([loss, top1, top5])
    return method.state_dict(), baseline.state_dict(), ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_bitwise_the_parity_modes(case):
    ours, theirs, our_figures, their_figures = sides(CASES[case], momentum=0.9)
    assert list(ours) == list(theirs) and our_figures == their_figures
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_comparison_sees_another_moving_average():
    ours, theirs, *_ = sides(CASES["split batch norm, CIFAR stem"], momentum=0.8)
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert any(name.startswith("encoder_k.") for name in differing)
