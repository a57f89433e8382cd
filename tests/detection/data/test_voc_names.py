"""Split files and folders of VOC data as people have them."""

from __future__ import annotations

import shutil
import unicodedata

import pytest
from PIL import Image
from voc_files import SIZE, box, load, make_cfg, make_voc

from detection.data.data_check import EXIF_TURNED, OTHER_UNICODE_FORM
from detection.data.datasets import check_and_load
from detection.data.voc import DatasetSpec, load_records, scored_folder
from detection.data.voc_check import DUPLICATE_ID, ID_WITH_SUFFIX
from moco.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "größe") for form in ("NFC", "NFD"))


def rename(root, image: str, annotation: str | None = None) -> None:
    (root / "JPEGImages/a.jpg").rename(root / f"JPEGImages/{image}.jpg")
    (root / "Annotations/a.xml").rename(root / f"Annotations/{annotation or image}.xml")


def ids_of(root, split="train"):
    records, report = load(root, split)
    return [record["image_id"] for record in records], dict(report.repairs), report.problems


def test_names_with_spaces_are_read_where_they_exist(tmp_path):
    make_voc(tmp_path, split="my cells 1\nb\n")
    rename(tmp_path, "my cells 1")
    assert ids_of(tmp_path) == (["my cells 1", "b"], {}, [])


def test_a_name_that_looks_like_an_id_with_a_flag_is_a_name_where_it_exists(tmp_path):
    make_voc(tmp_path, split="a -1\n")
    ids, repairs, (problem,) = ids_of(tmp_path)  # control: a class's list of VOC
    assert not ids and "line 1: 'a -1'; allowed: one image id a line; an id with a flag" in problem
    assert "name the split itself" in problem
    shutil.copy(tmp_path / "JPEGImages/a.jpg", tmp_path / "JPEGImages/a -1.jpg")
    shutil.copy(tmp_path / "Annotations/a.xml", tmp_path / "Annotations/a -1.xml")
    assert ids_of(tmp_path) == (["a -1"], {}, [])


def test_spaces_that_no_file_has_stay_a_problem(tmp_path):
    _, _, (problem,) = ids_of(make_voc(tmp_path, split="a b\n"))
    assert "'a b'; allowed: one image id a line, with spaces only where a file has" in problem


@pytest.mark.parametrize("line", ["a.jpg", "a.JPG", "a.png"])
def test_ids_with_a_suffix(tmp_path, line):
    assert ids_of(make_voc(tmp_path, split=f"{line}\n")) == (["a"], {ID_WITH_SUFFIX: 1}, [])


def test_a_suffix_that_belongs_to_the_name_stays(tmp_path):
    make_voc(tmp_path, split="a.jpg\n")
    rename(tmp_path, "a.jpg")  # a.jpg.jpg and a.jpg.xml
    assert ids_of(tmp_path) == (["a.jpg"], {}, [])


def test_the_same_id_in_two_ways_is_one(tmp_path):
    found = ids_of(make_voc(tmp_path, split="a\na.jpg\n"))
    assert found == (["a"], {ID_WITH_SUFFIX: 1, DUPLICATE_ID: 1}, [])


