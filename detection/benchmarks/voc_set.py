"""A generated result set in the size of VOC07 test: VOC-format files and detections of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from detection.data.voc import VOC_CLASSES

SPLIT = "test"
_HEIGHT, _WIDTH = 375, 500
_PERSON = VOC_CLASSES.index("person")
_MEAN_OBJECTS = 3.0  # VOC07 test: 14,976 in 4,952 images,
_DIFFICULT = 0.2  # of which 2,944 difficult
_LOWEST_SCORE = 0.05  # Detectron2's MODEL.ROI_HEADS.SCORE_THRESH_TEST


def write_voc_set(
    root: Path, num_images: int, mean_detections: float, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Write Annotations, ImageSets and JPEGImages (one grey image under all names).

    Each object is found with boxes of varying accuracy, some twice; the other detections are
    false, of any class and mostly with low scores.

    Returns: the detections, see `detection.evaluation.voc_ap.Detections`.
    """
    rng = np.random.default_rng(seed)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    ids = [f"{number:06d}" for number in range(1, num_images + 1)]
    (root / "ImageSets/Main" / f"{SPLIT}.txt").write_text("".join(f"{i}\n" for i in ids))
    first_image = root / "JPEGImages" / f"{ids[0]}.jpg"
    Image.new("RGB", (_WIDTH, _HEIGHT), (128, 128, 128)).save(first_image)
    detections = {}
    for image_id in ids:
        boxes = _random_boxes(rng, 1 + rng.poisson(_MEAN_OBJECTS - 1))
        classes = rng.integers(0, len(VOC_CLASSES), len(boxes))
        classes[rng.random(len(boxes)) < 0.3] = _PERSON
        _write_annotation(root, image_id, boxes, classes, rng.random(len(boxes)) < _DIFFICULT)
        detections[image_id] = _detect(rng, boxes, classes, mean_detections)
        image = root / "JPEGImages" / f"{image_id}.jpg"
        if image != first_image:
            os.link(first_image, image)
    return detections


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[N, 4] whole numbers, 1-based inclusive."""
    sides = np.array([_WIDTH, _HEIGHT]) * rng.uniform(0.05, 0.9, (count, 2))
    low = 1 + rng.uniform(0, 1, (count, 2)) * (np.array([_WIDTH, _HEIGHT]) - sides - 1)
    return np.concatenate([low, low + sides], axis=1).astype(np.int64)


def _write_annotation(
    root: Path, image_id: str, boxes: np.ndarray, classes: np.ndarray, difficult: np.ndarray
) -> None:
    lines = [f"<annotation><size><width>{_WIDTH}</width><height>{_HEIGHT}</height></size>"]
    for box, class_id, hard in zip(boxes, classes, difficult, strict=True):
        x0, y0, x1, y1 = box
        lines.append(
            f"<object><name>{VOC_CLASSES[class_id]}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{int(hard)}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        )
    text = "\n".join([*lines, "</annotation>\n"])
    (root / "Annotations" / f"{image_id}.xml").write_text(text)


def _detect(
    rng: np.random.Generator, boxes: np.ndarray, classes: np.ndarray, mean_detections: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    repeats = rng.integers(0, 4, len(boxes))
    near = np.repeat(boxes, repeats, axis=0) - [1.0, 1.0, 0.0, 0.0]
    near += rng.normal(0, 0.06, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
    far = _random_boxes(rng, rng.poisson(max(mean_detections - 1.5 * _MEAN_OBJECTS, 0.0)))
    low = np.minimum(near[:, :2], near[:, 2:])
    near = np.concatenate([low, np.maximum(near[:, :2], near[:, 2:])], axis=1)
    near = np.clip(near, 0, [_WIDTH, _HEIGHT, _WIDTH, _HEIGHT])
    scores = np.concatenate([rng.beta(5, 1.5, len(near)), rng.beta(1, 8, len(far))])
    labels = np.concatenate(
        [np.repeat(classes, repeats), rng.integers(0, len(VOC_CLASSES), len(far))]
    )
    order = np.argsort(-scores, kind="stable")  # as a detector gives them
    return (
        np.concatenate([near, far])[order].astype(np.float32),
        np.maximum(scores, _LOWEST_SCORE)[order].astype(np.float32),
        labels[order],
    )
