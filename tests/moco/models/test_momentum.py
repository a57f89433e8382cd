"""The moving average in both forms, and split batch norm in both memory orders."""

import copy

import pytest
import torch
import torch.nn as nn

from moco.models.momentum import ema_update_, init_key_encoder_
from moco.models.norm import SplitBatchNorm2d


def networks():
    torch.manual_seed(0)
    query = nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50), nn.Linear(31, 17))
    key = copy.deepcopy(query)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.normal_()
    return key, query


@pytest.mark.parametrize("momentum", [0.999, 0.99, 0.5, 0.0])
def test_many_tensors_at_once_are_the_loops_bits(momentum):
    key, query = networks()
    looped = copy.deepcopy(key)
    for _ in range(3):
        for a, b in zip(looped.parameters(), query.parameters(), strict=True):
            a.data = a.data * momentum + b.data * (1.0 - momentum)
        ema_update_(key, query, momentum)
    pairs = list(zip(key.parameters(), looped.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_pass_rounds_less():
    """Against float64. Negative control: it is not the reference's form, bit for bit."""
    key, query = networks()
    exact, three_passes = copy.deepcopy(key).double(), copy.deepcopy(key)
    for _ in range(20):
        ema_update_(key, query, 0.999, fused=True)
        ema_update_(three_passes, query, 0.999)
        ema_update_(exact, copy.deepcopy(query).double(), 0.999)

    def error(network):
        pairs = zip(network.parameters(), exact.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert error(key) < 1e-6
    pairs = zip(key.parameters(), three_passes.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_parameter_stays(fused):
    key, query = networks()
    init_key_encoder_(key, query)
    query[0].requires_grad_(False)
    before = key[0].weight.clone()
    with torch.no_grad():
        query[0].weight.add_(1.0)
    ema_update_(key, query, 0.9, fused=fused)
    assert torch.equal(key[0].weight, before)


def test_split_batch_norm_keeps_the_memory_order():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 4)
    norms = [SplitBatchNorm2d(6, num_splits=4) for _ in range(2)]
    first = norms[0](x)
    last = norms[1](x.to(memory_format=torch.channels_last))
    assert first.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var)