def test_a_byte_order_mark(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_bytes("\ufeffa\r\nb\r\n".encode())
    assert ids_of(tmp_path) == (["a", "b"], {}, [])


@pytest.mark.parametrize("line", [NFC, NFD])
@pytest.mark.parametrize("image", [NFC, NFD])
@pytest.mark.parametrize("annotation", [NFC, NFD])
def test_unicode_forms(tmp_path, line, image, annotation):
    make_voc(tmp_path, split=f"{line}\n")
    rename(tmp_path, image, annotation)
    ids, repairs, problems = ids_of(tmp_path)
    assert (ids, problems) == ([annotation], [])
    assert repairs == ({} if line == annotation else {OTHER_UNICODE_FORM: 1})
    (record,), _ = load(tmp_path)
    with Image.open(record["file_name"]) as found:
        assert found.size == (60, 40)


def test_detectron2s_evaluator_gets_ids_that_it_can_read(tmp_path):
    make_voc(tmp_path, split="a.jpg\nb\n")
    spec = DatasetSpec("toy", str(tmp_path), "train", ("cat", "dog"), 2007)
    records, _ = load_records(spec)
    with scored_folder(spec, records) as folder:
        assert folder != str(tmp_path)
        with open(f"{folder}/ImageSets/Main/train.txt") as file:
            assert file.read() == "a\nb\n"
        with open(f"{folder}/Annotations/a.xml") as file:
            assert "<annotation>" in file.read()
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    with scored_folder(spec, records) as folder:  # as it is, where it needs nothing
        assert folder == str(tmp_path)


def test_a_folder_without_splits_is_told_how_to_get_them(tmp_path):
    root = make_voc(tmp_path / "voc")
    shutil.rmtree(root / "ImageSets")
    with pytest.raises(DataError) as caught:
        check_and_load(make_cfg(root))
    assert (
        f"1 problem to correct before training: {root}/ImageSets/Main: splits: missing, beside "
        "Annotations and JPEGImages; allowed: lists <split>.txt of image ids; to make a random "
        f"split: python tools/prepare_voc.py {root}"
    ) in str(caught.value)
    flat = tmp_path / "flat"
    flat.mkdir()
    for folder in ("Annotations", "JPEGImages"):
        for path in (root / folder).iterdir():
            path.rename(flat / path.name)
    with pytest.raises(DataError) as caught:
        check_and_load(make_cfg(flat))
    assert "it is a flat folder of 2 images and 2 .xml" in str(caught.value)
    assert f"python tools/prepare_voc.py {flat} --output-dir NEW" in str(caught.value)


def turned(root, orientation=6) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (60, 40)).save(root / "JPEGImages/a.jpg", exif=exif)


@pytest.mark.parametrize(
    ("corners", "words"),
    [
        (dict(xmax=55, ymax=38), "the boxes fit only that one: remove the EXIF orientation from"),
        (dict(xmax=38, ymax=55), "the boxes fit only the rotated one: correct <size> to 40 x 60"),
        (dict(xmax=30, ymax=30), "the boxes fit both sizes: look at one; where they are right on "),
        (dict(xmax=70, ymax=70), "the boxes fit neither size: look at one"),
    ],
)
def test_an_annotation_of_the_unrotated_image_is_told_so(tmp_path, corners, words):
    make_voc(tmp_path, objects=box(**corners))
    turned(tmp_path)
    _, _, (problem,) = ids_of(tmp_path)
    assert problem.startswith(
        f"{tmp_path}/Annotations/a.xml: size: 60 x 40; the image is 40 x 60 after its EXIF "
        "orientation 6, which is applied; <size> has the size of the unrotated image, "
    )
    assert words in problem


def test_other_sizes_and_orientations_are_not_spoken_of_as_rotation(tmp_path):
    make_voc(tmp_path, size=SIZE.replace("60", "61"))
    turned(tmp_path)
    (problem,) = ids_of(tmp_path)[2]
    assert problem.endswith("size: 61 x 40; the image is 40 x 60")
    make_voc(tmp_path)
    turned(tmp_path, orientation=3)
    ids, repairs, problems = ids_of(tmp_path)
    assert (ids, problems, repairs) == (["a"], [], {EXIF_TURNED: 1})


def test_the_reason_why_an_image_does_not_open_is_said(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages/a.jpg").write_bytes(b"no image")
    assert "image: does not open (no known image format); allowed" in ids_of(tmp_path)[2][0]


def test_the_check_has_an_account_of_both_parts(tmp_path):
    objects = box() + box(tags="<pose>x</pose><truncated>0</truncated><difficult>1</difficult>")
    root = make_voc(tmp_path, objects=objects, split="a\nb\n")
    (root / "ImageSets/Main/test.txt").write_text("a\n")
    (root / "Annotations/b.xml").write_text(f"<annotation>{SIZE}</annotation>")
    lines = check_and_load(make_cfg(root)).report.lines()
    assert lines[:4] == [
        "training data: 2 images, 2 boxes read: 1 image with 2 boxes trained on; left out: 1 image "
        "without a box to train on",
        "test data: 1 image, 2 boxes read: 1 image with 1 box scored; left out: 1 box marked "
        "difficult (detections of crowds and difficult objects count neither way)",
        "warning: classes without an object to train on: (dog)",
        "warning: classes without an object in the test data: (dog); each counts as AP 0 in the "
        "mean of VOC's 2007 metric, as in Detectron2",
    ]
