"""The data a configuration names, checked as a whole before the first iteration.

DATASETS.TRAIN and DATASETS.TEST name either VOC-format data sets (`detection.data.voc`) or
COCO-format ones (`detection.data.coco`); the two have different metrics and are not mixed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.data import coco, voc
from detection.data.data_check import CheckReport, raise_for_problems
from moco.cfgnode import CfgNode
from moco.errors import ConfigError

SHARED_IMAGE = "image in both the training and the test data: kept in both"
_NUM_NAMES_SHOWN = 8


@dataclass(frozen=True)
class DetectionData:
    """Everything a run needs to know of its data.

    Attributes:
        train_records, test_records: dicts in Detectron2's form, see `voc.load_records` and
            `coco.load_records`. "image_id" is a str (VOC) or an int (COCO).
        class_names: by contiguous class id, from 0.
        metric: "voc" or "coco".
        metric_year: 2007 or 2012 for VOC, else None.
        test_name: how results call the test set.
        report: what the check found.
        coco_json: the test set's annotation file, None for VOC.
        category_ids: the COCO category id of each class id; empty for VOC.
    """

    train_records: list[dict]
    test_records: list[dict]
    class_names: tuple[str, ...]
    metric_year: int | None
    test_name: str
    report: CheckReport
    metric: str = "voc"
    coco_json: Path | None = None
    category_ids: tuple[int, ...] = ()


def check_and_load(cfg: CfgNode) -> DetectionData:
    """Check all data the config names, then return it.

    Raises:
        ConfigError: an unknown name, more than one test set, or a class count other than
            MODEL.ROI_HEADS.NUM_CLASSES.
        DataError: one line with the number of problems and the first of them. All are in the
            error's attribute `report`.
    """
    known = coco.known_specs(cfg)
    for name in voc.NAMED:
        if name in known:
            raise ConfigError(
                f"DATASETS.COCO_FILES: the name {name!r} is one of VOC's; choose another"
            )
    for which in ("TRAIN", "TEST"):
        _check_names(cfg, which, known)
    if len(cfg.DATASETS.TEST) > 1:
        raise ConfigError(
            f"DATASETS.TEST: {len(cfg.DATASETS.TEST)} data sets are given; one is allowed, since "
            "AP is one number"
        )
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    of_coco = [name for name in names if name in known and not cfg.DATASETS.VOC_ROOT]
    if not of_coco:
        return _load_voc(cfg)
    if len(of_coco) < len(names):
        other = next(name for name in names if name not in known)
        raise ConfigError(
            f"DATASETS: {other!r} has VOC's format and {of_coco[0]!r} COCO's; they are not mixed, "
            "as their metrics differ; name data of one format"
        )
    return _load_coco(cfg, known)


def _check_names(cfg: CfgNode, which: str, of_coco: Mapping[str, coco.CocoSpec]) -> None:
    """Raise ConfigError for no name, one given twice or one that means no data set."""
    names = tuple(cfg.DATASETS[which])
    if not names:
        raise ConfigError(f"DATASETS.{which}: is empty; name at least one data set")
    if len(set(names)) != len(names):
        raise ConfigError(f"DATASETS.{which}: {names} names one data set twice; name it once")
    for name in names:
        if cfg.DATASETS.VOC_ROOT and name in of_coco:
            raise ConfigError(
                f"DATASETS.{which}: {name!r} is a COCO data set, but DATASETS.VOC_ROOT is "
                f"{cfg.DATASETS.VOC_ROOT!r}; VOC and COCO data are not mixed: set VOC_ROOT to ''"
            )
        if not cfg.DATASETS.VOC_ROOT and name not in voc.NAMED and name not in of_coco:
            allowed = [*voc.NAMED, *of_coco]
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"DATASETS.{which}: unknown data set {name!r}{hint}; allowed: "
                f"{', '.join(allowed)}; or set DATASETS.VOC_ROOT to name splits of your own "
                "folder, or DATASETS.COCO_FILES to name your own COCO files"
            )


def _load_coco(cfg: CfgNode, known: Mapping[str, coco.CocoSpec]) -> DetectionData:
    (test_name,) = cfg.DATASETS.TEST
    masks = cfg.MODEL.MASK_ON
    test = coco.load_records(known[test_name], for_scoring=True, with_masks=masks)
    if not test.report.problems:
        check_num_classes(cfg, test.class_names)  # before the training data, which take minutes
    report = CheckReport()
    train_records: list[dict] = []
    for name in cfg.DATASETS.TRAIN:
        part = coco.load_records(known[name], for_scoring=False, with_masks=masks)
        report.merge(part.report)
        train_records.extend(part.records)
        read = not (part.report.problems or test.report.problems)
        if read and part.class_names != test.class_names:
            raise ConfigError(
                f"DATASETS.TRAIN: {name} has the categories {_some(part.class_names)}, but "
                f"{test_name} has {_some(test.class_names)}; they must be equal, in order of ids"
            )
    report.merge(test.report)
    _count_shared(train_records, test.records, report)
    raise_for_problems(report)
    return DetectionData(
        train_records,
        test.records,
        test.class_names,
        None,
        test_name,
        report,
        metric="coco",
        coco_json=known[test_name].json_file,
        category_ids=test.category_ids,
    )


def _some(class_names: Sequence[str]) -> str:
    shown = ", ".join(class_names[:_NUM_NAMES_SHOWN])
    rest = len(class_names) - _NUM_NAMES_SHOWN
    return f"({shown}{f' and {rest} more' if rest > 0 else ''})"


def _load_voc(cfg: CfgNode) -> DetectionData:
    train_specs = voc.resolve_datasets(cfg, "TRAIN")
    (test_spec,) = voc.resolve_datasets(cfg, "TEST")
    check_num_classes(cfg, test_spec.class_names)
    report = CheckReport()
    train_records: list[dict] = []
    for spec in train_specs:
        records, found = voc.load_records(spec)
        train_records.extend(records)
        report.merge(found)
    test_records, found = voc.load_records(test_spec)
    report.merge(found)
    _count_shared(train_records, test_records, report)
    raise_for_problems(report)
    return DetectionData(
        train_records,
        test_records,
        test_spec.class_names,
        test_spec.metric_year,
        test_spec.name,
        report,
    )


def check_num_classes(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Raise ConfigError if the model has another number of classes than the data."""
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if num_classes != len(class_names):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES: {num_classes} is given, but the data has "
            f"{len(class_names)} classes; set it to {len(class_names)}"
        )


def _count_shared(
    train_records: Sequence[dict], test_records: Sequence[dict], report: CheckReport
) -> None:
    train_files = {record["file_name"] for record in train_records}
    for record in test_records:
        if record["file_name"] in train_files:
            report.repaired(SHARED_IMAGE, record["file_name"])
