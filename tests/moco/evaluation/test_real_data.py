"""On real images, where they are at hand: CIFAR-10's, by an untrained network of a tenth."""

from __future__ import annotations

import os
from pathlib import Path

import linear_runs as runs
import pytest
import tiny

from moco.evaluation.cached import evaluate_cached
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn

CIFAR10 = Path(os.environ.get("MOCO_REAL_DATA", "")) / "cifar10"


@pytest.mark.skipif("MOCO_REAL_DATA" not in os.environ, reason="MOCO_REAL_DATA is not set")
def test_even_untrained_features_beat_chance_on_cifar10(tmp_path):
    """Chance is 10 %; random convolutions see colour and texture."""
    weights = runs.write_weights(tmp_path)
    knn = evaluate_knn(
        KnnSettings((20, 200), size=16, resize=16, backend="opencv"), weights, str(CIFAR10), None,
        tiny.alone(), num_workers=0, say=lambda line: None,
    )  # fmt: skip
    assert knn["num_classes"] == 10 and 15 < knn["top1"] < 60
    linear = evaluate_cached(
        runs.config(
            DATA__RESIZE=16, DATA__BACKEND="opencv", TRAIN__BATCH_SIZE=256, TRAIN__EPOCHS=5,
            EVAL__BATCH_SIZE=256, CACHED__NORMALIZE=True, CACHED__LRS="(3.0, 10.0)",
        ),
        weights, str(CIFAR10), tmp_path / "cached", tiny.alone(), say=lambda line: None,
    )  # fmt: skip
    assert 15 < linear["top1"] < 60
