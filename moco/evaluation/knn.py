"""The weighted kNN classifier (Wu et al. 2018, section 3.4; MoCo's CIFAR demo)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco.errors import ConfigError


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    chunk: int = 256,
) -> float:
    """Share of test samples, in percent, whose class wins the vote of their k nearest neighbours.

    Neighbours are the train samples of highest cosine similarity s; each votes exp(s / temperature)
    for its class. All tensors are on one device, where the similarities of `chunk` test samples
    to all train samples are computed at a time.

    Args:
        train_features, test_features: [N, D] and [M, D], of any norm.
        train_labels, test_labels: int64 [N] and [M], from 0 to num_classes - 1.
    Raises: ConfigError for k outside 1 .. N, or a temperature not above 0.
    """
    num_train = len(train_features)
    if not 1 <= k <= num_train:
        raise ConfigError(
            f"kNN: k is {k}; allowed: 1 to {num_train}, the number of train samples; lower k or "
            "give more images"
        )
    if not temperature > 0:
        raise ConfigError(f"kNN: temperature is {temperature}; allowed: a number above 0")
    assert len(test_features) == len(test_labels) > 0 and num_train == len(train_labels)
    train_DN = F.normalize(train_features.float(), dim=1).T
    num_correct = 0
    for start in range(0, len(test_features), chunk):
        test_BD = F.normalize(test_features[start : start + chunk].float(), dim=1)
        similarity_BK, neighbour_BK = (test_BD @ train_DN).topk(k, dim=1)
        # Relative to the nearest neighbour, which changes no winner and cannot overflow.
        weight_BK = ((similarity_BK - similarity_BK[:, :1]) / temperature).exp()
        votes_BC = torch.zeros(len(test_BD), num_classes, device=test_BD.device)
        votes_BC.scatter_add_(1, train_labels[neighbour_BK], weight_BK)
        winner_B = votes_BC.argmax(dim=1)
        num_correct += int((winner_B == test_labels[start : start + chunk]).sum())
    return 100.0 * num_correct / len(test_labels)
