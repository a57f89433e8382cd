"""Gathering with gradient and batch norm over two processes, against the whole in one."""

import pytest
import torch
from processes import in_processes
from torch import nn

from moco.distributed import all_gather_cat, all_gather_with_gradient
from moco.models.norm import SyncBatchNorm

SHAPES = {"images": (8, 3, 5, 7), "vectors": (8, 3)}


def _data(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3 + 50  # a mean far from zero
    weights = torch.randn(shape, generator=generator)
    return x, weights


def _normalise(norm, x, weights):
    """Output, gradients of input, weight and bias, running statistics, of a weighted sum."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0, 0.0]))
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * weights).sum().backward()
    norm(x.detach() + 1)  # a second batch, so that old running statistics count too
    found = [y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [t.detach() for t in (*found, norm.num_batches_tracked)]


def _worker(rank):
    own = slice(4 * rank, 4 * rank + 4)
    found = {}
    for name, shape in SHAPES.items():
        x, weights = _data(shape)
        found[name] = _normalise(SyncBatchNorm(3), x[own], weights[own])
        plain = nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3)
        found[f"{name}, apart"] = _normalise(plain, x[own], weights[own])
    keys = torch.arange(6.0).view(2, 3) + 10 * rank
    for name, gather in (("gather", all_gather_with_gradient), ("no gradient", all_gather_cat)):
        leaf = keys.clone().requires_grad_()
        gathered = gather(leaf * 1.0)
        loss = (gathered * torch.arange(12.0).view(4, 3)).sum() * (rank + 1) + leaf.sum() * 0
        loss.backward()
        found[name] = [gathered.detach(), leaf.grad]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_processes(_worker, tmp_path_factory.mktemp("gradients"))


@pytest.mark.parametrize("name", SHAPES)
def test_sync_batch_norm_is_batch_norm_of_the_whole_batch(ranks, name):
    x, weights = _data(SHAPES[name])
    norm = nn.BatchNorm2d(3) if x.dim() == 4 else nn.BatchNorm1d(3)
    y, grad_x, grad_w, grad_b, *tracked = _normalise(norm, x, weights)
    first, second = (r[name] for r in ranks)
    close = dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y, **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), grad_x, **close)
    torch.testing.assert_close(first[2] + second[2], grad_w, **close)
    torch.testing.assert_close(first[3] + second[3], grad_b, **close)
    for own in (first, second):
        for a, b in zip(own[4:], tracked, strict=True):
            torch.testing.assert_close(a, b, **close)
    apart = torch.cat([r[f"{name}, apart"][0] for r in ranks])
    assert not torch.allclose(apart, y, atol=1e-2)  # negative control


def test_gather_hands_back_the_sum_of_all_ranks_gradients(ranks):
    for rank, found in enumerate(ranks):
        gathered, gradient = found["gather"]
        assert gathered[:, 0].tolist() == [0, 3, 10, 13]
        own = torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2]
        assert torch.equal(gradient, own * (1 + 2))  # the losses have factors 1 and 2
        assert torch.equal(found["no gradient"][1], torch.zeros(2, 3))  # negative control
