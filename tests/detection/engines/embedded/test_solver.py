from __future__ import annotations

import math

import pytest
import torch

from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.solver import build_optimizer, clip_gradients_, lr_at, set_lr
from moco.errors import ConfigError

VOC_24K = {
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.STEPS": (18000, 22000),
    "SOLVER.WARMUP_ITERS": 100,
}


def config(**changes):
    settings = {**VOC_24K, **{f"SOLVER.{key}": value for key, value in changes.items()}}
    return load_detection_config(None, [item for pair in settings.items() for item in pair])


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.02 * 0.001),
        (50, 0.02 * (0.5 + 0.5 * 0.001)),
        (100, 0.02),
        (17999, 0.02),
        (18000, 0.002),
        (21999, 0.002),
        (22000, 0.0002),
        (23999, 0.0002),
    ],
)
def test_warm_up_and_steps_of_the_24k_schedule(iteration, expected):
    assert lr_at(config(), iteration) == pytest.approx(expected, rel=1e-12)


def test_constant_warm_up_and_cosine():
    cfg = config(WARMUP_METHOD="constant", WARMUP_FACTOR=0.1)
    assert lr_at(cfg, 99) == pytest.approx(0.002)
    cfg = config(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR_END=0.002)
    # Half way: 0.002 + (0.02 - 0.002) / 2
    assert lr_at(cfg, 12000) == pytest.approx(0.011)
    assert lr_at(cfg, 6000) == pytest.approx(0.002 + 0.018 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.filterwarnings("ignore:.*lie beyond SOLVER.MAX_ITER")
def test_steps_beyond_the_end_do_nothing():
    cfg = config(MAX_ITER=200)
    assert lr_at(cfg, 199) == pytest.approx(0.02)


def test_a_step_at_the_end_is_refused():
    with pytest.raises(ConfigError, match="MAX_ITER 22000 and STEPS"):
        lr_at(config(MAX_ITER=22000), 0)


def test_groups_decay_weights_and_biases_but_no_norms():
    cfg = load_detection_config(None, ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0])
    with torch.device("meta"):
        model = build_model(cfg)
    decayed, undecayed = build_optimizer(cfg, model).param_groups
    # 52 convolutions + (3 RPN layers + 2 predictors) x (weight, bias); 52 norms x 2; the
    # extra norm of MoCo's head makes 106.
    assert (len(decayed["params"]), decayed["weight_decay"]) == (63, 1e-4)
    assert (len(undecayed["params"]), undecayed["weight_decay"]) == (106, 0.0)
    assert decayed["momentum"] == 0.9 and not decayed["nesterov"]


def test_bias_rules_and_set_lr():
    cfg = config(BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.5, WEIGHT_DECAY_NORM=0.25)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    model.append(torch.nn.Linear(1, 1).requires_grad_(False))
    optimizer = build_optimizer(cfg, model)
    rules = {
        (group["initial_lr"], group["weight_decay"]): len(group["params"])
        for group in optimizer.param_groups
    }
    # conv weight; both biases; norm weight. The frozen linear layer is in no group.
    assert rules == {(0.02, 1e-4): 1, (0.04, 0.5): 2, (0.02, 0.25): 1}
    set_lr(optimizer, cfg, 18000)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.002, 0.004, 0.002])


def test_a_step_worked_by_hand():
    cfg = config(WARMUP_ITERS=0, WEIGHT_DECAY=0.1, MOMENTUM=0.5)
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(cfg, layer)
    weight = 2.0
    velocity = 0.0
    for iteration in range(3):
        set_lr(optimizer, cfg, iteration)
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        velocity = 0.5 * velocity + 1.0 + 0.1 * weight
        weight -= 0.02 * velocity
    assert layer.weight.item() == pytest.approx(weight)


@pytest.mark.parametrize(
    "clip_type, norm_type, expected",
    [
        ("value", 2.0, ([1.0, -1.0], [0.5])),
        ("norm", 2.0, ([0.6, -0.8], [0.5])),  # of (3, -4): 5
        ("norm", 1.0, ([3 / 7, -4 / 7], [0.5])),
        (None, 2.0, ([3.0, -4.0], [0.5])),
    ],
)
def test_gradients_are_clipped_by_value_or_norm_each_parameter_apart(
    clip_type, norm_type, expected
):
    keys = {"ENABLED": clip_type is not None, "CLIP_TYPE": clip_type or "norm"}
    keys |= {"CLIP_VALUE": 1.0, "NORM_TYPE": norm_type}
    cfg = config(**{f"CLIP_GRADIENTS.{key}": value for key, value in keys.items()})
    layers = torch.nn.Sequential(*(torch.nn.Linear(size, 1, bias=False) for size in (2, 1)))
    layers[0].weight.grad = torch.tensor([[3.0, -4.0]])
    layers[1].weight.grad = torch.tensor([[0.5]])
    optimizer = build_optimizer(cfg, layers)
    clip_gradients_(optimizer, cfg)
    for layer, wanted in zip(layers, expected, strict=True):
        assert layer.weight.grad.flatten().tolist() == pytest.approx(wanted, rel=1e-5)
