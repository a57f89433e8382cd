"""The weighted kNN classifier (Wu et al. 2018, section 3.4; MoCo's CIFAR demo).

Neighbours are the training samples of highest cosine similarity s; each votes exp(s / temperature)
for its class. Votes are added as integers, multiples of 2^-40 of the nearest neighbour's vote. So
their sum depends on no order, on a GPU neither, and equal votes tie exactly: the lower class wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moco.errors import ConfigError
from moco.evaluation.neighbours import CHUNK, NeighbourSearch

_UNIT = 2.0**40  # the nearest neighbour's vote; a million of them stay below 2^63


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    chunk: int = CHUNK,
) -> float:
    """Share of test samples, in percent, whose class wins the vote of their k nearest neighbours.

    All tensors are on one device, where the similarities of `chunk` test samples to a block of
    train samples are computed at a time.

    Args:
        train_features, test_features: [N, D] and [M, D], of any norm.
        train_labels, test_labels: int64 [N] and [M], from 0 to num_classes - 1.
    Raises: ConfigError for k outside 1 .. N, or a temperature not above 0.
    """
    check_sweep([k], [temperature], len(train_features))
    assert len(test_features) == len(test_labels) > 0 and len(train_features) == len(train_labels)
    search = NeighbourSearch(test_features, k, chunk=chunk)
    search.add(train_features, 0)
    accuracies = sweep(
        search.similarity_MK, train_labels[search.index_MK], test_labels, [k], [temperature],
        num_classes=num_classes,
    )  # fmt: skip
    return accuracies[k, temperature]


def check_sweep(ks: Sequence[int], temperatures: Sequence[float], num_train: int) -> None:
    """Raises: ConfigError for a k outside 1 .. num_train, a temperature not above 0, or none."""
    if not ks or not temperatures:
        raise ConfigError("kNN: give at least one k and one temperature")
    for k in ks:
        if not 1 <= k <= num_train:
            raise ConfigError(
                f"kNN: k is {k}; allowed: 1 to {num_train}, the number of train samples; lower k "
                "or give more images"
            )
    for temperature in temperatures:
        if not temperature > 0:
            raise ConfigError(f"kNN: temperature is {temperature}; allowed: a number above 0")


def sweep(
    similarity_MK: torch.Tensor,
    label_MK: torch.Tensor,
    test_labels: torch.Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    *,
    num_classes: int,
    chunk: int = CHUNK,
) -> dict[tuple[int, float], float]:
    """Accuracy in percent of every (k, temperature), from one search.

    Args:
        similarity_MK: of the neighbours, falling; label_MK: their classes. K is at least max(ks).
    """
    if similarity_MK.device.type == "mps":  # has no float64
        similarity_MK, label_MK, test_labels = (
            tensor.cpu() for tensor in (similarity_MK, label_MK, test_labels)
        )
    pairs = [(k, t) for k in ks for t in temperatures]
    correct = {pair: torch.zeros((), dtype=torch.int64, device=label_MK.device) for pair in pairs}
    for start in range(0, len(test_labels), chunk):
        rows = slice(start, start + chunk)
        similarity, label, own = similarity_MK[rows].double(), label_MK[rows], test_labels[rows]
        for temperature in temperatures:
            # Relative to the nearest neighbour, which changes no winner and cannot overflow.
            weight = ((similarity - similarity[:, :1]) / temperature).exp()
            votes = (weight * _UNIT).round().long()
            for k in ks:
                sums = torch.zeros(
                    len(own), num_classes, dtype=torch.int64, device=votes.device
                ).scatter_add_(1, label[:, :k], votes[:, :k])
                winner = sums.argmax(dim=1)  # the first of equal sums
                correct[k, temperature] += (winner == own).sum()
    counts = torch.stack(list(correct.values())).tolist()
    return {p: 100.0 * n / len(test_labels) for p, n in zip(correct, counts, strict=True)}
