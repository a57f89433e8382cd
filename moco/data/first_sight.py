"""Hashes of images, made by loader workers when an image is read for the first time.

Bytes and pixels are in hand then, so nothing is read or decoded twice.
"""

from __future__ import annotations

import multiprocessing
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moco.data import image_hash
from moco.data.images import ImageSource

_NO_PIXELS = np.zeros((image_hash.THUMBNAIL,) * 2, np.uint8)  # of one colour: no perceptual hash


class Seen(NamedTuple):
    """Rows of images: index int64 [n], their numbers; rows uint8 [n, 24] of `image_rows`."""

    index: np.ndarray
    rows: np.ndarray


def joined(parts: list[Seen | None]) -> Seen | None:
    """All parts in one; None where all are."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    return Seen(*(np.concatenate(columns) for columns in zip(*given, strict=True)))


class SeenFlags:
    """A flag an image, shared with loader workers: whether its hash has arrived.

    The main process sets them, in the order of the steps. A worker that did would keep an earlier
    batch, which another worker is still at, from naming an image it shows.
    """

    def __init__(self, num_images: int):
        self.shared = multiprocessing.RawArray("B", num_images)

    def __len__(self) -> int:
        return len(self.shared)

    def mark(self, index: np.ndarray) -> None:
        np.frombuffer(self.shared, np.uint8)[index] = 1

    def unseen(self, index: np.ndarray) -> np.ndarray:
        """bool [n]"""
        return np.frombuffer(self.shared, np.uint8)[index] == 0


class FirstSight:
    """A source whose images are hashed as they are read, as long as they are not flagged.

    In everything else it is the source. `note` gives it the pixels, `take` what it has.
    """

    def __init__(self, source: ImageSource, flags: SeenFlags):
        self._wrapped, self._flags = source, flags
        self._exact: dict[int, bytes] = {}  # of images that are read and not yet taken
        self._thumbnails: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an object that pickle has not filled yet
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __len__(self) -> int:
        return len(self._wrapped)

    def read_bytes(self, index: int) -> bytes:
        data = self._wrapped.read_bytes(index)
        if not self._flags.shared[index]:
            self._exact[index] = image_hash.exact_hash(data)
        return data

    def open(self, index: int) -> Image.Image:
        return type(self._wrapped).open(self, index)  # by this object's read_bytes

    def note(self, index: int, image: np.ndarray | Image.Image | None) -> None:
        """Image `index` is one of the batch; `image` as `image_hash.thumbnail` takes it, or None
        where the pixels come later."""
        if index in self._exact and index not in self._thumbnails:
            self._thumbnails[index] = (
                _NO_PIXELS if image is None else image_hash.thumbnail(image)
            )

    def take(self) -> Seen | None:
        """What was noted since the last time. Images that were read and not noted are left out:
        they could not be decoded."""
        found = list(self._thumbnails)
        seen = None
        if found:
            index = np.array(found, np.int64)
            exact = [self._exact[number] for number in found]
            seen = Seen(index, image_hash.rows_of(exact, list(self._thumbnails.values())))
        self._exact.clear()
        self._thumbnails.clear()
        return seen
