"""An index for tar shards that others wrote in WebDataset's layout; the shards stay as they are."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_MAX_LABEL_BYTES = 256
_SKIPPED = re.compile(r"__[^/]*__(/|$)")  # as webdataset/tariterators.py, tar_file_iterator
# What may lie in a shard beside the images that are indexed.
_NO_KEY = "members without key and suffix, or of __NAME__ folders, which webdataset skips too"
_NO_IMAGE = "keys without an image"
_BESIDE = "other members beside an image"


@dataclass
class _Scanned:
    """What one shard holds.

    samples: their labels are numbers in `classes`, the different texts of `.cls` files.
    unreadable: (name, reason) of images. left_out: see `Packed`.
    """

    samples: np.ndarray
    names: list[str]
    unreadable: list[tuple[str, str]]
    num_bytes: int
    classes: tuple[str, ...]
    left_out: dict[str, tuple[int, str]]


def index_shards(
    folder: Path,
    num_workers: int,
    skip_unreadable: bool,
    tick: Callable[[], None] = lambda: None,
    decoding: Decoding = DEFAULT_DECODING,
) -> Packed:
    """Write the index of all .tar files of a folder, in the order of their names.

    A sample is a run of files whose names are equal up to the first dot after the last slash. It
    has one image, and a label where it has a `.cls` file: a number, or a line of text; its other
    files are not read. Either all samples or none are labelled. Keys without an image, and members
    that webdataset skips (README, __meta__/x.json), are left out and counted.

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
    class_names = _class_names(folder, samples, scanned)
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
    left_out = _added(result.left_out for result in scanned)
    return Packed(len(samples), len(shards), sum(sizes), skipped, left_out)


def _added(parts: Iterable[dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    total: dict[str, tuple[int, str]] = {}
    for part in parts:
        for what, (count, first) in part.items():
            before, name = total.get(what, (0, first))
            total[what] = (before + count, name)
    return total


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


def _class_names(
    folder: Path, samples: np.ndarray, scanned: Sequence[_Scanned]
) -> list[str] | None:
    """The classes of all shards; the labels of `samples` become numbers of theirs, in place.

    Numbers stay what they are; where any label is text, all are names, sorted.
    """
    without = int((samples["label"] == NO_LABEL).sum())
    if without == len(samples):
        return None
    if without:
        raise DataError(
            f"{folder}: {without} of {len(samples)} samples have no .cls file; label all or none"
        )
    texts = sorted({text for result in scanned for text in result.classes})
    if len(texts) > _MAX_LABEL:
        raise DataError(
            f"{folder}: its .cls files hold {len(texts)} different texts, which are no classes; "
            f"allowed are {_MAX_LABEL}; write the shards without .cls files"
        )
    if all(text.isascii() and text.isdigit() for text in texts):
        number_of = {text: int(text) for text in texts}
        names = [str(label) for label in range(max(number_of.values()) + 1)]
    else:
        number_of = {text: number for number, text in enumerate(texts)}
        names = texts
    position = 0
    for result in scanned:
        labels = samples["label"][position : position + len(result.samples)]
        if len(labels):
            labels[:] = np.array([number_of[text] for text in result.classes])[labels]
        position += len(labels)
    return names


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
    rows, names, unreadable, classes = [], [], [], {}
    left_out: dict[str, tuple[int, str]] = {}
    for key, members in _samples(path, file, num_bytes, left_out):
        images = {s: m for s, m in members.items() if f".{s}".lower().endswith(IMAGE_SUFFIXES)}
        where = f"{path.name}/{key}"
        if not images:
            _count(left_out, _NO_IMAGE, f"{where}.{next(iter(members))}")
            continue
        if len(images) > 1:
            found = ", ".join(sorted(members))[:200]
            raise _bad_member(path, key, f"has {len(images)} images, allowed is one ({found})")
        ((suffix, (offset, size)),) = images.items()
        for other in members.keys() - {suffix, "cls"}:
            _count(left_out, _BESIDE, f"{where}.{other}")
        text = _label(path, key, file, members["cls"]) if "cls" in members else None
        data = _bytes_at(file, offset, size)
        try:
            decode_rgb(data, f"{path}: {key}.{suffix}", decoding)
        except DataError as error:
            unreadable.append((f"{where}.{suffix}", str(error)))
            continue
        label = NO_LABEL if text is None else classes.setdefault(text, len(classes))
        sha256 = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
        rows.append((offset, size, 0, label, zlib.crc32(data), sha256))
        names.append(f"{where}.{suffix}")
    samples = np.array(rows, dtype=SAMPLE)
    return _Scanned(samples, names, unreadable, num_bytes, tuple(classes), left_out)


def _count(left_out: dict[str, tuple[int, str]], what: str, name: str) -> None:
    count, first = left_out.get(what, (0, name))
    left_out[what] = (count + 1, first)


def _samples(
    path: Path, file, num_bytes: int, left_out: dict[str, tuple[int, str]]
) -> Iterator[tuple[str, dict]]:
    """(key, {suffix: (offset, size)}) of each run of members with one key."""
    key, members = None, {}
    for name, offset, size in _members(path, file, num_bytes):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or not stem or _SKIPPED.match(name):
            _count(left_out, _NO_KEY, f"{path.name}/{name}")
            continue
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


def _label(path: Path, key: str, file, member: tuple[int, int]) -> str:
    """A `.cls` file's text: a number in decimal digits without leading zeros, or a class's name."""
    offset, size = member
    data = _bytes_at(file, offset, min(size, _MAX_LABEL_BYTES)).strip()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isascii() and text.isdigit() and int(text) < _MAX_LABEL:
        return str(int(text))
    is_number = re.fullmatch(r"[-+]?[0-9.]+", text) is not None
    if size > _MAX_LABEL_BYTES or is_number or not text.isprintable() or not text:
        raise _bad_member(
            path,
            f"{key}.cls",
            f"holds {data[:40]!r}, allowed is 0 to {_MAX_LABEL - 1}, or a line of text of up to "
            f"{_MAX_LABEL_BYTES} bytes",
        )
    return text


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
