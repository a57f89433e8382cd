"""Batches one step ahead: the same, in the same order."""

import pytest
import torch

from moco.training.prefetch import ahead_on_device


def batches(num):
    for number in range(num):
        yield [torch.full((2, 3), number, dtype=torch.uint8), torch.tensor([number])]


def test_a_cpu_gets_them_one_by_one():
    taken = []

    def source():
        for batch in batches(3):
            taken.append(int(batch[1]))
            yield batch

    ahead = ahead_on_device(source(), torch.device("cpu"))
    assert int(next(ahead)[1]) == 0 and taken == [0]
    assert [int(batch[1]) for batch in ahead] == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("num", [0, 1, 7])
def test_a_gpu_gets_all_of_them_in_order(num):
    device = torch.device("cuda", torch.cuda.current_device())
    seen = []
    for images, index in ahead_on_device(batches(num), device):
        assert images.device == device
        seen.append((int(images.max()), int(index)))
    assert seen == [(number, number) for number in range(num)]
