"""The compiled moving average of many tensors."""

import copy

import pytest
import torch

from moco.kernels.choose import use_kernels_
from moco.kernels.moving_average import move_, suits
from moco.models import momentum
from moco.models.backbone import build_backbone
from moco.models.momentum import ema_update_

SHAPES = [(1,), (4096,), (4097,), (64, 32, 3, 3), (0,), (300_001,)]


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2)
    )
    for tensors in (keys, queries):
        tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return keys, queries


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weight", [0.001, 0.0, 1.0, 0.7])
def test_equals_float64(threads, weight):
    keys, queries = pair()
    exact = [k.double() + weight * (q.double() - k.double()) for k, q in pair_of(keys, queries)]
    kept = copy.deepcopy(queries)
    torch.set_num_threads(threads)
    try:
        move_(keys, queries, weight)
    finally:
        torch.set_num_threads(1)
    for key, expected in pair_of(keys, exact):
        torch.testing.assert_close(key.double(), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(*both) for both in pair_of(queries, kept))
    if weight:  # negative control
        move_(keys, queries, weight)
        assert weight == 1 or not torch.allclose(keys[5].double(), exact[5], rtol=0, atol=1e-6)


def pair_of(a, b):
    return zip(a, b, strict=True)


def test_only_float32_in_one_memory_order():
    keys, queries = pair()
    assert suits(keys, queries)
    assert not suits(keys[3:4], [queries[3].contiguous()])
    assert not suits([keys[0].double()], queries[:1])


@pytest.mark.parametrize("compiled", [True, False])
def test_an_encoder_by_the_kernel_where_it_was_chosen(compiled, monkeypatch):
    torch.manual_seed(0)
    query, key = (build_backbone("resnet18", num_classes=8, width=0.25) for _ in range(2))
    expected = copy.deepcopy(key)
    ema_update_(expected, query, 0.99, fused=True)
    called = []
    monkeypatch.setattr(momentum, "move_", lambda *a: (called.append(1), move_(*a)))
    use_kernels_(query)
    ema_update_(key, query, 0.99, fused=True, compiled=compiled)
    assert called == [1] * compiled
    for found, param in pair_of(key.parameters(), expected.parameters()):
        torch.testing.assert_close(found, param, rtol=0, atol=1e-6)
