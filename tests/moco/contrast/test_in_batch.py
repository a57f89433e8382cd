"""In-batch InfoNCE and NT-Xent against loops over every pair, written from the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.contrast.info_nce import contrast_accuracy, in_batch_logits, nt_xent_logits


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 5, generator=generator, dtype=torch.float64), dim=1)


def brute_force_nt_xent(first, second, temperature):
    """SimCLR, equation 1 and algorithm 1, term by term."""
    z = [x for pair in zip(first.tolist(), second.tolist(), strict=True) for x in pair]

    def exp_similarity(i, k):
        return math.exp(sum(a * b for a, b in zip(z[i], z[k], strict=True)) / temperature)

    def term(i, j):
        others = sum(exp_similarity(i, k) for k in range(len(z)) if k != i)
        return -math.log(exp_similarity(i, j) / others)

    pairs = range(len(z) // 2)
    return sum(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k) for k in pairs) / len(z)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_nt_xent_is_the_brute_force_sum_however_the_batch_is_cut(parts):
    q, k = unit(6, 0), unit(6, 1)
    share, losses = 6 // parts, []
    for first in range(0, 6, share):
        own = slice(first, first + share)
        losses.append(F.cross_entropy(*nt_xent_logits(q[own], k[own], q, k, first, 0.3)))
    expected = brute_force_nt_xent(q, k, 0.3)
    assert sum(losses).item() / parts == pytest.approx(expected, rel=1e-12)
    assert brute_force_nt_xent(q, k.flip(0), 0.3) != pytest.approx(expected, rel=1e-3)
    assert brute_force_nt_xent(q, k, 0.31) != pytest.approx(expected, rel=1e-3)


def test_in_batch_logits_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    logits, labels = in_batch_logits(q, keys, 1, 0.5)  # q are images 1 and 2 of three
    torch.testing.assert_close(logits, torch.tensor([[1.2, 2.0, 0.0], [1.6, 0.0, -2.0]]))
    assert labels.tolist() == [1, 2]
    expected = math.log(math.exp(1.2) + math.exp(2.0) + 1) - 2.0
    expected += math.log(math.exp(1.6) + 1 + math.exp(-2.0)) + 2.0
    assert F.cross_entropy(logits, labels).item() == pytest.approx(expected / 2, rel=1e-6)


def test_equal_similarities_give_the_logarithm_of_the_batch():
    same = unit(1, 0).expand(7, -1)
    keys = in_batch_logits(same, same, 0, 0.1)
    assert F.cross_entropy(*keys).item() == pytest.approx(math.log(7))
    both = nt_xent_logits(same, same, same, same, 0, 0.1)
    assert F.cross_entropy(*both).item() == pytest.approx(math.log(13))


def test_accuracy_counts_the_positives_rank_in_any_column():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, -torch.inf]])
    found = contrast_accuracy(logits, torch.tensor([0, 1, 1]))
    assert found["acc1"].item() == pytest.approx(200 / 3)
    assert found["acc5"].item() == 100
    tied = torch.ones(2, 8)  # a constant output is no success
    assert contrast_accuracy(tied, torch.tensor([0, 5]))["acc5"].item() == 0
