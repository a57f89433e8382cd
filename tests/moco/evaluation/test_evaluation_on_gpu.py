"""The evaluations on a GPU against those on a CPU."""

from __future__ import annotations

import linear_runs as runs
import pytest
import torch

from moco.distributed import ProcessInfo
from moco.evaluation.cached import evaluate_cached
from moco.evaluation.knn import knn_accuracy
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn
from moco.evaluation.linear import evaluate_linear
from moco.evaluation.neighbours import NeighbourSearch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICES = ("cpu", "cuda")


def process(device):
    return ProcessInfo(0, 1, 0, torch.device(device))


def test_neighbours_and_votes_of_tied_features_are_the_cpus():
    draws = torch.Generator().manual_seed(0)
    corners = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1]]) / 2
    train, test = (corners[torch.randint(0, 3, (n,), generator=draws)] for n in (900, 300))
    labels = [torch.randint(0, 5, (len(x),), generator=draws) for x in (train, test)]
    found, accuracies = [], []
    for device in DEVICES:
        search = NeighbourSearch(test.to(device), 40, block=128, chunk=64)
        search.add(train.to(device), 0)
        found.append(search.index_MK.cpu())
        accuracies.append(
            knn_accuracy(train.to(device), labels[0].to(device), test.to(device),
                         labels[1].to(device), k=40, num_classes=5)
        )  # fmt: skip
    assert torch.equal(*found) and accuracies[0] == accuracies[1]


@pytest.mark.parametrize("amp", [False, True])
def test_linear_classification_is_the_cpus(image_folder, tmp_path, amp):
    weights = runs.write_weights(tmp_path)
    cpu, gpu = (
        evaluate_linear(
            runs.config(TRAIN__AMP=amp and device == "cuda", TRAIN__CHANNELS_LAST=amp), weights,
            str(image_folder), tmp_path / device, process(device), say=lambda line: None,
        )
        for device in DEVICES
    )  # fmt: skip
    assert gpu["test_loss"] == pytest.approx(cpu["test_loss"], rel=0.1 if amp else 0.01)
    assert gpu["backbone_unchanged"] == cpu["backbone_unchanged"]


def test_knn_and_cached_features_are_the_cpus(image_folder, tmp_path):
    weights = runs.write_weights(tmp_path)
    results = [
        evaluate_knn(
            KnnSettings((5,), size=16), weights, str(image_folder), None, process(device),
            num_workers=0, say=lambda line: None,
        )
        for device in DEVICES
    ]  # fmt: skip
    assert results[0]["top1"] == results[1]["top1"]
    assert results[1]["memory"]["peak_gpu_bytes"] > 0
    cpu, gpu = (
        evaluate_cached(
            runs.config(CACHED__LRS="(0.003,)"), weights, str(image_folder), tmp_path / device,
            process(device), say=lambda line: None,
        )["sweep"][0]["test_loss"]
        for device in DEVICES
    )  # fmt: skip
    assert gpu == pytest.approx(cpu, rel=0.01)
