"""Which data a configuration names, in either format, and what is checked across them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detection.config import load_detection_config
from detection.data.coco import BUILTIN
from detection.data.datasets import SHARED_IMAGE, check_and_load
from detection.data.loader import filter_empty, train_loader
from detection.data.shapes import make_shapes_dataset
from detection.data.shapes_coco import make_coco_shapes
from detection.scoring import score_detections
from moco.errors import ConfigError, DataError

CLASSES = ("circle", "square")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco") / "s"
    return make_coco_shapes(root, num_train=4, num_test=2, size=64, seed=0, class_names=CLASSES)


@pytest.fixture
def copied(shapes, tmp_path):
    """A function that writes the annotation file `name` anew, changed, and names it so."""

    def write(name: str, change) -> tuple:
        content = json.loads((shapes / f"{name}.json").read_text())
        change(content)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return (name, str(path), str(shapes / "images"))

    return write


def own(shapes, name: str) -> tuple:
    return (name, str(shapes / f"{name}.json"), str(shapes / "images"))


def make_cfg(*files, train=("train",), test=("test",), classes=2, **keys):
    settings = {
        "DATASETS.COCO_FILES": files,
        "DATASETS.TRAIN": train,
        "DATASETS.TEST": test,
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    return load_detection_config(None, [str(word) for pair in settings.items() for word in pair])


def test_own_coco_files(shapes):
    data = check_and_load(make_cfg(own(shapes, "train"), own(shapes, "test")))
    assert (data.metric, data.metric_year, data.test_name) == ("coco", None, "test")
    assert (data.class_names, data.category_ids) == (CLASSES, (1, 3))
    assert data.coco_json == shapes / "test.json"
    assert [r["image_id"] for r in data.train_records] == [1, 2, 3, 4]
    assert [r["image_id"] for r in data.test_records] == [5, 6]
    assert data.report.num_images == 6 and not data.report.repairs
    both = make_cfg(own(shapes, "train"), own(shapes, "test"), train=("train", "test"))
    data = check_and_load(both)
    assert len(data.train_records) == 6 and dict(data.report.repairs) == {SHARED_IMAGE: 2}


def test_detectron2s_names_are_found_in_its_folder(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name, split in (("coco_2017_train", "train"), ("coco_2017_val", "test")):
        folder, json_file = (tmp_path / part for part in BUILTIN[name])
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_bytes((shapes / f"{split}.json").read_bytes())
        folder.symlink_to(shapes / "images")
    data = check_and_load(make_cfg(train=("coco_2017_train",), test=("coco_2017_val",)))
    assert data.test_name == "coco_2017_val" and len(data.train_records) == 4
    assert data.train_records[0]["file_name"].startswith(str(tmp_path / "coco/train2017"))


def test_voc_data_say_so(tmp_path):
    root = make_shapes_dataset(
        tmp_path / "v", num_train=1, num_test=1, num_unlabelled=0, size=64, seed=0
    )
    classes = "('circle', 'square', 'triangle', 'cross')"
    data = check_and_load(
        make_cfg(classes=4, DATASETS__VOC_ROOT=root, DATASETS__VOC_CLASSES=classes)
    )
    assert (data.metric, data.metric_year, data.coco_json, data.category_ids) == (
        "voc", 2007, None, ()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(train=("voc_2007_trainval",)), "'voc_2007_trainval' has VOC's format and 'test'"),
        (dict(train=("trian",)), "unknown data set 'trian' .did you mean 'train'"),
        (dict(test=("coco_2017_vall",)), "did you mean 'coco_2017_val'"),
        (dict(test=("train", "test")), "one is allowed"),
        (dict(train=("train", "train")), "twice"),
        (dict(train=()), "DATASETS.TRAIN: is empty"),
        (dict(classes=3), "NUM_CLASSES: 3 is given, but the data has 2"),
        (
            dict(DATASETS__VOC_ROOT="x", DATASETS__VOC_CLASSES="('a', 'b')"),
            "'train' is a COCO data set, but DATASETS.VOC_ROOT is 'x'",
        ),
    ],
)
def test_wrong_names_are_config_errors(shapes, keys, words):
    with pytest.raises(ConfigError, match=words):
        check_and_load(make_cfg(own(shapes, "train"), own(shapes, "test"), **keys))


@pytest.mark.parametrize("name", ["train", "coco_2017_val", "voc_2007_test"])
def test_a_name_means_one_file(shapes, name):
    files = (own(shapes, "train"), own(shapes, "test"), (name, "x.json", "x"))
    with pytest.raises(ConfigError, match=f"'{name}' is (given twice or is )?one of"):
        check_and_load(make_cfg(*files))


@pytest.mark.parametrize(
    "files", ["(('a', 'b'),)", "('abc',)", "(('a', 'b', 3),)", "(('', 'b', 'c'),)"]
)
def test_malformed_files_are_config_errors(files):
    with pytest.raises(ConfigError, match="COCO_FILES is .*; allowed: triples"):
        load_detection_config(None, ["DATASETS.COCO_FILES", files])


def test_categories_must_agree(shapes, copied):
    def rename(content):
        content["categories"][1]["name"] = "disc"

    with pytest.raises(ConfigError, match=r"train has .*\(circle, disc\).* test has .*square"):
        check_and_load(make_cfg(copied("train", rename), own(shapes, "test")))

    def renumber(content):  # other ids in the same order mean the same classes
        for entry in (*content["annotations"], *content["categories"]):
            field = "category_id" if "category_id" in entry else "id"
            entry[field] += 10

    data = check_and_load(make_cfg(copied("train", renumber), own(shapes, "test")))
    assert data.category_ids == (1, 3)


def test_a_test_set_needs_annotations(shapes, copied):
    files = own(shapes, "train"), copied("test", lambda content: content.pop("annotations"))
    with pytest.raises(DataError, match="1 problem .*test.json: annotations: none; allowed in"):
        check_and_load(make_cfg(*files))


def test_problems_of_all_files_are_in_one_line(shapes, copied):
    def break_box(content):
        content["annotations"][0]["bbox"] = [1, 2, 3]

    with pytest.raises(DataError, match="2 problems.*train.json.*test.json") as caught:
        check_and_load(make_cfg(copied("train", break_box), copied("test", break_box)))
    assert "\n" not in str(caught.value) and len(caught.value.report.problems) == 2


def test_crowds_are_not_trained_on(shapes, copied):
    def crowd(content):
        for entry in content["annotations"]:
            if entry["image_id"] == 1 or entry["id"] % 2:
                entry["iscrowd"] = 1

    plain = check_and_load(make_cfg(own(shapes, "train"), own(shapes, "test")))
    assert len(filter_empty(plain.train_records)) == 4  # control
    cfg = make_cfg(copied("train", crowd), own(shapes, "test"), SOLVER__IMS_PER_BATCH=1)
    data = check_and_load(cfg)
    expected = {
        r["image_id"]: [a["category_id"] for a in r["annotations"] if not a["iscrowd"]]
        for r in data.train_records
    }
    kept = [r["image_id"] for r in filter_empty(data.train_records)]
    assert kept == [i for i, classes in expected.items() if classes] and 1 not in kept
    loader = train_loader(
        data.train_records, cfg, seed=0, start_iteration=0, rank=0, world_size=1, num_workers=0
    )
    assert loader.num_filtered == 4 - len(kept)
    for _ in range(8):
        ((sample),) = next(loader)
        assert sample["gt_classes"].tolist() == expected[sample["image_id"]]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_records_own_objects_score_100(shapes):
    cfg = make_cfg(own(shapes, "train"), own(shapes, "test"), MODEL__MASK_ON=True)
    data = check_and_load(cfg)
    detections = {}
    for record in data.test_records:
        objects, size = record["annotations"], (record["height"], record["width"])
        detections[record["image_id"]] = (
            np.array([a["bbox"] for a in objects], np.float32),
            np.ones(len(objects), np.float32),
            np.array([a["category_id"] for a in objects]),
            [coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], *size)) for a in objects],
        )
    scores = score_detections(data, cfg, detections, None)
    for task in ("bbox", "segm"):
        assert scores["coco"][task]["AP"] == pytest.approx(100)
    for found in detections.values():  # control: the other class
        found[2][:] = 1 - found[2]
    assert score_detections(data, cfg, detections, None)["AP"] < 100


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_the_same_images_are_trained_on_as_by_detectron2(shapes, copied):
    build = pytest.importorskip("detectron2.data.build")

    def crowd(content):
        for entry in content["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] in (1, 3))

    data = check_and_load(make_cfg(copied("train", crowd), own(shapes, "test")))
    theirs = build.filter_images_with_only_crowd_annotations(data.train_records)
    assert filter_empty(data.train_records) == theirs != data.train_records
