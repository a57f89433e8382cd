"""Packs images into tar shards in WebDataset's layout, with the index of shard_index.py."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from PIL import Image

from moco.child_processes import end_with_parent
from moco.data.reading import UnreadableImage
from moco.data.rgb import decode_rgb
from moco.data.shard_index import NO_LABEL, SAMPLE, TAR_BLOCK, write_index
from moco.data.shards import ShardSource
from moco.errors import DataError

SKIPPED_FILE = "skipped.jsonl"
_END = bytes(2 * TAR_BLOCK)  # of an archive
_In, _Out = TypeVar("_In"), TypeVar("_Out")


@dataclass(frozen=True)
class PackOptions:
    """How images are packed.

    Attributes:
        shard_bytes: a shard is closed before it would grow larger, unless it is empty.
        resize: shorter side of images that are larger; None keeps every file as it is.
        quality: of the JPEG files that resized images become.
        skip_unreadable: leave unreadable images out and list them; otherwise they are an error.
        num_workers: processes that read and decode; 0 for this one.
    """

    shard_bytes: int = 256 << 20
    resize: int | None = None
    quality: int = 95
    skip_unreadable: bool = False
    num_workers: int = 0


@dataclass(frozen=True)
class Packed:
    """What was packed.

    skipped: (name, reason) of each image that was left out. left_out: what else lay in indexed
    shards -> (how many, the first one's name).
    """

    num_images: int
    num_shards: int
    num_bytes: int
    skipped: list[tuple[str, str]]
    left_out: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Prepared:
    data: bytes
    suffix: str
    crc32: int
    sha256: bytes


def pack_images(
    source,
    folder: Path,
    options: PackOptions,
    order: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> Packed:
    """Write the images of a source into `folder`, which exists and is empty.

    The index has them in the order of the source; in the shards they lie in the order `order`, a
    permutation of their numbers. The same images and options give the same bytes.

    Args:
        source: `ImageSource` or anything like it.
        tick: called after each image.
    Raises: DataError for an unreadable image (unless they are skipped), for a disk that is full and
        where no image is left.
    """
    samples = np.zeros(len(source), dtype=SAMPLE)
    kept = np.zeros(len(source), dtype=bool)
    skipped: list[tuple[int, str]] = []
    prepare = _Prepare(source, options.resize, options.quality)
    with _disk_errors(folder), _ShardWriter(folder, options.shard_bytes) as writer:
        prepared = ordered_map(prepare, order, options.num_workers)
        for number, image in zip(order, prepared, strict=True):
            tick()
            if isinstance(image, DataError):
                if not (options.skip_unreadable and isinstance(image, UnreadableImage)):
                    raise image
                skipped.append((number, str(image)))
                continue
            label = NO_LABEL if source.labels is None else source.labels[number]
            shard, offset = writer.add(number, image, label)
            sha256 = np.frombuffer(image.sha256, dtype=np.uint8)
            samples[number] = (offset, len(image.data), shard, label, image.crc32, sha256)
            kept[number] = True
    if not kept.any():
        raise DataError(f"{source.root}: none of its {len(source)} images can be read")
    with _disk_errors(folder):
        listed = [(source.paths[number], reason) for number, reason in sorted(skipped)]
        write_skipped(folder, listed)
        write_index(
            folder,
            shards=writer.shards,
            samples=samples[kept],
            names=(source.paths[number] for number in np.flatnonzero(kept)),
            class_names=None if source.labels is None else source.class_names,
            made=_made(options, len(skipped)),
        )
    return Packed(int(kept.sum()), len(writer.shards), sum(n for _, n in writer.shards), listed)


def verify(pack: ShardSource, tick: Callable[[], None] = lambda: None) -> None:
    """Read every image of a pack, as it lies, and compare its SHA-256. Raises: DataError."""
    for index in pack.storage_order.tolist():
        pack.check(index)
        tick()


def write_skipped(folder: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """List what was left out, one JSON object a line; no file where nothing was."""
    lines = [json.dumps({"name": name, "reason": reason}) for name, reason in skipped]
    if lines:
        (folder / SKIPPED_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def ordered_map(
    function: Callable[[_In], _Out], items: Iterable[_In], num_workers: int
) -> Iterator[_Out]:
    """`map` over processes, in order, a few items ahead. Raises: DataError for a dead process."""
    if num_workers == 0:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")  # whatever threads this process has
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=spawn, initializer=_keep, initargs=(function,)
    )
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call_kept, item))
            if len(waiting) > 8 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"a process that reads images died ({error}); give more memory, or fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _keep(function: Callable) -> None:
    global _kept
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    end_with_parent()
    _kept = function  # sent once to each process, not with every item


def _call_kept(item: object) -> object:
    return _kept(item)


class _Prepare:
    """index -> the image as it is packed, or the DataError that says why it cannot be."""

    def __init__(self, source, resize: int | None, quality: int):
        self.source, self.resize, self.quality = source, resize, quality

    def __call__(self, index: int) -> _Prepared | DataError:
        try:
            data = self.source.read_bytes(index)
            # Decoded in any case: an image that cannot be is found now, not in epoch 3.
            image = decode_rgb(data, self.source.path(index), self.source.decoding)
        except DataError as error:
            return error
        suffix = os.path.splitext(self.source.paths[index])[1][1:].lower()
        if self.resize is not None and min(image.size) > self.resize:
            data, suffix = _resized(image, self.resize, self.quality), "jpg"
        return _Prepared(data, suffix, zlib.crc32(data), hashlib.sha256(data).digest())


def _resized(image: Image.Image, shorter_side: int, quality: int) -> bytes:
    scale = shorter_side / min(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class _ShardWriter:
    """Appends samples to images-000000.tar, images-000001.tar ...; `shards` has (name, bytes)."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[tuple[str, int]] = []
        self.file = None
        self.size = 0

    def add(self, number: int, image: _Prepared, label: int) -> tuple[int, int]:
        """Write one sample. Returns: number of its shard, offset of its first byte."""
        key = f"{number:09d}"
        members = [(f"{key}.{image.suffix}", image.data)]
        if label != NO_LABEL:
            members.append((f"{key}.cls", str(label).encode()))
        needed = sum(TAR_BLOCK + _padded(len(data)) for _, data in members) + len(_END)
        if self.file is not None and self.size + needed > self.shard_bytes:
            self._finish()
        if self.file is None:
            self.name, self.size = f"images-{len(self.shards):06d}.tar", 0
            self.file = open(self.folder / self.name, "xb")  # closed by _finish
        offset = self.size + TAR_BLOCK
        for name, data in members:
            self._write(_header(name, len(data)))
            self._write(data + bytes(_padded(len(data)) - len(data)))
        return len(self.shards), offset

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.size += len(data)

    def _finish(self) -> None:
        self._write(_END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.shards.append((self.name, self.size))
        self.file = None

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.file is not None and kind is None:
            self._finish()
        elif self.file is not None:
            with contextlib.suppress(OSError):  # a full disk fails here again; it was said already
                self.file.close()


def _header(name: str, size: int) -> bytes:
    """A ustar header without time and owner, so that the same images give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _made(options: PackOptions, num_skipped: int) -> dict[str, object]:
    made: dict[str, object] = {"num_skipped": num_skipped, "resize": options.resize}
    if options.resize is not None:
        made.update(quality=options.quality, pillow=PIL.__version__)
    return made


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); free space, or "
            "give another folder"
        ) from error
