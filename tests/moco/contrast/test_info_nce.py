"""InfoNCE by three oracles: by hand, another formula, and plain Python; with negative controls."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moco.contrast.info_nce import (
    contrast_accuracy,
    in_batch_logits,
    info_nce_logits,
    info_nce_loss,
)


def unit(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def loss_of(q, k, queue, temperature):
    return info_nce_loss(info_nce_logits(q, k, queue, temperature))


def test_by_hand():
    q = torch.tensor([[1.0, 0.0]])
    k = torch.tensor([[0.6, 0.8]])
    queue = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # columns (0, 1) and (-1, 0)
    logits = info_nce_logits(q, k, queue, 0.5)
    torch.testing.assert_close(logits, torch.tensor([[1.2, 0.0, -2.0]]))
    expected = -1.2 + math.log(math.exp(1.2) + 1.0 + math.exp(-2.0))
    assert info_nce_loss(logits).item() == pytest.approx(expected, rel=1e-6)


def test_equals_logsumexp_formula():
    q, k, queue = unit(5, 8, 0), unit(5, 8, 1), unit(7, 8, 2).T
    positive, negative = (q * k).sum(1) / 0.2, q @ queue / 0.2
    expected = (torch.logsumexp(torch.cat([positive[:, None], negative], 1), 1) - positive).mean()
    torch.testing.assert_close(loss_of(q, k, queue, 0.2), expected, rtol=1e-12, atol=0)
    # Negative controls: a swapped positive, and another temperature.
    assert not torch.isclose(loss_of(q, k.flip(0), queue, 0.2), expected, rtol=1e-3)
    assert not torch.isclose(loss_of(q, k, queue, 0.21), expected, rtol=1e-3)


def test_equals_plain_python():
    q, k, queue = unit(3, 4, 3), unit(3, 4, 4), unit(5, 4, 5).T
    losses = []
    for i in range(3):
        dot = lambda a, b: sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))  # noqa: E731
        scores = [math.exp(dot(q[i], k[i]) / 0.07)]
        scores += [math.exp(dot(q[i], queue[:, j]) / 0.07) for j in range(5)]
        losses.append(-math.log(scores[0] / sum(scores)))
    assert loss_of(q, k, queue, 0.07).item() == pytest.approx(sum(losses) / 3, rel=1e-12)


@pytest.mark.parametrize("queue_size", [7, 65536])
def test_equal_similarities_give_log_of_k_plus_1(queue_size):
    q = torch.tensor([[1.0, 0.0]])
    queue = q.T.expand(2, queue_size)
    assert loss_of(q, q, queue, 0.2).item() == pytest.approx(math.log(queue_size + 1), rel=1e-5)


def test_gradient_is_the_analytic_one():
    q, k, queue = unit(4, 6, 6).requires_grad_(), unit(4, 6, 7), unit(9, 6, 8).T
    logits = info_nce_logits(q, k, queue, 0.2)
    info_nce_loss(logits).backward()
    probability = logits.detach().softmax(1)
    expected = ((probability[:, :1] - 1) * k + probability[:, 1:] @ queue.T) / 0.2 / 4
    torch.testing.assert_close(q.grad, expected, rtol=1e-10, atol=1e-12)


def test_accuracy_counts_the_rank_of_the_positive():
    logits = torch.tensor([[5.0, 1, 2, 3, 4, 0], [3.0, 9, 1, 0, 0, 0], [0.0, 9, 8, 7, 6, 5]])
    figures = contrast_accuracy(logits)
    assert figures["acc1"].item() == pytest.approx(100 / 3)
    assert figures["acc5"].item() == pytest.approx(200 / 3)


# Shapes at which a matrix product of torch may choose another way to sum; 918 of them.
SMALL_SHAPES = list(itertools.product(
    (1, 2, 3, 4, 5, 8, 16, 32, 64),
    (2, 8, 16, 32, 64, 128),
    (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 20, 31, 32, 64, 128, 256, 1024),
))  # fmt: skip


def references_logits(q, k, queue, temperature):
    """As MoCo.forward of facebookresearch/moco computes them."""
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
    return torch.cat([positive, negative], dim=1) / temperature


def by_matrix_product(q, k, queue, temperature):
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    return torch.cat([positive, q @ queue], dim=1) / temperature


def num_differing(logits_of):
    """At how many of the small shapes logits, loss or gradient are not the reference's bits."""
    differing = 0
    for batch, dim, queue_size in SMALL_SHAPES:
        args = unit(batch, dim, 1).float(), unit(queue_size, dim, 2).float().T.contiguous(), 0.2
        found = []
        for function in (logits_of, references_logits):
            q = unit(batch, dim, 0).float().requires_grad_()
            logits = function(q, *args)
            loss = info_nce_loss(logits)
            loss.backward()
            found.append((logits, loss, q.grad))
        differing += not all(map(torch.equal, *found))
    return differing


def test_bits_are_the_references_at_small_shapes():
    assert len(SMALL_SHAPES) == 918
    assert num_differing(info_nce_logits) == 0
    # Negative control: the other product differs at about a tenth of them.
    assert num_differing(by_matrix_product) > 9


def test_in_batch_similarities_are_moco_v3s_but_for_the_last_bit():
    differing = 0
    for batch, dim, num_keys in SMALL_SHAPES:
        q, keys = unit(batch, dim, 0).float(), unit(num_keys, dim, 1).float()
        logits, _ = in_batch_logits(q, keys, 0, 1.0)
        expected = torch.einsum("nc,mc->nm", [q, keys])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
        differing += not torch.equal(logits, expected)
    assert differing > 0  # as docs/COMPATIBILITY.md says
