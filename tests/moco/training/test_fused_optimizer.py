"""torch's one-pass optimizers: the same numbers, and the choice survives a loaded state."""

import copy

import pytest
import tiny
import torch
import torch.nn as nn

from moco.training.optimizer import build_optimizer


def steps(cfg, network, num_steps=4):
    optimizer = build_optimizer(cfg, network)
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_numbers_up_to_rounding(optimizer):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(40, 30))
    other, moved = copy.deepcopy(network), copy.deepcopy(network)
    changes = {"TRAIN__OPTIMIZER": optimizer, "TRAIN__LR": 0.01}
    fused = steps(tiny.config(**changes), network)
    plain = steps(tiny.config(**changes, TRAIN__REFERENCE=True), other)
    steps(tiny.config(**changes, TRAIN__WEIGHT_DECAY=0.02), moved)
    assert fused.param_groups[0]["fused"] is True and plain.param_groups[0]["fused"] is None
    pairs = list(zip(network.parameters(), other.parameters(), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # Negative control: another weight decay is seen.
    pairs = zip(moved.parameters(), other.parameters(), strict=True)
    assert not all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("saved_by_reference", [True, False])
def test_a_loaded_state_does_not_bring_its_choice(saved_by_reference):
    network = nn.Linear(3, 2)
    saved = steps(tiny.config(TRAIN__REFERENCE=saved_by_reference), network).state_dict()
    cfg = tiny.config(TRAIN__REFERENCE=not saved_by_reference)
    optimizer = build_optimizer(cfg, network)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fused"] is (True if saved_by_reference else None)
    buffer = optimizer.state[network.weight]["momentum_buffer"].clone()
    network.weight.grad, network.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    expected = 0.9 * buffer + 1 + 1e-4 * network.weight  # but for the weight's own move
    torch.testing.assert_close(
        optimizer.state[network.weight]["momentum_buffer"], expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_memory_orders_may_differ(optimizer):
    """Weights channels last; state saved channels first; gradients either way."""
    changes = {"TRAIN__OPTIMIZER": optimizer, "TRAIN__LR": 0.01}
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3)
    reference = build_optimizer(tiny.config(**changes, TRAIN__REFERENCE=True), plain)
    for parameter in plain.parameters():
        parameter.grad = torch.randn_like(parameter)
    reference.step()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fused = build_optimizer(tiny.config(**changes), last)
    fused.load_state_dict(copy.deepcopy(reference.state_dict()))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for a, b in zip(plain.parameters(), last.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
            if b.dim() == 4:
                b.grad = b.grad.to(memory_format=memory_format)
        reference.step()
        fused.step()
        assert last.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last.weight, plain.weight, rtol=1e-6, atol=1e-6)
    # Negative control: what torch's kernel makes of a gradient in another order.
    last.weight.grad, last.bias.grad = plain.weight.grad.clone(), plain.bias.grad.clone()
    fused._optimizer_step_pre_hooks.clear()
    reference.step()
    if optimizer == "sgd":  # the same call, without our views
        buffer = fused.state[last.weight]["momentum_buffer"]
        torch._fused_sgd_(
            [last.weight.detach()], [last.weight.grad], [buffer], weight_decay=1e-4, momentum=0.9,
            lr=0.01, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
    else:
        fused.step()
    assert not torch.allclose(last.weight, plain.weight, rtol=1e-6, atol=1e-6)


def test_gpu_updates_can_be_left_out_by_the_device():
    """The attribute by which `StepGuard` knows that `found_inf` is obeyed."""
    network = nn.Linear(3, 2)
    fused = build_optimizer(tiny.config(), network)
    plain = build_optimizer(tiny.config(TRAIN__REFERENCE=True), network)
    assert getattr(fused, "_step_supports_amp_scaling", False)
    assert not getattr(plain, "_step_supports_amp_scaling", False)
    before = network.weight.detach().clone()
    network.weight.grad, network.bias.grad = torch.ones(2, 3), torch.ones(2)
    fused.found_inf = torch.ones(())
    fused.step()
    assert torch.equal(network.weight, before)
