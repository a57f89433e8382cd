"""The nearest training images of a data set's test images, by the features of an encoder.

Each process encodes its share of both splits. Training features are compared as they come, on the
device, and are never held all at once; only the test features and the neighbours are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from moco import distributed
from moco.data.images import ImageSource
from moco.data.loader import build_eval_loader
from moco.data.subset import SubsetSource
from moco.distributed import ProcessInfo
from moco.errors import MocoError
from moco.evaluation.features import RateLines, iterate_features
from moco.evaluation.neighbours import BLOCK, NeighbourSearch


@dataclass(frozen=True)
class FeatureReader:
    """How images become features.

    Attributes:
        encode: images [B, C, H, W] -> features [B, width]; width: D.
        size, resize: of the view, see `OneView`. mean, std: of its normalisation.
        backend: "pil" or "opencv". channels_last: the images' memory format. channels: C.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    width: int
    process: ProcessInfo
    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    num_workers: int
    backend: str = "pil"
    channels_last: bool = False
    channels: int = 3

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
            backend=self.backend,
            channels=self.channels,
        )
        for features_BD, _ in iterate_features(
            self.encode, loader, self.process.device, self.mean, self.std,
            channels_last=self.channels_last,
        ):  # fmt: skip
            yield features_BD
            rate.add(len(features_BD))


def find_neighbours(
    reader: FeatureReader,
    train: ImageSource,
    test: ImageSource,
    *,
    k: int,
    dtype: torch.dtype,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> NeighbourSearch | None:
    """The `k` nearest of `train` for each image of `test`, on every process; a collective call.

    Args:
        dtype: of the features that are compared.
        stop: asked between batches on each process; where it is true on one of them, all give up.
    Returns: None where `stop` said so.
    Raises: DataError for an unreadable image, NonFiniteError for weights that have diverged; on
        every process, whichever met it.
    """
    own = _share(len(test), reader.process)
    rows = torch.empty(len(own), reader.width, device=reader.process.device)
    batches = reader.batches(test, own, RateLines("test images", len(own), say))
    if not _all_done(partial(_fill, rows, _until(stop, batches)), stop):
        return None
    search = NeighbourSearch(_gather_rows(rows), k, dtype=dtype)
    del rows
    own = _share(len(train), reader.process)
    batches = reader.batches(train, own, RateLines("training images", len(own), say))
    if not _all_done(partial(_add_all, search, _until(stop, batches), own.start), stop):
        return None
    search.join_processes()
    return search


def _all_done(work: Callable[[], None], stop: Callable[[], bool]) -> bool:
    """Do this process's share. Returns: whether all did theirs, and none is to stop.

    A process that failed must not leave the others waiting: its error is raised on all.
    """
    error = None
    try:
        work()
    except MocoError as caught:
        error = caught
    everyone = distributed.gather_objects((error, stop()))
    for failed, _ in everyone:
        if failed is not None:
            raise failed
    return not any(stopped for _, stopped in everyone)


def _fill(rows: torch.Tensor, batches: Iterator[torch.Tensor]) -> None:
    done = 0
    for features in batches:
        rows[done : done + len(features)] = features
        done += len(features)


def _add_all(search: NeighbourSearch, batches: Iterator[torch.Tensor], first: int) -> None:
    pending: list[torch.Tensor] = []
    for features in batches:
        pending.append(features)
        if sum(map(len, pending)) >= BLOCK:
            first = _add(search, pending, first)
    if pending:
        _add(search, pending, first)


def _until(stop: Callable[[], bool], batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for features in batches:
        if stop():
            batches.close()  # and the loader's workers with it
            return
        yield features


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
