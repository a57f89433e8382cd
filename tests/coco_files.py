"""A COCO-format file of two images, with whatever is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from detection.data.coco import CocoSpec, load_records

IMAGE = {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60}
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]
RLE = {"size": [40, 60], "counts": [100, 50, 2250]}


def annotation(number=1, **changes) -> dict:
    """An object of image 7, with every field of COCO; a change to None takes the field out."""
    entry = {
        "id": number,
        "image_id": 7,
        "category_id": 3,
        "bbox": [10, 5.5, 20, 20.25],
        "area": 400,
        "iscrowd": 0,
        "segmentation": SQUARE,
        **changes,
    }
    return {key: value for key, value in entry.items() if value is not None}


def content(*annotations, **changes) -> dict:
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
        ],
        "annotations": list(annotations or [annotation()]),
        "categories": [{"id": 12, "name": "dog"}, {"id": 3, "name": "cat"}],
        **changes,
    }


def make(root: Path, tree: object, name="x.json") -> CocoSpec:
    root.mkdir(exist_ok=True)
    for image in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40), (90, 120, 40)).save(root / image)
    text = tree if isinstance(tree, str | bytes) else json.dumps(tree)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return CocoSpec("toy", root / name, root)


def load(root: Path, tree: object, *, for_scoring=False, with_masks=False, name="x.json"):
    return load_records(make(root, tree, name), for_scoring=for_scoring, with_masks=with_masks)
