"""A residual block as one function against its layers one by one, and against float64."""

import copy

import pytest
import torch

from moco.kernels import residual
from moco.kernels.choose import use_kernels_
from moco.models.backbone import build_backbone

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}  # of the norm; ReLUs at a kink flip


def block(arch, stage, number, bn_splits=1):
    torch.manual_seed(0)
    network = build_backbone(arch, num_classes=32, width=0.5, bn_splits=bn_splits)
    made = getattr(network, f"layer{stage}")[number].to(memory_format=torch.channels_last)
    with torch.no_grad():  # so that no ReLU stands at a kink for all
        for name, parameter in made.named_parameters():
            if "bn" in name or "downsample.1" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape))
    return made


def channels_in(made):
    return made.conv1.in_channels


def run(made, x, upstream=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = made(x * 1)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    y.backward(upstream)
    seen = {"y": y.detach(), "dx": x.grad}
    seen |= {f"gradient of {n}": p.grad for n, p in made.named_parameters()}
    seen |= {n: b for n, b in made.named_buffers()}
    return seen, upstream


def worst(ours, expected):
    return {
        n: ((ours[n].double() - e).norm() / e.norm()).item()
        for n, e in ((n, e.double()) for n, e in expected.items())
    }


BLOCKS = [
    ("resnet50", 1, 0),  # a downsample without stride
    ("resnet50", 1, 1),
    ("resnet50", 2, 0),  # stride 2
    ("resnet18", 1, 1),
    ("resnet18", 2, 0),
]


@pytest.mark.parametrize("where", BLOCKS, ids=str)
@pytest.mark.parametrize("bn_splits", [1, 2])
def test_equals_the_layers_one_by_one_in_float64(where, bn_splits, dtype, monkeypatch):
    made = block(*where, bn_splits)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, channels_in(made), 9, 9, generator=generator).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    used, function = [], residual.residual
    monkeypatch.setattr(residual, "residual", lambda *a: (used.append(1), function(*a))[1])
    exact, plain, fast = copy.deepcopy(made).double(), copy.deepcopy(made), made
    if dtype == torch.bfloat16:  # the weights that the products see
        for name, parameter in exact.named_parameters():
            if parameter.dim() == 4:
                parameter.data = dict(made.named_parameters())[name].to(dtype).double()
    use_kernels_(fast)
    ours, upstream = run(fast, x)
    assert used == [1]
    expected, _ = run(exact, x.double(), upstream.double())
    rounding = worst(run(plain, x, upstream)[0], expected)
    found = worst(ours, expected)
    assert used == [1], "the plain block has no kernels"
    assert max(found.values()) < TOLERANCE[dtype], found
    # As near as torch's own rounding, or nearer.
    assert max(found.values()) < 1.25 * max(rounding.values()) + 1e-6, (found, rounding)
    # Negative control: images in another order.
    other, _ = run(copy.deepcopy(exact), x.double().flip(0), upstream.double())
    assert max(worst(other, expected).values()) > 0.05


def test_gradients_from_above_are_left_alone():
    """Another user of the output may have the same tensor."""
    made = block("resnet50", 2, 0)
    use_kernels_(made)
    x = torch.randn(4, channels_in(made), 6, 6).to(memory_format=torch.channels_last)
    y = made(x.requires_grad_() * 1)
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, kept)


def test_frozen_weights_and_inputs_get_no_gradient():
    made = block("resnet18", 2, 0)
    use_kernels_(made)
    made.conv1.weight.requires_grad_(False)
    x = torch.randn(4, channels_in(made), 6, 6)
    made(x).sum().backward()
    assert made.conv1.weight.grad is None and made.conv2.weight.grad is not None


