"""Two views of images in batches, as loader workers make them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from moco.data.augment import Recipe, ViewParameters
from moco.data.augment_device import table_row
from moco.data.backends import BACKENDS, Backend, choose_backend, draw_views
from moco.data.bad_images import BadImages
from moco.data.decode import plain_jpeg_size, read_rgb
from moco.data.first_sight import FirstSight
from moco.data.images import ImageSource
from moco.errors import ConfigError

# So many images, of so many pixels, go through each step before the next: its code stays in the
# caches, which is 6 % faster than image by image.
_TOGETHER, _MAX_PIXELS = 16, 16_000_000


class TwoViews(Dataset):
    """`dataset[(epoch, index)]` -> (view_q, view_k, index), views uint8 [C, size, size].

    Each view's draws depend on (seed, epoch, index, view) alone. With the backend "device" the
    views are crops only, and (table_q, table_k), the parameters `apply_batch` needs, come after.

    Args:
        recipe: of both views, or one for each; their size must be the same.
        backend: a name in BACKENDS.
        bad_images: replaces unreadable images; without it they are errors.
        channels: C, DATA.CHANNELS.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe | tuple[Recipe, Recipe],
        seed: int,
        backend: str = "opencv",
        bad_images: BadImages | None = None,
        channels: int = 3,
    ):
        self.source, self.bad_images, self.channels = source, bad_images, channels
        self.recipes = recipe if isinstance(recipe, tuple) else (recipe, recipe)
        self.seed = seed
        if backend not in BACKENDS:
            raise ConfigError(
                f"AUGMENT.BACKEND {backend!r} is unknown; allowed: {', '.join(BACKENDS)}"
            )
        self.backend = backend

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor | int, ...]:
        view_q, view_k, index, *tables = self.batch([key])
        return view_q[0], view_k[0], int(index), *(table[0] for table in tables)

    def batch(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """The samples of `keys`: views uint8 [B, C, size, size] twice, index [B], tables."""
        backend, size = self._functions(), self.recipes[0].size
        views = [_empty_batch(len(keys), self.channels, size, size) for _ in self.recipes]
        out = [view.numpy() for view in views]
        read, drawn, images, num_pixels = [], [], [], 0
        for key in keys:
            key, image = self._read(*key)
            width, height = backend.size(image)
            read.append(key)
            drawn.append(draw_views(self.recipes, self.seed, *key, width, height))
            images.append(image)
            num_pixels += width * height
            if len(images) == _TOGETHER or num_pixels > _MAX_PIXELS or len(read) == len(keys):
                self._write(images, drawn, out, first=len(read) - len(images))
                images, num_pixels = [], 0
        return *views, _indices(read), *(_tables(drawn) if backend.on_device else ())

    def _functions(self) -> Backend:
        return choose_backend(self.backend, self.channels)  # kept by name: it is sent to workers

    def _read(self, epoch: int, index: int) -> tuple[tuple[int, int], Any]:
        """The key and the image, or those of the image that replaces a bad one."""
        read = functools.partial(self._functions().read, self.source)
        if self.bad_images is None:
            image = read(index)
        else:
            image, index = self.bad_images.read(read, epoch, index)
        if isinstance(self.source, FirstSight):
            self.source.note(index, image)
        return (epoch, index), image

    def _write(
        self, images: list, drawn: list[list[ViewParameters]], out: list[np.ndarray], *, first: int
    ) -> None:
        """Write the views of samples `first` .. first + len(images) - 1 of the batch."""
        backend, size = self._functions(), self.recipes[0].size
        crops = [
            [backend.crop(image, p, size) for p in drawn[first + number]]
            for number, image in enumerate(images)
        ]
        for number, of_image in enumerate(crops, start=first):
            for crop, p, view in zip(of_image, drawn[number], out, strict=True):
                backend.finish(crop, p, view[number])


class TwoTables(Dataset):
    """Batches (index, table_q, table_k) for images of one size that live on the device."""

    def __init__(self, width: int, height: int, recipes: tuple[Recipe, Recipe], seed: int):
        self.image_size = width, height
        self.recipes, self.seed = recipes, seed

    def batch(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        rows = [
            draw_views(self.recipes, self.seed, epoch, index, *self.image_size)
            for epoch, index in keys
        ]
        return _indices(keys), *_tables(rows)


class TwoTablesAndFile(Dataset):
    """Batches (files, index, table_q, table_k) for images that the device decodes."""

    def __init__(self, source: ImageSource, recipes: tuple[Recipe, Recipe], seed: int):
        self.source, self.recipes, self.seed = source, recipes, seed

    def batch(self, keys: list[tuple[int, int]]) -> tuple[list | torch.Tensor, ...]:
        """files: uint8 [bytes] of a plain JPEG file, else the decoded [H, W, 3]."""
        files, rows = [], []
        for epoch, index in keys:
            data = self.source.read_bytes(index)
            size, image = plain_jpeg_size(data, self.source.decoding.max_pixels), None
            if size is None:
                file = read_rgb(self.source, index)
                size, image = (file.shape[1], file.shape[0]), file[..., ::-1]
            else:
                file = np.frombuffer(bytearray(data), np.uint8)
            if isinstance(self.source, FirstSight):
                self.source.note(index, image)
            files.append(torch.from_numpy(file))
            rows.append(draw_views(self.recipes, self.seed, epoch, index, *size))
        return files, _indices(keys), *_tables(rows)


def _empty_batch(*shape: int) -> torch.Tensor:
    """uint8; in a loader worker it lies in shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's default_collate does; there is no public way.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def _indices(keys: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([index for _, index in keys])


def _tables(rows: list[list[ViewParameters]]) -> tuple[torch.Tensor, ...]:
    """One parameter table [B, NUM_COLUMNS] a view."""
    return tuple(torch.tensor([table_row(p) for p in view]) for view in zip(*rows, strict=True))
