"""tools/prepare_voc.py: splits for annotated images that have none."""

from __future__ import annotations

import os
import shlex
import unicodedata

import numpy as np
import pytest
from PIL import Image
from scripts import load_tool

from detection.config import load_detection_config
from detection.data.datasets import check_and_load

NAMES = [f"{k}" for k in range(10)]
PARTS = ("JPEGImages", "Annotations")


def make(folder, names=NAMES, *, flat=True, classes=("cat", "dog")):
    images, annotations = (folder / part for part in (("", "") if flat else PARTS))
    for part in (images, annotations):
        part.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.png")
        things = "".join(
            f"<object><name>{c}</name><bndbox><xmin>2</xmin><ymin>2</ymin>"
            f"<xmax>{20 + number}</xmax><ymax>30</ymax></bndbox></object>"
            for c in classes
        )
        size = "<size><width>60</width><height>40</height></size>"
        (annotations / f"{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")
    return folder


def run(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        load_tool("prepare_voc").main([str(word) for word in words])
    return caught.value.code


def split_of(root, name) -> list[str]:
    return (root / f"ImageSets/Main/{name}.txt").read_text().split("\n")[:-1]


def test_a_flat_folder_becomes_one_that_trains(tmp_path, capsys):
    flat = make(tmp_path / "flat", classes=("dog", "a cat"))
    (flat / "x.xml").write_text("<annotation/>")
    Image.new("RGB", (9, 9)).save(flat / "y.jpg")
    assert run(flat, "--output-dir", tmp_path / "voc") == 0
    said = capsys.readouterr().out
    assert (
        "flat: 10 annotated images; left out: 1 image without an annotation (y.jpg), 1 annotation "
        "without an image (x.xml)"
    ) in said
    assert "trainval: 8 images; objects: 8 a cat, 8 dog" in said and "test: 2 images" in said
    train, test = split_of(tmp_path / "voc", "trainval"), split_of(tmp_path / "voc", "test")
    assert sorted(train + test) == NAMES and len(test) == 2
    image = tmp_path / f"voc/JPEGImages/{test[0]}.png"
    assert os.path.samefile(image, flat / f"{test[0]}.png")
    # The command that is printed loads, and its data are whole.
    words = shlex.split(said[said.index("python detection/train_net.py") :].replace("\\\n", " "))
    start = words.index("DATASETS.VOC_ROOT")
    cfg = load_detection_config(None, words[start:])
    data = check_and_load(cfg)
    assert data.class_names == ("a cat", "dog")
    assert (len(data.train_records), len(data.test_records)) == (8, 2)


def test_splits_are_written_beside_annotations_and_never_replaced_unasked(tmp_path, capsys):
    root = make(tmp_path / "own", flat=False)
    assert run(root, "--test-fraction", "0.5") == 0
    first = split_of(root, "test")
    assert len(first) == 5
    assert run(root) == 2
    assert "trainval.txt" in capsys.readouterr().err
    assert split_of(root, "test") == first
    assert run(root, "--test-fraction", "0.5", "--overwrite") == 0
    assert split_of(root, "test") == first  # the seed's
    assert run(root, "--test-fraction", "0.5", "--overwrite", "--seed", "1") == 0
    assert split_of(root, "test") != first


@pytest.mark.parametrize("seed", range(6))
def test_copies_are_on_one_side(tmp_path, capsys, seed):
    root = make(tmp_path / "own", flat=False)
    pixels = Image.open(root / "JPEGImages/0.png")
    for name in ("1", "2"):  # the same pixels in other bytes
        pixels.save(root / f"JPEGImages/{name}.png", compress_level=int(name))
    assert run(root, "--test-fraction", "0.3", "--seed", seed) == 0
    assert "2 images with the pixels of another" in capsys.readouterr().out
    sides = [name for name in ("trainval", "test") if {"0", "1", "2"} & {*split_of(root, name)}]
    assert len(sides) == 1
    assert not {*split_of(root, "trainval")} & {*split_of(root, "test")}


def test_names_of_another_unicode_form_are_paired(tmp_path):
    flat = make(tmp_path / "flat", names=["b", "c", "d"])
    decomposed, composed = (unicodedata.normalize(form, "größe") for form in ("NFD", "NFC"))
    os.rename(flat / "b.png", flat / f"{decomposed}.png")
    os.rename(flat / "b.xml", flat / f"{composed}.xml")
    assert run(flat, "--output-dir", tmp_path / "voc") == 0
    ids = split_of(tmp_path / "voc", "trainval") + split_of(tmp_path / "voc", "test")
    assert composed in ids and (tmp_path / f"voc/JPEGImages/{composed}.png").is_file()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda root: None, (), "is a flat folder of 10 annotated images; give --output-dir OUT"),
        (lambda root: None, ("--output-dir", "{}"), "exists; nothing is overwritten"),
        (lambda root: None, ("--test-fraction", "1"), "allowed is above 0, below 1"),
        (lambda root: (root / "3.xml").write_text("<a>"), ("--output-dir", "{}/o"), "3.xml: annot"),
        (lambda root: (root / "3.png").write_text("x"), ("--output-dir", "{}/o"), "3.png: this im"),
        (lambda root: [p.unlink() for p in root.glob("*.png")], (), "0 images, 10 .xml"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, change, words, message):
    flat = make(tmp_path / "flat")
    change(flat)
    before = sorted(os.listdir(tmp_path))
    assert run(flat, *(word.format(tmp_path) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
