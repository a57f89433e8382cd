"""What identifies the data of a run: a digest of its checked records, training and test apart.

It covers each image's id and size and each object's box, class and flags (`difficult`, `iscrowd`),
its area where the metric reads it and, with MODEL.MASK_ON, its mask; all of it in the order of the
records, which is the order of training. Where files lie, when they were changed and what their
pixels are is not in it. A list of short digests by image, kept beside the run, lets a later start
name the images that differ.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.data.datasets import DetectionData
from moco.training.checkpoint import write_atomic

LIST_FILE = "data_digests.npz"
_PARTS = {"train": "training data", "test": "test data"}
_ASPECTS = ("size", "number of objects", "boxes", "classes", "flags", "areas", "masks")
_NUM_SHOWN = 3


@dataclass(frozen=True)
class PartFingerprint:
    """Of the training or the test records.

    Attributes:
        digest: 16 hex digits.
        image_ids: in the order of the records.
        by_image: uint16 [N, len(_ASPECTS)], what of each image is compared to name differences.
    """

    digest: str
    num_boxes: int
    image_ids: tuple[str, ...]
    by_image: np.ndarray

    @classmethod
    def of(
        cls, records: Sequence[dict], class_names: Sequence[str], *, with_masks: bool
    ) -> PartFingerprint:
        whole = hashlib.sha256()
        by_image = np.empty((len(records), len(_ASPECTS)), np.uint16)
        for row, record in zip(by_image, records, strict=True):
            aspects = _aspects(record, class_names, with_masks)
            own = hashlib.sha256(repr(record["image_id"]).encode())
            for aspect in aspects:
                own.update(b"%d:" % len(aspect) + aspect)
            whole.update(own.digest())
            row[:] = [zlib.crc32(aspect) & 0xFFFF for aspect in aspects]
        return cls(
            whole.hexdigest()[:16],
            sum(len(record["annotations"]) for record in records),
            tuple(str(record["image_id"]) for record in records),
            by_image,
        )

    def summary(self) -> dict:
        return {"digest": self.digest, "images": len(self.image_ids), "boxes": self.num_boxes}


@dataclass(frozen=True)
class DataFingerprint:
    """Of all data of a run; class names, not their numbers, stand for the classes."""

    train: PartFingerprint
    test: PartFingerprint

    @classmethod
    def of(cls, data: DetectionData, *, with_masks: bool) -> DataFingerprint:
        parts = (
            PartFingerprint.of(records, data.class_names, with_masks=with_masks)
            for records in (data.train_records, data.test_records)
        )
        return cls(*parts)

    def summary(self) -> dict:
        """{"train": {"digest", "images", "boxes"}, "test": the same}, for manifests and results."""
        return {name: getattr(self, name).summary() for name in _PARTS}

    def write_list(self, folder: Path) -> None:
        """Write `LIST_FILE`: about 15 bytes an image."""
        arrays = {}
        for name in _PARTS:
            part = getattr(self, name)
            ids = "\n".join(part.image_ids).encode("utf-8", "surrogateescape")
            arrays[f"{name}_ids"] = np.frombuffer(ids, np.uint8)
            arrays[f"{name}_by_image"] = part.by_image
            arrays[f"{name}_digest"] = np.array(part.digest)
        write_atomic(folder / LIST_FILE, lambda file: np.savez_compressed(file, **arrays))


def data_differences(then: Mapping, now: Mapping, then_folder: Path, now_lists: Mapping) -> str:
    """What differs between two summaries, in words; "" where nothing does.

    Args:
        then_folder: where `LIST_FILE` of `then` is, if it is anywhere.
        now_lists: part -> (image ids, by_image), see `lists_of` and `read_lists`.
    """
    lists = read_lists(then_folder, then)
    found = []
    for part, name in _PARTS.items():
        old, new = then[part], now[part]
        if old["digest"] == new["digest"]:
            continue
        line = (
            f"{name}: {old['images']} images, {old['boxes']} boxes then, {new['images']} images, "
            f"{new['boxes']} boxes now"
        )
        if part in lists and part in now_lists:
            line += f"; {_first_differences(lists[part], now_lists[part])}"
        found.append(line)
    return "; ".join(found)


def lists_of(data: DataFingerprint) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    return {p: (getattr(data, p).image_ids, getattr(data, p).by_image) for p in _PARTS}


def read_lists(folder: Path, summary: Mapping) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    """The lists in a folder that are those of `summary`; a lost or damaged one only names less."""
    lists = {}
    try:
        with np.load(folder / LIST_FILE, allow_pickle=False) as file:
            for part in _PARTS:
                if str(file[f"{part}_digest"]) != summary[part]["digest"]:
                    continue
                text = file[f"{part}_ids"].tobytes().decode("utf-8", "surrogateescape")
                ids, by_image = text.split("\n") if text else [], file[f"{part}_by_image"]
                if by_image.shape == (len(ids), len(_ASPECTS)):
                    lists[part] = ids, by_image
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return {}
    return lists


def _aspects(record: dict, class_names: Sequence[str], with_masks: bool) -> list[bytes]:
    """In the order of `_ASPECTS`."""
    objects = record["annotations"]
    masks = [_mask(o.get("segmentation")) for o in objects] if with_masks else []
    return [
        b"%d %d" % (record["height"], record["width"]),
        b"%d" % len(objects),
        array("d", [side for o in objects for side in o["bbox"]]).tobytes(),
        "\n".join(class_names[o["category_id"]] for o in objects).encode(),
        bytes(2 * o.get("difficult", 0) + o.get("iscrowd", 0) for o in objects),
        array("d", [o.get("area", -1.0) for o in objects]).tobytes(),
        b"".join(b"%d:" % len(mask) + mask for mask in masks),
    ]


def _mask(segmentation: list[list[float]] | dict | None) -> bytes:
    if segmentation is None:
        return b""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return counts.encode() if isinstance(counts, str) else counts
    return b"".join(b"%d:" % len(one) + array("d", one).tobytes() for one in segmentation)


def _first_differences(then: tuple, now: tuple) -> str:
    old, new = (dict(zip(_numbered(ids), rows, strict=True)) for ids, rows in (then, now))
    differing = []
    for key in {**old, **new}:
        what = None
        if key not in new:
            what = "not there now"
        elif key not in old:
            what = "not there then"
        elif (old[key] != new[key]).any():
            changed = [a for a, was, is_ in zip(_ASPECTS, old[key], new[key], strict=True)
                       if was != is_]  # fmt: skip
            what = f"{', '.join(changed)} changed"
        if what:
            differing.append(f"image {key[0]!r}: {what}")
    if not differing:
        return "the same images in another order" if list(old) != list(new) else "which is unknown"
    rest = len(differing) - _NUM_SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return f"first differences: {'; '.join(differing[:_NUM_SHOWN])}{more}"


def _numbered(image_ids: Sequence[str]) -> list[tuple[str, int]]:
    """Several COCO files may use one id: each with the number of its occurrence."""
    seen: Counter[str] = Counter()
    numbered = []
    for image_id in image_ids:
        numbered.append((image_id, seen[image_id]))
        seen[image_id] += 1
    return numbered
