"""The suppression that ends early keeps the boxes torchvision's keeps, to the last one."""

import pytest
import torch
from torchvision import ops

from moco.kernels.nms import nms


def boxes(count, seed, *, whole=False):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([400.0, 300.0])
    halves = torch.rand(count, 2, generator=generator) ** 2 * 100
    made = torch.cat([centres - halves, centres + halves], dim=1).clamp(0, 350)
    return made.round() if whole else made


def torchvisions(made, threshold):
    best_first = torch.arange(len(made), 0, -1).float()
    return ops.nms(made, best_first, threshold)


@pytest.mark.parametrize("threshold", [0.7, 0.5, 1 / 3, 0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 63, 2000])
@pytest.mark.parametrize("whole", [False, True])  # whole numbers: overlaps equal to a threshold
def test_keeps_what_torchvision_keeps(count, threshold, whole):
    for seed in range(5):
        made = boxes(count, seed, whole=whole)
        expected = torchvisions(made, threshold)
        assert torch.equal(nms(made, threshold, count), expected)
        assert torch.equal(nms(made, threshold, 10), expected[:10])


def test_an_overlap_that_equals_the_threshold_is_kept():
    made = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 1.01]])
    assert nms(made, 0.5, 9).tolist() == torchvisions(made, 0.5).tolist() == [0, 1]
    # 0.7 is below the float next to it, which an overlap can have.
    made = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7]])
    assert nms(made, 0.7, 9).tolist() == torchvisions(made, 0.7).tolist()


def test_overlaps_are_rounded_as_torchvision_rounds_them():
    """A product that is joined with a sum would be rounded once instead of twice."""
    first, second = boxes(3000, 1), boxes(3000, 2)
    corner, end = torch.maximum(first, second)[:, :2], torch.minimum(first, second)[:, 2:]
    both = (end - corner).clamp(min=0).prod(1)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (first, second)]
    overlaps = both / (areas[0] + areas[1] - both)
    found = [i for i in range(3000) if 0 < overlaps[i] < 1]
    assert len(found) > 100
    for i in found:
        pair, threshold = torch.stack([first[i], second[i]]), overlaps[i].item()
        assert nms(pair, threshold, 2).tolist() == torchvisions(pair, threshold).tolist() == [0, 1]
        below = threshold * (1 - 1e-7)
        assert nms(pair, below, 2).tolist() == torchvisions(pair, below).tolist() == [0]


def test_boxes_without_area():
    made = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [9, 9, 3, 3], [0, 0, 8, 8]])
    assert torch.equal(nms(made, 0.5, 9), torchvisions(made, 0.5))


def test_negative_control_another_threshold_keeps_others():
    made = boxes(2000, 0)
    assert not torch.equal(nms(made, 0.69, 2000), torchvisions(made, 0.7))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4), torch.zeros(2, 5)]
)
def test_other_tensors_are_refused(wrong):
    with pytest.raises(ValueError, match="takes float32 boxes"):
        nms(wrong, 0.5, 1)
