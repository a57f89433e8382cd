"""The compiled norm of many tensors; and linear layers by the 1x1 convolution's kernels."""

import pytest
import torch
import torch.nn as nn

from moco.kernels.choose import use_kernels_
from moco.kernels.gradient_norm import total_norm
from moco.models.heads import Linear


@pytest.mark.parametrize("threads", [1, 3])
def test_equals_float64(threads):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (4096,), (4097,), (64, 32, 3, 3), (0,), (300_001,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    try:
        found = total_norm(tensors)
        assert torch.equal(found, total_norm(tensors))
        assert total_norm([]) == 0
    finally:
        torch.set_num_threads(1)
    exact = torch.cat([t.double().flatten() for t in tensors]).norm()
    assert abs(found - exact) < 1e-6 * exact
    assert abs(total_norm(tensors[:-1]) - exact) > 0.1 * exact


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_anywhere(value):
    for place in (0, 5000, -1):
        tensors = [torch.ones(7), torch.ones(9000)]
        tensors[1][place] = value
        assert not total_norm(tensors).isfinite()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_float64(dtype, bias):
    torch.manual_seed(0)
    layer, exact = Linear(96, 64, bias=bias), nn.Linear(96, 64, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    exact.weight.data = layer.weight.detach().to(dtype).double()
    assert use_kernels_(layer) == 1
    x = torch.randn(13, 96).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    x64 = x.detach().double().requires_grad_()
    y64 = exact(x64)
    y64.backward(upstream.double())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    pairs = [(y, y64), (x.grad, x64.grad), (layer.weight.grad, exact.weight.grad)]
    for ours, expected in pairs + ([(layer.bias.grad, exact.bias.grad)] if bias else []):
        assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (layer.weight.grad.double() - exact.weight.grad).abs().max() < 1e-5  # never rounded


def test_linear_is_torchs_where_there_is_no_kernel():
    for width, mode in ((96, False), (40, True)):
        layer = Linear(width, 64)
        use_kernels_(layer)
        layer.train(mode)
        x = torch.randn(3, width)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), expected)
    assert list(Linear(4, 2).state_dict()) == list(nn.Linear(4, 2).state_dict())
