"""The index of packed images: what makes tar shards randomly accessible. Read with suspicion.

A pack is a folder of tar shards and three files (docs/PACKED_DATA.md):
    pack.json    what the pack is; written last, so a folder that has it is whole
    samples.bin  a record `SAMPLE` an image, in the order of the images
    names.txt    a name an image, each followed by a line feed, UTF-8
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.data.reading import MAX_FILE_BYTES, open_regular, retried
from moco.errors import DataError

INDEX_FILE, SAMPLES_FILE, NAMES_FILE = "pack.json", "samples.bin", "names.txt"
FORMAT, VERSION = "moco-packed-images", 1
TAR_BLOCK = 512
NO_LABEL = -1
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its shard
        ("size", "<u4"),  # bytes
        ("shard", "<u4"),  # number in the list of pack.json
        ("label", "<i4"),
        ("crc32", "<u4"),  # compared whenever the image is read: three times as fast as SHA-256
        ("sha256", "u1", (32,)),  # compared after packing and by --verify
    ]
)
_MAX_IMAGES = 1 << 28
_MAX_JSON_BYTES = 64 << 20
_MAX_CLASSES = 1 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.tar")


@dataclass(frozen=True)
class PackIndex:
    """An index whose every number has been checked against the files' sizes.

    Attributes:
        shards: names of the tar files.
        shard_bytes: int64 [S], their sizes.
        samples: `SAMPLE` [N].
        names: N names, each followed by a line feed.
        class_names: sorted as in the folder that was packed; None without labels.
        made: how the pack was made, for people.
    """

    shards: tuple[str, ...]
    shard_bytes: np.ndarray
    samples: np.ndarray
    names: bytes
    class_names: tuple[str, ...] | None
    made: Mapping[str, object]


def is_pack(folder: str | os.PathLike) -> bool:
    return os.path.lexists(os.path.join(folder, INDEX_FILE))


def is_shard_name(name: object) -> bool:
    """Whether a name is a plain one, of letters that lead nowhere else."""
    return isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None


def write_index(
    folder: Path,
    *,
    shards: Sequence[tuple[str, int]],
    samples: np.ndarray,
    names: Iterable[str],
    class_names: Sequence[str] | None,
    made: Mapping[str, object],
) -> None:
    """Write the three files, `pack.json` last. Raises: DataError for a name of several lines."""
    names = list(names)
    odd = next((name for name in names if "\n" in name or not _is_utf8(name)), None)
    if odd is not None:
        raise DataError(
            f"{odd!r}: a name with a line feed or of broken UTF-8 cannot be packed; rename the file"
        )
    contents = {
        SAMPLES_FILE: samples.astype(SAMPLE).tobytes(),
        NAMES_FILE: "".join(f"{name}\n" for name in names).encode(),
    }
    for name, content in contents.items():
        _write_whole(folder / name, content)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_images": len(samples),
        "class_names": None if class_names is None else list(class_names),
        "shards": [{"name": name, "bytes": size} for name, size in shards],
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "made": dict(made),
    }
    _write_whole(folder / INDEX_FILE, (json.dumps(content, indent=1) + "\n").encode())


def read_index(folder: str | os.PathLike) -> PackIndex:
    """Read and check an index; every shard must be there and have its size.

    Raises: DataError for anything that is missing, damaged, out of range or leads elsewhere.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    content = _read_json(path)
    num_images = _number(path, content, "num_images", 1, _MAX_IMAGES)
    class_names = _class_names(path, content.get("class_names"))
    shards, shard_bytes = _shards(path, content.get("shards"))
    made = content.get("made")
    index = PackIndex(
        shards=shards,
        shard_bytes=shard_bytes,
        samples=_samples(folder, content, num_images),
        names=_read_part(folder, NAMES_FILE, content, None),
        class_names=class_names,
        made=made if isinstance(made, dict) else {},
    )
    _check_samples(folder, index)
    _check_names(folder, index)
    _check_shard_files(folder, index)
    return index


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(_read_whole(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, f"no JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f"'format' is not {FORMAT!r}")
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise DataError(
            f"{path}: is of version {content.get('version')!r:.40}, this code reads {VERSION}; "
            "use the code that packed the images, or pack them again"
        )
    return content


def _number(path: Path, content: Mapping, key: str, least: int, most: int) -> int:
    value = content.get(key)
    if type(value) is not int or not least <= value <= most:
        raise _damaged(path, f"{key!r} is {value!r:.40}, allowed is {least} to {most}")
    return value


def _class_names(path: Path, names: object) -> tuple[str, ...] | None:
    if names is None:
        return None
    fits = isinstance(names, list) and 1 <= len(names) <= _MAX_CLASSES
    if not (fits and all(isinstance(n, str) and n and "\n" not in n for n in names)):
        raise _damaged(path, "'class_names' is no list of names")
    if len(set(names)) != len(names):
        raise _damaged(path, "'class_names' holds a name twice")
    return tuple(names)


def _shards(path: Path, shards: object) -> tuple[tuple[str, ...], np.ndarray]:
    if not (isinstance(shards, list) and shards and all(isinstance(s, dict) for s in shards)):
        raise _damaged(path, "'shards' is no list of shards")
    names, sizes = [], []
    for shard in shards:
        name = shard.get("name")
        if not is_shard_name(name):
            raise _damaged(path, f"{name!r:.80} is no plain name of a .tar file in this folder")
        names.append(name)
        sizes.append(_number(path, shard, "bytes", 2 * TAR_BLOCK, 1 << 62))
    if len(set(names)) != len(names):
        raise _damaged(path, "'shards' holds a name twice")
    return tuple(names), np.array(sizes, dtype=np.int64)


def _samples(folder: Path, content: Mapping, num_images: int) -> np.ndarray:
    data = _read_part(folder, SAMPLES_FILE, content, num_images * SAMPLE.itemsize)
    return np.frombuffer(data, dtype=SAMPLE)


def _read_part(folder: Path, name: str, content: Mapping, expected: int | None) -> bytes:
    path = folder / name
    data = _read_whole(path, expected or _MAX_IMAGES * 64, exactly=expected is not None)
    hashes = content.get("sha256")
    if not isinstance(hashes, dict) or hashes.get(name) != hashlib.sha256(data).hexdigest():
        raise _damaged(path, f"its SHA-256 is not the one in {INDEX_FILE}")
    return data


def _check_samples(folder: Path, index: PackIndex) -> None:
    samples = index.samples
    shard, size = samples["shard"], samples["size"].astype(np.uint64)
    _require_all(folder, "shard", shard < len(index.shards))
    _require_all(folder, "size", size <= MAX_FILE_BYTES)
    end_of_shard = index.shard_bytes.astype(np.uint64)[shard]
    offset = samples["offset"]
    # In this order: the sum cannot overflow once the first two hold.
    fits = (offset >= TAR_BLOCK) & (offset <= end_of_shard) & (offset % TAR_BLOCK == 0)
    _require_all(folder, "offset", fits)
    _require_all(folder, "size", offset + size <= end_of_shard)
    if index.class_names is None:
        _require_all(folder, "label", samples["label"] == NO_LABEL)
    else:
        label = samples["label"]
        _require_all(folder, "label", (label >= 0) & (label < len(index.class_names)))


def _require_all(folder: Path, field: str, holds: np.ndarray) -> None:
    if not holds.all():
        number = int(np.argmin(holds))
        raise _damaged(folder / SAMPLES_FILE, f"{field} of image {number} is out of range")


def _check_names(folder: Path, index: PackIndex) -> None:
    path = folder / NAMES_FILE
    if not index.names.endswith(b"\n") or index.names.count(b"\n") != len(index.samples):
        raise _damaged(path, f"it does not hold {len(index.samples)} lines")
    try:
        index.names.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is no UTF-8 text") from error


def _check_shard_files(folder: Path, index: PackIndex) -> None:
    for name, size in zip(index.shards, index.shard_bytes.tolist(), strict=True):
        try:
            found = os.lstat(folder / name).st_size
        except OSError as error:
            raise DataError(
                f"{folder / name}: shard cannot be found ({error.strerror}); copy the whole pack"
            ) from error
        if found != size:
            raise shard_of_other_size(folder / name, found, size)


def shard_of_other_size(path: str | os.PathLike, found: int, expected: int) -> DataError:
    return DataError(
        f"{path}: has {found} bytes, the index says {expected}; it is damaged or was replaced: "
        "copy it anew, or pack the images again"
    )


def _read_whole(path: Path, most: int, *, exactly: bool = False) -> bytes:
    """A file's bytes; its size is checked before they are read."""

    def read() -> bytes:
        with open(open_regular(path, follow_links=False), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most or (exactly and size != most):
                allowed = f"{most}" if exactly else f"at most {most}"
                raise _damaged(path, f"it has {size} bytes, allowed is {allowed}")
            data = file.read(size)
            if len(data) != size:
                raise _damaged(path, f"it ends after {len(data)} of {size} bytes")
            return data

    try:
        return retried(str(path), read)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); copy the whole pack, or pack again"
        ) from error


def _write_whole(path: Path, content: bytes) -> None:
    """Atomically: under another name, flushed to the disk, then renamed."""
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8
        return False
    return True


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: {problem}; the index is damaged or not of tools/pack_images.py: copy it anew, "
        "or pack the images again"
    )
