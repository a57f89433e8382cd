"""Batches: two augmented views for pretraining, one central view for evaluation."""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, default_collate

from moco.data.augment import Recipe, eval_resize
from moco.data.backends import choose_backend
from moco.data.bad_images import BadImages
from moco.data.device_crops import GpuDecoder, ResidentImages
from moco.data.first_sight import FirstSight, Seen, SeenFlags
from moco.data.images import ImageSource
from moco.data.sampler import EpochStream, Order, epoch_order
from moco.data.two_views import TwoTables, TwoTablesAndFile, TwoViews
from moco.data.workers import (
    Board,
    check_shared_memory,
    full_shared_memory_as_error,
    join_board,
    note_idle,
)
from moco.errors import ConfigError, DataError

_PREFETCH_BATCHES = 2  # per worker
_WORKER_TIMEOUT_SECONDS = 300.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class OneView(Dataset):
    """`dataset[index]` -> (image uint8 [C, size, size], label, index): the view "eval".

    Raises: DataError where the source has no labels, ConfigError where resize < size.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        resize: int | None = None,
        backend: str = "pil",
        channels: int = 3,
    ):
        if source.labels is None:
            raise DataError(
                f"{source.root}: is a flat folder of images; evaluation needs class folders, whose "
                "names are the labels"
            )
        self.source, self.channels = source, channels
        self.backend = backend  # its name: its functions cannot be sent to a worker
        self.size = size
        self.resize = eval_resize(size) if resize is None else resize
        if not 1 <= self.size <= self.resize:
            raise ConfigError(
                f"evaluation view: size is {size}, resize {self.resize}; "
                "allowed: 1 <= size <= resize"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        backend = choose_backend(self.backend, self.channels)
        image = backend.read(self.source, index)
        view = torch.empty(self.channels, self.size, self.size, dtype=torch.uint8)
        backend.write_eval(image, self.size, self.resize, view.numpy())
        return view, self.source.labels[index], index


def build_pretrain_loader(
    source: ImageSource,
    recipe: Recipe | tuple[Recipe, Recipe],
    *,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
    num_workers: int,
    pin_memory: bool,
    backend: str = "opencv",
    decode: str = "cpu",
    resident: bool = False,
    device: torch.device | str = "cpu",
    order: Order = epoch_order,
    bad_images: BadImages | None = None,
    worker_timeout_s: float = _WORKER_TIMEOUT_SECONDS,
    channels: int = 3,
    seen: SeenObserver | None = None,
) -> DataLoader:
    """Loader of this rank's share of global steps `first_step` .. `last_step` - 1, in one iterator.

    A batch is (view_q, view_k, index): uint8 [B, C, size, size] twice and int64 [B], with
    B = global_batch / world_size; with the backend "device" also (table_q, table_k), see
    `TwoViews`. `to_inputs` makes all of them a network's inputs. The number of workers changes no
    pixel.

    Args:
        recipe: of both views, or one for each.
        backend, decode, resident: AUGMENT.BACKEND, DECODE and RESIDENT of the configuration.
        device: where a resident data set lives and the GPU decodes.
        order: of the images of an epoch. bad_images: see `TwoViews`.
        worker_timeout_s: without progress, after which workers are stuck; 0: never.
        channels: C, DATA.CHANNELS; 3 with `resident` and `decode` "gpu".
        seen: receives the hashes of images that are seen for the first time.
    Raises: ConfigError at once for a batch that does not fit (see EpochStream) or a device that
        cannot decode; DataError at once for images that cannot be resident or too little shared
        memory, and while iterating, in this process, for an unreadable image or stuck workers.
    """
    stream = EpochStream(
        num_images=len(source),
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        first_step=first_step,
        last_step=last_step,
        order=order,
    )
    if seen is not None:
        # Resident images are all hashed now; which of them a step shows is known by their numbers.
        source = FirstSight(source, SeenFlags(len(source)) if resident else seen.flags)
    views = TwoViews(source, recipe, seed, backend, bad_images, channels)
    recipes, size, device = views.recipes, views.recipes[0].size, torch.device(device)
    if resident:
        images = ResidentImages(source, size, device)
        tables = TwoTables(images.width, images.height, recipes, seed)
        return _Loader(
            tables, stream, num_workers, pin_memory, finish=images, timeout_s=worker_timeout_s,
            seen=seen,
        )  # fmt: skip
    if decode == "gpu":
        decoder = GpuDecoder(source, size, device)
        files = TwoTablesAndFile(source, recipes, seed)
        return _Loader(
            files, stream, num_workers, pin_memory, finish=decoder, timeout_s=worker_timeout_s,
            seen=seen,
        )  # fmt: skip
    batch_bytes = 2 * channels * size * size * stream.per_rank
    check_shared_memory(batch_bytes, _PREFETCH_BATCHES * num_workers + 1, num_workers)
    return _Loader(
        views, stream, num_workers, pin_memory, timeout_s=worker_timeout_s, seen=seen
    )


def build_eval_loader(
    source: ImageSource,
    size: int,
    batch_size: int,
    num_workers: int,
    *,
    resize: int | None = None,
    pin_memory: bool = False,
    backend: str = "pil",
    channels: int = 3,
) -> DataLoader:
    """Loader of every image once, in order: (image uint8 [B, C, size, size], label, index).

    Args:
        resize: shorter side before the central crop; None for size * 256 / 224. With resize = size,
            square images of that size keep their pixels, as in the reference's CIFAR demo.
        backend: "pil", or "opencv" for nearly its pixels, faster. channels: C, DATA.CHANNELS.
    Raises: DataError and ConfigError as `OneView`.
    """
    if batch_size < 1:
        raise ConfigError(f"evaluation batch size is {batch_size}; allowed: an integer >= 1")
    dataset = OneView(source, size, resize, backend, channels)
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    return _Loader(dataset, batches, num_workers, pin_memory)


class SeenObserver(Protocol):
    """Who wants to know which images were seen; `flags` are shared with the workers."""

    flags: SeenFlags

    def add(self, step: int, seen: Seen) -> None:
        """Images in the batch of `step` that were seen for the first time."""


class _Loader(DataLoader):
    """A DataLoader that raises a DataError of a worker as it is.

    torch re-raises a worker's exception with the worker's traceback as its message. So here the
    error travels as a value, in place of the batch, and is raised by the iterator.

    Args:
        dataset: its `batch(keys)` makes a batch; without one, samples are collated.
        finish: applied to each batch in the main process.
        timeout_s: see `Board`.
        seen: of `build_pretrain_loader`; `batch_sampler` is an EpochStream then.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler,
        num_workers: int,
        pin_memory: bool,
        finish: Callable | None = None,
        timeout_s: float = _WORKER_TIMEOUT_SECONDS,
        seen: SeenObserver | None = None,
    ):
        self.finish, self.seen = finish, seen
        if num_workers < 0:
            raise ConfigError(f"number of loader workers is {num_workers}; allowed: 0 or more")
        source = getattr(dataset, "source", None)
        self.board = Board(num_workers, source and source.note_path, timeout_s)
        super().__init__(
            _ErrorsAsValues(dataset, with_seen=seen is not None),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=functools.partial(_init_worker, self.board.rows),
            prefetch_factor=_PREFETCH_BATCHES if num_workers else None,
            # Without its own generator a loader draws from torch's global one.
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator:
        for number, batch in enumerate(self.board.watched(super().__iter__)):
            if isinstance(batch, DataError):
                raise batch
            if self.seen is not None:
                yield self._finished(self.batch_sampler.first_step + number, *batch)
            else:
                yield batch if self.finish is None else self.finish(batch)

    def _finished(self, step: int, batch, seen: Seen | None):
        """The batch, once `self.seen` knows whose images are in it."""
        if isinstance(self.finish, ResidentImages):
            index = batch[0].numpy()
            seen = Seen(index, self.finish.seen.rows[index])
        if isinstance(self.finish, GpuDecoder):
            batch = self.finish(batch, seen)
        elif self.finish is not None:
            batch = self.finish(batch)
        if seen is not None:
            self.seen.add(step, seen)
        return batch


class _ErrorsAsValues(Dataset):
    """Fetches a batch, or the DataError that one of its samples raised.

    with_seen: fetches pairs of a batch and what its images' first sight gave, or None.
    """

    def __init__(self, dataset: Dataset, *, with_seen: bool = False):
        self.dataset, self.with_seen = dataset, with_seen

    def __getitems__(self, keys: list):
        try:
            with full_shared_memory_as_error():
                if self.with_seen:
                    batch = self.dataset.batch(keys)
                    source = getattr(self.dataset, "source", None)  # resident images have none
                    return batch, None if source is None else source.take()
                if hasattr(self.dataset, "batch"):
                    return self.dataset.batch(keys)
                return default_collate([self.dataset[key] for key in keys])
        except DataError as error:
            return error
        finally:
            note_idle()


def _as_it_is(batch):
    return batch


def _init_worker(rows: ctypes.Array, worker_id: int) -> None:
    """One thread a worker, and signals to the whole process group are left to the main process.

    Ctrl-C and a scheduler's SIGTERM reach every process of the group. The main process then saves
    a checkpoint and needs its workers until it is done. SIGTERM is obeyed only when the main
    process itself sends it, which is how multiprocessing ends its workers.
    """
    join_board(rows, worker_id)
    spare_overhead()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked in this thread, and in the waiting thread, which inherits the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent_sigterm, daemon=True).start()


def spare_overhead() -> None:
    """Make this process one that only augments: it saves about a tenth of its time.

    One thread. What exists now stays and is not looked through for garbage again. And freed
    pictures are kept for the next ones: glibc would hand each back to the system and have its pages
    given, and zeroed, anew.
    """
    torch.set_num_threads(1)
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's, malloc.h
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _obey_parent_sigterm() -> None:
    main_process = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
