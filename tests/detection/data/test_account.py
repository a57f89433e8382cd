"""Read = used + left out, in every line about the data."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.config import get_defaults
from detection.data import account
from detection.data.account import (
    classes_without_test_objects,
    classes_without_training_objects,
    training_account,
)
from detection.data.loader import filter_empty, usable_records
from moco.errors import DataError


def thing(index=0, bbox=(1, 1, 5, 5), **flags) -> dict:
    return {"category_id": index, "bbox": list(bbox), "bbox_mode": 0, **flags}


def record(*annotations) -> dict:
    return {"height": 40, "width": 60, "annotations": list(annotations)}


def test_the_issues_example_trains_on_one_image():
    crowd = thing(iscrowd=1)
    records = [record(thing(iscrowd=0), thing(iscrowd=0)), *[record(crowd)] * 6, record()]
    assert training_account(records, get_defaults()).line() == (
        "training data: 8 images, 8 boxes read: 1 image with 2 boxes trained on; left out: "
        "6 boxes marked iscrowd, 7 images without a box to train on"
    )


def test_all_crowd_says_so_in_the_check_and_in_the_error():
    records = [record(thing(iscrowd=1))] * 8
    line = training_account(records, get_defaults()).line()
    assert line == (
        "training data: 8 images, 8 boxes read: no image is trained on; left out: 8 boxes marked "
        "iscrowd, 8 images without a box to train on"
    )
    with pytest.raises(DataError) as caught:
        usable_records(records, get_defaults())
    assert str(caught.value).startswith(line)


def test_images_without_boxes_may_be_kept():
    cfg = get_defaults()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert training_account([record(thing()), record()], cfg).line() == (
        "training data: 2 images, 1 box read: 2 images with 1 box trained on (images without a box "
        "too: DATALOADER.FILTER_EMPTY_ANNOTATIONS False)"
    )


def test_what_the_test_set_leaves_out():
    records = [record(thing(difficult=1), thing(difficult=0)), record()]
    assert account.test_account(records, {"of no image": 2}).line() == (
        "test data: 2 images, 4 boxes read: 2 images with 1 box scored; left out: 2 boxes of no "
        "image, 1 box marked difficult (detections of crowds and difficult objects count neither "
        "way)"
    )
    plain = account.test_account([record(thing())]).line()
    assert plain == "test data: 1 image, 1 box read: 1 image with 1 box scored"


def test_classes_without_objects():
    records = [record(thing(0), thing(1, difficult=1), thing(2, iscrowd=1))]
    names = ("cat", "dog", "cow", "hen")
    assert classes_without_test_objects(records, names) == ("dog", "cow", "hen")
    assert classes_without_training_objects(records, names) == ("cow", "hen")


boxes = st.tuples(*[st.integers(-9, 70)] * 4)
things = st.builds(
    lambda bbox, flags: thing(0, bbox, **flags),
    boxes,
    st.sampled_from([{}, {"iscrowd": 1}, {"iscrowd": 0}, {"difficult": 1}]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(things, max_size=4).map(lambda a: record(*a)), max_size=6), st.booleans())
def test_read_is_used_and_left_out(records, filters):
    cfg = get_defaults()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filters
    found = training_account(records, cfg, {"of no image": 2})
    kept = filter_empty(records) if filters else records
    used = [
        a
        for r in kept
        for a in r["annotations"]
        if not a.get("iscrowd")
        and max(a["bbox"][0], 0) < min(a["bbox"][2], 60)
        and max(a["bbox"][1], 0) < min(a["bbox"][3], 40)
    ]
    assert (found.used_images, found.used_boxes) == (len(kept), len(used))
    assert found.boxes == sum(len(r["annotations"]) for r in records) + 2
