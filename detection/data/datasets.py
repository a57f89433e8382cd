"""The data a configuration names, checked as a whole before the first iteration.

DATASETS.TRAIN and DATASETS.TEST name either VOC-format data sets (`detection.data.voc`) or
COCO-format ones (`detection.data.coco`); the two have different metrics and are not mixed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from detection.data import coco, voc
from detection.data.account import (
    classes_without_test_objects,
    classes_without_training_objects,
    counted,
    meaning_of_absent_classes,
    test_account,
    training_account,
)
from detection.data.data_check import CheckReport, raise_for_problems
from detection.data.transforms import decoding_of, reads_as_detectron2
from moco.cfgnode import CfgNode
from moco.data.sixteen_bit import MOST_DECODED, lines_about, sixteen_bit_use
from moco.errors import ConfigError

OTHER_IDS = "file whose category ids are not the test file's: matched by name"
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

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """The classes that the test data have nothing to find of."""
        return classes_without_test_objects(self.test_records, self.class_names)


def check_and_load(cfg: CfgNode, engine: str = "embedded") -> DetectionData:
    """Check all data the config names, then return it.

    Args:
        engine: the name of the one that will read the images.
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
        return _load_voc(cfg, engine)
    if len(of_coco) < len(names):
        other = next(name for name in names if name not in known)
        raise ConfigError(
            f"DATASETS: {other!r} has VOC's format and {of_coco[0]!r} COCO's; they are not mixed, "
            "as their metrics differ; name data of one format"
        )
    return _load_coco(cfg, known, engine)


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


def _load_coco(cfg: CfgNode, known: Mapping[str, coco.CocoSpec], engine: str) -> DetectionData:
    (test_name,) = cfg.DATASETS.TEST
    test_file = coco.open_file(known[test_name], for_scoring=True)
    train_files = [coco.open_file(known[name], for_scoring=False) for name in cfg.DATASETS.TRAIN]
    coco.settle_roots([*train_files, test_file])
    for file in train_files:
        if not (file.report.problems or test_file.report.problems):
            _check_same_categories(file, test_file)
    if not test_file.report.problems:
        # Before the images' headers are read, which takes minutes.
        check_num_classes(cfg, tuple(test_file.categories.values()))
    reading = {"with_masks": cfg.MODEL.MASK_ON, "decoding": decoding_of(cfg, engine)}
    test = coco.read_records(test_file, for_scoring=True, **reading)
    train_report = CheckReport()
    train_records: list[dict] = []
    for file in train_files:
        # Classes are matched by name: exporters number them anew in each file.
        part = coco.read_records(file, test.class_names or None, for_scoring=False, **reading)
        train_report.merge(part.report)
        train_records.extend(part.records)
        if part.class_names == test.class_names and part.category_ids != test.category_ids:
            train_report.repaired(OTHER_IDS, str(file.spec.json_file))
    data = DetectionData(
        train_records,
        test.records,
        test.class_names,
        None,
        test_name,
        CheckReport(),
        metric="coco",
        coco_json=known[test_name].json_file,
        category_ids=test.category_ids,
    )
    _finish_report(cfg, engine, data, train_report, test.report)
    return data


def _check_same_categories(train: coco.CocoFile, test: coco.CocoFile) -> None:
    """Raise ConfigError where the categories of two files have not the same names."""
    names, files = [], (train, test)
    for file in files:
        names.append(set(file.categories.values()))
    if not all(names) or names[0] == names[1]:
        return
    lacking = []
    for file, own, others in ((test, names[1], names[0]), (train, names[0], names[1])):
        if others - own:
            missing = ", ".join(repr(name) for name in sorted(others - own)[:_NUM_NAMES_SHOWN])
            more = len(others - own) - _NUM_NAMES_SHOWN
            missing += f" and {more} more" if more > 0 else ""
            lacking.append(f"{file.spec.json_file} ({file.spec.name}) lacks {missing}")
    raise ConfigError(
        f"DATASETS: training and test data have different categories: {'; '.join(lacking)}; "
        f"{train.spec.name} has {_some(tuple(train.categories.values()))}, {test.spec.name} has "
        f"{_some(tuple(test.categories.values()))}; both need the same names: add what is missing "
        "to the file's list of categories, under an id that is free (no annotation of it is "
        "needed), or rename what means the same"
    )


def _some(class_names: Sequence[str]) -> str:
    shown = ", ".join(class_names[:_NUM_NAMES_SHOWN])
    rest = len(class_names) - _NUM_NAMES_SHOWN
    return f"({shown}{f' and {rest} more' if rest > 0 else ''})"


def _load_voc(cfg: CfgNode, engine: str) -> DetectionData:
    train_specs = voc.resolve_datasets(cfg, "TRAIN")
    (test_spec,) = voc.resolve_datasets(cfg, "TEST")
    check_num_classes(cfg, test_spec.class_names)
    decoding, train_report = decoding_of(cfg, engine), CheckReport()
    train_records: list[dict] = []
    for spec in train_specs:
        records, found = voc.load_records(spec, decoding)
        train_records.extend(records)
        train_report.merge(found)
    test_records, test_report = voc.load_records(test_spec, decoding)
    data = DetectionData(
        train_records,
        test_records,
        test_spec.class_names,
        test_spec.metric_year,
        test_spec.name,
        CheckReport(),
    )
    _finish_report(cfg, engine, data, train_report, test_report)
    return data


def _finish_report(
    cfg: CfgNode, engine: str, data: DetectionData, train: CheckReport, test: CheckReport
) -> None:
    """Join the reports of both parts in `data.report`, with lines on what is used of each.

    Raises: DataError if a problem is listed.
    """
    report = data.report
    report.merge(train)
    report.merge(test)
    _count_shared(data.train_records, data.test_records, report)
    raise_for_problems(report)
    report.notes += [
        training_account(data.train_records, cfg, train.unread_boxes).line(),
        test_account(data.test_records, test.unread_boxes).line(),
    ]
    untrained = classes_without_training_objects(data.train_records, data.class_names)
    if untrained:
        report.notes.append(f"warning: classes without an object to train on: {_some(untrained)}")
    absent = data.absent_classes
    if absent:
        meaning = meaning_of_absent_classes(data.metric, data.metric_year)
        report.notes.append(
            f"warning: classes without an object in the test data: {_some(absent)}; {meaning}"
        )
    report.notes += _sixteen_bit_lines(cfg, engine, report.sixteen_bit)


def _sixteen_bit_lines(cfg: CfgNode, engine: str, files: Sequence[str]) -> list[str]:
    """How 16-bit grey is read: `files` have it."""
    if not files:
        return []
    if reads_as_detectron2(cfg, engine):
        return [
            f"warning: {counted(len(files), '16-bit grey image')} read as Detectron2 reads them: "
            "clipped at 255, so nearly all white, unlike in pretraining; --engine embedded with "
            f"DATALOADER.STREAM stateless scales them (first: {files[0]})"
        ]
    decoding = decoding_of(cfg, engine)
    step = max(1, len(files) // MOST_DECODED)
    uses = []
    for file in files[::step][:MOST_DECODED]:
        with suppress(Exception):  # one that cannot be decoded is the loader's to report
            uses.append(sixteen_bit_use(file, decoding))
    return lines_about(uses, decoding, "INPUT.SIXTEEN_BIT_RANGE", of=len(files))


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
