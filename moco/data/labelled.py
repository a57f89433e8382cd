"""Batches for training a classifier: one augmented view and its label."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from moco import seeding
from moco.data.augment import Recipe, build_recipe, sample_parameters
from moco.data.backends import choose_backend
from moco.data.images import ImageSource
from moco.data.loader import _Loader
from moco.data.sampler import epoch_order
from moco.errors import ConfigError, DataError


def classification_recipe(size: int, crop_scale: tuple[float, float], flip: float) -> Recipe:
    """Random resized crop and horizontal flip alone (facebookresearch/moco, main_lincls.py)."""
    return build_recipe(
        "v2",
        size=size,
        crop_scale=crop_scale,
        jitter_probability=0.0,
        grey_probability=0.0,
        blur_probability=0.0,
        flip_probability=flip,
    )


class LabelledStream:
    """Batch sampler over global steps `first_step` .. `last_step` - 1, as `EpochStream`.

    The last, incomplete batch of an epoch is kept, as main_lincls.py does; its images are shared
    out as evenly as they go. A process that gets none reads the batch's first image, which counts
    for nothing (`num_images_of`).

    Args:
        drop_last: leave that batch out.
    Raises: ConfigError for a batch that the processes cannot share or the images cannot fill.
    """

    def __init__(
        self,
        *,
        num_images: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int = 0,
        last_step: int = 0,
        drop_last: bool = False,
    ):
        least = global_batch if drop_last else 1
        if global_batch < 1 or global_batch % world_size or num_images < least:
            raise ConfigError(
                f"TRAIN.BATCH_SIZE {global_batch} (global) with {num_images} images on "
                f"{world_size} processes: allowed is a multiple of {world_size}"
                + (f" up to {num_images}" if drop_last else "")
                + "; change the batch size, the number of processes or the images"
            )
        assert 0 <= rank < world_size and 0 <= first_step
        self.num_images = num_images
        self.global_batch = global_batch
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.first_step, self.last_step = first_step, last_step
        self.drop_last = drop_last

    @property
    def steps_per_epoch(self) -> int:
        whole = self.num_images // self.global_batch
        return whole if self.drop_last else -(-self.num_images // self.global_batch)

    def num_images_of(self, step: int) -> tuple[int, int]:
        """How many images of a step are this process's, and how many the global batch has."""
        start, stop, total = self._share(step)
        return stop - start, total

    def _share(self, step: int) -> tuple[int, int, int]:
        first = step % self.steps_per_epoch * self.global_batch
        total = min(self.global_batch, self.num_images - first)
        cuts = [first + total * r // self.world_size for r in (self.rank, self.rank + 1)]
        return *cuts, total

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            epoch = step // self.steps_per_epoch
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.num_images, self.seed, epoch)
            start, stop, _ = self._share(step)
            if start == stop:
                start = step % self.steps_per_epoch * self.global_batch
                stop = start + 1
            yield [(epoch, index) for index in order[start:stop].tolist()]


class LabelledViews(Dataset):
    """`dataset[(epoch, index)]` -> (view uint8 [C, size, size], label, index).

    The view's draws depend on (seed, epoch, index) alone.

    Args:
        backend: "pil" (the reference's pixels), or "opencv" for nearly them, faster.
    Raises: DataError where the source has no labels.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        seed: int,
        backend: str = "pil",
        channels: int = 3,
    ):
        if source.labels is None:
            raise DataError(
                f"{source.root}: is a flat folder of images; a classifier needs class folders, "
                "whose names are the labels"
            )
        self.source, self.recipe, self.seed = source, recipe, seed
        self.labels = source.labels
        self.backend, self.channels = choose_backend(backend, channels), channels

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        return tuple(values[0] for values in self.batch([key]))

    def batch(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """The samples of `keys`: views uint8 [B, C, size, size], labels [B], indices [B]."""
        backend, size = self.backend, self.recipe.size
        views = torch.empty(len(keys), self.channels, size, size, dtype=torch.uint8)
        out = views.numpy()
        for number, (epoch, index) in enumerate(keys):
            image = backend.read(self.source, index)
            rng = seeding.python_random(self.seed, "labelled-view", epoch, index)
            parameters = sample_parameters(self.recipe, rng, *backend.size(image))
            backend.finish(backend.crop(image, parameters, size), parameters, out[number])
        indices = [index for _, index in keys]
        labels = [self.labels[index] for index in indices]
        return views, torch.tensor(labels), torch.tensor(indices)


def build_labelled_loader(
    source: ImageSource,
    recipe: Recipe,
    stream: LabelledStream,
    *,
    num_workers: int,
    pin_memory: bool,
    backend: str = "pil",
    channels: int = 3,
) -> DataLoader:
    """Loader of this process's share of the stream: (view uint8 [B, C, size, size], label, index).

    The number of workers changes no pixel.
    Raises: ConfigError, DataError as the classes above; DataError while iterating for an unreadable
        image.
    """
    views = LabelledViews(source, recipe, stream.seed, backend, channels)
    return _Loader(views, stream, num_workers, pin_memory)
