"""Images that pretraining must not see, such as the test images of a benchmark: found by content.

What is left out may be named by a VOC folder and split, a COCO file, a folder, a pack or a list
(`find_excluded`). An image of the source is left out where its bytes are those of one of them,
under whatever name, or where it is a near copy of one: re-encoded or resized
(`moco.data.image_rows`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.data import image_hash, image_rows
from moco.data.images import IMAGE_SUFFIXES, ImageSource, find_images, list_images
from moco.data.reading import UnreadableImage, read_file
from moco.data.shard_index import is_pack
from moco.data.shards import ShardSource
from moco.errors import DataError

RECORD_FILE = "excluded.json"
ALLOWED = (
    "allowed: VOC_ROOT:SPLIT, FILE.json or FILE.json:IMAGES (COCO), a folder of images, a pack, or "
    "a text file with a path of an image a line"
)
_SECONDS_BETWEEN_LINES = 20.0
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Excluded:
    """The images that one --exclude names.

    Attributes:
        what: as it was given.
        source: these images.
    """

    what: str
    source: ImageSource | ShardSource


@dataclass(frozen=True)
class LeftOut:
    """What is left out of a source, and why.

    Attributes:
        images: of each that is left out {"path", "like" (the image it equals), "exclude" (what
            named that), "match" ("exact" or "near"), "distance" (bits)}, in the source's order.
        counts: of each exclusion {"exclude", "num_named", "num_exact", "num_near"}: how many
            images it names, and how many are left out because of it.
        key: of source, exclusions and method; equal keys mean an equal result.
    """

    images: tuple[dict, ...]
    counts: tuple[dict, ...]
    key: str

    def lines(self, num_images: int) -> list[str]:
        """For people. num_images: of the source before."""
        lines = []
        for count in self.counts:
            exact, near, named = (count[f"num_{which}"] for which in ("exact", "near", "named"))
            if len(self.counts) > 1 or exact + near != named:
                lines.append(
                    f"--exclude {count['exclude']} names {named} images: {exact + near} images "
                    f"left out ({exact} exact, {near} near)"
                )
        by = ", ".join(count["exclude"] for count in self.counts)
        exact = sum(count["num_exact"] for count in self.counts)
        near = [image for image in self.images if image["match"] == "near"]
        lines.append(
            f"{num_images - len(self.images)} of {num_images} images used, {len(self.images)} left "
            f"out by --exclude {by} ({exact} exact, {len(near)} near)"
        )
        for image in near[:_NAMES_SHOWN]:
            lines.append(f"  near copy: {image['path']} of {image['like']}")
        if len(near) > _NAMES_SHOWN:
            lines.append(f"  and {len(near) - _NAMES_SHOWN} more near copies, see {RECORD_FILE}")
        return lines


def find_excluded(what: str) -> Excluded:
    """The images that a value of --exclude names.

    Raises: DataError where it names nothing, or a file that is not there.
    """
    whole = Path(what).expanduser()
    head, _, tail = what.rpartition(":")
    if whole.is_dir():
        return Excluded(what, find_images(whole) if is_pack(whole) else _folder(whole))
    if whole.is_file():
        is_coco = whole.suffix.lower() == ".json"
        return Excluded(what, _coco(whole, None) if is_coco else _listed(whole))
    if head:
        parent = Path(head).expanduser()
        if parent.is_dir():
            return Excluded(what, _voc(parent, tail))
        if parent.is_file():
            return Excluded(what, _coco(parent, Path(tail).expanduser()))
    raise DataError(f"--exclude {what}: names nothing that exists; {ALLOWED}")


def _folder(folder: Path) -> ImageSource:
    return _source(str(folder), folder, list_images(folder))


def _voc(root: Path, split: str) -> ImageSource:
    """JPEGImages/<id>.* of the ids in ImageSets/Main/<split>.txt, the first word of each line."""
    lists, images = root / "ImageSets" / "Main", root / "JPEGImages"
    path = lists / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))[:12]) or "none"
        raise DataError(
            f"--exclude {root}:{split}: {path} is missing; splits there: {found}; {ALLOWED}"
        )
    by_name: dict[str, str] = {}
    for name in sorted(list_images(images)):
        for key in (name, name.rpartition(".")[0]):
            by_name.setdefault(_plain(key), name)
    chosen, missing = [], []
    for line in _lines(path):
        key = next((k for k in (line, line.split()[0]) if _plain(k) in by_name), None)
        chosen.append(by_name[_plain(key)]) if key else missing.append(line)
    _refuse_missing(f"{root}:{split}", missing, f"no image in {images}")
    return _source(f"{root}:{split}", images, chosen)


def _coco(path: Path, images: Path | None) -> ImageSource:
    what = str(path) if images is None else f"{path}:{images}"
    try:
        content = json.loads(read_file(path))
        names = [image["file_name"] for image in content["images"]]
        assert all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise DataError(
            f"--exclude {what}: {path} is not a file in COCO's format, with 'images' that have a "
            f"'file_name'; {ALLOWED}"
        ) from error
    # Beside the file; as COCO has it, annotations/instances_val2017.json and val2017/.
    split = path.stem.rpartition("_")[2]
    beside = (path.parent, path.parent / "images", path.parent.parent / split)
    candidates = [images] if images else [*beside, path.parent.parent / "images"]
    for folder in candidates:
        missing = [name for name in names if not (folder / name).is_file()]
        if names and not missing:
            return _source(what, folder, names)
        if images:
            _refuse_missing(what, missing, f"not in {images}")
    tried = ", ".join(map(str, candidates))
    raise DataError(
        f"--exclude {what}: its images are in none of {tried}; give {path}:IMAGES with their folder"
    )


def _listed(path: Path) -> ImageSource:
    """The images of a text file, by absolute paths, or below its folder or the working folder."""
    chosen, missing = [], []
    for line in _lines(path):
        found = next((p for p in (path.parent / line, Path(line)) if p.is_file()), None)
        chosen.append(os.path.abspath(found)) if found else missing.append(line)
    _refuse_missing(str(path), missing, f"no file, also not below {path.parent}")
    return _source(str(path), Path("/"), [name.lstrip("/") for name in chosen])


def _lines(path: Path) -> list[str]:
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"--exclude: {path} is not UTF-8 text; {ALLOWED}") from error
    return [line.strip() for line in lines if line.strip()]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # as Linux writes what macOS writes as NFD


def _refuse_missing(what: str, missing: Sequence[str], where: str) -> None:
    if missing:
        raise DataError(
            f"--exclude {what}: {len(missing)} of its images are missing ({where}; first: "
            f"{missing[0]!r}); give all of them, or an image could not be told from the others"
        )


def _source(what: str, folder: Path, names: Sequence[str]) -> ImageSource:
    if not names:
        raise DataError(
            f"--exclude {what}: holds no image; suffixes: {', '.join(IMAGE_SUFFIXES)}; {ALLOWED}"
        )
    return ImageSource(str(folder), tuple(dict.fromkeys(names)), None, ())


def leave_out(
    source: ImageSource | ShardSource,
    exclusions: Sequence[Excluded],
    *,
    near_copies: bool = True,
    known: Path | None = None,
    say: Callable[[str], None] = print,
) -> LeftOut:
    """Which images of `source` are among those of `exclusions`.

    By bytes only images are read whose size occurs among the excluded, and none of a pack. Near
    copies need every image read and decoded, once: `known` is where that was written down.

    Args:
        near_copies: look for those too.
        known: a file with the result of an earlier start, as JSON of `dataclasses.asdict`; taken
            where its key is this one's.
        say: receives lines on the progress, of what takes long.
    Raises: DataError where an image cannot be read.
    """
    key = _key(source, exclusions, near_copies)
    before = _read_known(known, key)
    if before is not None:
        return before
    owners = [number for number, e in enumerate(exclusions) for _ in range(len(e.source))]
    paths = [e.source.path(index) for e in exclusions for index in range(len(e.source))]
    if near_copies:
        pool = np.concatenate([_rows(e.source) for e in exclusions])
        rows = _rows(source, skip_unreadable=True, say=say)
    else:
        sizes = np.concatenate([_sizes(e.source) for e in exclusions])
        pool = np.concatenate([_rows_of_bytes(e.source, sizes) for e in exclusions])
        rows = _rows_of_bytes(source, sizes)
    found = image_rows.match(rows, pool)
    images, counts = [], [
        {"exclude": e.what, "num_named": len(e.source), "num_exact": 0, "num_near": 0}
        for e in exclusions
    ]
    for index in np.flatnonzero(found.kind).tolist():
        partner = int(found.partner[index])
        match = "exact" if found.kind[index] == image_rows.EXACT else "near"
        counts[owners[partner]][f"num_{match}"] += 1
        images.append({
            "path": source.paths[index], "like": paths[partner],
            "exclude": exclusions[owners[partner]].what, "match": match,
            "distance": int(found.distance[index]),
        })  # fmt: skip
    return LeftOut(tuple(images), tuple(counts), key)


def _rows(
    source: ImageSource | ShardSource,
    *,
    skip_unreadable: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """uint8 [N, 24]: rows of `image_hash`; zeros, which equal no other, of what is skipped."""

    def row(index: int) -> np.ndarray:
        try:
            return image_hash.hash_bytes(source.read_bytes(index), source.path(index))
        except UnreadableImage:
            if not skip_unreadable:
                raise
            return np.zeros(image_rows.ROW_BYTES, np.uint8)

    rows = np.empty((len(source), image_rows.ROW_BYTES), np.uint8)
    said = time.monotonic()
    for number, found in enumerate(image_hash.in_threads(row, range(len(source)))):
        rows[number] = found
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"--exclude: looked at {number + 1} of {len(source)} images of {source.root}")
    return rows


def _rows_of_bytes(source: ImageSource | ShardSource, sizes: np.ndarray) -> np.ndarray:
    """uint8 [N, 24]: SHA-256, as far as it goes, of the files that have one of `sizes`."""
    rows = np.zeros((len(source), image_rows.ROW_BYTES), np.uint8)
    candidates = np.flatnonzero(np.isin(_sizes(source), sizes))
    if isinstance(source, ShardSource):
        digests = source.index.samples["sha256"][candidates]
    else:
        digests = [
            np.frombuffer(digest, np.uint8)
            for digest in image_hash.in_threads(lambda i: _sha256(source, i), candidates.tolist())
        ]
    if len(candidates):
        rows[candidates, : image_rows.EXACT_BYTES] = np.stack(digests)[:, : image_rows.EXACT_BYTES]
    return rows


def _sizes(source: ImageSource | ShardSource) -> np.ndarray:
    """int64 [N]: bytes of each file."""
    if isinstance(source, ShardSource):
        return source.index.samples["size"].astype(np.int64)
    return np.array([status.st_size for status in _statuses(source)], np.int64)


def _statuses(source: ImageSource) -> Iterator[os.stat_result]:
    for index in range(len(source)):
        path = source.path(index)
        try:
            yield os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _sha256(source: ImageSource, index: int) -> bytes:
    return hashlib.sha256(source.read_bytes(index)).digest()


def _key(
    source: ImageSource | ShardSource, exclusions: Sequence[Excluded], near_copies: bool
) -> str:
    """16 hex digits: names, sizes and times of all files, and how they are compared."""
    sha = hashlib.sha256(f"{near_copies} {image_rows.MAX_DISTANCE}".encode())
    for what, one in [("", source), *((e.what, e.source) for e in exclusions)]:
        sha.update(f"{what} {len(one)}\n".encode())
        if isinstance(one, ShardSource):
            sha.update(one.index.names)
            sha.update(one.index.samples.tobytes())
            continue
        sha.update("\n".join(one.paths).encode(errors="surrogateescape"))
        for status in _statuses(one):
            sha.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]


def _read_known(path: Path | None, key: str) -> LeftOut | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if content.get("key") == key:
            return LeftOut(tuple(content["images"]), tuple(content["counts"]), key)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass  # missing or damaged: found anew
    return None


def without(
    source: ImageSource | ShardSource, left_out: Sequence[Mapping[str, object]]
) -> ImageSource | ShardSource:
    """The source without the images of `LeftOut.images`, numbered anew.

    Raises: DataError where none is left.
    """
    paths = {image["path"] for image in left_out}
    kept = [index for index, path in enumerate(source.paths) if path not in paths]
    if not kept:
        raise DataError(f"{source.root}: --exclude leaves none of its {len(source)} images")
    if len(kept) == len(source):
        return source
    if isinstance(source, ShardSource):
        return source.subset(kept)
    labels = source.labels
    return dataclasses.replace(
        source,
        paths=tuple(source.paths[index] for index in kept),
        labels=None if labels is None else tuple(labels[index] for index in kept),
    )
