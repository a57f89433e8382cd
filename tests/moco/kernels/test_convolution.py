"""Compiled convolutions against float64: values, both gradients, odd shapes, other layers."""

import copy

import pytest
import torch
import torch.nn as nn

from moco.kernels import convolution
from moco.kernels.choose import use_kernels_
from moco.kernels.convolution import convolve

# Of the largest value: outputs and dx are rounded to the type, dweight never is.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 6e-3}
DWEIGHT_TOLERANCE = 4e-6


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that run, in order."""
    seen, call = [], convolution._call
    monkeypatch.setattr(convolution, "_call", lambda *a: (seen.append(a[0]), call(*a)))
    return seen


def layer(inputs, outputs, kernel, stride, **options):
    torch.manual_seed(0)
    options = {"padding": kernel // 2, "bias": False, **options}
    made = nn.Conv2d(inputs, outputs, kernel, stride=stride, **options)
    use_kernels_(made)
    return made.to(memory_format=torch.channels_last)


def images(batch, channels, height, width, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x.to(dtype).to(memory_format=torch.channels_last)


def run(conv, x, upstream=None):
    x = x.clone().requires_grad_()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    with autocast:
        y = convolve(conv, x)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    y.backward(upstream)
    return {"y": y.detach(), "dx": x.grad, "dweight": conv.weight.grad}, upstream


def exact(conv, x, upstream):
    """In float64, from the rounded weights that the products see."""
    oracle = copy.deepcopy(conv).double()
    oracle.weight.data = conv.weight.detach().to(x.dtype).double()
    oracle.weight.grad = None
    return run(oracle.eval(), x.double(), upstream.double())[0]


def worst(ours, expected):
    return {
        name: ((ours[name].double() - e).abs().max() / e.abs().max()).item()
        for name, e in expected.items()
    }


SHAPES = [  # inputs, outputs, kernel, stride, batch, height, width
    (32, 64, 1, 1, 4, 9, 7),
    (64, 32, 1, 2, 3, 9, 8),  # an odd batch: an image without a partner
    (32, 96, 3, 1, 4, 6, 5),
    (96, 32, 3, 2, 5, 7, 7),
    (32, 32, 3, 2, 2, 8, 8),
    (64, 64, 3, 1, 6, 1, 1),  # eight of nine places of the kernel see no pixel
    (32, 32, 5, 2, 1, 4, 11),
    (32, 64, 7, 3, 2, 10, 11),  # stride 3: nine groups of pixels in the gradient to the input
    (64, 32, 3, 2, 3, 2, 2),
    (32, 32, 1, 3, 2, 7, 5),  # most pixels of that gradient are zero
    (32, 32, 5, 1, 3, 2, 3),
    (256, 512, 1, 1, 1, 2, 2),  # more outputs than pixels
    (32, 32, 3, 1, 2, 120, 100),  # an image is more than one chunk
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_float64(shape, threads, dtype, calls):
    inputs, outputs, kernel, stride, batch, height, width = shape
    conv, x = layer(inputs, outputs, kernel, stride), images(batch, inputs, height, width, dtype)
    torch.set_num_threads(threads)
    try:
        ours, upstream = run(conv, x)
    finally:
        torch.set_num_threads(1)
    expected = exact(conv, x, upstream)
    found = worst(ours, expected)
    assert max(found.values()) < TOLERANCE[dtype], found
    assert found["dweight"] < DWEIGHT_TOLERANCE
    assert ours["dweight"].dtype == torch.float32
    assert ours["dweight"].stride() == conv.weight.stride()
    assert calls == ["convolution", "convolution", "weight_gradient"]
    # Negative controls: an image, a shift of the images, other weights.
    for changed in (x.flip(0) if batch > 1 else -x, x.roll(1, 2) if height > 1 else x.roll(1, 1)):
        assert max(worst(run(copy.deepcopy(conv), changed, upstream)[0], expected).values()) > 0.05


def test_with_a_bias(dtype, calls):
    conv, x = layer(32, 64, 3, 1, bias=True), images(3, 32, 6, 5, dtype)
    ours, upstream = run(conv, x)
    assert calls == ["convolution", "convolution", "weight_gradient"]
    expected = exact(conv, x, upstream)
    assert max(worst(ours, expected).values()) < 2 * TOLERANCE[dtype]
    added = upstream.double().sum((0, 2, 3))
    assert (conv.bias.grad - added).abs().max() < 2 * TOLERANCE[dtype] * added.abs().max()
    conv.bias.data.zero_()  # negative control
    assert max(worst(run(conv, x, upstream)[0], expected).values()) > 0.05


def test_many_images_and_threads(dtype):
    """Every way of dividing the work: pixels or weights among threads, one or several chunks."""
    for batch, size, channels, threads in ((64, 14, 64, 2), (40, 28, 64, 5), (48, 56, 32, 1),
                                           (9, 3, 128, 7)):  # fmt: skip
        for kernel in (1, 3):
            conv, x = (
                layer(channels, channels, kernel, 1),
                images(batch, channels, size, size, dtype),
            )
            torch.set_num_threads(threads)
            try:
                ours, upstream = run(conv, x)
            finally:
                torch.set_num_threads(1)
            found = worst(ours, exact(conv, x, upstream))
            assert max(found.values()) < TOLERANCE[dtype], (batch, size, kernel, found)
            assert found["dweight"] < DWEIGHT_TOLERANCE


def test_the_same_bits_again(dtype):
    conv, x = layer(64, 64, 3, 1), images(16, 64, 14, 14, dtype)
    torch.set_num_threads(2)
    try:
        first, second = (run(copy.deepcopy(conv), x)[0] for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_gradient_the_same_values(dtype, calls):
    x = images(4, 64, 5, 5, dtype)
    for kernel in (1, 3):
        conv = layer(64, 64, kernel, 1)
        expected = run(conv, x)[0]["y"]
        calls.clear()
        with torch.inference_mode(), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            assert torch.equal(convolve(conv, x), expected)
        assert calls == ["convolution"]


def test_other_memory_orders(dtype):
    conv, x = layer(32, 32, 3, 1), images(4, 32, 5, 5, dtype)
    expected, upstream = run(conv, x)
    plain = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    ours, _ = run(plain, x.contiguous(), upstream.contiguous())
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert plain.weight.grad.stride() == plain.weight.stride()


def test_nan_and_infinity_pass(dtype):
    for value in (torch.nan, torch.inf):
        for kernel in (1, 3):
            conv, x = layer(32, 32, kernel, 1), images(3, 32, 5, 5, dtype)
            x[1, 7, 2, 2] = value
            ours, _ = run(conv, x)
            assert not ours["y"][1, :, 2, 2].isfinite().any()
            assert ours["y"][0].isfinite().all()
            assert not ours["dweight"][:, 7].isfinite().all(2).all(1).any()
            assert ours["dweight"][:, :7].isfinite().all()


def test_a_nan_of_any_bits_in_the_weights_is_seen(dtype):
    ones = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    conv, x = layer(32, 32, 1, 1), images(2, 32, 3, 3, dtype)
    conv.weight.data[5, 3] = ones
    ours, _ = run(conv, x)
    assert ours["y"][:, 5].isnan().all() and ours["y"][:, :5].isfinite().all()
    assert ours["dx"][:, 3].isnan().all() and ours["dx"][:, :3].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": 3}, {"outputs": 40}, {"groups": 2}, {"dilation": 2},
        {"padding_mode": "circular"}, {"stride": (1, 2)}, {"kernel": (3, 1)}, {"padding": "same"},
        {"padding": 3},
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_torchs(options, calls):
    options = {"inputs": 32, "outputs": 32, "kernel": 3, "stride": 1, "padding": 1, **options}
    inputs, outputs, kernel = (options.pop(n) for n in ("inputs", "outputs", "kernel"))
    options.setdefault("bias", False)
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, **options)
    use_kernels_(conv)
    x = images(2, inputs, 6, 6, torch.float32)
    assert torch.equal(convolve(conv, x), conv(x)) and calls == []


def test_other_types_and_evaluation_are_torchs(calls):
    conv = layer(32, 32, 1, 1)
    x = images(2, 32, 4, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(convolve(conv, x), conv(x))  # float32 that autocast is to cast
    double = copy.deepcopy(conv).double()
    assert torch.equal(convolve(double, x.double()), double(x.double()))
    assert torch.equal(convolve(conv.eval(), x), conv(x))
    plain = nn.Conv2d(32, 32, 1, bias=False)
    assert torch.equal(convolve(plain, x), plain(x))
    assert calls == []


def test_evaluation_by_kernels_where_it_was_asked_for(calls, dtype):
    conv, x = layer(32, 64, 3, 2).eval(), images(3, 32, 6, 5, dtype)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), autocast:
        expected = convolve(copy.deepcopy(conv).train(), x)
        calls.clear()
        convolve(conv, x)
        assert calls == []
        use_kernels_(conv, evaluation=True)
        assert torch.equal(convolve(conv, x), expected) and calls == ["convolution"]
    calls.clear()
    with autocast:
        convolve(conv, x)  # with gradient
    assert calls == []


def test_a_hook_is_called(calls):
    conv, x, seen = layer(32, 64, 3, 1), images(2, 32, 6, 5, torch.float32), []
    handle = conv.register_forward_hook(lambda *_: seen.append(1))
    convolve(conv, x)
    assert seen == [1] and calls == []
    handle.remove()
    convolve(conv, x)
    assert calls == ["convolution"]