def test_again_with_a_kept_graph_and_never_a_freed_one():
    made = block("resnet50", 1, 0)
    use_kernels_(made)
    x = torch.randn(4, channels_in(made), 6, 6).requires_grad_()
    y = made(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("where", BLOCKS, ids=str)
def test_without_gradient_the_same_values(where, dtype):
    made = block(*where)
    use_kernels_(made)
    x = torch.randn(4, channels_in(made), 6, 6).to(dtype)
    kept = x.clone()
    expected, _ = run(copy.deepcopy(made), x)
    with torch.inference_mode(), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        assert torch.equal(made(x), expected["y"])
    assert torch.equal(x, kept)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in made.named_buffers())


@pytest.mark.parametrize("where", BLOCKS, ids=str)
def test_evaluation_by_kernels_where_it_was_asked_for(where, dtype, monkeypatch):
    made = block(*where, bn_splits=2)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand(buffer.shape))
    made.eval()
    buffers = copy.deepcopy(dict(made.named_buffers()))
    x = torch.randn(3, channels_in(made), 9, 9).to(dtype).to(memory_format=torch.channels_last)
    exact, plain = copy.deepcopy(made).double(), copy.deepcopy(made)
    use_kernels_(made, evaluation=True)
    used, function = [], residual.residual
    monkeypatch.setattr(residual, "residual", lambda *a: (used.append(1), function(*a))[1])
    with torch.no_grad():
        expected = {"y": exact(x.double())}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours, rounding = {"y": made(x)}, {"y": plain(x)}
            other = {"y": made(x.flip(0))}
    assert used == [1, 1]
    found, torchs = worst(ours, expected)["y"], worst(rounding, expected)["y"]
    assert found < 1.25 * torchs + 1e-6, (found, torchs)
    assert worst(other, expected)["y"] > 0.05  # negative control
    assert all(torch.equal(b, buffers[name]) for name, b in made.named_buffers())


def test_a_hook_on_any_layer_is_called():
    made, seen = block("resnet50", 2, 0), []
    use_kernels_(made)
    handle = made.downsample[1].register_forward_pre_hook(lambda *_: seen.append(1))
    x = torch.randn(4, channels_in(made), 6, 6)
    with_hook, _ = run(copy.deepcopy(made), x, torch.ones(4, 256, 3, 3))
    assert seen == [1]
    handle.remove()
    without, _ = run(made, x, torch.ones(4, 256, 3, 3))
    assert seen == [1]
    assert max(worst(without, with_hook).values()) < TOLERANCE[torch.float32]


def test_two_passes_before_their_gradients():
    """Each keeps its own tensors, as a loss of two views needs it."""
    made = block("resnet50", 2, 0)
    use_kernels_(made)
    first, second = (torch.randn(4, channels_in(made), 6, 6) for _ in range(2))
    alone = [run(copy.deepcopy(made), x, torch.ones(4, 256, 3, 3))[0] for x in (first, second)]
    inputs = [x.clone().requires_grad_() for x in (first, second)]
    outputs = [made(x) for x in inputs]
    (outputs[0].sum() + outputs[1].sum()).backward()
    for x, expected in zip(inputs, alone, strict=True):
        torch.testing.assert_close(x.grad, expected["dx"], rtol=1e-5, atol=1e-6)


def test_weights_in_any_memory_order(dtype):
    made = block("resnet50", 2, 0)
    use_kernels_(made)
    plain = copy.deepcopy(made).to(memory_format=torch.contiguous_format)
    x = torch.randn(4, channels_in(made), 6, 6).to(dtype)
    expected, upstream = run(made, x)
    found, _ = run(plain, x, upstream)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_kernels_say_what_they_took():
    made = block("resnet18", 1, 1)
    use_kernels_(made)
    before = residual.seconds()
    run(made, torch.randn(4, channels_in(made), 6, 6))
    assert all(value > before[name] for name, value in residual.seconds().items())


def test_one_value_a_channel_is_refused_as_by_torch():
    made = block("resnet18", 2, 0)
    use_kernels_(made)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(torch.randn(1, channels_in(made), 2, 2))
