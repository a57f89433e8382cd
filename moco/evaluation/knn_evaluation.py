"""kNN classification of a data set by an encoder's features, with its results file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moco import distributed
from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD
from moco.data.images import ImageSource
from moco.data.loader import build_eval_loader
from moco.data.subset import SubsetSource
from moco.devices import out_of_memory_as_error, set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import ConfigError
from moco.evaluation.features import RateLines, encoder_function, iterate_features
from moco.evaluation.knn import check_sweep, sweep
from moco.evaluation.memory import peak_memory
from moco.evaluation.neighbours import BLOCK, NeighbourSearch, memory_plan
from moco.evaluation.results import (
    describe_data,
    describe_weights,
    markdown_table,
    versions,
    write_results,
)
from moco.evaluation.splits import find_splits
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
    train, test = find_splits(data_dir, test_dir)
    check_sweep(settings.ks, settings.temperatures, len(train))
    extract = _Extraction(settings, weights, process, batch_size, num_workers)
    k = max(settings.ks)
    dtype = getattr(torch, settings.dtype)
    plan = memory_plan(
        num_train=len(train), num_test=len(test), width=extract.width, k=k, dtype=dtype
    )
    say(
        f"kNN on {settings.features} features of {weights.path} ({weights.arch}): {len(train)} "
        f"training and {len(test)} test images, {extract.width} features, "
        f"{len(train.class_names)} classes"
    )
    whole = len(train) * extract.width * dtype.itemsize
    say(plan_in_words(plan, whole))
    with out_of_memory_as_error(
        lambda: f"kNN (rank {process.rank})",
        lambda: "Lower --batch-size, or compare float16 features",
    ):
        search = _search(extract, train, test, k, dtype, say)
    labels, test_labels = (torch.tensor(source.labels) for source in (train, test))
    neighbour_labels = labels.to(process.device)[search.index_MK]
    accuracies = sweep(
        search.similarity_MK, neighbour_labels, test_labels.to(process.device), settings.ks,
        settings.temperatures, num_classes=len(train.class_names),
    )  # fmt: skip
    results = _results(settings, weights, train, test, process, extract, accuracies, plan)
    results["seconds"] = round(time.monotonic() - started, 1)
    if output_dir is not None:
        distributed.on_main(lambda: _write(Path(output_dir), results))
    say(
        f"{settings.features} features: top-1 {results['top1']:.2f} with k {settings.ks[0]}, "
        f"temperature {settings.temperatures[0]:g}; best of the sweep {results['best']['top1']:.2f}"
    )
    return results


class _Extraction:
    """Batches of features of a source's images; `width` is D."""

    def __init__(self, settings, weights: Pretrained, process, batch_size, num_workers):
        self.settings, self.process = settings, process
        self.batch_size, self.num_workers = batch_size, num_workers
        self.size = settings.size or weights.size or 224
        own_resize = self.size if weights.options["stem"] == "cifar" else None
        self.resize = settings.resize or own_resize
        self.mean, self.std = weights.mean or IMAGENET_MEAN, weights.std or IMAGENET_STD
        encoder = weights.build_encoder(image_size=self.size, head=settings.features == "head")
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        encoder.to(process.device, memory_format=memory_format)
        set_arithmetic(process.device)
        self.encode = encoder_function(encoder, settings.features, amp=settings.amp)
        with torch.inference_mode():
            blank = torch.zeros(1, 3, self.size, self.size, device=process.device)
            self.width = self.encode(blank).shape[1]

    def batches(self, source: ImageSource, own: range, rate: RateLines) -> Iterator[torch.Tensor]:
        """Features [B, D] of the images `own`, in order."""
        if not own:
            return
        loader = build_eval_loader(
            SubsetSource(source, own),
            self.size,
            self.batch_size,
            self.num_workers,
            resize=self.resize,
            pin_memory=self.process.device.type == "cuda",
            backend=self.settings.backend,
        )
        for features_BD, _ in iterate_features(
            self.encode, loader, self.process.device, self.mean, self.std,
            channels_last=self.settings.channels_last,
        ):  # fmt: skip
            yield features_BD
            rate.add(len(features_BD))


def _search(extract: _Extraction, train, test, k, dtype, say) -> NeighbourSearch:
    process = extract.process
    own, done = _share(len(test), process), 0
    rate = RateLines("test images", len(own), say)
    rows = torch.empty(len(own), extract.width, device=process.device)
    for features in extract.batches(test, own, rate):
        rows[done : done + len(features)] = features
        done += len(features)
    search = NeighbourSearch(_gather_rows(rows), k, dtype=dtype)
    del rows
    own, pending = _share(len(train), process), []
    first, rate = own.start, RateLines("training images", len(own), say)
    for features in extract.batches(train, own, rate):
        pending.append(features)
        if sum(map(len, pending)) >= BLOCK:
            first = _add(search, pending, first)
    if pending:
        _add(search, pending, first)
    search.join_processes()
    return search


def _add(search: NeighbourSearch, pending: list[torch.Tensor], first: int) -> int:
    """Hand the pending features over; returns the index after them."""
    block = torch.cat(pending)
    pending.clear()
    search.add(block, first)
    return first + len(block)


def _share(num: int, process: ProcessInfo) -> range:
    """A run of indices for each process, in rank order."""
    cuts = [num * r // process.world_size for r in (process.rank, process.rank + 1)]
    return range(*cuts)


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, whose numbers may differ."""
    if distributed.world_size() == 1:
        return rows
    counts = distributed.all_gather_cat(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = distributed.all_gather_cat(padded).view(len(counts), max(counts), -1)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def plan_in_words(plan: dict[str, int], whole: int) -> str:
    """The line about memory before a run. whole: bytes of all training features."""
    parts = ", ".join(f"{name} {_mib(count)}" for name, count in plan.items())
    return (
        f"memory beside the network: {_mib(sum(plan.values()))} ({parts}); all training features "
        f"at once would take {_mib(whole)}"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _results(settings, weights, train, test, process, extract, accuracies, plan) -> dict:
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
        "num_features": extract.width,
        "size": extract.size,
        "resize": extract.resize,
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
