"""Reading one VOC annotation or split file, with every problem found counted or listed.

What is harmless is repaired and counted by kind in `CheckReport.repairs`. What is not is listed
in `CheckReport.problems`, each as `file: field: given; allowed`, and stops the run later.
Coordinates in the files are 1-based and inclusive, so xmin = xmax is a box one pixel wide.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

from detection.data.data_check import CheckReport, image_size, read_small_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

FLOAT_COORDINATE = "float coordinate: kept in training, cut to an integer in evaluation"
CLIPPED_BOX = "box reaching out of its image: clipped"
ONE_PIXEL_BOX = "box one pixel wide or high: kept"
SIZE_FROM_IMAGE = "<size> missing or zero: read from the image"
DUPLICATE_ID = "image id repeated in its split: kept once"


def missing_tag(name: str) -> str:
    """The kind under which an absent <difficult>, <pose> or <truncated> is counted."""
    return f"<{name}> missing: read as 0"


class _NoDoctypeBuilder(ET.TreeBuilder):
    """Refuses a DOCTYPE as it begins, so no entity of the file is ever declared or expanded."""

    def doctype(self, name, pubid, system):
        raise ET.ParseError("it has a DOCTYPE")


def read_split(path: Path, report: CheckReport) -> list[str]:
    """The image ids of an ImageSets/Main/<split>.txt file, in order, each once."""
    try:
        lines = read_small_file(path).decode("utf-8").splitlines()
    except OSError:
        others = sorted(p.stem for p in path.parent.glob("*.txt"))
        found = f"splits there: {', '.join(others[:12])}" if others else "no split is there"
        report.problem(path, "split file", "missing or unreadable", found)
        return []
    except ValueError as error:  # not UTF-8, or too large
        report.problem(path, "split file", error, "allowed: UTF-8 text, one image id a line")
        return []
    ids: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        image_id = line.strip()
        if not image_id:
            continue
        where = f"{path}: line {number}"
        if len(image_id.split()) > 1:
            report.problem(path, f"line {number}", repr(image_id), "allowed: one image id a line")
        elif image_id in (".", "..") or any(c in image_id for c in "/\\\0"):
            allowed = "allowed: a file name without its suffix, without / or \\"
            report.problem(path, f"line {number}", repr(image_id), allowed)
        elif image_id in ids:
            report.repaired(DUPLICATE_ID, where)
        else:
            ids[image_id] = None
    if not ids and not report.problems:
        report.problem(path, "split file", "names no image", "allowed: one image id a line")
    return list(ids)


def index_images(folder: Path) -> dict[str, Path]:
    """Image id -> its file, for every .jpg, .jpeg or .png (any case); .jpg wins over .png."""
    found: dict[str, Path] = {}
    for suffix in IMAGE_SUFFIXES:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() == suffix:
                found.setdefault(path.stem, path)
    return found


def read_annotation(
    image_id: str,
    xml_path: Path,
    image_path: Path | None,
    class_index: Mapping[str, int],
    report: CheckReport,
) -> dict | None:
    """The record of one image in Detectron2's form, or None where a problem was listed."""
    num_problems = len(report.problems)
    root = _parse(xml_path, report)
    size = None
    if image_path is None:
        images = xml_path.parent.parent / "JPEGImages" / image_id
        report.problem(images, "image", "missing", f"allowed: {', '.join(IMAGE_SUFFIXES)}")
    else:
        try:
            size = image_size(image_path)
        except (OSError, ValueError):
            report.problem(image_path, "image", "does not open", "allowed: a JPEG or PNG image")
    if root is None or size is None:
        return None
    height, width = size
    _check_size(root, height, width, xml_path, report)
    annotations = []
    for number, element in enumerate(root.findall("object"), start=1):
        where = f"{xml_path}: object {number}"
        annotation = _read_object(element, where, height, width, class_index, report)
        if annotation is not None:
            annotations.append(annotation)
    if len(report.problems) > num_problems:
        return None
    report.num_images += 1
    report.num_boxes += len(annotations)
    return {
        "file_name": str(image_path),
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def _parse(xml_path: Path, report: CheckReport) -> ET.Element | None:
    try:
        data = read_small_file(xml_path)
        root = ET.fromstring(data, ET.XMLParser(target=_NoDoctypeBuilder()))
    except OSError:
        report.problem(xml_path, "annotation", "missing or unreadable", "every image needs one")
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        report.problem(xml_path, "annotation", f"not readable as XML ({error})", "allowed: VOC XML")
    else:
        if root.tag == "annotation":
            return root
        report.problem(xml_path, "root element", f"<{root.tag}>", "allowed: <annotation>")
    return None


def _check_size(
    root: ET.Element, height: int, width: int, xml_path: Path, report: CheckReport
) -> None:
    texts = [(root.findtext(f"size/{name}") or "0").strip() for name in ("width", "height")]
    try:
        given = tuple(int(float(text)) for text in texts)
    except (ValueError, OverflowError):
        report.problem(xml_path, "size", " x ".join(texts), f"the image is {width} x {height}")
        return
    if given == (width, height):
        return
    if 0 in given:
        report.repaired(SIZE_FROM_IMAGE, str(xml_path))
    else:
        # Detectron2 refuses such an image too, but only when it first loads it.
        report.problem(xml_path, "size", " x ".join(texts), f"the image is {width} x {height}")


def _read_object(
    element: ET.Element,
    where: str,
    height: int,
    width: int,
    class_index: Mapping[str, int],
    report: CheckReport,
) -> dict | None:
    name = (element.findtext("name") or "").strip()
    if name not in class_index:
        report.problem(where, "name", repr(name), f"allowed: {', '.join(class_index)}")
        return None
    for tag in ("pose", "truncated"):
        if element.find(tag) is None:
            report.repaired(missing_tag(tag), where)
    difficult = (element.findtext("difficult") or "").strip()
    if not difficult:
        report.repaired(missing_tag("difficult"), where)
    elif difficult not in ("0", "1"):
        report.problem(where, "difficult", repr(difficult), "allowed: 0 or 1")
        return None
    bbox = _read_box(element, where, height, width, report)
    if bbox is None:
        return None
    return {
        "category_id": class_index[name],
        "bbox": bbox,
        "bbox_mode": 0,
        "difficult": int(difficult or 0),
    }


def _read_box(
    element: ET.Element, where: str, height: int, width: int, report: CheckReport
) -> list[float] | None:
    """[x0, y0, x1, y1] with x0 = xmin - 1, y0 = ymin - 1 (Detectron2, datasets/pascal_voc.py)."""
    values = []
    for name in ("xmin", "ymin", "xmax", "ymax"):
        text = (element.findtext(f"bndbox/{name}") or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            given = repr(text) if text else "missing"
            report.problem(where, f"bndbox.{name}", given, "allowed: a finite number")
            return None
        values.append(value)
    xmin, ymin, xmax, ymax = values
    given = f"({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
    if xmin > xmax or ymin > ymax:
        report.problem(where, "bndbox", given, "allowed: xmin <= xmax and ymin <= ymax")
        return None
    clipped = [max(xmin, 1.0), max(ymin, 1.0), min(xmax, float(width)), min(ymax, float(height))]
    if clipped[0] > clipped[2] or clipped[1] > clipped[3]:
        report.problem(where, "bndbox", given, f"allowed: inside the image, {width} x {height}")
        return None
    if any(value != int(value) for value in values):
        report.repaired(FLOAT_COORDINATE, where)
    if clipped != values:
        report.repaired(CLIPPED_BOX, where)
    if clipped[0] == clipped[2] or clipped[1] == clipped[3]:
        report.repaired(ONE_PIXEL_BOX, where)
    return [clipped[0] - 1.0, clipped[1] - 1.0, clipped[2], clipped[3]]
