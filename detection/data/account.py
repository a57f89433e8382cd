"""What of the data is used, and what is left out and why: read = used + left out.

The rules are Detectron2's (data/build.py, data/dataset_mapper.py, its evaluators); here they are
counted, so that a run that trains on one image of eight says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moco.cfgnode import CfgNode

CROWD_BOX = "marked iscrowd"
DIFFICULT_BOX = "marked difficult"
NO_AREA_BOX = "without an area inside the image"
NO_BOX_IMAGE = "without a box to train on"


@dataclass
class Account:
    """Images and boxes of one part of the data, "training" or "test".

    Attributes:
        images, boxes: read, those left out included.
        left_out_images, left_out_boxes: reason -> count.
        used_for: what is done with the rest, in words.
        remark: what the reasons do not tell.
    """

    part: str
    images: int
    boxes: int
    used_for: str
    left_out_images: Counter = field(default_factory=Counter)
    left_out_boxes: Counter = field(default_factory=Counter)
    remark: str = ""

    @property
    def used_images(self) -> int:
        return self.images - self.left_out_images.total()

    @property
    def used_boxes(self) -> int:
        return self.boxes - self.left_out_boxes.total()

    def line(self) -> str:
        """The account in one line."""
        read = f"{counted(self.images, 'image')}, {counted(self.boxes, 'box')} read"
        used = f"{counted(self.used_images, 'image')} with {counted(self.used_boxes, 'box')}"
        if not self.used_images:
            used = "no image is"
        line = f"{self.part} data: {read}: {used} {self.used_for}"
        reasons = [
            f"{counted(count, noun)} {reason}"
            for noun, left_out in (("box", self.left_out_boxes), ("image", self.left_out_images))
            for reason, count in left_out.items()
            if count
        ]
        return line + (f"; left out: {', '.join(reasons)}" if reasons else "") + self.remark


def counted(number: int, noun: str) -> str:
    """"1 box", "2 boxes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('x', 's')) else 's'}"


def trained_objects(record: dict) -> list[dict]:
    """The annotations that are trained on: all but COCO's crowds, as in Detectron2's mapper."""
    return [a for a in record["annotations"] if not a.get("iscrowd", 0)]


def scored_objects(record: dict) -> list[dict]:
    """The annotations to find: crowds (COCO) and difficult objects (VOC) are neither found nor
    missed."""
    return [a for a in trained_objects(record) if not a.get("difficult", 0)]


def training_account(
    records: Sequence[dict], cfg: CfgNode, unread: Mapping[str, int] | None = None
) -> Account:
    """What training takes of its records.

    Args:
        unread: reason -> count of boxes that are in the files and in no record.
    """
    account = _account("training", records, "trained on", unread)
    filters = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    for record in records:
        objects = trained_objects(record)
        empty = sum(not _has_area(a["bbox"], record) for a in objects)
        account.left_out_boxes[CROWD_BOX] += len(record["annotations"]) - len(objects)
        account.left_out_boxes[NO_AREA_BOX] += empty
        # As in Detectron2, an image of empty boxes alone is trained on as one without objects.
        account.left_out_images[NO_BOX_IMAGE] += filters and not objects
    if not filters:
        account.remark = " (images without a box too: DATALOADER.FILTER_EMPTY_ANNOTATIONS False)"
    return account


def test_account(records: Sequence[dict], unread: Mapping[str, int] | None = None) -> Account:
    """What the score is computed from; see `training_account`."""
    account = _account("test", records, "scored", unread)
    for record in records:
        objects = trained_objects(record)
        account.left_out_boxes[CROWD_BOX] += len(record["annotations"]) - len(objects)
        account.left_out_boxes[DIFFICULT_BOX] += len(objects) - len(scored_objects(record))
    if account.left_out_boxes[CROWD_BOX] or account.left_out_boxes[DIFFICULT_BOX]:
        account.remark = " (detections of crowds and difficult objects count neither way)"
    return account


test_account.__test__ = False  # pytest would collect it where it is imported


def _account(
    part: str, records: Sequence[dict], used_for: str, unread: Mapping[str, int] | None
) -> Account:
    boxes = sum(len(record["annotations"]) for record in records)
    left_out = Counter(unread or {})
    return Account(part, len(records), boxes + left_out.total(), used_for, Counter(), left_out)


def _has_area(bbox: Sequence[float], record: dict) -> bool:
    x0, y0, x1, y1 = bbox
    wide = min(x1, record["width"]) > max(x0, 0)
    return wide and min(y1, record["height"]) > max(y0, 0)


def classes_without_test_objects(
    records: Sequence[dict], class_names: Sequence[str]
) -> tuple[str, ...]:
    """The classes of which the test data have nothing to find."""
    found = {a["category_id"] for record in records for a in scored_objects(record)}
    return tuple(name for index, name in enumerate(class_names) if index not in found)


def classes_without_training_objects(
    records: Sequence[dict], class_names: Sequence[str]
) -> tuple[str, ...]:
    found = {a["category_id"] for record in records for a in trained_objects(record)}
    return tuple(name for index, name in enumerate(class_names) if index not in found)


def meaning_of_absent_classes(metric: str, metric_year: int | None) -> str:
    """What a class without test objects does to AP; the figures stay Detectron2's."""
    if metric == "coco":
        return "left out of COCO's mean"
    if metric_year == 2007:
        return "each counts as AP 0 in the mean of VOC's 2007 metric, as in Detectron2"
    return (
        "each counts as AP 0 in the mean of VOC's area metric, or makes it undefined once there is "
        "a detection of it, as in Detectron2"
    )
