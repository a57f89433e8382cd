"""Reading a COCO-format annotation file, with every problem found counted or listed.

The rules are Detectron2's (data/datasets/coco.py); where it would stop during training, or go on
with a defect, the defect is listed in `CheckReport.problems` and stops the run before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from detection.data.coco_json import LARGEST_ID, is_id
from detection.data.data_check import CheckReport

CLIPPED_BOX = "box reaching out of its image: clipped in training"
EMPTY_BOX = "box without an area inside its image: not trained on"
NO_POLYGON = "object whose polygons all have under 3 corners: left out, as Detectron2 does"
DUPLICATE_ID = "annotation id repeated in a minival file, as it is known to be: both kept"
NO_CROWD_FLAG = "iscrowd missing: read as 0"
NO_AREA = "area missing in the test data: the box's is used for small, medium and large"
ROOT_CATEGORY = "category that no annotation uses and that is another's supercategory: left out"
NO_IMAGE = "annotation of an image that the file does not list: left out"
NO_IMAGE_BOX = "of images that the file does not list"
NO_POLYGON_BOX = "whose polygons all have under 3 corners"
ZERO_ID = "annotation id 0 in the test data, 'not found' to pycocotools: numbered anew for scoring"

# Corners so far out come from a defect, and drawing them would take all memory.
_FARTHEST_CORNER = 1e6


def read_categories(
    path: Path, content: dict, report: CheckReport, left_out: Collection[int] = ()
) -> dict[int, str]:
    """Category id -> name, ascending by id, which is the order of the class ids."""
    categories: dict[int, str] = {}
    for where, entry in _entries(path, content, "categories", report):
        number, name = entry.get("id"), entry.get("name")
        if is_id(number) and number in left_out:
            continue
        if not is_id(number):
            report.problem(where, "id", repr(number), "allowed: a whole number")
        elif number in categories:
            report.problem(where, "id", number, "allowed: one category an id")
        elif not _is_line(name):
            report.problem(where, "name", repr(name), "allowed: a line of text")
        elif name in categories.values():
            report.problem(where, "name", repr(name), "allowed: one category a name")
        else:
            categories[number] = name
    return dict(sorted(categories.items()))


def read_images(path: Path, content: dict, report: CheckReport) -> dict[int, dict]:
    """Image id -> {"file_name", "height", "width"}, ascending by id, as Detectron2 sorts them."""
    images: dict[int, dict] = {}
    for where, entry in _entries(path, content, "images", report):
        number, name = entry.get("id"), entry.get("file_name")
        size = entry.get("height"), entry.get("width")
        if not is_id(number):
            report.problem(where, "id", repr(number), "allowed: a whole number")
        elif number in images:
            report.problem(where, "id", number, "allowed: one image an id")
        elif not _is_line(name):
            report.problem(where, "file_name", repr(name), "allowed: a path in the image folder")
        elif not all(is_id(side) and side > 0 for side in size):
            report.problem(where, "height, width", size, "allowed: whole numbers above 0")
        else:
            images[number] = {"file_name": name, "height": size[0], "width": size[1]}
    return dict(sorted(images.items()))


class AnnotationReader:
    """Reads the annotations of one file in order; `by_image` collects them by image id.

    An annotation becomes {"bbox" [x0, y0, x1, y1], "bbox_mode" 0, "category_id" from 0} with
    "iscrowd" and "segmentation" where the file has them, in a test set "area" too.

    Args:
        images: see `read_images`.
        class_index: category id -> class id.
        for_scoring: the file is a test set, whose annotations must have what COCO's metric needs.
        with_masks: also what its metric of masks needs.
    """

    def __init__(
        self,
        path: Path,
        images: Mapping[int, dict],
        class_index: Mapping[int, int],
        report: CheckReport,
        *,
        for_scoring: bool,
        with_masks: bool,
    ) -> None:
        self._path, self._images, self._class_index = path, images, class_index
        self._report, self._for_scoring, self._with_masks = report, for_scoring, with_masks
        self._ids: set[int] = set()
        self.by_image: dict[int, list[dict]] = {number: [] for number in images}

    def read_all(self, content: dict) -> None:
        """Read the section "annotations" and empty its entries, which are most of the memory."""
        for where, entry in _entries(self._path, content, "annotations", self._report):
            annotation = self._read(where, entry)
            if annotation is not None:
                self.by_image[entry["image_id"]].append(annotation)
            entry.clear()

    def _read(self, where: str, entry: dict) -> dict | None:
        report = self._report
        if not self._read_ids(where, entry):
            return None
        if entry.get("ignore", 0) != 0:
            report.problem(where, "ignore", repr(entry["ignore"]), "allowed: 0, or no such field")
            return None
        annotation = {"category_id": self._class_index[entry["category_id"]], "bbox_mode": 0}
        if "iscrowd" not in entry:
            report.repaired(NO_CROWD_FLAG, where)
        elif entry["iscrowd"] not in (0, 1):
            report.problem(where, "iscrowd", repr(entry["iscrowd"]), "allowed: 0 or 1")
            return None
        else:
            annotation["iscrowd"] = int(entry["iscrowd"])
        image = self._images[entry["image_id"]]
        box = _read_box(where, entry.get("bbox"), image, report)
        if box is None or not self._read_area(where, entry):
            return None
        annotation["bbox"] = box
        if self._for_scoring and "area" in entry:
            annotation["area"] = entry["area"]
        given = entry.get("segmentation")
        if not given:
            if self._with_masks and self._for_scoring:
                report.problem(where, "segmentation", "missing", "MODEL.MASK_ON needs it to score")
                return None
            return annotation
        segmentation = read_segmentation(given, image["height"], image["width"])
        if isinstance(segmentation, str):
            report.problem(where, "segmentation", segmentation, "allowed: polygons or an RLE")
            return None
        if not segmentation:
            if self._with_masks and self._for_scoring:
                allowed = "allowed in a test set: 3 or more corners"
                report.problem(where, "segmentation", "no polygon with 3 corners", allowed)
            else:
                report.repaired(NO_POLYGON, where)
                report.unread_boxes[NO_POLYGON_BOX] += 1
            return None
        return {**annotation, "segmentation": segmentation}

    def _read_ids(self, where: str, entry: dict) -> bool:
        report, number = self._report, entry.get("id")
        image_id = entry.get("image_id")
        if is_id(image_id) and image_id not in self._images:
            report.repaired(NO_IMAGE, where)
            report.unread_boxes[NO_IMAGE_BOX] += 1
            return False
        for field, known in (("image_id", self._images), ("category_id", self._class_index)):
            value = entry.get(field)
            if not is_id(value) or value not in known:
                given = repr(value) if field in entry else "missing"
                kind = "images" if field == "image_id" else "categories"
                report.problem(where, field, given, f"allowed: the id of one of its {kind}")
                return False
        if not is_id(number):
            report.problem(where, "id", repr(number), "allowed: a whole number")
            return False
        if number in self._ids:
            if "minival" not in self._path.name:
                report.problem(where, "id", number, "allowed: one annotation an id")
                return False
            report.repaired(DUPLICATE_ID, where)
        self._ids.add(number)
        if number == 0 and self._for_scoring:
            report.repaired(ZERO_ID, where)
        return True

    def _read_area(self, where: str, entry: dict) -> bool:
        if not self._for_scoring:
            return True
        if "area" not in entry:
            self._report.repaired(NO_AREA, where)
        elif not _is_finite(entry["area"]) or entry["area"] < 0:
            allowed = "allowed: a finite number, 0 or more"
            self._report.problem(where, "area", repr(entry["area"]), allowed)
            return False
        return True


def _entries(path: Path, content: dict, section: str, report: CheckReport):
    """(where, entry) of each entry of a section that is an object; lists what is none."""
    entries = content.get(section)
    if not isinstance(entries, list):
        given = "missing" if section not in content else f"a {type(entries).__name__}"
        report.problem(path, section, given, f"allowed: a list of {section}")
        return
    for number, entry in enumerate(entries):
        where = f"{path}: {section}[{number}]"
        if isinstance(entry, dict):
            yield where, entry
        else:
            report.problem(where, "entry", f"a {type(entry).__name__}", "allowed: an object")


def _read_box(
    where: str, box: object, image: dict, report: CheckReport
) -> list[float] | None:
    """[x, y, width, height] as [x0, y0, x1, y1], in the float32 arithmetic of Detectron2's
    BoxMode.convert (structures/boxes.py); neither clipped nor dropped."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        given = "missing" if box is None else repr(box)[:80]
        report.problem(where, "bbox", given, "allowed: [x, y, width, height], finite numbers")
        return None
    if all(isinstance(value, int) for value in box):  # exact there
        x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    else:
        with np.errstate(over="ignore"):
            x0, y0, width, height = np.array(box, dtype=np.float64).astype(np.float32)
            x1, y1 = x0 + width, y0 + height
    if box[2] < 0 or box[3] < 0 or max(map(abs, (x0, y0, x1, y1))) > _FARTHEST_CORNER:
        allowed = f"allowed: a width and height of 0 or more, up to {_FARTHEST_CORNER:g} pixels"
        report.problem(where, "bbox", box, allowed)
        return None
    corners = [float(value) for value in (x0, y0, x1, y1)]
    inside = [
        *(max(corners[0], 0.0), max(corners[1], 0.0)),
        *(min(corners[2], image["width"]), min(corners[3], image["height"])),
    ]
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        report.repaired(EMPTY_BOX, where)
    elif inside != corners:
        report.repaired(CLIPPED_BOX, where)
    return corners


