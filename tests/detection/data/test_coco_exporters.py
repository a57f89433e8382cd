"""COCO files as exporters write them: Roboflow's root category, floats, cut lists of images."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from coco_files import IMAGE, annotation, content, load, make
from PIL import Image
from pycocotools.coco import COCO

from detection.config import load_detection_config
from detection.data.coco_check import NO_IMAGE, NO_IMAGE_BOX, ROOT_CATEGORY
from detection.data.coco_json import WHOLE_FLOAT, scored_file
from detection.data.data_check import OTHER_UNICODE_FORM
from detection.data.datasets import OTHER_IDS, check_and_load
from detection.scoring import score_detections
from moco.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = {"id": 0, "name": "cells", "supercategory": "none"}
CAT = {"id": 3, "name": "cat", "supercategory": "cells"}
DOG = {"id": 12, "name": "dog", "supercategory": "cells"}


def floats(tree: object) -> object:
    """The tree with every whole number of an id or a size as a float."""
    if isinstance(tree, list):
        return [floats(entry) for entry in tree]
    if isinstance(tree, dict):
        names = ("id", "image_id", "category_id", "height", "width", "iscrowd")
        return {k: float(v) if k in names and v is not None else floats(v) for k, v in tree.items()}
    return tree


def config(tmp_path, train: dict, test: dict, classes=2, **keys):
    """The configuration of two files, whose images are those of `make`."""
    for name, tree in (("train", train), ("test", test)):
        make(tmp_path / "x", tree, f"{name}.json")
    folder = tmp_path / "x"
    files = tuple((n, str(folder / f"{n}.json"), str(folder)) for n in ("train", "test"))
    settings = {
        "DATASETS.COCO_FILES": files, "DATASETS.TRAIN": ("train",), "DATASETS.TEST": ("test",),
        "MODEL.ROI_HEADS.NUM_CLASSES": classes, **keys,
    }  # fmt: skip
    return load_detection_config(None, [str(word) for pair in settings.items() for word in pair])


def perfect(data) -> dict:
    """Detections that are the test records' own boxes."""
    return {
        record["image_id"]: (
            np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4),
            np.ones(len(record["annotations"]), np.float32),
            np.array([a["category_id"] for a in record["annotations"]], dtype=np.int64),
        )
        for record in data.test_records
    }


def test_whole_floats_are_read_as_whole_numbers(tmp_path):
    plain = load(tmp_path, content(annotation(iscrowd=1)), for_scoring=True)
    loaded = load(tmp_path, floats(content(annotation(iscrowd=1))), for_scoring=True)
    assert loaded.report.problems == [] and loaded.records == plain.records
    assert loaded.category_ids == (3, 12)
    assert {type(n) for n in loaded.category_ids} == {int}
    # Two images and categories, one annotation: 2 * 3 + 2 + 4.
    assert dict(loaded.report.repairs) == {WHOLE_FLOAT: 12}
    assert loaded.report.first_seen[WHOLE_FLOAT].endswith("x.json: images[0].id")


@pytest.mark.parametrize("value", [7.5, float("inf"), 2.0**60, "7", True])
def test_other_numbers_stay_problems(tmp_path, value):
    tree = content(images=[{**IMAGE, "id": value}])
    assert "images[0]: id: " in load(tmp_path, tree).report.problems[0]


def test_the_root_category_is_left_out_and_counted(tmp_path):
    loaded = load(tmp_path, content(categories=[ROOT, DOG, CAT]), for_scoring=True)
    assert (loaded.class_names, loaded.category_ids) == (("cat", "dog"), (3, 12))
    assert dict(loaded.report.repairs) == {ROOT_CATEGORY: 1}
    assert loaded.report.first_seen[ROOT_CATEGORY].endswith("categories: 'cells' (id 0)")


@pytest.mark.parametrize(
    ("entries", "categories"),
    [
        ([annotation(category_id=0)], [ROOT, CAT]),  # it is used
        ([annotation()], [{**ROOT, "name": "other"}, CAT]),  # it is nobody's supercategory
        ([annotation()], [CAT, {**DOG, "supercategory": "dog"}]),  # its own only
    ],
)
def test_no_other_unused_category_is_left_out(tmp_path, entries, categories):
    loaded = load(tmp_path, content(*entries, categories=categories))
    assert len(loaded.class_names) == 2 and not loaded.report.repairs


def test_a_root_named_as_a_class_is_left_out_by_its_id(tmp_path):
    categories = [{**ROOT, "name": "cat"}, {**CAT, "supercategory": "cat"}]
    tree = content(categories=categories)
    data = check_and_load(config(tmp_path, tree, tree, classes=1))
    assert (data.class_names, data.category_ids) == (("cat",), (3,))
    assert score_detections(data, config(tmp_path, tree, tree, 1), perfect(data), None)["AP"] == (
        pytest.approx(100)
    )


def test_a_root_that_the_other_file_uses_stays_in_both(tmp_path):
    train = content(annotation(), annotation(2, category_id=0), categories=[ROOT, CAT])
    test = content(categories=[ROOT, CAT])
    data = check_and_load(config(tmp_path, train, test))
    assert data.class_names == ("cells", "cat") and ROOT_CATEGORY not in data.report.repairs


def test_annotations_of_images_that_were_cut_are_counted_and_left_out(tmp_path):
    tree = content(annotation(1), annotation(2, image_id=55), annotation(3, image_id=56))
    loaded = load(tmp_path, tree, for_scoring=True)
    assert loaded.report.problems == [] and loaded.report.num_boxes == 1
    assert dict(loaded.report.repairs) == {NO_IMAGE: 2}
    assert dict(loaded.report.unread_boxes) == {NO_IMAGE_BOX: 2}
    data = check_and_load(config(tmp_path, tree, tree))
    assert data.report.lines()[0] == (
        "training data: 2 images, 3 boxes read: 1 image with 1 box trained on; left out: 2 boxes "
        "of images that the file does not list, 1 image without a box to train on"
    )


