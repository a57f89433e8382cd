"""kNN classification of a data set by an encoder's features, with its results file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moco import distributed
from moco.devices import out_of_memory_as_error, set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import ConfigError
from moco.evaluation.features import encoder_function, feature_width
from moco.evaluation.knn import check_sweep, sweep
from moco.evaluation.knn_search import FeatureReader, find_neighbours
from moco.evaluation.memory import peak_memory
from moco.evaluation.neighbours import memory_plan
from moco.evaluation.results import (
    describe_data,
    describe_weights,
    markdown_table,
    versions,
    write_results,
)
from moco.evaluation.splits import find_splits, splits_in_words
from moco.evaluation.weights import Pretrained, read_pretrained


@dataclass(frozen=True)
class KnnSettings:
    """What determines the accuracies.

    Attributes:
        ks, temperatures: all pairs are scored; the first of each give the result.
        features: "backbone" or "head"; the two are not comparable.
        size, resize: of the view; None: what the weights were trained with (else 224), and
            size * 256 / 224, or size for a CIFAR stem.
        dtype: "float32" or "float16", of the features that are compared.
        amp, channels_last: of the encoder.
        backend: "pil", or "opencv" for nearly its pixels, faster.
    """

    ks: tuple[int, ...] = (200,)
    temperatures: tuple[float, ...] = (0.1,)
    features: str = "backbone"
    size: int | None = None
    resize: int | None = None
    dtype: str = "float32"
    amp: bool = False
    channels_last: bool = False
    backend: str = "pil"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("features", ("backbone", "head")),
            ("dtype", ("float32", "float16")),
            ("backend", ("pil", "opencv")),
        ):
            if getattr(self, field) not in allowed:
                raise ConfigError(
                    f"kNN: {field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}"
                )

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def evaluate_knn(
    settings: KnnSettings,
    weights: str | Pretrained,
    data_dir: str,
    output_dir: str | Path | None,
    process: ProcessInfo,
    *,
    test_dir: str | None = None,
    batch_size: int = 256,
    num_workers: int = 4,
    say: Callable[[str], None] = print,
) -> dict:
    """Encode both splits, find neighbours, vote; write results.json and results.md.

    Training features are compared as they come and never held all at once. With several
    processes each encodes its share of both splits; the accuracies are those of one process.

    Args:
        data_dir, test_dir: see `find_splits`. output_dir: None writes nothing.
    Returns: the content of results.json, on every process.
    Raises: MocoError for what the user gave.
    """
    started = time.monotonic()
    weights = read_pretrained(weights) if isinstance(weights, str) else weights
    for note in weights.notes:
        say(note)
    train, test = find_splits(data_dir, test_dir, weights.decoding)
    check_sweep(settings.ks, settings.temperatures, len(train))
    reader = _feature_reader(settings, weights, process, batch_size, num_workers)
    k = max(settings.ks)
    dtype = getattr(torch, settings.dtype)
    plan = memory_plan(
        num_train=len(train), num_test=len(test), width=reader.width, k=k, dtype=dtype
    )
    say(
        f"kNN on {settings.features} features of {weights.path} ({weights.arch}), {reader.width} "
        f"features: {splits_in_words(train, train, test)}"
    )
    whole = len(train) * reader.width * dtype.itemsize
    say(plan_in_words(plan, whole))
    with out_of_memory_as_error(
        lambda: f"kNN (rank {process.rank})",
        lambda: "Lower --batch-size, or compare float16 features",
    ):
        search = find_neighbours(reader, train, test, k=k, dtype=dtype, say=say)
    labels, test_labels = (torch.tensor(source.labels) for source in (train, test))
    neighbour_labels = labels.to(process.device)[search.index_MK]
    accuracies = sweep(
        search.similarity_MK, neighbour_labels, test_labels.to(process.device), settings.ks,
        settings.temperatures, num_classes=len(train.class_names),
    )  # fmt: skip
    results = _results(settings, weights, train, test, process, reader, accuracies, plan)
    results["seconds"] = round(time.monotonic() - started, 1)
    if output_dir is not None:
        distributed.on_main(lambda: _write(Path(output_dir), results))
    say(
        f"{settings.features} features: top-1 {results['top1']:.2f} with k {settings.ks[0]}, "
        f"temperature {settings.temperatures[0]:g}; best of the sweep {results['best']['top1']:.2f}"
    )
    return results


def _feature_reader(
    settings: KnnSettings,
    weights: Pretrained,
    process: ProcessInfo,
    batch_size: int,
    num_workers: int,
) -> FeatureReader:
    size = settings.size or weights.size or 224
    encoder = weights.build_encoder(image_size=size, head=settings.features == "head")
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    encoder.to(process.device, memory_format=memory_format)
    set_arithmetic(process.device)
    encode = encoder_function(encoder, settings.features, amp=settings.amp)
    mean, std = weights.pixel_statistics()
    return FeatureReader(
        encode=encode,
        width=feature_width(encode, size, process.device, weights.channels),
        process=process,
        size=size,
        resize=settings.resize or (size if weights.options["stem"] == "cifar" else None),
        mean=mean,
        std=std,
        batch_size=batch_size,
        num_workers=num_workers,
        backend=settings.backend,
        channels_last=settings.channels_last,
        channels=weights.channels,
    )


def plan_in_words(plan: dict[str, int], whole: int) -> str:
    """The line about memory before a run. whole: bytes of all training features."""
    parts = ", ".join(f"{name} {_mib(count)}" for name, count in plan.items())
    return (
        f"memory beside the network: {_mib(sum(plan.values()))} ({parts}); all training features "
        f"at once would take {_mib(whole)}"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _results(settings, weights, train, test, process, reader, accuracies, plan) -> dict:
    rows = [{"k": k, "temperature": t, "top1": a} for (k, t), a in accuracies.items()]
    best = max(rows, key=lambda row: row["top1"])
    return {
        "engine": "kNN",
        "protocol": f"weighted kNN on {settings.features} features, no augmentation",
        "features": settings.features,
        "versions": versions(process),
        "config_digest": settings.digest(),
        "config": asdict(settings),
        **describe_data(train, test),
        "metric": "top-1 accuracy in percent",
        "weights": describe_weights(weights),
        "num_processes": process.world_size,
        "status": "finished",
        "error": None,
        "num_features": reader.width,
        "size": reader.size,
        "resize": reader.resize,
        "k": settings.ks[0],
        "temperature": settings.temperatures[0],
        "top1": rows[0]["top1"],
        "best": best,
        "sweep": rows,
        "memory": {"computed_bytes": plan, **peak_memory(process.device)},
    }


def _write(output_dir: Path, results: dict) -> None:
    temperatures = list(dict.fromkeys(row["temperature"] for row in results["sweep"]))
    ks = list(dict.fromkeys(row["k"] for row in results["sweep"]))
    found = {(row["k"], row["temperature"]): row["top1"] for row in results["sweep"]}
    table = markdown_table(
        ["k", *(f"temperature {t:g}" for t in temperatures)],
        [[k, *(found[k, t] for t in temperatures)] for k in ks],
    )
    note = (
        f"Top-1 in percent of weighted kNN on **{results['features']}** features "
        f"({results['num_features']} of them); those of backbone and head are not comparable. The "
        f"result is the first of each list: **{results['top1']:.2f}** with k {results['k']}, "
        f"temperature {results['temperature']:g}."
    )
    write_results(output_dir, results, [note, table])
