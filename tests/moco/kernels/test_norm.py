"""Compiled batch norm against torch's own, in float64 as the oracle; and what it refuses."""

import copy

import pytest
import torch
import torch.nn as nn

from moco.errors import ConfigError
from moco.kernels.choose import use_kernels_
from moco.kernels.convolution import suits
from moco.kernels.gradient_norm import total_norm
from moco.models.backbone import build_backbone
from moco.models.norm import SplitBatchNorm2d, norm_relu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value


def make_norm(channels, groups):
    norm = SplitBatchNorm2d(channels, num_splits=groups) if groups > 1 else None
    norm = norm or nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


def tensors(dtype, *, channels=37, mean=0.0, count=3, size=5):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(8, channels, size, size, generator=generator) for _ in range(count)]
    made[0] = made[0] * 2 + mean
    return [t.to(dtype).to(memory_format=torch.channels_last) for t in made]


def run(norm, x, shortcut, upstream, relu):
    """Everything the norm computes, by name."""
    x = x.clone().requires_grad_()
    shortcut = None if shortcut is None else shortcut.clone().requires_grad_()
    y = norm_relu(norm, x * 1, shortcut, relu=relu)
    y.backward(upstream)
    seen = {"y": y, "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    seen |= {name: getattr(norm, name) for name in ("running_mean", "running_var")}
    if shortcut is not None:
        seen["dshortcut"] = shortcut.grad
    return {name: tensor.detach().double() for name, tensor in seen.items()}


def differences(a, b):
    assert a.keys() == b.keys()
    return {name: ((a[name] - b[name]).abs().max() / b[name].abs().max()).item() for name in a}


CASES = [(1, False, True), (1, True, True), (1, False, False), (4, False, True), (4, True, True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("groups", "with_shortcut", "relu"), CASES)
def test_equals_torch_in_float64(dtype, groups, with_shortcut, relu):
    x, shortcut, upstream = tensors(dtype, mean=1.5)
    shortcut = shortcut if with_shortcut else None
    oracle = make_norm(37, groups).double()
    expected = run(oracle, *(t if t is None else t.double() for t in (x, shortcut, upstream)), relu)
    norm = make_norm(37, groups)
    assert use_kernels_(norm) == 1
    ours = run(norm, x, shortcut, upstream, relu)
    found = differences(ours, expected)
    assert max(found.values()) < TOLERANCE[dtype], found
    assert norm.num_batches_tracked == 1
    # Negative control: groups of other images.
    other = run(make_norm(37, 2).double(), x.double(), *(
        t if t is None else t.double() for t in (shortcut, upstream)), relu)  # fmt: skip
    assert max(differences(other, expected).values()) > 0.05


def test_a_large_mean_takes_no_digits_from_the_variance():
    norm = make_norm(3, 1)
    use_kernels_(norm)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    x = x.to(memory_format=torch.channels_last)
    norm_relu(norm, x.clone(), relu=False)
    exact = nn.BatchNorm2d(3).double()
    exact(x.double())
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=1e-5, atol=0)


def test_without_gradient_the_input_is_overwritten_and_the_result_the_same():
    x, shortcut, _ = tensors(torch.float32)
    norms = [make_norm(37, 1) for _ in range(2)]
    for norm in norms:
        use_kernels_(norm)
    with_gradient = norm_relu(norms[0], x.clone().requires_grad_() * 1, shortcut)
    with torch.no_grad():
        given = x.clone(memory_format=torch.preserve_format)
        without = norm_relu(norms[1], given, shortcut)
    assert torch.equal(with_gradient, without) and without.data_ptr() == given.data_ptr()


def test_other_memory_orders_and_numbers_of_threads():
    x, shortcut, upstream = tensors(torch.float32, size=9)
    norms = [make_norm(37, 4) for _ in range(3)]
    for norm in norms:
        use_kernels_(norm)
    first = run(norms[0], x, shortcut, upstream, True)
    plain = run(norms[1], *(t.contiguous() for t in (x, shortcut, upstream)), True)
    assert max(differences(plain, first).values()) == 0
    torch.set_num_threads(3)
    try:
        threads = run(norms[2], x, shortcut, upstream, True)
    finally:
        torch.set_num_threads(1)
    assert max(differences(threads, first).values()) < 2e-6


def test_nan_passes_and_infinity_becomes_nan():
    for value in (torch.nan, torch.inf):
        for dtype in TOLERANCE:
            x, _, _ = tensors(dtype)
            x[2, 5, 1, 1] = value
            norm = make_norm(37, 1)
            use_kernels_(norm)
            y = norm_relu(norm, x)
            assert y[:, 5].isnan().all() and not y[:, :5].isnan().any()


def test_a_nan_of_any_bits_in_the_weights_is_seen():
    """The last bits of this NaN would carry into its sign when it is rounded to bfloat16."""
    ones = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    for dtype in TOLERANCE:
        norm, (x, _, upstream) = make_norm(37, 1), tensors(dtype)
        use_kernels_(norm)
        norm.weight.data[5] = ones[0]
        y = norm_relu(norm, x.requires_grad_() * 1)
        y.backward(upstream)
        for values in (y, x.grad):
            assert values[:, 5].isnan().all() and not values[:, :5].isnan().any()


def test_evaluation_is_torchs():
    norm = make_norm(37, 4)
    plain = copy.deepcopy(norm).eval()
    use_kernels_(norm)
    x, shortcut, _ = tensors(torch.float32)
    expected = torch.relu(plain(x) + shortcut)
    assert torch.equal(norm_relu(norm.eval(), x, shortcut), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("groups", "with_shortcut", "relu"), CASES)
def test_evaluation_by_kernels_where_it_was_asked_for(dtype, groups, with_shortcut, relu):
    norm = make_norm(37, groups)
    norm.running_mean.copy_(torch.linspace(-1, 1, 37))
    norm.running_var.copy_(torch.linspace(0.5, 2, 37))
    norm.eval()
    buffers = copy.deepcopy(dict(norm.named_buffers()))
    exact = copy.deepcopy(norm).double()
    use_kernels_(norm, evaluation=True)
    x, shortcut, _ = (t[:3] for t in tensors(dtype))  # 3 images: not whole groups
    shortcut = shortcut if with_shortcut else None
    exact_shortcut = None if shortcut is None else shortcut.double()
    expected = norm_relu(exact, x.double(), exact_shortcut, relu=relu)
    with torch.no_grad():
        ours = norm_relu(norm, x.clone(), shortcut, relu=relu)
        other = norm_relu(norm, x.flip(0).clone(), shortcut, relu=relu)  # negative control
    assert differences({"y": ours.double()}, {"y": expected})["y"] < TOLERANCE[dtype]
    assert differences({"y": other.double()}, {"y": expected})["y"] > 0.05
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_hook_is_called_and_one_value_is_enough_to_evaluate():
    norm, seen = make_norm(37, 1), []
    use_kernels_(norm, evaluation=True)
    handle = norm.register_forward_pre_hook(lambda *_: seen.append(1))
    x, _, _ = tensors(torch.float32)
    norm_relu(norm, x)
    assert seen == [1]
    handle.remove()
    norm_relu(norm, x)
    assert seen == [1]
    with torch.no_grad():
        norm_relu(norm.eval(), x[:1, :, :1, :1])


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_whole_network(arch):
    """Outputs, gradients and statistics are as near to float64's as torch's own float32."""
    torch.manual_seed(0)
    options = {"num_classes": 8, "width": 0.125, "stem": "cifar", "bn_splits": 2}
    plain = build_backbone(arch, **options).to(memory_format=torch.channels_last)
    exact, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    num_norms = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    num_convolutions = sum(isinstance(m, nn.Conv2d) and suits(m) for m in plain.modules())
    assert num_convolutions > 5 and use_kernels_(fast) == num_norms + num_convolutions
    x = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)

    def values(network, images):
        output = network(images)
        output.square().sum().backward()
        gradients = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
        statistics = {n: b.double() for n, b in network.named_buffers()}
        return {"output": output.detach(), **gradients, **statistics}

    oracle = values(exact, x.double())
    rounding, found = (differences(values(net, x), oracle) for net in (plain, fast))
    assert max(found.values()) < 5 * max(rounding.values())
    # Gradients of a deep network have kinks (ReLU) that either rounding may fall beside of.
    assert rounding["output"] < 1e-2 and found["output"] < 1e-2
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_one_value_a_channel_is_refused_as_by_torch():
    norm = make_norm(4, 2)
    use_kernels_(norm)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(norm, torch.zeros(2, 4, 1, 1))
    with pytest.raises(ConfigError, match="BN_SPLITS 2 does not divide the 3 images"):
        norm_relu(norm, torch.zeros(3, 4, 2, 2))


def test_other_types_are_refused():
    norm = make_norm(4, 1)
    use_kernels_(norm)
    with pytest.raises(ValueError, match="takes float32, bfloat16 on a CPU, got torch.float64"):
        norm_relu(norm, torch.zeros(2, 4, 3, 3, dtype=torch.float64))


def test_another_default_type_changes_nothing():
    """The kernels write float32, whatever torch makes by default."""
    x, shortcut, upstream = tensors(torch.float32)
    norms = [make_norm(37, 1) for _ in range(2)]
    for norm in norms:
        use_kernels_(norm)
    expected = run(norms[0], x, shortcut, upstream, True)
    torch.set_default_dtype(torch.float64)
    try:
        found = run(norms[1], x, shortcut, upstream, True)
        norm_of_ones = total_norm([torch.ones(16, dtype=torch.float32)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert max(differences(found, expected).values()) == 0
    assert norm_of_ones == 4 and norm_of_ones.dtype == torch.float32