def test_pycocotools_scores_such_files(tmp_path):
    """All of it at once: floats, a root, cut images; against the plain file, and a control."""
    entries = [annotation(1), annotation(2, category_id=12, image_id=9, bbox=[2, 2, 9, 30])]
    plain = content(*entries, categories=[CAT, DOG])
    cut = annotation(9, image_id=55, category_id=12)
    odd = floats(content(*entries, cut, categories=[ROOT, CAT, DOG]))
    scores = []
    for tree in (plain, odd):
        cfg = config(tmp_path, tree, tree)
        data = check_and_load(cfg)
        assert data.class_names == ("cat", "dog")
        found = perfect(data)
        scores.append(score_detections(data, cfg, found, None))
        assert scores[-1]["AP"] == pytest.approx(100)
        found[7][2][:] = 1  # control: the other class
        assert score_detections(data, cfg, found, None)["AP"] < 60
    assert scores[0] == scores[1]
    # What Detectron2's evaluator is given: a file that pycocotools reads as it is.
    with scored_file(data.coco_json, data.category_ids) as path:
        assert path != str(data.coco_json)
        api = COCO(path)
        assert (api.getCatIds(), sorted(api.getImgIds())) == ([3, 12], [7, 9])
        assert sorted(api.anns) == [1, 2]
    config(tmp_path, plain, plain)
    with scored_file(data.coco_json, data.category_ids) as path:  # the file itself otherwise
        assert path == str(data.coco_json)


def test_a_category_that_a_file_lacks_is_named_before_all_else(tmp_path):
    train, test = content(categories=[CAT, DOG]), content(categories=[CAT])
    for classes in (1, 2, 5):  # whatever NUM_CLASSES is
        with pytest.raises(ConfigError) as caught:
            check_and_load(config(tmp_path, train, test, classes))
        message = str(caught.value)
        assert f"{tmp_path}/x/test.json (test) lacks 'dog'; train has (cat, dog), test" in message
        assert "add what is missing to the file's list of categories" in message
        assert "\n" not in message
    with pytest.raises(ConfigError, match=r"train.json \(train\) lacks 'dog'"):
        check_and_load(config(tmp_path, test, train))


def test_an_empty_category_is_named_in_the_check(tmp_path):
    lines = check_and_load(config(tmp_path, content(), content())).report.lines()
    assert "warning: classes without an object to train on: (dog)" in lines
    assert (
        "warning: classes without an object in the test data: (dog); left out of COCO's mean"
    ) in lines


def test_categories_are_matched_by_name_whatever_their_ids(tmp_path):
    """Two exports number the same classes in another order: ids alone would exchange them."""
    entries = [annotation(1), annotation(2, category_id=12)]
    test = content(*entries, categories=[CAT, DOG])
    swapped = content(*entries, categories=[{**CAT, "name": "dog"}, {**DOG, "name": "cat"}])
    data = check_and_load(config(tmp_path, swapped, test))
    assert (data.class_names, data.category_ids) == (("cat", "dog"), (3, 12))
    assert [a["category_id"] for a in data.train_records[0]["annotations"]] == [1, 0]
    assert [a["category_id"] for a in data.test_records[0]["annotations"]] == [0, 1]
    assert data.report.repairs[OTHER_IDS] == 1
    same = check_and_load(config(tmp_path, test, test))  # control
    assert OTHER_IDS not in same.report.repairs


def test_file_names_of_another_unicode_form_are_found(tmp_path):
    written, there = (unicodedata.normalize(form, "größe.jpg") for form in ("NFC", "NFD"))
    spec_image = {**IMAGE, "file_name": written}
    Image.new("RGB", (60, 40)).save(tmp_path / there)
    loaded = load(tmp_path, content(images=[spec_image]))
    assert loaded.records[0]["file_name"] == str(tmp_path / there)
    assert dict(loaded.report.repairs) == {OTHER_UNICODE_FORM: 1}
    assert not loaded.report.problems


def test_an_annotation_file_of_the_unrotated_image_is_told_so(tmp_path):
    tree = content(annotation(bbox=[30, 5, 25, 20]), images=[IMAGE])
    spec = make(tmp_path, tree)
    exif = Image.Exif()
    exif[274] = 8
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    from detection.data.coco import load_records

    (problem,) = load_records(spec, for_scoring=False, with_masks=False).report.problems
    assert problem == (
        f"{tmp_path}/a.jpg: size: 60 x 40 in x.json; the image is 40 x 60 after its EXIF "
        "orientation 8, which is applied; x.json has the size of the unrotated image, and the "
        "boxes fit only that one: remove the EXIF orientation from the image"
    )


def test_all_crowd_stops_before_training_in_the_words_of_the_check(tmp_path):
    from detection.data.loader import usable_records

    train = content(annotation(1, iscrowd=1), annotation(2, iscrowd=1))
    cfg = config(tmp_path, train, content())
    data = check_and_load(cfg)
    line = data.report.lines()[0]
    assert "no image is trained on; left out: 2 boxes marked iscrowd, 2 images without" in line
    with pytest.raises(DataError) as caught:
        usable_records(data.train_records, cfg)
    assert line in str(caught.value)


def test_a_byte_order_mark_is_read_and_not_given_to_pycocotools(tmp_path):
    text = b"\xef\xbb\xbf" + json.dumps(content()).encode()
    spec = make(tmp_path, text)
    assert not load(tmp_path, text).report.problems
    with scored_file(spec.json_file, (3, 12)) as path:
        assert len(COCO(path).anns) == 1
