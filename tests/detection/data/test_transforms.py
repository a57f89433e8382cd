"""Images and boxes, by hand and against Detectron2 to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from detection.data.data_check import image_size
from detection.data.transforms import (
    flip_image,
    nonempty_boxes,
    read_image,
    resize_image,
    shortest_edge_shape,
    transform_boxes,
)
from moco.errors import ConfigError, DataError

# Not multiples of 16: there, differences would hide.
SHAPES = [(333, 500), (375, 281), (417, 290), (97, 97), (50, 211)]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("shape", "short_edge", "max_size", "expected"),
    [
        ((333, 500), 480, 1333, (480, 721)),  # 720.72 + .5
        ((500, 333), 800, 1333, (1201, 800)),  # 1201.2
        ((100, 400), 800, 1333, (333, 1333)),  # 3200 is capped, 333.25
        ((60, 60), 45, 1333, (45, 45)),
        ((60, 41), 0, 50, (60, 41)),  # 0 means as it is, whatever the cap
    ],
)
def test_shortest_edge_shape(shape, short_edge, max_size, expected):
    assert shortest_edge_shape(*shape, short_edge, max_size) == expected


def test_boxes_by_hand():
    boxes = np.array([[10.0, 5.0, 30.0, 25.0], [-4.0, 5.0, 70.0, 25.0]])
    moved = transform_boxes(boxes, (40, 60), (80, 90), flip=True)
    assert moved.dtype == np.float32
    # x * 1.5, then 90 - x with sides exchanged; y * 2; clipped to 90 x 80
    assert moved.tolist() == [[45, 10, 75, 50], [0, 10, 90, 50]]
    assert boxes[1, 0] == -4.0  # the input is untouched
    assert transform_boxes(np.zeros((0, 4)), (4, 4), (8, 8), False).shape == (0, 4)


def test_empty_boxes_are_found():
    boxes = np.array([[1, 1, 2, 2], [1, 1, 1, 2], [0, 0, 1, 1e-5], [0, 0, 1, 2e-5]], np.float32)
    assert nonempty_boxes(boxes).tolist() == [True, False, False, True]


def test_flip(rng):
    image = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(flip_image(image)[:, 0], image[:, 4])


def test_formats_modes_and_orientation(tmp_path):
    path = tmp_path / "x.png"
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path, "RGB"), pixels)
    assert np.array_equal(read_image(path, "BGR"), pixels[:, :, ::-1])
    exif = Image.Exif()
    exif[274] = 6  # shown upright after a quarter turn clockwise
    Image.fromarray(pixels).save(path, exif=exif)
    assert np.array_equal(read_image(path, "RGB"), np.rot90(pixels, -1))
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        target = tmp_path / ("y.jpg" if mode == "CMYK" else "y.png")
        Image.fromarray(pixels).convert(mode).save(target)
        assert read_image(target, "BGR").shape == (2, 3, 3)


def test_unreadable_images(tmp_path, rng):
    path = tmp_path / "x.jpg"
    with pytest.raises(DataError, match="x.jpg: this image cannot be read"):
        read_image(path, "BGR")
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match="truncated") as caught:
        read_image(path, "BGR")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="allowed: BGR, RGB"):
        read_image(path, "L")


def test_postscript_named_jpg_is_given_to_no_other_program(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **rest: called.append(args))
    for read in (lambda: read_image(path, "RGB"), lambda: image_size(path)):
        with pytest.raises((DataError, OSError), match="cannot (be read|identify)"):
            read()
    assert not called
    with Image.open(path) as image, pytest.raises(Exception):  # noqa: B017  control: PIL itself
        image.load()
    assert called


@pytest.mark.detectron2
@pytest.mark.parametrize("shape", SHAPES)
def test_resize_and_boxes_equal_detectron2s(rng, shape):
    transforms = pytest.importorskip("detectron2.data.transforms")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    instances_of = utils.annotations_to_instances
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    low = rng.uniform(-3, 1, (20, 2)) * shape[::-1]
    boxes = np.concatenate([low, low + rng.uniform(0, 0.6, (20, 2)) * shape[::-1]], axis=1)
    for short_edge, max_size in ((480, 1333), (123, 1333), (301, 400), (800, 1333)):
        for flip in (False, True):
            steps = [transforms.ResizeShortestEdge((short_edge,), max_size, "choice")]
            if flip:
                steps.append(transforms.RandomFlip(prob=1.0))
            given = transforms.AugInput(image)
            applied = transforms.AugmentationList(steps)(given)
            new_shape = shortest_edge_shape(*shape, short_edge, max_size)
            ours = resize_image(image, *new_shape)
            ours = flip_image(ours) if flip else ours
            assert np.array_equal(ours, given.image)
            if flip:
                assert not np.array_equal(flip_image(ours), given.image)  # control

            annotations = [
                utils.transform_instance_annotations(
                    {"bbox": list(b), "bbox_mode": 0, "category_id": 0}, applied, new_shape
                )
                for b in boxes
            ]
            instances = instances_of(annotations, new_shape)
            moved = transform_boxes(boxes, shape, new_shape, flip)
            assert np.array_equal(moved, instances.gt_boxes.tensor.numpy())
            other = transform_boxes(boxes + 0.01, shape, new_shape, flip)  # control
            assert not np.array_equal(other, moved)
            kept = utils.filter_empty_instances(instances, return_mask=True)[1].numpy()
            assert np.array_equal(nonempty_boxes(moved), kept)


@pytest.mark.detectron2
@pytest.mark.parametrize("orientation", range(1, 9))
def test_reading_equals_detectron2s(tmp_path, rng, orientation):
    utils = pytest.importorskip("detectron2.data.detection_utils")
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "x.jpg"
    pixels = rng.integers(0, 256, (21, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    theirs = utils.read_image(str(path), "BGR")
    assert np.array_equal(read_image(path, "BGR"), theirs)
    assert not np.array_equal(read_image(path, "RGB"), theirs)  # control
