"""What the fingerprint of detection data covers, what it does not, and which images it names."""

import copy
import os
import shutil
from types import SimpleNamespace

import pytest

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.fingerprint import (
    LIST_FILE,
    DataFingerprint,
    data_differences,
    lists_of,
    read_lists,
)
from detection.data.shapes import make_shapes_dataset
from detection.data.shapes_coco import make_coco_shapes

NAMES = ("cat", "dog")


def records():
    rle = {"size": [40, 30], "counts": "abc"}
    triangle = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]
    return [
        {"file_name": "/a/1.jpg", "image_id": 1, "height": 40, "width": 30, "annotations": [
            {"category_id": 0, "bbox": [0.0, 1.0, 9.0, 9.5], "iscrowd": 0, "area": 50.0,
             "segmentation": triangle},
            {"category_id": 1, "bbox": [2.0, 1.0, 9.0, 9.0], "iscrowd": 1, "segmentation": rle},
        ]},
        {"file_name": "/a/2.jpg", "image_id": 2, "height": 40, "width": 30, "annotations": [
            {"category_id": 1, "bbox": [2.0, 1.0, 9.0, 9.0], "difficult": 0},
        ]},
        {"file_name": "/a/7.jpg", "image_id": 7, "height": 40, "width": 30, "annotations": []},
    ]  # fmt: skip


def of(test, names=NAMES, *, with_masks=True):
    data = SimpleNamespace(train_records=records(), test_records=test, class_names=names)
    return DataFingerprint.of(data, with_masks=with_masks)


def changed(change):
    test = copy.deepcopy(records())
    change(test)
    return test


def set_first(**fields):
    return lambda test: test[0]["annotations"][0].update(fields)


CHANGES = {
    "image '1': boxes changed": set_first(bbox=[0.0, 1.0, 9.0, 9.25]),
    "image '1': classes changed": set_first(category_id=1),
    "image '1': flags changed": set_first(iscrowd=1),
    "image '2': flags changed": lambda test: test[1]["annotations"][0].update(difficult=1),
    "image '1': areas changed": set_first(area=51.0),
    "image '1': masks changed": set_first(segmentation=[[0.0, 0.0, 9.0, 0.0, 9.0, 8.0]]),
    "image '2': size changed": lambda test: test[1].update(height=41),
    "image '7': not there now": lambda test: test.pop(),
    "image '3': not there then": lambda test: test.append({**test[2], "image_id": 3}),
    "the same images in another order": lambda test: test.reverse(),
}


@pytest.mark.parametrize("words", CHANGES)
def test_each_change_is_seen_and_named(words, tmp_path):
    then, now = of(records()), of(changed(CHANGES[words]))
    assert now.train.digest == then.train.digest and now.test.digest != then.test.digest
    then.write_list(tmp_path)
    text = data_differences(then.summary(), now.summary(), tmp_path, lists_of(now))
    assert text.startswith("test data: 3 images, 3 boxes then, ") and text.endswith(words)


def test_where_files_are_and_masks_that_are_not_used_do_not_count():
    then = of(records(), with_masks=False).summary()
    moved = changed(lambda test: [r.update(file_name="/b/x.jpg") for r in test])
    assert of(moved, with_masks=False).summary() == then
    masks = changed(CHANGES["image '1': masks changed"])
    assert of(masks, with_masks=False).summary() == then
    # Negative control: they count where they are used.
    assert of(masks).test.digest != of(records()).test.digest


def test_classes_count_by_name_not_by_number():
    swapped = changed(
        lambda test: [
            a.update(category_id=1 - a["category_id"]) for r in test for a in r["annotations"]
        ]
    )
    assert of(swapped, NAMES[::-1]).test.digest == of(records()).test.digest
    assert of(records(), NAMES[::-1]).test.digest != of(records()).test.digest


def test_without_the_list_only_counts_are_told(tmp_path):
    then, now = of(records()), of(changed(CHANGES["image '7': not there now"]))
    words = "test data: 3 images, 3 boxes then, 2 images, 3 boxes now"
    for damage in (None, b"", b"half", "other"):
        if damage == "other":  # a list of other data than the run's
            now.write_list(tmp_path)
        elif damage is not None:
            (tmp_path / LIST_FILE).write_bytes(damage)
        assert data_differences(then.summary(), now.summary(), tmp_path, lists_of(now)) == words
        assert "test" not in read_lists(tmp_path, then.summary())


def test_many_differences_are_counted_and_an_id_may_repeat(tmp_path):
    many = [{**records()[2], "image_id": n // 2} for n in range(10)]
    then, now = of(many), of(many[:2])
    then.write_list(tmp_path)
    text = data_differences(then.summary(), now.summary(), tmp_path, lists_of(now))
    assert text.count("not there now") == 3 and text.endswith("; and 5 more")


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_a_moved_folder_of_either_format_is_the_same_data(form, tmp_path):
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    options = {"num_train": 3, "num_test": 2, "size": 64, "seed": 0, "class_names": NAMES_OF_SHAPES}
    if form == "voc":
        make_shapes_dataset(old, num_unlabelled=0, **options)
    else:
        make_coco_shapes(old, **options)
    shutil.copytree(old, new)
    for path in new.rglob("*"):
        os.utime(path, (1, 1))
    first, second = (
        DataFingerprint.of(check_and_load(config(form, root)), with_masks=form == "coco")
        for root in (old, new)
    )
    assert first.summary() == second.summary() and first.train.num_boxes > 0


NAMES_OF_SHAPES = ("circle", "square")


def config(form, root):
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": 2, "DATASETS.TRAIN": "('train',)"}
    keys["DATASETS.TEST"] = "('test',)"
    if form == "voc":
        keys |= {"DATASETS.VOC_ROOT": root, "DATASETS.VOC_CLASSES": NAMES_OF_SHAPES}
    else:
        files = tuple((n, f"{root}/{n}.json", f"{root}/images") for n in ("train", "test"))
        keys |= {"DATASETS.COCO_FILES": files, "MODEL.MASK_ON": True}
    return load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
