"""R18: hostile VOC annotations and splits. Each is read or named, before anything is trained."""

from __future__ import annotations

import math
import os
import random
import signal
from pathlib import Path

import pytest
from PIL import Image

from detection.data import voc_check
from detection.data.data_check import CheckReport, raise_for_problems
from detection.data.voc import DatasetSpec, load_records
from moco.errors import DataError

pytestmark = pytest.mark.faults
CLASSES = ("cat", "dog")
GOOD = """<annotation>
<folder>VOC</folder><filename>a.jpg</filename>
<size><width>60</width><height>40</height><depth>3</depth></size><segmented>0</segmented>
<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>1</difficult>
<bndbox><xmin>2.5</xmin><ymin>3</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object>
</annotation>
"""
VALUES = (
    "nan", "inf", "-inf", "-1", "0", "1e309", "1e18", "", " ", "x", "1,5", "0x10", "1_0", "²", "½",
    "60.0001", "99999999999999999999", "-0.0", "\u200b5", "5\u0000"[:1], "cat", "None", "[]",
)  # fmt: skip
TAGS = ("xmin", "ymin", "xmax", "ymax", "name", "difficult", "width", "height", "bndbox", "size",
        "object", "truncated", "annotation")  # fmt: skip


def make_voc(root: Path, split: str = "a\n") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text(split)
    Image.new("RGB", (60, 40), (90, 120, 40)).save(root / "JPEGImages/a.jpg")
    (root / "Annotations/a.xml").write_text(GOOD)
    return root


def load(root: Path) -> list[dict]:
    records, report = load_records(DatasetSpec("toy", str(root), "train", CLASSES, 2007))
    raise_for_problems(report)
    return records


def mutated(rng: random.Random) -> bytes:
    """GOOD with one to three changes: values, tags, structure, bytes."""
    data = GOOD.encode()
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(8)
        tag = rng.choice(TAGS)
        opening, closing = f"<{tag}>".encode(), f"</{tag}>".encode()
        start = data.find(opening)
        end = data.find(closing, start)
        if kind < 3 and start >= 0 and end > start:  # another value
            data = data[: start + len(opening)] + rng.choice(VALUES).encode() + data[end:]
        elif kind == 3:  # a tag gone, or opened twice
            data = data.replace(rng.choice((opening, closing)), rng.choice((b"", opening * 2)), 1)
        elif kind == 4:  # cut
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == 5:  # bytes
            changed = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                if changed:
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
            data = bytes(changed)
        elif kind == 6:  # a piece repeated
            a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            data = data[:b] + data[a:b] + data[b:]
        else:  # an encoding, a doctype, a processing instruction
            head = rng.choice((
                b'<?xml version="1.0" encoding="utf-16"?>', b'<?xml version="1.0" encoding="x"?>',
                b"\xff\xfe", b"\xef\xbb\xbf", b"<!DOCTYPE a>", b"<?php x?>", b"<!-- -- -->",
            ))  # fmt: skip
            data = head + data
    return data


def outcome(root: Path) -> str:
    """"read" or "refused"; anything else raises."""
    try:
        records = load(root)
    except DataError as error:
        text = str(error)
        assert "\n" not in text and "a.xml" in text, text
        return "refused"
    for record in records:
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            assert all(map(math.isfinite, annotation["bbox"]))
            assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40, annotation
            assert annotation["category_id"] in (0, 1) and annotation["difficult"] in (0, 1)
    return "read"


def campaign(root: Path, num: int) -> dict[str, int]:
    """Outcomes of `num` seeded mutations; a hang ends by SIGALRM."""
    counts = {"read": 0, "refused": 0, "uncaught": 0}
    for seed in range(num):
        (root / "Annotations/a.xml").write_bytes(mutated(random.Random(seed)))
        signal.alarm(10)
        try:
            counts[outcome(root)] += 1
        except Exception:
            counts["uncaught"] += 1
        finally:
            signal.alarm(0)
    return counts


def test_mutated_annotations_are_read_or_refused(tmp_path, observed, long):
    num = 20_000 if long else 2_000
    counts = campaign(make_voc(tmp_path / "voc"), num)
    assert counts["read"] > num / 20 and counts["refused"] > num / 3, counts  # both kinds occur
    observed("R18", num - counts["uncaught"], num)


def test_control_without_the_check_of_numbers_boxes_are_not_finite(tmp_path, monkeypatch, observed):
    monkeypatch.setattr(voc_check.math, "isfinite", lambda value: True, raising=True)
    counts = campaign(make_voc(tmp_path / "voc"), 400)
    observed("R18", int(counts["uncaught"] > 0), 1, control=True)


ENTITIES = '<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">' + "".join(
    f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 12)
) + "]>"  # fmt: skip
HOSTILE = {
    "entity bomb": ENTITIES + GOOD.replace("cat", "&x11;"),
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    + GOOD.replace("cat", "&x;"),
    "parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]>' + GOOD,
    "200,000 levels": "<a>" * 200_000 + "</a>" * 200_000,
    "100,000 objects of no class": "<annotation>" + "<object/>" * 100_000 + "</annotation>",
    "zero bytes": "",
    "a NaN box": GOOD.replace("<xmin>11", "<xmin>nan"),
    "a box of infinite width": GOOD.replace("<xmax>30", "<xmax>inf"),
    "a name of 10 MB": GOOD.replace("cat", "c" * 10_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_annotation_is_refused_in_one_line(tmp_path, name, observed):
    root = make_voc(tmp_path / "voc")
    (root / "Annotations/a.xml").write_text(HOSTILE[name])
    signal.alarm(20)
    try:
        with pytest.raises(DataError, match="a.xml") as error:
            load(root)
    finally:
        signal.alarm(0)
    assert len(str(error.value)) < 3000
    observed("R18", 1, 1)


@pytest.mark.parametrize(
    "split, message",
    [
        ("../a\n", "line 1"), ("/etc/passwd\n", "line 1"), ("..\n", "line 1"),
        ("", "names no image"), ("\n\n", "names no image"), ("a b c\n", "line 1"),
        ("a\x00b\n", "line 1"),
        ("b\n", "missing"), ("a\n" * 3 + "é\n", "missing"),
    ],
)  # fmt: skip
def test_a_hostile_split_is_refused(tmp_path, split, message, observed):
    root = make_voc(tmp_path / "voc", split)
    with pytest.raises(DataError, match=message):
        load(root)
    observed("R18", 1, 1)


def test_a_split_of_one_line_without_its_end_is_read(tmp_path, observed):
    assert len(load(make_voc(tmp_path / "voc", "a"))) == 1
    observed("R18", 1, 1)


FILES = ("Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/train.txt")


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, what, kind, observed):
    root = make_voc(tmp_path / "voc")
    (root / what).unlink()
    if kind == "pipe":
        os.mkfifo(root / what)
    elif kind == "folder":
        (root / what).mkdir()
    else:
        (root / what).symlink_to(root / what)
    signal.alarm(10)
    try:
        with pytest.raises(DataError):
            load(root)
    finally:
        signal.alarm(0)
    observed("R18", 1, 1)


def test_a_report_lists_every_problem_of_a_file(tmp_path):
    root = make_voc(tmp_path / "voc")
    bad = GOOD.replace("<xmin>11", "<xmin>nan").replace("dog", "cow")
    (root / "Annotations/a.xml").write_text(bad)
    report = CheckReport()
    voc_check.read_annotation("a", root / "Annotations/a.xml", root / "JPEGImages/a.jpg",
                              {"cat": 0, "dog": 1}, report)  # fmt: skip
    assert len(report.problems) == 2
