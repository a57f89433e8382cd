"""Samples loaded ahead by processes, in a given order."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from detection.data.packed import PackedRecords
from moco.errors import DataError, dead_worker_as_data_error, dead_worker_error

WORKERS_KEY = "DATALOADER.NUM_WORKERS"


def start_loader(
    records: Sequence[dict],
    load: Callable[[Sequence[dict], Any], dict],
    batches: Iterable[list],
    *,
    num_workers: int,
    num_filtered: int = 0,
) -> Loader:
    """Start `num_workers` processes, or none, that load batches.

    Args:
        load: (records, draw) -> sample; a DataError of it is raised where its batch is asked for.
        batches: lists of draws. They are iterated in this process, a few batches ahead.
    """
    loader = torch.utils.data.DataLoader(
        _Dataset(PackedRecords(records) if num_workers else records, load),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_init_worker,
        # Without a generator of its own the loader would draw from torch's global one. Nothing
        # is drawn in its workers.
        generator=torch.Generator().manual_seed(0),
    )
    return Loader(loader, num_filtered)


class Loader:
    """An iterator of batches; `num_filtered` images without boxes were left out."""

    def __init__(self, loader: torch.utils.data.DataLoader, num_filtered: int) -> None:
        self.num_filtered = num_filtered
        self._batches = iter(loader)
        # Workers ignore SIGTERM, by which torch and Python end those that are left. So they are
        # ended in order: on close, when this object goes (its finalizer keeps the iterator out
        # of a garbage cycle, where its queues would die first), and before Python's own exit.
        has_workers = loader.num_workers > 0
        self._end = weakref.finalize(self, _end_workers, self._batches if has_workers else None)
        self._end.atexit = False
        atexit.register(self._end)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[dict]:
        if self._batches is None:
            raise StopIteration
        try:
            with dead_worker_as_data_error(WORKERS_KEY):
                batch = next(self._batches)
        except (EOFError, OSError) as error:  # it died while it handed over a tensor
            raise dead_worker_error(error, WORKERS_KEY) from error
        for sample in batch:
            if isinstance(sample, DataError):
                raise sample
        return batch

    def close(self) -> None:
        """End the worker processes; the iterator is exhausted from then on."""
        self._end()
        self._batches = None


def _end_workers(batches) -> None:
    if batches is None:
        return
    try:
        batches._shutdown_workers()  # what torch itself calls when it drops the iterator
    except RuntimeError as error:
        # torch's signal handler reports the death of a worker, which next() may have met before
        # it as a broken pipe. What is left is ended all the same, by a `finally` of torch's.
        if "DataLoader worker" not in str(error):
            raise


class _Dataset(torch.utils.data.Dataset):
    def __init__(self, records: Sequence[dict], load: Callable[[Sequence[dict], Any], dict]):
        self._records, self._load = records, load

    def __getitem__(self, draw) -> dict | DataError:
        try:
            return self._load(self._records, draw)
        except DataError as error:
            # As a value, since torch would wrap a raised one in the worker's whole traceback.
            return DataError(str(error))


def _as_list(samples: list) -> list:
    return samples


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # A signal to the process group is for the main process, which still needs its batches to
    # finish the step and write a checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
