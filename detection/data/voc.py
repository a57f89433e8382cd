"""VOC-format data sets: which ones a config names, and their checked records.

Records, names and folders are Detectron2's (data/datasets/pascal_voc.py, builtin.py). What
differs: the whole data set is checked before the first iteration, a split of one id works, and
harmless defects (`voc_check`) are repaired and counted where Detectron2 would stop or train on.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.data.data_check import CheckReport
from detection.data.voc_check import (
    IMAGE_SUFFIXES,
    VocFiles,
    index_annotations,
    index_images,
    read_annotation,
    read_split,
)
from moco.cfgnode import CfgNode
from moco.data.rgb import DEFAULT_DECODING, Decoding
from moco.errors import ConfigError

# In Detectron2's order, which is the order of its weights.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
NAMED = {
    f"voc_{year}_{split}": (year, split)
    for year, splits in (
        (2007, ("trainval", "train", "val", "test")),
        (2012, ("trainval", "train", "val")),
    )
    for split in splits
}
_METRIC_YEARS = (2007, 2012)


@dataclass(frozen=True)
class DatasetSpec:
    """One split of one VOC-format folder (Annotations, ImageSets/Main, JPEGImages).

    Attributes:
        name: how results call it.
        metric_year: 2007 (11-point AP) or 2012 (area under the curve).
    """

    name: str
    root: str
    split: str
    class_names: tuple[str, ...]
    metric_year: int


def resolve_datasets(cfg: CfgNode, which: str) -> list[DatasetSpec]:
    """The data sets under DATASETS.TRAIN or DATASETS.TEST (`which`: "TRAIN" or "TEST").

    With DATASETS.VOC_ROOT they are splits of that folder; otherwise Detectron2's names under
    $DETECTRON2_DATASETS (default: datasets).

    Raises: ConfigError for a bad class list, metric or split.
    """
    names = tuple(cfg.DATASETS[which])
    if cfg.DATASETS.VOC_ROOT:
        return _own_datasets(cfg, names)
    parent = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
    specs = []
    for name in names:
        year, split = NAMED[name]
        specs.append(DatasetSpec(name, str(parent / f"VOC{year}"), split, VOC_CLASSES, year))
    return specs


def _own_datasets(cfg: CfgNode, splits: tuple[str, ...]) -> list[DatasetSpec]:
    root, classes = os.path.expanduser(cfg.DATASETS.VOC_ROOT), tuple(cfg.DATASETS.VOC_CLASSES)
    year = cfg.DATASETS.VOC_METRIC
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(
            f"DATASETS.VOC_CLASSES: {classes!r} is given for DATASETS.VOC_ROOT {root}; "
            "allowed: the names of its classes, each once"
        )
    if year not in _METRIC_YEARS:
        raise ConfigError(f"DATASETS.VOC_METRIC: {year!r} is given; allowed: 2007 or 2012")
    for split in splits:
        if split in (".", "..") or "/" in split or "\\" in split:
            raise ConfigError(
                f"DATASETS: split {split!r} is given; allowed: the name of a file "
                "ImageSets/Main/<split>.txt, without folders"
            )
    folder = Path(root).resolve().name
    return [DatasetSpec(f"{folder}_{split}", root, split, classes, year) for split in splits]


def load_records(
    spec: DatasetSpec, decoding: Decoding = DEFAULT_DECODING
) -> tuple[list[dict], CheckReport]:
    """Read and check one split.

    Args:
        decoding: how its images will be read.
    Returns: (records in split order, without those that have a problem; the report). A record is
        {"file_name", "image_id", "height", "width", "annotations"}; an annotation has
        "category_id" (from 0), "bbox" [x0, y0, x1, y1] in pixels from 0, "bbox_mode" 0 and
        "difficult" (0 or 1). Difficult objects are included, as Detectron2 trains on them.
    Raises: nothing for bad data; see `CheckReport.problems`.
    """
    report = CheckReport()
    root = Path(spec.root)
    if not root.is_dir():
        report.problem(
            root,
            f"data set {spec.name}",
            "the folder is missing",
            "set the environment variable DETECTRON2_DATASETS to the folder that holds VOC2007 "
            "and VOC2012, or DATASETS.VOC_ROOT to a VOC-format folder",
        )
        return [], report
    splits, annotations = root / "ImageSets" / "Main", root / "Annotations"
    if next(splits.glob("*.txt"), None) is None:
        _list_missing_splits(root, report)
        return [], report
    files = VocFiles(index_images(root / "JPEGImages"), index_annotations(annotations))
    ids = read_split(splits / f"{spec.split}.txt", report, files)
    class_index = {name: index for index, name in enumerate(spec.class_names)}
    records = []
    for image_id in ids:
        xml_path = files.annotation(image_id, annotations)
        image_path = files.image(image_id)
        record = read_annotation(image_id, xml_path, image_path, class_index, report, decoding)
        if record is not None:
            records.append(record)
    return records, report


@contextlib.contextmanager
def scored_folder(spec: DatasetSpec, records: Sequence[dict]) -> Iterator[str]:
    """A folder whose split Detectron2's evaluator can read by itself: the ids of the records.

    It is the data set's own, but where the split has other lines (file names, a byte order mark).
    """
    ids = [record["image_id"] for record in records]
    main = Path("ImageSets") / "Main"
    lines = (Path(spec.root) / main / f"{spec.split}.txt").read_bytes().splitlines()
    if [line.strip() for line in lines] == [image_id.encode() for image_id in ids]:
        yield spec.root
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / main).mkdir(parents=True)
        (Path(folder) / "Annotations").symlink_to(Path(spec.root).resolve() / "Annotations")
        text = "".join(f"{image_id}\n" for image_id in ids)
        (Path(folder) / main / f"{spec.split}.txt").write_text(text, encoding="utf-8")
        yield folder


def _list_missing_splits(root: Path, report: CheckReport) -> None:
    """Say which layout a folder without splits has, and what makes them."""
    names = [path.name for path in root.iterdir()]
    num_images = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    num_annotations = sum(name.endswith(".xml") for name in names)
    given, command = "missing", f"tools/prepare_voc.py {root}"
    if num_images and num_annotations:
        given = f"missing: it is a flat folder of {num_images} images and {num_annotations} .xml"
        command += " --output-dir NEW"
    elif {"Annotations", "JPEGImages"} <= {*names}:
        given = "missing, beside Annotations and JPEGImages"
    allowed = f"allowed: lists <split>.txt of image ids; to make a random split: python {command}"
    report.problem(root / "ImageSets" / "Main", "splits", given, allowed)
