"""The check of VOC-format data: what is repaired and counted, and what stops a run."""

from __future__ import annotations

import os

import pytest
from PIL import Image
from voc_files import CLASSES, SIZE, TAGS, box, load, make_cfg, make_voc

from detection.config import get_defaults
from detection.data.datasets import SHARED_IMAGE, check_and_load
from detection.data.voc import VOC_CLASSES, DatasetSpec, load_records, resolve_datasets
from detection.data.voc_check import (
    CLIPPED_BOX,
    DUPLICATE_ID,
    FLOAT_COORDINATE,
    ONE_PIXEL_BOX,
    SIZE_FROM_IMAGE,
    missing_tag,
)
from moco.errors import ConfigError, DataError


def test_record_has_detectron2s_form(tmp_path):
    records, report = load(make_voc(tmp_path))
    assert records == [
        {
            "file_name": str(tmp_path / "JPEGImages/a.jpg"),
            "image_id": "a",
            "height": 40,
            "width": 60,
            "annotations": [
                {"category_id": 0, "bbox": [10.0, 5.0, 30.0, 25.0], "bbox_mode": 0, "difficult": 0}
            ],
        }
    ]
    assert (report.problems, dict(report.repairs), report.num_boxes) == ([], {}, 1)


@pytest.mark.parametrize(
    ("change", "kind", "bbox"),
    [
        (dict(objects=box(xmin="11.5")), FLOAT_COORDINATE, [10.5, 5, 30, 25]),
        (dict(objects=box(xmin=0, ymax=44)), CLIPPED_BOX, [0, 5, 30, 40]),
        (dict(objects=box(xmin=30)), ONE_PIXEL_BOX, [29, 5, 30, 25]),
        (dict(size=SIZE.replace("60", "0").replace("40", "0")), SIZE_FROM_IMAGE, [10, 5, 30, 25]),
        (dict(size=""), SIZE_FROM_IMAGE, [10, 5, 30, 25]),
        (dict(split="a\na\n"), DUPLICATE_ID, [10, 5, 30, 25]),
        *(
            (dict(objects=box(tags=TAGS.replace(tag, "x"))), missing_tag(tag), [10, 5, 30, 25])
            for tag in ("pose", "truncated", "difficult")
        ),
    ],
)
def test_harmless_defects_are_repaired_and_counted(tmp_path, change, kind, bbox):
    records, report = load(make_voc(tmp_path, **change))
    assert report.problems == []
    assert dict(report.repairs) == {kind: 1}
    assert str(tmp_path) in report.first_seen[kind]
    assert [record["annotations"][0]["bbox"] for record in records] == [bbox]
    assert (records[0]["height"], records[0]["width"]) == (40, 60)


BOMB = "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><annotation>&a;</annotation>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(objects=box(name="cow")), ("a.xml: object 1", "name", "'cow'", "cat, dog")),
        (dict(objects=box() + box(xmin=31)), ("object 2", "(31, 6, 30, 25)", "xmin <= xmax")),
        (dict(objects=box(xmin=70, xmax=80)), ("bndbox", "inside the image, 60 x 40")),
        (dict(objects=box(xmin="nan")), ("bndbox.xmin", "'nan'", "finite number")),
        (dict(objects=box(ymax=None)), ("bndbox.ymax", "missing")),
        (dict(objects=box(xmin="x")), ("bndbox.xmin", "'x'")),
        (dict(objects=box(tags="<difficult>yes</difficult>")), ("difficult", "'yes'", "0 or 1")),
        (dict(size=SIZE.replace("60", "61")), ("size: 61 x 40", "the image is 60 x 40")),
        (dict(size=SIZE.replace("60", "wide")), ("size: wide x 40",)),
        (dict(xml="<annotation>"), ("a.xml", "not readable as XML")),
        (dict(xml=BOMB), ("not readable as XML", "DOCTYPE")),
        (dict(xml='<?xml version="1.0" encoding="no-such"?><a/>'), ("not readable as XML",)),
        (dict(split=""), ("train.txt", "names no image")),
        (dict(split="a\nc\n"), ("JPEGImages/c", "missing", ".jpg, .jpeg, .png")),
        (dict(split="a\n../a\n"), ("train.txt: line 2", "'../a'")),
        (dict(split="a -1\n"), ("line 1", "'a -1'", "one image id a line")),
    ],
)
def test_other_defects_stop_the_run_in_one_line(tmp_path, change, words):
    with pytest.raises(DataError) as caught:
        check_and_load(make_cfg(make_voc(tmp_path, **change)))
    message = str(caught.value)
    assert "\n" not in message and "data check: " in message
    for word in words:
        assert word in message
    assert caught.value.report.problems


def test_doctype_in_another_encoding_is_refused(tmp_path):
    make_voc(tmp_path)
    text = f'<?xml version="1.0" encoding="UTF-16"?>{BOMB}'
    (tmp_path / "Annotations/a.xml").write_bytes(text.encode("utf-16"))
    assert "DOCTYPE" in load(tmp_path)[1].problems[0]


