"""RoIAlign against torchvision's in float64; its gradient too; what it refuses."""

import pytest
import torch
from torchvision import ops

from moco.kernels.roi_align import roi_align

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value
OPTIONS = {"side": 5, "scale": 1 / 16, "sampling_ratio": 0, "aligned": True}


def features(channels=37, dtype=torch.float32, images=2, height=9, width=12):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(images, channels, height, width, generator=generator).to(dtype)
    return made.to(memory_format=torch.channels_last)


def regions(count=30, images=2):
    """Of all sizes, some beyond the image; the last ones have no area, or none in the image."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([190.0, 140.0]) - 20
    size = torch.rand(count, 2, generator=generator) ** 2 * 150
    image = torch.randint(0, images, (count, 1), generator=generator)
    special = [[0, 40, 40, 40, 90], [1, 60, 60, 50, 50], [0, 900, 900, 950, 950]]
    made = torch.cat([image, corner, corner + size], dim=1)
    return torch.cat([made, torch.tensor(special, dtype=torch.float32)])


def run(function, x, rois, upstream):
    x = x.clone().requires_grad_()
    y = function(x * 1, rois)
    y.backward(upstream)
    return y.detach().double(), x.grad.double()


def torchvisions(options):
    side, scale = options["side"], options["scale"]
    rest = options["sampling_ratio"], options["aligned"]
    return lambda x, rois: ops.roi_align(x, rois.to(x.dtype), side, scale, *rest)


def worst(ours, expected):
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected, strict=True)
    )


def both(options, dtype=torch.float32, channels=37, rois=None):
    rois = regions() if rois is None else rois
    x = features(channels, dtype)
    shape = len(rois), channels, options["side"], options["side"]
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours = run(lambda x, rois: roi_align(x, rois, **options), x, rois, upstream)
    return ours, run(torchvisions(options), x.double(), rois, upstream.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 37, 128, 200])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_equals_torchvision_in_float64(dtype, channels, sampling_ratio, aligned):
    options = {**OPTIONS, "sampling_ratio": sampling_ratio, "aligned": aligned}
    assert worst(*both(options, dtype, channels)) < TOLERANCE[dtype]


def test_negative_control_another_offset_is_seen():
    ours, _ = both({**OPTIONS, "aligned": False})
    _, expected = both(OPTIONS)
    assert worst(ours, expected) > 100 * TOLERANCE[torch.bfloat16]


def test_features_smaller_than_a_bin_and_of_one_pixel():
    for height, width in ((1, 1), (1, 7), (3, 2)):
        x = features(height=height, width=width)
        ours = roi_align(x, regions(), **OPTIONS).double()
        expected = torchvisions(OPTIONS)(x.double(), regions())
        assert worst([ours], [expected]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    expected, _ = both(OPTIONS, torch.bfloat16, 200)
    try:
        torch.set_num_threads(threads)
        ours, _ = both(OPTIONS, torch.bfloat16, 200)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_memory_order_and_no_regions():
    x = features()
    last = roi_align(x, regions(), **OPTIONS)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(roi_align(x.contiguous(), regions(), **OPTIONS), last)
    x.requires_grad_()
    none = roi_align(x, regions()[:0], **OPTIONS)
    assert none.shape == (0, 37, 5, 5)
    none.sum().backward()
    assert not x.grad.any()


def test_regions_that_are_no_numbers_see_nothing():
    rois = torch.tensor([[0, float("nan"), 0, 50, 50], [0, 0, 0, float("inf"), 50]])
    assert not roi_align(features(), rois, **OPTIONS).any()


def test_a_nan_of_the_features_reaches_the_regions_that_see_it():
    x = features(dtype=torch.bfloat16)
    x[0, 3, 4, 5] = float("nan")
    y = roi_align(x, torch.tensor([[0.0, 60, 40, 110, 100], [1, 60, 40, 110, 100]]), **OPTIONS)
    assert y[0, 3].isnan().any() and not y[0, 4].isnan().any() and not y[1].isnan().any()


def test_what_is_refused():
    with pytest.raises(ValueError, match="takes float32, bfloat16 on a CPU, got torch.float64"):
        roi_align(features().double(), regions(), **OPTIONS)
    for image in (-1, 2, float("nan")):
        with pytest.raises(ValueError, match="not among 2"):
            roi_align(features(), torch.tensor([[image, 0.0, 0, 9, 9]]), **OPTIONS)
