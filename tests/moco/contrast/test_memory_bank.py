"""The bank's update by hand, its logits by loops, its draws."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.contrast.info_nce import info_nce_loss
from moco.contrast.memory_bank import bank_logits, draw_negatives, initial_bank, update_bank_


def test_update_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    update_bank_(bank, torch.tensor([2, 0]), torch.tensor([[0.6, -0.8], [0.0, 1.0]]), 0.25)
    # Row 2: 0.25 (0.6, 0.8) + 0.75 (0.6, -0.8) = (0.6, -0.4), of length sqrt(0.52).
    # Row 0: 0.25 (1, 0) + 0.75 (0, 1) = (0.25, 0.75), of length sqrt(0.625).
    root = math.sqrt(0.52), math.sqrt(0.625)
    expected = [[0.25 / root[1], 0.75 / root[1]], [0.0, 1.0], [0.6 / root[0], -0.4 / root[0]]]
    torch.testing.assert_close(bank, torch.tensor(expected))
    other = bank.clone()
    update_bank_(other, torch.tensor([0]), torch.tensor([[1.0, 0.0]]), 0.5)
    assert not torch.equal(other[0], bank[0]) and torch.equal(other[1:], bank[1:])


def test_loss_is_the_loop_over_stored_features_without_the_query_itself():
    torch.manual_seed(0)
    bank = initial_bank(6, 4).double()
    q = F.normalize(torch.randn(2, 4, dtype=torch.float64), dim=1)
    index, negatives = torch.tensor([4, 1]), torch.tensor([0, 4, 4, 2, 1, 5])
    loss = info_nce_loss(bank_logits(q, index, bank, negatives, 0.3))

    def similarity(row, image):
        return math.exp((q[row] @ bank[image]).item() / 0.3)

    def expected(with_itself):
        terms = []
        for row, image in enumerate(index.tolist()):
            own = similarity(row, image)
            others = [n for n in negatives.tolist() if with_itself or n != image]
            terms.append(-math.log(own / (own + sum(similarity(row, n) for n in others))))
        return sum(terms) / len(terms)

    assert loss.item() == pytest.approx(expected(False), rel=1e-12)
    assert loss.item() != pytest.approx(expected(True), rel=1e-3)  # negative control


def test_draws_are_uniform_and_depend_on_the_generator_alone():
    def draw(seed):
        torch.manual_seed(seed + 100)  # the global generator plays no part
        return draw_negatives(10, 5000, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    counts = torch.bincount(draw(1), minlength=10)
    assert len(counts) == 10 and counts.min() > 400 and counts.max() < 600


def test_initial_rows_are_unit_vectors():
    bank = initial_bank(50, 8)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(50))
    assert bank.mean(0).abs().max() < 0.3