def read_segmentation(given: object, height: int, width: int) -> list[list[float]] | dict | str:
    """An annotation's segmentation in Detectron2's form, or what is wrong with it.

    Polygons that Detectron2 filters out (under 3 corners, or an odd number of coordinates) are
    left out. Their numbers are made floats, since Detectron2 cuts whole ones after resizing. An
    uncompressed RLE is compressed.
    """
    if isinstance(given, dict):
        return _read_rle(given, height, width)
    if not isinstance(given, list):
        return f"a {type(given).__name__}"
    polygons = []
    for polygon in given:
        if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
            return "a polygon that is no list of numbers"
        try:
            corners = np.array(polygon, dtype=np.float64)
        except OverflowError:
            corners = np.array([math.inf])
        if not (np.abs(corners) <= _FARTHEST_CORNER).all():
            return f"a corner that is not finite, or farther out than {_FARTHEST_CORNER:g} pixels"
        if len(polygon) % 2 == 0 and len(polygon) >= 6:
            polygons.append(corners.tolist())
    return polygons


def _read_rle(given: dict, height: int, width: int) -> dict | str:
    """A checked RLE: pycocotools would write out of its memory for runs that sum to more."""
    counts, size = given.get("counts"), given.get("size")
    if size != [height, width]:
        return f"an RLE of size {size!r:.40}, its image is {[height, width]} (height, width)"
    if isinstance(counts, str):
        runs = runs_of_compressed(counts)
        if runs is None:
            return "an RLE whose counts are no compressed runs"
    elif isinstance(counts, list) and all(map(is_id, counts)):
        runs = np.array(counts, dtype=np.int64)
    else:
        return "an RLE whose counts are neither text nor a list of whole numbers"
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        return f"an RLE whose runs are not {height} x {width} pixels in total"
    given = {"size": [height, width], "counts": counts}
    return given if isinstance(counts, str) else coco_mask.frPyObjects(given, height, width)


def runs_of_compressed(counts: str) -> np.ndarray | None:
    """The run lengths in an RLE's text, or None where it is malformed.

    Source of the format: pycocotools, common/maskApi.c: 5 bits a character from "0" on, low ones
    first, 32 where more follow, 16 of the last as the sign; from the fourth run on as a
    difference to the run before the last one.
    """
    characters = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
    codes = characters - 48
    if len(codes) == 0 or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # 35 bits: more than any image has pixels
        return None
    place = np.arange(len(codes)) - np.repeat(first, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    values -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)
    for start in (1, 2):  # every other run, from the second and from the third on
        values[start::2] = np.cumsum(values[start::2])
    return values


def _is_line(value: object) -> bool:
    """Text that can be printed: one line, and no half of a surrogate pair, which JSON allows."""
    if not isinstance(value, str) or not value.strip() or len(value.splitlines()) > 1:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_finite(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_ID
    return type(value) is float and math.isfinite(value)
