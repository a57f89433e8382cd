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


def cases_beyond_the_map():
    """(features, regions, scale): maps of all sizes, regions in and beyond them, every second time
    of whole numbers, whose samples can fall on the very place of the cut-off."""
    generator = torch.Generator().manual_seed(3)
    for number in range(48):
        height, width = torch.randint(1, 30, (2,), generator=generator).tolist()
        x = torch.randn(1, 3, height, width, generator=generator)
        scale = (1 / 16, 1 / 4, 1.0)[number % 3]
        extent = torch.tensor([width, height]) / scale
        corner = (torch.rand(30, 2, generator=generator) * 3 - 1) * extent
        size = torch.rand(30, 2, generator=generator) * 1.5 * extent
        if number % 2:
            corner, size = corner.round(), size.round()
        yield x, torch.cat([torch.zeros(30, 1), corner, corner + size], dim=1), scale


def is_at_the_cut_off(x, rois, options):
    """[R]: whether rounding can decide if a sample counts: torchvision takes those from -1 to the
    height or width, both included (ops/cpu/roi_align_common.h)."""
    side, scale, offset = options["side"], options["scale"], 0.5 * options["aligned"]
    found = []
    for roi in rois.double():
        at_edge = False
        for low, high, pixels in ((1, 3, x.shape[3]), (2, 4, x.shape[2])):
            start = roi[low] * scale - offset
            length = roi[high] * scale - offset - start
            length = length if options["aligned"] else length.clamp(min=1)
            count = options["sampling_ratio"] or max(int((length / side).ceil()), 1)
            place = start + (torch.arange(side * count) + 0.5) * length / (side * count)
            at_edge |= bool((((place + 1).abs() < 1e-4) | ((place - pixels).abs() < 1e-4)).any())
        found.append(at_edge)
    return torch.tensor(found)


def by_region(a, b):
    """[R]: the largest difference of each region's result."""
    return (a - b).abs().flatten(1).amax(dim=1)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_regions_beyond_the_map_see_what_torchvisions_see(sampling_ratio, aligned):
    """A sample on the very edge counts or not by its last bit: float32's is torchvision's in
    float32, and only such regions differ from float64, torchvision's own as much."""
    num_decided, num_seen_by_control = 0, 0
    for x, rois, scale in cases_beyond_the_map():
        options = {"side": 7, "scale": scale, "sampling_ratio": sampling_ratio, "aligned": aligned}
        upstream = torch.randn(len(rois), 3, 7, 7, generator=torch.Generator().manual_seed(4))

        def ours(x, rois, options=options):
            return roi_align(x, rois, **options)

        y, gradient = run(ours, x, rois, upstream)
        same, same_gradient = run(torchvisions(options), x, rois, upstream)
        assert by_region(y, same).max() < 1e-5
        assert (gradient - same_gradient).abs().max() < 1e-5 * max(1, same_gradient.abs().max())
        edge = is_at_the_cut_off(x, rois, options)
        exact = torchvisions(options)(x.double(), rois)
        assert (by_region(y, exact)[~edge] < 1e-5).all()
        decided = by_region(same, exact) > 1e-3
        assert not (decided & ~edge).any()
        num_decided += int(decided.sum())
        inside, part = rois[~edge], upstream[~edge]
        _, gradient = run(ours, x, inside, part)
        _, exact_gradient = run(torchvisions(options), x.double(), inside, part.double())
        assert (gradient - exact_gradient).abs().max() < 1e-5 * max(1, exact_gradient.abs().max())
        # Control: an edge that is off by the last bits of a place is seen.
        moved = rois + torch.tensor([0, 1, 1, 1, 1]) * 2e-4 / scale
        num_seen_by_control += int((by_region(ours(x, moved), same) > 0.01).sum())
    assert num_decided > 0 and num_seen_by_control > 0


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
