from __future__ import annotations

import math

import pytest
import torch

from moco.errors import ConfigError
from moco.evaluation.knn import knn_accuracy


def oracle(train, train_labels, test, test_labels, k, temperature):
    """Plain Python, float64, one sample at a time."""
    correct = 0
    for sample, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        scored = []
        for other, other_label in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(sample, other, strict=True))
            scored.append((dot / (math.hypot(*sample) * math.hypot(*other)), other_label))
        votes = {}
        for similarity, other_label in sorted(scored, reverse=True)[:k]:
            votes[other_label] = votes.get(other_label, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == label
    return 100 * correct / len(test)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)

    def sample(num):
        labels = torch.randint(0, 4, (num,), generator=generator)
        return centres[labels] + 1.5 * torch.randn(num, 6, generator=generator), labels

    return *sample(60), *sample(50)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_agrees_with_the_oracle(data, k, temperature):
    expected = oracle(*data, k, temperature)
    assert 25 < expected < 100
    for chunk in (7, 256):
        accuracy = knn_accuracy(*data, k=k, temperature=temperature, num_classes=4, chunk=chunk)
        assert accuracy == pytest.approx(expected)
    train, train_labels, test, test_labels = data
    wrong = knn_accuracy(train, train_labels.roll(1), test, test_labels, k=k, num_classes=4)
    assert wrong < expected - 10


def test_votes_are_weighted_by_similarity():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([1, 0, 0])
    test, test_label = torch.tensor([[3.0, 0.0]]), torch.tensor([1])

    def accuracy(temperature):
        return knn_accuracy(
            train, labels, test, test_label, k=3, temperature=temperature, num_classes=2
        )

    assert accuracy(0.1) == 100.0  # e^10 against 2 e^6
    assert accuracy(10.0) == 0.0  # e^0.1 against 2 e^0.06
    assert accuracy(0.001) == 100.0  # e^1000 would overflow


@pytest.mark.parametrize("k", [0, 61])
def test_k_out_of_range_is_refused(data, k):
    with pytest.raises(ConfigError, match=f"k is {k}; allowed: 1 to 60"):
        knn_accuracy(*data, k=k, num_classes=4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_out_of_range_is_refused(data, temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        knn_accuracy(*data, k=5, temperature=temperature, num_classes=4)
