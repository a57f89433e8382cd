"""LARS by hand and against SGD; which optimizer a configuration gets."""

import math

import pytest
import tiny
import torch

from moco.methods import build_method
from moco.training.optimizer import LARS, FusedSGD, build_optimizer

LARS_OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def stepped(optimizer_class, start, gradients, **options):
    weight = torch.nn.Parameter(start.clone())
    optimizer = optimizer_class([weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


def test_two_steps_by_hand():
    start = torch.tensor([[3.0, 4.0]])
    gradients = [torch.tensor([[0.7, -0.4]]), torch.tensor([[0.0, 1.0]])]
    weight, _ = stepped(LARS, start, gradients, **LARS_OPTIONS)
    # d = (0.7, -0.4) + 0.1 (3, 4) = (1, 0); ratio 0.001 * 5 / 1; buffer (0.005, 0); w - 0.5 buffer
    first = [3.0 - 0.0025, 4.0]
    d = [0.1 * first[0], 1.0 + 0.1 * first[1]]
    ratio = 0.001 * math.hypot(*first) / math.hypot(*d)
    buffer = [0.9 * 0.005 + ratio * d[0], ratio * d[1]]
    expected = [first[0] - 0.5 * buffer[0], first[1] - 0.5 * buffer[1]]
    torch.testing.assert_close(weight[0], torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_step_does_not_depend_on_the_gradients_size():
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 3), torch.randn(4, 3)
    options = {**LARS_OPTIONS, "weight_decay": 0.0}
    small, large = (stepped(LARS, start, [gradient * s], **options)[0] for s in (1e-3, 1e3))
    torch.testing.assert_close(small, large)
    step = (small - start).norm() / start.norm()
    assert step.item() == pytest.approx(0.5 * 0.001, rel=1e-3)
    plain = [stepped(torch.optim.SGD, start, [gradient * s], lr=0.5)[0] for s in (1e-3, 1e3)]
    assert not torch.allclose(*plain)  # negative control


def test_one_dimension_is_sgd_without_decay():
    torch.manual_seed(0)
    start, gradients = torch.randn(5), [torch.randn(5) for _ in range(3)]
    ours, _ = stepped(LARS, start, gradients, **LARS_OPTIONS)
    sgd, _ = stepped(torch.optim.SGD, start, gradients, lr=0.5, momentum=0.9)
    torch.testing.assert_close(ours, sgd)
    decayed, _ = stepped(torch.optim.SGD, start, gradients, lr=0.5, momentum=0.9, weight_decay=0.1)
    assert not torch.allclose(ours, decayed)


@pytest.mark.parametrize("start", [torch.zeros(2, 2), torch.ones(2, 2)])
def test_a_norm_of_zero_leaves_the_gradient_unscaled(start):
    gradient = torch.full((2, 2), 0.25) if not start.any() else torch.zeros(2, 2)
    weight, _ = stepped(LARS, start, [gradient], lr=1.0, momentum=0.0, weight_decay=0.0)
    assert torch.equal(weight, start - gradient)


def test_state_resumes_and_a_missing_gradient_is_left_alone():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 3), [torch.randn(3, 3) for _ in range(4)]
    whole, _ = stepped(LARS, start, gradients, **LARS_OPTIONS)
    half, optimizer = stepped(LARS, start, gradients[:2], **LARS_OPTIONS)
    weight, frozen = torch.nn.Parameter(half.clone()), torch.nn.Parameter(torch.ones(2, 2))
    resumed = LARS([weight], **LARS_OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.add_param_group({"params": [frozen]})
    for gradient in gradients[2:]:
        weight.grad = gradient.clone()
        resumed.step()
    assert torch.equal(weight, whole)
    assert torch.equal(frozen, torch.ones(2, 2)) and frozen not in resumed.state


@pytest.mark.parametrize(
    "name, kind", [("sgd", FusedSGD), ("lars", LARS), ("adamw", torch.optim.AdamW)]
)
def test_configuration_chooses_the_optimizer_over_all_parameters(name, kind):
    cfg = tiny.config(TRAIN__OPTIMIZER=name, TRAIN__LR=0.25, TRAIN__WEIGHT_DECAY=0.125)
    method = build_method(cfg)
    optimizer = build_optimizer(cfg, method)
    assert type(optimizer) is kind
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
    assert group["params"] == list(method.parameters())