def test_missing_files(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "Annotations/a.xml").unlink()
    (tmp_path / "JPEGImages/b.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 problems") as caught:
        check_and_load(make_cfg(tmp_path))
    assert "a.xml: annotation: missing" in str(caught.value)
    assert "b.jpg: image: does not open" in str(caught.value)
    assert "splits there: test, train" in load(tmp_path, "val")[1].problems[0]
    assert "folder is missing" in load(tmp_path / "none")[1].problems[0]


def test_many_problems_are_counted_and_cut(tmp_path):
    cfg = make_cfg(make_voc(tmp_path, objects=box(name="cow") * 9))
    with pytest.raises(DataError, match="9 problems.* and 4 more") as caught:
        check_and_load(cfg)
    assert len(caught.value.report.problems) == 9


@pytest.mark.parametrize("suffix", [".jpeg", ".png", ".JPG"])
def test_image_suffixes(tmp_path, suffix):
    records, _ = load(make_voc(tmp_path, suffix=suffix))
    assert records[0]["file_name"].endswith(f"a{suffix}")


def test_size_is_compared_after_exif_orientation(tmp_path):
    make_voc(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "JPEGImages/a.jpg", exif=exif)
    records, report = load(tmp_path)
    assert not report.problems and (records[0]["height"], records[0]["width"]) == (40, 60)
    Image.new("RGB", (40, 60)).save(tmp_path / "JPEGImages/a.jpg")  # control: not turned
    assert "the image is 40 x 60" in load(tmp_path)[1].problems[0]


def test_check_and_load(tmp_path):
    cfg = make_cfg(make_voc(tmp_path / "toy", split="a\nb\n"))
    data = check_and_load(cfg)
    assert [r["image_id"] for r in data.train_records] == ["a", "b"]
    assert [r["image_id"] for r in data.test_records] == ["b"]
    assert (data.class_names, data.metric_year, data.test_name) == (CLASSES, 2007, "toy_test")
    assert dict(data.report.repairs) == {SHARED_IMAGE: 1}
    assert any(SHARED_IMAGE in line for line in data.report.lines())


def test_detectron2s_names(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = get_defaults()
    cfg.DATASETS.TRAIN = ("voc_2007_trainval", "voc_2012_trainval")
    first, second = resolve_datasets(cfg, "TRAIN")
    assert first == DatasetSpec(
        "voc_2007_trainval", str(tmp_path / "VOC2007"), "trainval", VOC_CLASSES, 2007
    )
    assert (second.root, second.metric_year) == (str(tmp_path / "VOC2012"), 2012)
    assert len(VOC_CLASSES) == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"TRAIN": ("voc_2007_trianval",), "VOC_ROOT": ""}, "did you mean 'voc_2007_trainval'"),
        ({"TRAIN": ()}, "DATASETS.TRAIN: is empty"),
        ({"TRAIN": ("train", "train")}, "twice"),
        ({"TRAIN": ("../x",)}, "without folders"),
        ({"VOC_CLASSES": ()}, "DATASETS.VOC_CLASSES"),
        ({"VOC_METRIC": 2010}, "2007 or 2012"),
        ({"TEST": ("test", "train")}, "one is allowed"),
        ({"VOC_CLASSES": ("cat",)}, "NUM_CLASSES: 2 is given"),
    ],
)
def test_wrong_names_are_config_errors(tmp_path, change, words):
    cfg = make_cfg(make_voc(tmp_path))
    for key, value in change.items():
        cfg.DATASETS[key] = value
    with pytest.raises(ConfigError, match=words):
        check_and_load(cfg)


@pytest.mark.skipif("MOCO_REAL_DATA" not in os.environ, reason="MOCO_REAL_DATA is not set")
def test_blood_cells():
    root = os.path.join(os.environ["MOCO_REAL_DATA"], "bccd")
    classes = ("RBC", "WBC", "Platelets")
    numbers = {}
    for split in ("trainval", "test"):
        records, report = load_records(DatasetSpec("bccd", root, split, classes, 2007))
        assert report.problems == []
        numbers[split] = (len(records), report.num_boxes, sum(report.repairs.values()))
        assert set(report.repairs) <= {ONE_PIXEL_BOX}
    assert sum(n[0] for n in numbers.values()) == 364
    assert sum(n[1] for n in numbers.values()) == 4888
    assert sum(n[2] for n in numbers.values()) == 2


@pytest.mark.detectron2
def test_records_equal_detectron2s(tmp_path):
    pascal_voc = pytest.importorskip("detectron2.data.datasets.pascal_voc")
    # Two ids: Detectron2 cannot read a split of one.
    make_voc(tmp_path, objects=box() + box(xmin="12.25", name="dog"), split="a\nb\n")
    records, _ = load(tmp_path)
    assert [a.pop("difficult") for r in records for a in r["annotations"]] == [0, 0, 0]
    theirs = pascal_voc.load_voc_instances(str(tmp_path), "train", CLASSES)
    assert theirs == records
    theirs[0]["annotations"][0]["bbox"][0] += 1  # control
    assert theirs != records
