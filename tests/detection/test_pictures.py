"""Pictures of detections: written, enlarged, with both kinds of boxes in their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from detection.pictures import draw_detections, save_detection_pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = ("cat", "dog")
GREEN, ORANGE = (0, 170, 60), (255, 120, 0)


def make_record(folder, name="a", size=(60, 44)):
    path = folder / f"{name}.png"
    Image.new("RGB", size, (128, 128, 128)).save(path)
    box = {"category_id": 0, "bbox": [5.0, 5.0, 25.0, 25.0], "bbox_mode": 0, "difficult": 0}
    return {
        "file_name": str(path),
        "image_id": name,
        "height": size[1],
        "width": size[0],
        "annotations": [box],
    }


def count(path, colour) -> int:
    """Pixels of a colour in the image part of the picture (the legend lies below it)."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[: 44 * 11]
    return int((pixels == colour).all(axis=2).sum())


DETECTION = (np.array([[30.0, 8.0, 50.0, 38.0]], np.float32), np.array([0.9]), np.array([1]))


def test_small_images_are_enlarged_and_boxes_drawn(tmp_path):
    record = make_record(tmp_path)
    path = draw_detections(record, *DETECTION, NAMES, tmp_path / "out" / "x.png")
    with Image.open(path) as picture:
        assert picture.width == 60 * 11 and picture.height > 44 * 11
    assert count(path, GREEN) > 500 and count(path, ORANGE) > 500


def test_low_scores_are_left_out(tmp_path):
    record = make_record(tmp_path)
    path = draw_detections(record, *DETECTION, NAMES, tmp_path / "x.png", score_threshold=0.95)
    assert count(path, GREEN) > 500 and count(path, ORANGE) == 0


@pytest.mark.parametrize("bbox", [[0, 0, 60, 44], [-9, -9, 99, 99], [59.9, 43.9, 60, 44]])
def test_boxes_at_the_edges(tmp_path, bbox):
    found = (np.array([bbox], np.float32), np.array([0.9]), np.array([1]))
    draw_detections(make_record(tmp_path), *found, NAMES, tmp_path / "x.png")
    assert count(tmp_path / "x.png", ORANGE) > 0


def test_folder_of_pictures(tmp_path):
    records = [make_record(tmp_path, f"i{k}") for k in range(7)]
    paths = save_detection_pictures(records, {"i0": DETECTION}, NAMES, tmp_path / "p", num_images=3)
    assert [p.name for p in paths] == ["i0.png", "i2.png", "i4.png", "contact_sheet.png"]
    assert all(p.is_file() for p in paths)
    assert count(paths[0], ORANGE) > 500 and count(paths[1], ORANGE) == 0
    again = [p.read_bytes() for p in paths]
    save_detection_pictures(records, {"i0": DETECTION}, NAMES, tmp_path / "p", num_images=3)
    assert again == [p.read_bytes() for p in paths]
    assert save_detection_pictures([], {}, NAMES, tmp_path / "q") == []


def test_an_image_without_annotations_has_no_ground_truth(tmp_path):
    record = make_record(tmp_path)
    del record["annotations"]
    path = draw_detections(record, *DETECTION, NAMES, tmp_path / "x.png")
    assert count(path, GREEN) == 0 and count(path, ORANGE) > 500
    legend = np.asarray(Image.open(path).convert("RGB"))[44 * 11 :]
    assert not (legend == GREEN).all(axis=2).any() and (legend == ORANGE).all(axis=2).any()


def test_masks_are_filled_each_in_its_colour(tmp_path):
    record = make_record(tmp_path)
    shape = (44, 60)
    masks = []
    for rows in (slice(5, 15), slice(20, 40)):
        inside = np.zeros(shape, dtype=np.uint8, order="F")
        inside[rows, 30:50] = 1
        masks.append(coco_mask.encode(inside))
    boxes = np.array([[30, 5, 50, 15], [30, 20, 50, 40]], np.float32)
    found = (boxes, np.array([0.9, 0.2]), np.array([0, 1]))
    path = draw_detections(record, *found, NAMES, tmp_path / "x.png", masks=masks)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    filled, too_low, outside = (tuple(pixels[y * 11, 40 * 11]) for y in (10, 30, 42))
    assert filled != outside and too_low == outside == (128, 128, 128)
    both = draw_detections(record, *found, NAMES, tmp_path / "y.png", 0.1, masks)
    pixels = np.asarray(Image.open(both).convert("RGB"))
    first, second = (tuple(pixels[y * 11, 40 * 11]) for y in (10, 30))
    assert len({first, second, outside}) == 3


def test_numeric_image_ids_and_masks_in_a_folder_of_pictures(tmp_path):
    record = {**make_record(tmp_path), "image_id": 7}
    del record["annotations"][0]["difficult"]  # COCO has none
    mask = coco_mask.encode(np.ones((44, 60), dtype=np.uint8, order="F"))
    found = {7: (*DETECTION, [mask])}
    paths = save_detection_pictures([record], found, NAMES, tmp_path / "p")
    assert [path.name for path in paths] == ["7.png", "contact_sheet.png"]
    assert tuple(np.asarray(Image.open(paths[0]).convert("RGB"))[2, 2]) != (128, 128, 128)
