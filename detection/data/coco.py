"""COCO-format data sets in Detectron2's form, checked as a whole.

Names, folders and records are Detectron2's (data/datasets/builtin.py, coco.py). What differs:
everything is checked before the first iteration, boxes are [x0, y0, x1, y1] already, and
whole-number coordinates are floats (Detectron2 cuts them to whole numbers after resizing).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detection.data.coco_check import (
    ROOT_CATEGORY,
    AnnotationReader,
    read_categories,
    read_images,
)
from detection.data.coco_json import load_json, make_whole, root_categories
from detection.data.data_check import (
    EXIF_TURNED,
    OTHER_UNICODE_FORM,
    CheckReport,
    ImageHeader,
    image_header,
    not_opened,
    other_size,
)
from moco.cfgnode import CfgNode
from moco.data.rgb import DEFAULT_DECODING, Decoding
from moco.errors import ConfigError, DataError

# name -> (image folder, annotation file), both under $DETECTRON2_DATASETS.
BUILTIN = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_valminusminival": (
        "coco/val2014",
        "coco/annotations/instances_valminusminival2014.json",
    ),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
}
_NUM_READERS = 8  # image headers are read from disk side by side


@dataclass(frozen=True)
class CocoSpec:
    """One annotation file and the folder its file names are in."""

    name: str
    json_file: Path
    image_folder: Path


@dataclass(frozen=True)
class CocoSet:
    """What `load_records` read; `category_ids` and `class_names` are by class id."""

    records: list[dict]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    report: CheckReport


def known_specs(cfg: CfgNode) -> dict[str, CocoSpec]:
    """Every COCO data set that can be named: DATASETS.COCO_FILES and Detectron2's.

    Raises: ConfigError for a name of COCO_FILES that is given twice or is one of Detectron2's.
    """
    parent = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
    specs = {
        name: CocoSpec(name, parent / json_file, parent / folder)
        for name, (folder, json_file) in BUILTIN.items()
    }
    for name, json_file, folder in cfg.DATASETS.COCO_FILES:
        if name in specs:
            raise ConfigError(
                f"DATASETS.COCO_FILES: the name {name!r} is given twice or is one of Detectron2's; "
                "choose another"
            )
        places = (Path(os.path.expanduser(place)) for place in (json_file, folder))
        specs[name] = CocoSpec(name, *places)
    return specs


@dataclass
class CocoFile:
    """An annotation file that was read, and whose categories were checked.

    Attributes:
        content: the JSON.
        categories: id -> name, ascending by id; without `roots`.
        roots: id -> name of those that `root_categories` finds; see `settle_roots`.
        report: what was found so far.
    """

    spec: CocoSpec
    content: dict
    categories: dict[int, str]
    roots: dict[int, str]
    report: CheckReport


def open_file(spec: CocoSpec, *, for_scoring: bool) -> CocoFile:
    """Read an annotation file and its categories.

    Args:
        for_scoring: it is the test set, which must have what COCO's metric needs.
    Raises: nothing for bad data; see `CheckReport.problems`.
    """
    report, path = CheckReport(), spec.json_file
    try:
        content = load_json(path)
    except DataError as error:
        report.problems.append(f"data set {spec.name}: {error}{_where_to_look(spec)}")
        return CocoFile(spec, {}, {}, {}, report)
    if for_scoring and not content.get("annotations"):
        allowed = "allowed in DATASETS.TEST: a file with annotations, by which AP is computed"
        report.problem(path, "annotations", "none", allowed)
        return CocoFile(spec, content, {}, {}, report)
    make_whole(path, content, report)
    roots = root_categories(content)
    categories = read_categories(path, content, report, left_out=roots)
    return CocoFile(spec, content, categories, roots, report)


def settle_roots(files: Sequence[CocoFile]) -> None:
    """Leave out the root categories, but one that another file uses as a class."""
    for file in files:
        others = [o for o in files if o is not file]
        for number, name in file.roots.items():
            if any(name in o.categories.values() and name not in o.roots.values() for o in others):
                file.categories[number] = name
            else:
                where = f"{file.spec.json_file}: categories: {name!r} (id {number})"
                file.report.repaired(ROOT_CATEGORY, where)
        file.roots = {n: name for n, name in file.roots.items() if n not in file.categories}
        file.categories = dict(sorted(file.categories.items()))


def load_records(spec: CocoSpec, *, for_scoring: bool, with_masks: bool) -> CocoSet:
    """`read_records` of one file by itself."""
    file = open_file(spec, for_scoring=for_scoring)
    settle_roots([file])
    return read_records(file, for_scoring=for_scoring, with_masks=with_masks)


def read_records(
    file: CocoFile,
    class_names: Sequence[str] | None = None,
    *,
    for_scoring: bool,
    with_masks: bool,
    decoding: Decoding = DEFAULT_DECODING,
) -> CocoSet:
    """Read and check the annotations of a file and the headers of its images.

    A record is {"file_name", "image_id" (int), "height", "width", "annotations"}; for its
    annotations see `coco_check.AnnotationReader`. Crowds are among them, as Detectron2 has them.

    Args:
        class_names: by class id, the names of the file's categories; None orders them by
            ascending category id.
        for_scoring: see `open_file`.
        with_masks: with the test set's masks too (MODEL.MASK_ON).
        decoding: how the images will be read.
    Returns: the records by ascending image id.
    Raises: nothing for bad data; see `CheckReport.problems`.
    """
    report, spec, content = file.report, file.spec, file.content
    path = spec.json_file
    if report.problems and not file.categories:
        return CocoSet([], (), (), report)
    images = read_images(path, content, report)
    for section, found in (("images", images), ("categories", file.categories)):
        if not found and not report.problems:
            report.problem(path, section, "none", "allowed: at least one")
    if report.problems:  # the annotations' own would only follow from these
        return CocoSet([], (), (), report)
    names = tuple(class_names or file.categories.values())
    ids_by_name = {name: number for number, name in file.categories.items()}
    category_ids = tuple(ids_by_name[name] for name in names)
    class_index = {number: index for index, number in enumerate(category_ids)}
    reader = AnnotationReader(
        path, images, class_index, report, for_scoring=for_scoring, with_masks=with_masks
    )
    reader.read_all(content)
    records = [
        {
            "file_name": os.path.join(spec.image_folder, image["file_name"]),
            "image_id": number,
            "height": image["height"],
            "width": image["width"],
            "annotations": reader.by_image[number],
        }
        for number, image in images.items()
    ]
    _check_image_files(spec, records, report, decoding)
    report.num_images = len(records)
    report.num_boxes = sum(len(record["annotations"]) for record in records)
    if for_scoring and not report.num_boxes and not report.problems:
        given = f"none of {len(content['annotations'])} is of an image that the file lists"
        report.problem(path, "annotations", given, "allowed: a file by which AP can be computed")
    return CocoSet(records, category_ids, names, report)


def _where_to_look(spec: CocoSpec) -> str:
    if spec.json_file.exists() or spec.name not in BUILTIN:
        return ""
    return (
        "; set the environment variable DETECTRON2_DATASETS to the folder that holds coco, or "
        "name own files in DATASETS.COCO_FILES"
    )


def _check_image_files(
    spec: CocoSpec, records: Sequence[dict], report: CheckReport, decoding: Decoding
) -> None:
    if not spec.image_folder.is_dir():
        report.problem(spec.image_folder, f"images of {spec.name}", "the folder is missing", "")
        return
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        read = partial(_header_or_problem, decoding=decoding)
        headers = pool.map(read, (record["file_name"] for record in records))
        for record, (path, header) in zip(records, headers, strict=True):
            if path != record["file_name"]:
                report.repaired(OTHER_UNICODE_FORM, path)
                record["file_name"] = path
            if isinstance(header, str):
                report.problem(path, "image", header, "allowed: a JPEG or PNG image")
            else:
                _check_header(spec, record, header, report)


def _check_header(
    spec: CocoSpec, record: dict, header: ImageHeader, report: CheckReport
) -> None:
    path, size = record["file_name"], (record["height"], record["width"])
    if header.orientation != 1:
        report.repaired(EXIF_TURNED, path)
    if header.is_sixteen_bit:
        report.sixteen_bit.append(path)
    if size != (header.height, header.width):
        # Detectron2 refuses such an image too, but only when it first loads it.
        given = f"{size[1]} x {size[0]} in {spec.json_file.name}"
        corners = [annotation["bbox"][2:] for annotation in record["annotations"]]
        found = other_size(size, header, corners, spec.json_file.name)
        report.problem(path, "size", given, found)


def _header_or_problem(file_name: str, decoding: Decoding) -> tuple[str, ImageHeader | str]:
    """(the file, what its header says or what is wrong with it).

    A name that a disk has in another Unicode form (decomposed, as Apple's once did) is found.
    """
    forms = [file_name, *(unicodedata.normalize(form, file_name) for form in ("NFC", "NFD"))]
    path = next((form for form in forms if "\0" in form or os.path.lexists(form)), file_name)
    try:
        return path, image_header(Path(path), decoding)
    except FileNotFoundError:
        return path, "missing"
    except (OSError, ValueError) as error:
        return path, not_opened(error)
