"""An index for tar shards that others wrote in WebDataset's layout; the shards stay as they are."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.data.images import IMAGE_SUFFIXES
from moco.data.reading import MAX_FILE_BYTES, open_regular
from moco.data.rgb import DEFAULT_DECODING, Decoding, decode_rgb
from moco.data.shard_index import NO_LABEL, SAMPLE, TAR_BLOCK, is_shard_name, write_index
from moco.data.shard_writer import Packed, ordered_map, write_skipped
from moco.errors import DataError

_MAX_LABEL = 1 << 20
_MAX_LABEL_BYTES = 32


@dataclass
class _Scanned:
    """What one shard holds: numbers, names and the (name, reason) of unreadable images."""

    samples: np.ndarray
    names: list[str]
    unreadable: list[tuple[str, str]]
    num_bytes: int


def index_shards(
    folder: Path,
    num_workers: int,
    skip_unreadable: bool,
    tick: Callable[[], None] = lambda: None,
    decoding: Decoding = DEFAULT_DECODING,
) -> Packed:
    """Write the index of all .tar files of a folder, in the order of their names.

    A sample is a run of files whose names are equal up to the first dot after the last slash. It
    has one image, and a label where it has a `.cls` file; its other files are not read. Either all
    samples or none are labelled.

    Args:
        tick: called after each shard.
    Raises: DataError for a damaged or hostile archive, naming the shard and the member.
    """
    shards = list_shards(folder)
    scanned = []
    for result in ordered_map(_Scan(folder, decoding), shards, num_workers):
        if isinstance(result, DataError):
            raise result
        if result.unreadable and not skip_unreadable:
            raise DataError(result.unreadable[0][1])
        result.samples["shard"] = len(scanned)
        scanned.append(result)
        tick()
    samples = np.concatenate([result.samples for result in scanned])
    if not len(samples):
        raise DataError(f"{folder}: its {len(shards)} .tar files hold no readable image")
    class_names = _class_names(folder, samples["label"])
    skipped = [pair for result in scanned for pair in result.unreadable]
    sizes = [result.num_bytes for result in scanned]
    try:
        write_skipped(folder, skipped)
        write_index(
            folder,
            shards=list(zip(shards, sizes, strict=True)),
            samples=samples,
            names=[name for result in scanned for name in result.names],
            class_names=class_names,
            made={"num_skipped": len(skipped), "indexed_only": True},
        )
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written ({error.strerror})"
        ) from error
    return Packed(len(samples), len(shards), sum(sizes), skipped)


def list_shards(folder: Path) -> list[str]:
    """The .tar files of a folder, sorted. Raises: DataError where there is none."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    if not names:
        raise DataError(f"{folder}: holds no .tar file; give the folder that holds the shards")
    odd = next((name for name in names if not is_shard_name(name)), None)
    if odd is not None:
        raise DataError(
            f"{folder}: {odd!r} is no plain name; allowed are letters, digits, '.', '_' and '-'; "
            "rename the file"
        )
    return names


def _class_names(folder: Path, labels: np.ndarray) -> list[str] | None:
    without = int((labels == NO_LABEL).sum())
    if without == len(labels):
        return None
    if without:
        raise DataError(
            f"{folder}: {without} of {len(labels)} samples have no .cls file; label all or none"
        )
    return [str(label) for label in range(int(labels.max()) + 1)]


class _Scan:
    """Name of a shard -> what it holds, or the DataError that says what is wrong with it."""

    def __init__(self, folder: Path, decoding: Decoding):
        self.folder, self.decoding = folder, decoding

    def __call__(self, name: str) -> _Scanned | DataError:
        path = self.folder / name
        try:
            with open(open_regular(path, follow_links=False), "rb") as file:
                return _scan(path, file, self.decoding)
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"{path}: cannot be read ({error.strerror}); copy the shard anew")


def _scan(path: Path, file, decoding: Decoding) -> _Scanned:
    num_bytes = os.fstat(file.fileno()).st_size
    rows, names, unreadable = [], [], []
    for key, members in _samples(path, file, num_bytes):
        images = {s: m for s, m in members.items() if f".{s}".lower().endswith(IMAGE_SUFFIXES)}
        where = f"{path.name}/{key}"
        if len(images) != 1:
            found = ", ".join(sorted(members))[:200]
            raise _bad_member(path, key, f"has {len(images)} images, allowed is one ({found})")
        ((suffix, (offset, size)),) = images.items()
        label = _label(path, key, file, members["cls"]) if "cls" in members else NO_LABEL
        data = _bytes_at(file, offset, size)
        try:
            decode_rgb(data, f"{path}: {key}.{suffix}", decoding)
        except DataError as error:
            unreadable.append((f"{where}.{suffix}", str(error)))
            continue
        sha256 = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
        rows.append((offset, size, 0, label, zlib.crc32(data), sha256))
        names.append(f"{where}.{suffix}")
    return _Scanned(np.array(rows, dtype=SAMPLE), names, unreadable, num_bytes)


def _samples(path: Path, file, num_bytes: int) -> Iterator[tuple[str, dict]]:
    """(key, {suffix: (offset, size)}) of each run of members with one key."""
    key, members = None, {}
    for name, offset, size in _members(path, file, num_bytes):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or not stem:
            raise _bad_member(path, name, "has no key and suffix, as in 000123.jpg")
        if folder + slash + stem != key:
            if members:
                yield key, members
            key, members = folder + slash + stem, {}
        if suffix in members:
            raise _bad_member(path, name, "comes twice")
        members[suffix] = (offset, size)
    if members:
        yield key, members


def _members(path: Path, file, num_bytes: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file of an archive."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep them all
                name, offset, size = member.name, member.offset_data, member.size
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise _bad_member(path, name, "is no regular file")
                if "\n" in name or name.startswith("/") or ".." in name.split("/"):
                    raise _bad_member(path, name, "is no name that stays in its folder")
                if not (0 <= size <= MAX_FILE_BYTES and offset + size <= num_bytes):
                    raise _bad_member(path, name, f"has {size} bytes, which do not fit")
                yield name, offset, size
            end = archive.offset
    except (DataError, OSError):
        raise
    except Exception as error:  # damaged headers make tarfile raise almost anything
        raise _bad_archive(path, error or type(error).__name__) from error
    # tarfile takes a damaged header for the end of the archive.
    if any(_bytes_at(file, end, TAR_BLOCK)):
        raise _bad_archive(path, f"no member's header at {end}, nor the end of the archive")


def _label(path: Path, key: str, file, member: tuple[int, int]) -> int:
    offset, size = member
    text = _bytes_at(file, offset, min(size, _MAX_LABEL_BYTES)).strip()
    if not text.isdigit() or size > _MAX_LABEL_BYTES or int(text) >= _MAX_LABEL:
        raise _bad_member(
            path, f"{key}.cls", f"holds {text[:40]!r}, allowed is 0 to {_MAX_LABEL - 1}"
        )
    return int(text)


def _bytes_at(file, offset: int, size: int) -> bytes:
    position = file.tell()
    file.seek(offset)
    data = file.read(size)
    file.seek(position)
    return data


def _bad_member(path: Path, name: str, problem: str) -> DataError:
    return DataError(f"{path}: {name[:200]!r} {problem}; write the shard anew")


def _bad_archive(path: Path, reason: object) -> DataError:
    text = " ".join(str(reason).split())[:200]
    return DataError(
        f"{path}: is no whole, uncompressed tar archive ({text}); copy or write the shard anew"
    )
