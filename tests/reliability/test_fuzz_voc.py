"""Fuzz of the VOC reader: annotations and splits made of VOC's own words, in any order."""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from fuzz import REFUSED, explore, is_noticed, mutated, read_or_refuse, st
from PIL import Image

from detection.data import voc_check
from detection.data.data_check import CheckReport, raise_for_problems
from detection.data.voc import DatasetSpec, load_records

pytestmark = pytest.mark.faults
TAGS = st.sampled_from(
    ["annotation", "object", "name", "bndbox", "xmin", "ymin", "xmax", "ymax", "size", "width",
     "height", "depth", "difficult", "truncated", "pose", "part", "x:y", "\u00e9"]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["cat", "dog", "cow", "0", "1", "2", "11", "60", "60.5", "40", "1e2", "nan", "inf", "-inf",
     "-1", "1e309", "1_0", " 5 ", "\n", "", "\u0665", "\u00b2", "x" * 3000, "0x5", "True"]
)  # fmt: skip
NUMBERS = st.sampled_from(["1", "5", "20", "40", "60", "61", "2.5", "nan", "1e400", "", "-3", "x"])


def element(tag: str, inner: str) -> str:
    return f"<{tag}>{inner}</{tag}>"


NODES = st.recursive(
    st.builds(element, TAGS, TEXTS.map(escape)),
    lambda inner: st.builds(element, TAGS, st.lists(inner, max_size=4).map("".join)),
    max_leaves=10,
)


@st.composite
def annotations(draw) -> str:
    """Near what is right: sizes, objects and boxes with drawn texts, strays among them."""
    parts = [draw(NODES)] if draw(st.booleans()) else []
    if draw(st.booleans()):
        width, height = draw(st.just("60") | NUMBERS), draw(st.sampled_from(["40", "0"]))
        parts.append(element("size", element("width", width) + element("height", height)))
    for _ in range(draw(st.integers(0, 2))):
        corners = draw(st.permutations(("xmin", "ymin", "xmax", "ymax")))
        box = "".join(element(tag, draw(NUMBERS)) for tag in corners)
        name = element("name", draw(st.sampled_from(["cat", "dog", "cat ", "cow"])))
        inner = [name, element("bndbox", box)]
        if draw(st.booleans()):
            inner.append(element("difficult", draw(TEXTS)))
        if draw(st.booleans()):
            inner.append(draw(NODES))
        parts.append(element("object", "".join(draw(st.permutations(inner)))))
    return element("annotation", "".join(draw(st.permutations(parts))))


GOOD = element(
    "annotation",
    element("size", element("width", "60") + element("height", "40"))
    + element("object", "<name>cat</name><pose>Left</pose><truncated>0</truncated>"
              "<difficult>0</difficult><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax>"
              "<ymax>25</ymax></bndbox>"),
).encode()  # fmt: skip


@pytest.fixture
def root(tmp_path) -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    Image.new("RGB", (60, 40)).save(tmp_path / "JPEGImages/a.jpg")
    return tmp_path


def load(root: Path) -> tuple[list[dict], CheckReport]:
    spec = DatasetSpec("toy", str(root), "train", ("cat", "dog"), 2007)
    records, report = load_records(spec)
    raise_for_problems(report)
    return records, report


def annotation_check(root: Path):
    def check(data: str | bytes) -> None:
        data = data if isinstance(data, bytes) else data.encode()
        (root / "Annotations/a.xml").write_bytes(data)
        answer = read_or_refuse(lambda: load(root))
        if answer is REFUSED:
            return
        (record,), report = answer
        assert (record["width"], record["height"]) == (60, 40)
        assert report.num_boxes == len(record["annotations"]) <= data.count(b"<object")
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            assert all(map(math.isfinite, annotation["bbox"]))
            assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40
            assert annotation["category_id"] in (0, 1) and annotation["difficult"] in (0, 1)

    return check


def test_annotations(root, observed, long):
    check = annotation_check(root)
    check(GOOD)
    count = explore(check, annotations(), examples=10_000 if long else 700)
    rest = NODES | st.binary(max_size=80) | mutated(GOOD)
    count += explore(check, rest, examples=10_000 if long else 500)
    observed("fuzz", count, count)


def test_control_without_the_check_of_numbers_boxes_are_wrong(root, monkeypatch, observed):
    monkeypatch.setattr(voc_check.math, "isfinite", lambda value: True)
    found = is_noticed(annotation_check(root), annotations(), examples=700)
    observed("fuzz", int(found), 1, control=True)


def test_splits(root, observed, long):
    (root / "Annotations/a.xml").write_bytes(GOOD)
    pieces = st.sampled_from(["a", "a", "b", "\n", "\r\n", " ", "\t", "1", "-1", "..", "/", "\\",
                              "../a", "\0", "\u2028", "\x0c", "\x1c", "\u00e9", "a.jpg", "\ufeff",
                              "x" * 300])  # fmt: skip
    lines = st.lists(pieces, max_size=12).map("".join).map(str.encode)

    def check(data: bytes) -> None:
        (root / "ImageSets/Main/train.txt").write_bytes(data)
        answer = read_or_refuse(lambda: load(root))
        if answer is not REFUSED:
            assert [record["image_id"] for record in answer[0]] == ["a"]

    count = explore(check, lines | st.binary(max_size=40), examples=10_000 if long else 700)
    observed("fuzz", count, count)
