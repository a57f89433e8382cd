"""Generated COCO-format data: the images of `detection.data.shapes`, with outlines as polygons."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detection.data.shapes import DEFAULT_CLASSES, OUTLINES, render_outlined
from moco.errors import DataError
from moco.seeding import derive_seed

_JPEG_QUALITY = 95


def make_coco_shapes(
    root: str | os.PathLike,
    *,
    num_train: int,
    num_test: int,
    size: int = 128,
    seed: int,
    class_names: Sequence[str] = DEFAULT_CLASSES,
) -> Path:
    """Write train.json, test.json and images/ under `root`, a folder that is new or empty.

    The same arguments give the same files. As in COCO itself category ids are not contiguous
    (1, 3, 5, ...), boxes have fractions and an object's area is its outline's.

    Args:
        size: the longer side in pixels, 48 or more.
        class_names: a choice of `shapes.OUTLINES`.
    Returns: `root`.
    Raises: DataError for an unknown class, or if `root` holds anything.
    """
    root, class_names = Path(root), tuple(class_names)
    unknown = [name for name in class_names if name not in OUTLINES]
    if unknown:
        raise DataError(f"shapes: classes {unknown} are given; allowed: {', '.join(OUTLINES)}")
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: is not empty; give a new folder")
    (root / "images").mkdir(parents=True)
    first_id = 1
    for split, number in (("train", num_train), ("test", num_test)):
        content = {
            "info": {"description": f"generated shapes, seed {seed}, {split}"},
            "images": [],
            "annotations": [],
            "categories": [
                {"id": 2 * index + 1, "name": name} for index, name in enumerate(class_names)
            ],
        }
        for index in range(number):
            rng = np.random.default_rng(derive_seed(seed, f"coco-shapes-{split}", index))
            image, objects = render_outlined(rng, size, class_names)
            file_name = f"{split}_{index:05d}.jpg"
            Image.fromarray(image).save(root / "images" / file_name, quality=_JPEG_QUALITY)
            height, width = image.shape[:2]
            entry = {"id": first_id + index, "file_name": file_name}
            content["images"].append({**entry, "height": height, "width": width})
            for name, _, outline in objects:
                number_so_far = len(content["annotations"])
                content["annotations"].append(
                    {
                        "id": number_so_far + 1,
                        "image_id": entry["id"],
                        "category_id": 2 * class_names.index(name) + 1,
                        "iscrowd": 0,
                        **_shape(outline),
                    }
                )
        first_id += number
        text = json.dumps(content, indent=1)
        (root / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    return root


def _shape(outline: Sequence[tuple[float, float]]) -> dict:
    """segmentation, bbox [x, y, width, height] and area of a polygon, to a hundredth of a pixel."""
    corners = np.array(outline).round(2)
    (x, y), (width, height) = corners.min(axis=0), np.ptp(corners, axis=0)
    after = np.roll(corners, -1, axis=0)
    area = abs((corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum()) / 2
    return {
        "segmentation": [corners.reshape(-1).tolist()],
        "bbox": [round(float(value), 2) for value in (x, y, width, height)],
        "area": round(float(area), 2),
    }
