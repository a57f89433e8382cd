"""Reading one VOC annotation or split file, with every problem found counted or listed.

What is harmless is repaired and counted by kind in `CheckReport.repairs`. What is not is listed
in `CheckReport.problems`, each as `file: field: given; allowed`, and stops the run later.
Coordinates in the files are 1-based and inclusive, so xmin = xmax is a box one pixel wide.
"""

from __future__ import annotations

import math
import os
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

from detection.data.data_check import (
    EXIF_TURNED,
    OTHER_UNICODE_FORM,
    CheckReport,
    ImageHeader,
    image_header,
    not_opened,
    other_size,
    read_small_file,
)
from moco.data.rgb import DEFAULT_DECODING, Decoding

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

FLOAT_COORDINATE = "float coordinate: kept in training, cut to an integer in evaluation"
CLIPPED_BOX = "box reaching out of its image: clipped"
ONE_PIXEL_BOX = "box one pixel wide or high: kept"
SIZE_FROM_IMAGE = "<size> missing or zero: read from the image"
DUPLICATE_ID = "image id repeated in its split: kept once"
ID_WITH_SUFFIX = "image id with its file's suffix in a split: read without it"


def missing_tag(name: str) -> str:
    """The kind under which an absent <difficult>, <pose> or <truncated> is counted."""
    return f"<{name}> missing: read as 0"


class _NoDoctypeBuilder(ET.TreeBuilder):
    """Refuses a DOCTYPE as it begins, so no entity of the file is ever declared or expanded."""

    def doctype(self, name, pubid, system):
        raise ET.ParseError("it has a DOCTYPE")


class VocFiles:
    """The images and annotations of a VOC-format folder, found by the ids of its splits.

    An id is the name of an annotation without its suffix. Names are compared as they are, then in
    Unicode's composed form (NFC): a disk may have decomposed ones (NFD) where a list has the
    other.
    """

    def __init__(self, images: Mapping[str, Path], annotations: Mapping[str, Path]):
        self._images, self._annotations = images, annotations
        self._images_by_form = {composed(stem): path for stem, path in images.items()}
        self._ids_by_form = {composed(stem): stem for stem in (*images, *annotations)}

    def find_id(self, text: str) -> str | None:
        """The id that a line means, None where no file has its name."""
        if text in self._annotations:
            return text
        return self._ids_by_form.get(composed(text))

    def image(self, image_id: str) -> Path | None:
        return self._images.get(image_id) or self._images_by_form.get(composed(image_id))

    def annotation(self, image_id: str, folder: Path) -> Path:
        """The annotation's file, perhaps one that is missing."""
        return self._annotations.get(image_id) or folder / f"{image_id}.xml"


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_split(path: Path, report: CheckReport, files: VocFiles) -> list[str]:
    """The image ids of an ImageSets/Main/<split>.txt file, in order, each once.

    A line is an id, which may have spaces where a file has that name, or an image's file name.
    """
    try:
        lines = read_small_file(path).decode("utf-8-sig").splitlines()
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
        if not line.strip():
            continue
        image_id = _read_line(line.strip(), f"line {number}", path, report, files)
        if image_id is None:
            continue
        if image_id in ids:
            report.repaired(DUPLICATE_ID, f"{path}: line {number}")
        else:
            ids[image_id] = None
    if not ids and not report.problems:
        report.problem(path, "split file", "names no image", "allowed: one image id a line")
    return list(ids)


def _read_line(
    text: str, line: str, path: Path, report: CheckReport, files: VocFiles
) -> str | None:
    """The id in a line, None where a problem was listed."""
    if text in (".", "..") or any(c in text for c in "/\\\0"):
        allowed = "allowed: a file name without its suffix, without / or \\"
        report.problem(path, line, repr(text), allowed)
        return None
    stem, suffix = os.path.splitext(text)
    image_id, written = files.find_id(text), text
    if image_id is None and suffix.lower() in IMAGE_SUFFIXES:
        report.repaired(ID_WITH_SUFFIX, f"{path}: {line}")
        image_id, written = files.find_id(stem) or stem, stem
    if image_id is not None:
        if image_id != written and composed(image_id) == composed(written):
            report.repaired(OTHER_UNICODE_FORM, f"{path}: {line}")
        return image_id
    *before, last = text.split()
    if not before:
        return text  # its missing image and annotation are listed later
    allowed = "allowed: one image id a line, with spaces only where a file has that name"
    if last in ("-1", "0", "1") and files.find_id(" ".join(before)):
        allowed = (
            "allowed: one image id a line; an id with a flag is of a class's list: name the split "
            "itself"
        )
    report.problem(path, line, repr(text), allowed)
    return None


def index_images(folder: Path) -> dict[str, Path]:
    """Image id -> its file, for every .jpg, .jpeg or .png (any case); .jpg wins over .png."""
    found: dict[str, Path] = {}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for suffix in IMAGE_SUFFIXES:
        for path in paths:
            if path.suffix.lower() == suffix:
                found.setdefault(path.stem, path)
    return found


def index_annotations(folder: Path) -> dict[str, Path]:
    """Image id -> its .xml file."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.stem: path for path in paths if path.suffix == ".xml"}


def read_annotation(
    image_id: str,
    xml_path: Path,
    image_path: Path | None,
    class_index: Mapping[str, int],
    report: CheckReport,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict | None:
    """The record of one image in Detectron2's form, or None where a problem was listed."""
    num_problems = len(report.problems)
    root = parse_annotation(xml_path, report)
    header = None
    if image_path is None:
        images = xml_path.parent.parent / "JPEGImages" / image_id
        report.problem(images, "image", "missing", f"allowed: {', '.join(IMAGE_SUFFIXES)}")
    else:
        try:
            header = image_header(image_path, decoding)
        except (OSError, ValueError) as error:
            report.problem(image_path, "image", not_opened(error), "allowed: a JPEG or PNG image")
    if root is None or header is None:
        return None
    height, width = header.height, header.width
    if not _check_size(root, header, xml_path, report):
        return None  # the boxes' own would only follow from it
    if header.orientation != 1:
        report.repaired(EXIF_TURNED, str(image_path))
    if header.is_sixteen_bit:
        report.sixteen_bit.append(str(image_path))
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


def parse_annotation(xml_path: Path, report: CheckReport) -> ET.Element | None:
    """The root of an annotation, None where a problem was listed."""
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
    root: ET.Element, header: ImageHeader, xml_path: Path, report: CheckReport
) -> bool:
    """False where the size is that of another orientation, which boxes then have too."""
    height, width = header.height, header.width
    texts = [(root.findtext(f"size/{name}") or "0").strip() for name in ("width", "height")]
    try:
        given = tuple(int(float(text)) for text in texts)
    except (ValueError, OverflowError):
        report.problem(xml_path, "size", " x ".join(texts), f"the image is {width} x {height}")
        return True
    if given == (width, height):
        return True
    if 0 in given:
        report.repaired(SIZE_FROM_IMAGE, str(xml_path))
    else:
        # Detectron2 refuses such an image too, but only when it first loads it.
        found = other_size((given[1], given[0]), header, _corners(root), "<size>")
        report.problem(xml_path, "size", " x ".join(texts), found)
        return header.orientation == 1
    return True


def _corners(root: ET.Element) -> list[tuple[float, float]]:
    """(xmax, ymax) of the objects whose box can be read."""
    corners = []
    for element in root.findall("object"):
        texts = [element.findtext(f"bndbox/{name}") or "" for name in ("xmax", "ymax")]
        try:
            right, lower = map(float, texts)
        except ValueError:
            continue
        corners.append((right, lower))
    return corners


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
