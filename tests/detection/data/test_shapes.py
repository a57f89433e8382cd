"""The generated data set: whole, deterministic, and VOC in form."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from detection.data import shapes
from detection.data.shapes import DEFAULT_CLASSES, make_shapes_dataset, render
from detection.data.voc import DatasetSpec, load_records
from moco.errors import DataError

NUMBERS = dict(num_train=4, num_test=2, num_unlabelled=3, size=64)


def tree_digest(root) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def test_layout_and_records(tmp_path):
    root = make_shapes_dataset(tmp_path / "s", **NUMBERS, seed=0)
    assert len(list((root / "unlabelled").glob("*.jpg"))) == 3
    for split, number in (("train", 4), ("test", 2)):
        records, report = load_records(DatasetSpec("s", str(root), split, DEFAULT_CLASSES, 2007))
        assert len(records) == number and not report.problems and not report.repairs
        for record in records:
            assert 1 <= len(record["annotations"]) <= 4
            assert max(record["height"], record["width"]) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    digests = [
        tree_digest(make_shapes_dataset(tmp_path / name, **NUMBERS, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert digests[0] == digests[1]
    assert digests[0]["JPEGImages/train_00000.jpg"] != digests[2]["JPEGImages/train_00000.jpg"]
    images = {d for name, d in digests[0].items() if name.endswith(".jpg")}
    assert len(images) == 9  # splits share no image


def test_boxes_hold_the_shape():
    rng = np.random.default_rng(0)
    for _ in range(30):
        image, objects = render(rng, 64, DEFAULT_CLASSES)
        height, width = image.shape[:2]
        for name, (xmin, ymin, xmax, ymax) in objects:
            assert name in DEFAULT_CLASSES
            assert 1 <= xmin < xmax <= width and 1 <= ymin < ymax <= height


def test_outlines_lie_in_the_unit_circle():
    for name, points in shapes.OUTLINES.items():
        assert max(x * x + y * y for x, y in points) <= 1.0 + 1e-9, name


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    saved = []
    real_save = Image.Image.save

    def save(self, *args, **kwargs):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args)
        real_save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        make_shapes_dataset(tmp_path / "s", **NUMBERS, seed=0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    make_shapes_dataset(tmp_path / "s", **NUMBERS, seed=0)


def test_finished_data_are_kept_and_others_refused(tmp_path):
    root = make_shapes_dataset(tmp_path / "s", **NUMBERS, seed=0)
    before = (root / "shapes.json").stat().st_mtime_ns
    make_shapes_dataset(root, **NUMBERS, seed=0)
    assert (root / "shapes.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="is not this generated data set"):
        make_shapes_dataset(root, **NUMBERS, seed=1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="give a new folder"):
        make_shapes_dataset(tmp_path / "mine", **NUMBERS, seed=0)
    with pytest.raises(DataError, match="allowed: circle"):
        make_shapes_dataset(tmp_path / "t", **NUMBERS, seed=0, class_names=("cat",))
    with pytest.raises(DataError, match="at least 1"):
        make_shapes_dataset(tmp_path / "t", **{**NUMBERS, "num_train": 0}, seed=0)
