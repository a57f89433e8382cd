"""Batches: two augmented views for pretraining, one central view for evaluation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, default_collate

from moco import seeding
from moco.data.augment import (
    Recipe,
    apply_pil,
    eval_pil,
    eval_resize,
    sample_parameters,
    to_uint8_CHW,
)
from moco.data.images import ImageSource
from moco.data.sampler import EpochStream
from moco.errors import ConfigError, DataError

_PREFETCH_BATCHES = 2  # per worker


class TwoViews(Dataset):
    """`dataset[(epoch, index)]` -> (view_q, view_k, index), views uint8 [3, size, size].

    Each view's draws depend on (seed, epoch, index, view) alone.

    Args:
        recipe: of both views, or one for each.
    """

    def __init__(self, source: ImageSource, recipe: Recipe | tuple[Recipe, Recipe], seed: int):
        self.source = source
        self.recipes = recipe if isinstance(recipe, tuple) else (recipe, recipe)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        epoch, index = key
        image = self.source.open(index)
        view_q, view_k = (self._view(image, epoch, index, view) for view in (0, 1))
        return view_q, view_k, index

    def _view(self, image, epoch: int, index: int, view: int) -> torch.Tensor:
        rng = seeding.python_random(self.seed, "augment", epoch, index, view)
        parameters = sample_parameters(self.recipes[view], rng, *image.size)
        return to_uint8_CHW(apply_pil(image, parameters, self.recipes[view].size))


class OneView(Dataset):
    """`dataset[index]` -> (image uint8 [3, size, size], label, index): the view "eval".

    Raises: DataError where the source has no labels, ConfigError where resize < size.
    """

    def __init__(self, source: ImageSource, size: int, resize: int | None = None):
        if source.labels is None:
            raise DataError(
                f"{source.root}: is a flat folder of images; evaluation needs class folders, whose "
                "names are the labels"
            )
        self.source = source
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
        image = eval_pil(self.source.open(index), self.size, self.resize)
        return to_uint8_CHW(image), self.source.labels[index], index


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
) -> DataLoader:
    """Loader of this rank's share of global steps `first_step` .. `last_step` - 1, in one iterator.

    A batch is (view_q, view_k, index): uint8 [B, 3, size, size] twice and int64 [B], with
    B = global_batch / world_size. The number of workers changes no pixel.

    Args:
        recipe: of both views, or one for each.
    Raises: ConfigError at once for a batch that does not fit (see EpochStream); DataError while
        iterating, in this process, for an unreadable image.
    """
    stream = EpochStream(
        num_images=len(source),
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        first_step=first_step,
        last_step=last_step,
    )
    return _Loader(TwoViews(source, recipe, seed), stream, num_workers, pin_memory)


def build_eval_loader(
    source: ImageSource,
    size: int,
    batch_size: int,
    num_workers: int,
    *,
    resize: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Loader of every image once, in order: (image uint8 [B, 3, size, size], label, index).

    Args:
        resize: shorter side before the central crop; None for size * 256 / 224. With resize = size,
            square images of that size keep their pixels, as in the reference's CIFAR demo.
    Raises: DataError and ConfigError as `OneView`.
    """
    if batch_size < 1:
        raise ConfigError(f"evaluation batch size is {batch_size}; allowed: an integer >= 1")
    dataset = OneView(source, size, resize)
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    return _Loader(dataset, batches, num_workers, pin_memory)


class _Loader(DataLoader):
    """A DataLoader that raises a DataError of a worker as it is.

    torch re-raises a worker's exception with the worker's traceback as its message. So here the
    error travels as a value, in place of the batch, and is raised by the iterator.
    """

    def __init__(self, dataset: Dataset, batch_sampler, num_workers: int, pin_memory: bool):
        if num_workers < 0:
            raise ConfigError(f"number of loader workers is {num_workers}; allowed: 0 or more")
        super().__init__(
            _ErrorsAsValues(dataset),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=_init_worker,
            prefetch_factor=_PREFETCH_BATCHES if num_workers else None,
            # Without its own generator a loader draws from torch's global one.
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator:
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _ErrorsAsValues(Dataset):
    """Fetches a batch of samples, or the DataError that one of them raised."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, keys: list) -> list | DataError:
        try:
            return [self.dataset[key] for key in keys]
        except DataError as error:
            return error


def _collate(samples: list | DataError):
    return samples if isinstance(samples, DataError) else default_collate(samples)


def _init_worker(worker_id: int) -> None:
    """One thread a worker, and signals to the whole process group are left to the main process.

    Ctrl-C and a scheduler's SIGTERM reach every process of the group. The main process then saves
    a checkpoint and needs its workers until it is done. SIGTERM is obeyed only when the main
    process itself sends it, which is how multiprocessing ends its workers.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked in this thread, and in the waiting thread, which inherits the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent_sigterm, daemon=True).start()


def _obey_parent_sigterm() -> None:
    main_process = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
