"""Pictures of detections: written, enlarged, with both kinds of boxes in their colours."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detection.pictures import draw_detections, save_detection_pictures

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
