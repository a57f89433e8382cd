"""Images packed into tar shards, read by their number: no extraction, no pickle, no shell."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moco.data.reading import open_regular, retried
from moco.data.rgb import DEFAULT_DECODING, Decoding, decode_rgb
from moco.data.shard_index import PackIndex, read_index, shard_of_other_size
from moco.data.workers import note_image
from moco.errors import DataError

_OPEN_SHARDS = 64  # file descriptors a process keeps
_READ_AHEAD_STEP = 128 << 10  # the kernel cuts a larger request down to its own limit


class ShardSource:
    """The images of a pack, with the interface of `ImageSource`.

    An image is read by its offset, and its CRC-32 is compared with the index's every time. Shards
    are opened when first needed, in each process anew.

    Attributes:
        root: the folder of the pack.
        class_names: empty without labels.
        decoding: how files become pixels.
    """

    def __init__(
        self, root: str | os.PathLike, index: PackIndex, decoding: Decoding = DEFAULT_DECODING
    ):
        self.root = str(root)
        self.index = index
        self.decoding = decoding
        self.class_names = index.class_names or ()
        self._read_ahead = (0, 0)
        self._open_caches()

    def _open_caches(self) -> None:
        self._open_shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Shard)
        # Remembers the blocks in flight, and some more: theirs need not be announced again.
        self._blocks_ahead = functools.lru_cache(maxsize=2 * self._read_ahead[1])(self._announce)

    def __getstate__(self) -> dict:
        """Without open files and what can be derived: what worker processes get."""
        kept = ("root", "index", "class_names", "decoding", "_read_ahead")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_caches()

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The paths of the images in the folder that was packed."""
        return tuple(self.index.names.decode().split("\n")[:-1])

    @functools.cached_property
    def labels(self) -> tuple[int, ...] | None:
        has_labels = self.index.class_names is not None
        return tuple(self.index.samples["label"].tolist()) if has_labels else None

    @property
    def content_hashes(self) -> np.ndarray:
        """uint8 [N, 32]: the SHA-256 of each image's file, as the index has them."""
        return self.index.samples["sha256"]

    @functools.cached_property
    def storage_order(self) -> np.ndarray:
        """int64 [N]: the numbers of the images as they lie in the shards, one after another."""
        samples = self.index.samples
        return np.lexsort((samples["offset"], samples["shard"]))

    def __len__(self) -> int:
        return len(self.index.samples)

    def path(self, index: int) -> str:
        """A name for messages: the shard and the image's path before it was packed."""
        shard = self.index.shards[self.index.samples["shard"][index]]
        ends = self._name_ends
        name = self.index.names[ends[index - 1] + 1 if index else 0 : ends[index]].decode()
        return f"{os.path.join(self.root, shard)}: {name}"

    def note_path(self, index: int) -> str:
        """The name of the image that `note_image` was given."""
        return self.path(index)

    def read_bytes(self, index: int) -> bytes:
        """The file of image `index`. Raises DataError where it is not what was packed."""
        note_image(index)
        sample = self.index.samples[index]
        number = int(sample["shard"])
        path = os.path.join(self.root, self.index.shards[number])
        expected = int(self.index.shard_bytes[number])

        def read() -> bytes:
            try:
                return self._open_shard(path, expected).read(offset, size)
            except OSError:
                self._open_shard.cache_clear()  # a stale handle stays stale
                raise

        offset, size = int(sample["offset"]), int(sample["size"])
        if self._read_ahead[0]:
            self._blocks_ahead(int(self._position[index]) // self._read_ahead[0])
        try:
            data = retried(path, read)
        except OSError as error:
            raise DataError(
                f"{path}: shard cannot be read ({error.strerror}); copy it anew, or pack the "
                "images again"
            ) from error
        if len(data) != size or zlib.crc32(data) != sample["crc32"]:
            raise self._damaged(index, "CRC-32")
        return data

    def check(self, index: int) -> None:
        """Compare image `index` with the index's SHA-256, too. Raises: DataError."""
        data = self.read_bytes(index)
        if hashlib.sha256(data).digest() != self.index.samples["sha256"][index].tobytes():
            raise self._damaged(index, "SHA-256")

    def _damaged(self, index: int, what: str) -> DataError:
        sample = self.index.samples[index]
        return DataError(
            f"{self.path(index)}: image {index}, {sample['size']} bytes at {sample['offset']}, "
            f"does not have the {what} of the index; the shard is damaged: copy it anew, or pack "
            "the images again"
        )

    def open(self, index: int) -> Image.Image:
        """Image `index` as `decode_rgb` returns it. Raises DataError where it is unreadable."""
        return decode_rgb(self.read_bytes(index), self.path(index), self.decoding)

    def decoded_as(self, decoding: Decoding) -> ShardSource:
        """The same images, decoded otherwise."""
        return ShardSource(self.root, self.index, decoding)

    def subset(self, kept: Sequence[int]) -> ShardSource:
        """The images with these numbers as a source of their own, numbered anew."""
        names = "".join(f"{self.paths[index]}\n" for index in kept).encode()
        index = dataclasses.replace(self.index, samples=self.index.samples[kept], names=names)
        return ShardSource(self.root, index)

    def reading_ahead(self, block_size: int, blocks_in_flight: int) -> ShardSource:
        """A copy that, where an image is read, has the kernel fetch its whole block.

        For the order "blocks": block b are the images `block_size` * b ... of `storage_order`.
        """
        copy = ShardSource(self.root, self.index, self.decoding)
        copy._read_ahead = (block_size, blocks_in_flight)
        copy._open_caches()
        return copy

    @functools.cached_property
    def _name_ends(self) -> np.ndarray:
        """int64 [N]: where each name's line feed is. All names as strings would be ten times it."""
        return np.flatnonzero(np.frombuffer(self.index.names, dtype=np.uint8) == ord("\n"))

    @functools.cached_property
    def _position(self) -> np.ndarray:
        """int64 [N]: where an image stands in `storage_order`."""
        position = np.empty(len(self), dtype=np.int64)
        position[self.storage_order] = np.arange(len(self))
        return position

    def _announce(self, block: int) -> None:
        """Ask for the bytes of a block, a stretch in each shard it touches; nothing waits."""
        block_size = self._read_ahead[0]
        first = block * block_size
        samples = self.index.samples[self.storage_order[first : first + block_size]]
        for number in np.unique(samples["shard"]).tolist():
            own = samples[samples["shard"] == number]
            start = int(own["offset"][0])
            stop = int(own["offset"][-1]) + int(own["size"][-1])
            path = os.path.join(self.root, self.index.shards[number])
            try:
                self._open_shard(path, int(self.index.shard_bytes[number])).announce(start, stop)
            except OSError:
                continue  # advice only: reading the image itself will say what is wrong


class _Shard:
    """An open tar file. Positions are given with each read, so processes may share it."""

    def __init__(self, path: str, expected: int):
        self._descriptor = -1
        self._descriptor = open_regular(path, follow_links=False)
        found = os.fstat(self._descriptor).st_size
        if found != expected:
            raise shard_of_other_size(path, found, expected)

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            part = os.pread(self._descriptor, size, offset)
            if not part:
                break  # cut off since it was opened
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def announce(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            for at in range(start, stop, _READ_AHEAD_STEP):
                length = min(_READ_AHEAD_STEP, stop - at)
                os.posix_fadvise(self._descriptor, at, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        # Not closed when it leaves the cache: another thread may be reading.
        if self._descriptor >= 0:
            os.close(self._descriptor)


def open_pack(folder: str | os.PathLike) -> ShardSource:
    """The images of a folder that `tools/pack_images.py` wrote.

    Raises: DataError for an index or a shard that is missing or damaged.
    """
    return ShardSource(Path(folder), read_index(folder))
