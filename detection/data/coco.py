"""COCO-format data sets in Detectron2's form, checked as a whole.

Names, folders and records are Detectron2's (data/datasets/builtin.py, coco.py). What differs:
everything is checked before the first iteration, boxes are [x0, y0, x1, y1] already, and
whole-number coordinates are floats (Detectron2 cuts them to whole numbers after resizing).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detection.data.coco_check import AnnotationReader, load_json, read_categories, read_images
from detection.data.data_check import CheckReport, image_size
from moco.cfgnode import CfgNode
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


def load_records(spec: CocoSpec, *, for_scoring: bool, with_masks: bool) -> CocoSet:
    """Read and check one annotation file and the headers of its images.

    A record is {"file_name", "image_id" (int), "height", "width", "annotations"}; for its
    annotations see `coco_check.AnnotationReader`. Crowds are among them, as Detectron2 has them.

    Args:
        for_scoring: it is the test set, which must have what COCO's metric needs.
        with_masks: with the test set's masks too (MODEL.MASK_ON).
    Returns: the records by ascending image id.
    Raises: nothing for bad data; see `CheckReport.problems`.
    """
    report, path = CheckReport(), spec.json_file
    try:
        content = load_json(path)
    except DataError as error:
        report.problems.append(f"data set {spec.name}: {error}{_where_to_look(spec)}")
        return CocoSet([], (), (), report)
    if for_scoring and not content.get("annotations"):
        allowed = "allowed in DATASETS.TEST: a file with annotations, by which AP is computed"
        report.problem(path, "annotations", "none", allowed)
        return CocoSet([], (), (), report)
    categories = read_categories(path, content, report)
    images = read_images(path, content, report)
    for section, found in (("images", images), ("categories", categories)):
        if not found and not report.problems:
            report.problem(path, section, "none", "allowed: at least one")
    if report.problems:  # the annotations' own would only follow from these
        return CocoSet([], (), (), report)
    category_ids, class_names = tuple(categories), tuple(categories.values())
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
    _check_image_files(spec, records, report)
    report.num_images = len(records)
    report.num_boxes = sum(len(record["annotations"]) for record in records)
    return CocoSet(records, category_ids, class_names, report)


def _where_to_look(spec: CocoSpec) -> str:
    if spec.json_file.exists() or spec.name not in BUILTIN:
        return ""
    return (
        "; set the environment variable DETECTRON2_DATASETS to the folder that holds coco, or "
        "name own files in DATASETS.COCO_FILES"
    )


def _check_image_files(spec: CocoSpec, records: Sequence[dict], report: CheckReport) -> None:
    if not spec.image_folder.is_dir():
        report.problem(spec.image_folder, f"images of {spec.name}", "the folder is missing", "")
        return
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        sizes = pool.map(_size_or_problem, (record["file_name"] for record in records))
        for record, size in zip(records, sizes, strict=True):
            height, width = record["height"], record["width"]
            if isinstance(size, str):
                report.problem(record["file_name"], "image", size, "allowed: a JPEG or PNG image")
            elif size != (height, width):
                # Detectron2 refuses such an image too, but only when it first loads it.
                given = f"{width} x {height} in {spec.json_file.name}"
                found = f"the image is {size[1]} x {size[0]}"
                report.problem(record["file_name"], "size", given, found)


def _size_or_problem(file_name: str) -> tuple[int, int] | str:
    try:
        return image_size(Path(file_name))
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError):
        return "does not open"
