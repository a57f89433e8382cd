"""VOC07-style classification by linear SVMs on an encoder's features, with its results file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from moco.data.images import ImageSource
from moco.data.whole_images import build_whole_loader
from moco.distributed import ProcessInfo
from moco.errors import ConfigError
from moco.evaluation.features import RateLines, encoder_function, iterate_features
from moco.evaluation.results import describe_weights, markdown_table, versions, write_results
from moco.evaluation.svm import (
    COSTS,
    FOLDS,
    ClassResult,
    classify,
    normalize_rows,
    require_scikit_learn,
)
from moco.evaluation.weights import Pretrained, read_pretrained
from moco.models.backbone import ResNet


@dataclass(frozen=True)
class SvmSettings:
    """What determines the scores.

    grid: features are the last feature map averaged to grid x grid, by windows that overlap as in
        others' benchmarks (2: 8192 features of a ResNet-50 at 224 pixels); 1: its mean.
    """

    costs: tuple[float, ...] = COSTS
    grid: int = 2
    size: int = 224
    seed: int = 0

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class GridPool(nn.Module):
    """[B, C, H, H] -> [B, C, grid, grid]: means over windows of H - grid + 1, one pixel apart."""

    def __init__(self, grid: int):
        super().__init__()
        self.grid = grid

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        window = [side - self.grid + 1 for side in x_BCHW.shape[-2:]]
        if min(window) < 1:
            raise ConfigError(
                f"--grid {self.grid}: the last feature map has {x_BCHW.shape[-2]} x "
                f"{x_BCHW.shape[-1]} places; allowed: 1 to {min(x_BCHW.shape[-2:])}"
            )
        return F.avg_pool2d(x_BCHW, window, stride=1)


def evaluate_svm(
    settings: SvmSettings,
    weights: str | Pretrained,
    train: tuple[ImageSource, np.ndarray],
    test: tuple[ImageSource, np.ndarray],
    class_names: Sequence[str],
    output_dir: str | Path | None,
    process: ProcessInfo,
    *,
    dataset: str,
    batch_size: int = 64,
    num_workers: int = 4,
    num_jobs: int = 1,
    say: Callable[[str], None] = print,
) -> dict:
    """Features of both splits, SVMs, results.json and results.md. Runs in one process.

    Args:
        train, test: images, and labels [N, C], see `svm.py`.
        dataset: how results call it. output_dir: None writes nothing.
    Returns: the content of results.json.
    Raises: MocoError for what the user gave.
    """
    require_scikit_learn()
    started = time.monotonic()
    weights = read_pretrained(weights) if isinstance(weights, str) else weights
    for note in weights.notes:
        say(note)
    encoder = _encoder(settings, weights, process)
    features = [
        _features(
            encoder, source.decoded_as(weights.decoding), settings, weights, process, batch_size,
            num_workers, say,
        )
        for source, _ in (train, test)
    ]
    say(
        f"{len(features[0])} training and {len(features[1])} test images, "
        f"{features[0].shape[1]} features; {len(class_names)} classes x {len(settings.costs)} "
        f"costs x {FOLDS} folds"
    )
    classes, unconverged = classify(
        (features[0], train[1]),
        (features[1], test[1]),
        class_names,
        costs=settings.costs,
        seed=settings.seed,
        num_jobs=num_jobs,
        say=say,
    )
    results = {
        **_origin(settings, weights, train[0], test[0], process, dataset),
        "seconds": round(time.monotonic() - started, 1),
        "num_classes": len(class_names),
        "num_features": features[0].shape[1],
        "mAP": float(np.mean([c.ap for c in classes])),
        "mAP_11_points": float(np.mean([c.ap_11 for c in classes])),
        "fits_not_converged": unconverged,
        "per_class": [asdict(c) for c in classes],
    }
    if output_dir is not None:
        _write(Path(output_dir), results, classes)
    say(
        f"mAP {results['mAP']:.2f} (11 points: {results['mAP_11_points']:.2f}); {unconverged} fits "
        "did not converge in 2000 iterations"
    )
    return results


def _encoder(settings: SvmSettings, weights: Pretrained, process: ProcessInfo) -> nn.Module:
    encoder = weights.build_encoder(image_size=settings.size)
    if isinstance(encoder, ResNet):
        encoder.avgpool = GridPool(settings.grid)
    elif settings.grid != 1:
        raise ConfigError(f"--grid {settings.grid}: {weights.arch} has no feature map; allowed: 1")
    return encoder.to(process.device).eval()


def _origin(settings, weights, train, test, process, dataset) -> dict[str, object]:
    """What made the scores."""
    return {
        "engine": "SVM classification",
        "protocol": "linear SVM a class on frozen features, cost by 3-fold cross-validation",
        "versions": {**versions(process), "scikit-learn": _scikit_learn_version()},
        "config_digest": settings.digest(),
        "config": asdict(settings),
        "dataset": dataset,
        "train_folder": train.root,
        "test_folder": test.root,
        "num_train": len(train),
        "num_test": len(test),
        "metric": "mean over classes of AP in percent, area under the curve",
        "weights": describe_weights(weights),
        "seed": settings.seed,
        "num_processes": 1,
        "status": "finished",
        "error": None,
    }


def _features(
    encoder, source, settings, weights, process, batch_size, num_workers, say
) -> np.ndarray:
    """Unit vectors [N, D], float64."""
    loader = build_whole_loader(
        source,
        settings.size,
        batch_size,
        num_workers,
        pin_memory=process.device.type == "cuda",
        channels=weights.channels,
    )
    rate = RateLines(f"features of {source.root}", len(source), say)
    parts = []
    for features_BD, label_B in iterate_features(
        encoder_function(encoder, "backbone"),
        loader,
        process.device,
        *weights.pixel_statistics(),
    ):
        parts.append(features_BD.cpu())
        rate.add(len(label_B))
    return normalize_rows(torch.cat(parts).numpy())


def _scikit_learn_version() -> str:
    import sklearn

    return sklearn.__version__


def _write(output_dir: Path, results: dict, classes: Sequence[ClassResult]) -> None:
    summary = (
        f"**mAP {results['mAP']:.2f}** by the area under the curve, which other projects report "
        f"for this task; {results['mAP_11_points']:.2f} by the 11 points of VOC 2007. "
        f"{results['num_features']} features. {results['fits_not_converged']} fits did not "
        "converge in 2000 iterations."
    )
    table = markdown_table(
        ["class", "AP", "AP, 11 points", "cost", "cross-validation", "positive test images"],
        [[c.name, c.ap, c.ap_11, f"{c.cost:g}", c.cross_validation, c.num_positives]
         for c in classes],
    )  # fmt: skip
    write_results(output_dir, results, [summary, table])
