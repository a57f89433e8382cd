"""Pictures of detections beside the ground truth, legible for small images too."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from detection.data.transforms import read_image
from moco.data.rgb import DEFAULT_DECODING, Decoding

_TRUTH_COLOUR = (0, 170, 60)
_DETECTION_COLOUR = (255, 120, 0)
# With masks each object has its own colour, or those that touch would run together.
_MASK_COLOURS = (
    *((230, 97, 0), (26, 133, 255), (212, 17, 89), (0, 150, 120), (147, 85, 220), (170, 130, 0)),
    *((220, 50, 220), (90, 110, 20)),
)
_MASK_OPACITY = 0.45
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_LEGIBLE_SIDE = 640
_FONT_SIZE = 14
_CELL = 480


def draw_detections(
    record: dict,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike,
    score_threshold: float = 0.3,
    masks: Sequence[dict] | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> Path:
    """Draw one image with its ground truth (green) and its detections (orange), with a legend.

    Args:
        record: Detectron2's form; a difficult object or a crowd is labelled so. Without
            "annotations" there is no ground truth.
        boxes: [N, 4] in pixels of the original image, from 0; scores [N]; classes [N].
        path: the picture to write (.png or .jpg).
        score_threshold: detections below it are left out; the legend counts them.
        masks: N COCO RLE dicts of the image's size, filled in, each in a colour of its own.
        decoding: how the detector's images were read.
    Raises: DataError if the image cannot be read.
    """
    path = Path(path)
    picture = _picture(
        record, boxes, scores, classes, class_names, score_threshold, masks, decoding
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    # Coloured lines and small letters blur at JPEG's usual settings.
    picture.save(path, **({"quality": 92, "subsampling": 0} if is_jpeg else {}))
    return path


def save_detection_pictures(
    records: Sequence[dict],
    detections: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    folder: str | os.PathLike,
    num_images: int = 6,
    score_threshold: float = 0.3,
    decoding: Decoding = DEFAULT_DECODING,
) -> list[Path]:
    """Write pictures of images spread evenly over the records, and one sheet of them all.

    Args:
        detections: image id -> (boxes, scores, classes[, masks]); an absent image has none.
    Returns: the paths, `<image_id>.png` each and `contact_sheet.png` last; nothing without records.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_images = min(num_images, len(records))
    if num_images < 1:
        return []
    chosen = [records[i * len(records) // num_images] for i in range(num_images)]
    nothing = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))
    paths, pictures = [], []
    for record in chosen:
        found = detections.get(record["image_id"], nothing)
        masks = found[3] if len(found) > 3 else None
        pictures.append(
            _picture(record, *found[:3], class_names, score_threshold, masks, decoding)
        )
        paths.append(folder / f"{record['image_id']}.png")
        pictures[-1].save(paths[-1])
    paths.append(folder / "contact_sheet.png")
    contact_sheet(pictures, [str(record["image_id"]) for record in chosen]).save(paths[-1])
    return paths


def contact_sheet(
    pictures: Sequence[Image.Image], titles: Sequence[str], cell: int = _CELL
) -> Image.Image:
    """Pictures in a grid, each fitted into `cell` x `cell` pixels under its title."""
    font, gap, title_height = ImageFont.load_default(_FONT_SIZE), 8, _FONT_SIZE + 8
    fitted = []
    for picture in pictures:
        scale = cell / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        fitted.append(picture.resize(size, Image.Resampling.LANCZOS))
    columns = math.ceil(math.sqrt(len(fitted)))
    width = max(image.width for image in fitted) + gap
    height = max(image.height for image in fitted) + gap + title_height
    sheet = Image.new(
        "RGB", (columns * width + gap, math.ceil(len(fitted) / columns) * height + gap), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for number, (image, title) in enumerate(zip(fitted, titles, strict=True)):
        x, y = gap + number % columns * width, gap + number // columns * height
        draw.text((x, y), title, fill=_INK, font=font)
        sheet.paste(image, (x, y + title_height))
    return sheet


def _picture(
    record, boxes, scores, classes, class_names, score_threshold, masks, decoding
) -> Image.Image:
    pixels = np.ascontiguousarray(read_image(record["file_name"], "RGB", decoding))
    shown = [i for i in np.argsort(-np.asarray(scores)) if scores[i] >= score_threshold]
    colours = {i: _DETECTION_COLOUR for i in shown}
    if masks is not None:
        colours = {i: _MASK_COLOURS[n % len(_MASK_COLOURS)] for n, i in enumerate(shown)}
        pixels = _with_masks(pixels, [(masks[i], colours[i]) for i in reversed(shown)])
    image = Image.fromarray(pixels)
    # Labels have a fixed size, so a small image is enlarged (by a whole factor) under them.
    factor = max(1, round(_LEGIBLE_SIDE / max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    font = ImageFont.load_default(_FONT_SIZE)
    annotations = record.get("annotations")
    marks = []  # (box in picture pixels, label, colour)
    for annotation in annotations or ():
        name = class_names[annotation["category_id"]]
        kind = next((k for k in ("difficult", "iscrowd") if annotation.get(k)), "")
        label = f"{name} ({kind.removeprefix('is')})" if kind else name
        marks.append((np.asarray(annotation["bbox"]) * factor, label, _TRUTH_COLOUR))
    for i in reversed(shown):  # the best one on top
        label = f"{class_names[int(classes[i])]} {scores[i]:.2f}"
        marks.append((np.asarray(boxes[i]) * factor, label, colours[i]))
    _draw_marks(image, marks, font)
    found = f"detections, score >= {score_threshold:g} ({len(shown)})"
    legend = [
        (_DETECTION_COLOUR if masks is None else None, found),
        (None, f"{len(scores) - len(shown)} below"),
    ]
    if annotations is not None:
        legend.insert(0, (_TRUTH_COLOUR, f"ground truth ({len(annotations)})"))
    return _with_legend(image, legend, font)


def _with_masks(pixels_HWC: np.ndarray, masks) -> np.ndarray:
    """The image with each (RLE, colour) blended over it, in order."""
    pixels = pixels_HWC.astype(np.float32)
    for rle, colour in masks:
        inside = coco_mask.decode(rle).astype(bool)
        own = pixels[inside]
        pixels[inside] = own + (np.array(colour, np.float32) - own) * _MASK_OPACITY
    return pixels.round().astype(np.uint8)


def _draw_marks(image: Image.Image, marks, font) -> None:
    """All boxes, then all labels: ground truth's at the lower edge, detections' at the upper."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for (x0, y0, x1, y1), _, colour in marks:
        x1, y1 = max(min(x1, width) - 1, x0), max(min(y1, height) - 1, y0)
        # The dark rim keeps the colour visible on an image of the same colour.
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_INK, width=4)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
    for (x0, y0, _, y1), label, colour in marks:
        left, top, right, bottom = font.getbbox(label)
        label_width, label_height = right - left + 6, bottom - top + 6
        x = min(max(x0, 0), max(width - label_width, 0))
        y = (y1 if colour == _TRUTH_COLOUR else y0) - label_height
        y = min(max(y, 0), max(height - label_height, 0))
        draw.rectangle((x, y, x + label_width, y + label_height), fill=colour)
        draw.text((x + 3 - left, y + 3 - top), label, fill=_PAPER, font=font)


def _with_legend(image: Image.Image, entries, font) -> Image.Image:
    """The image with a strip of colour keys under it, in as many lines as its width needs."""
    gap, square, line_height = 8, 12, _FONT_SIZE + 8
    placed, x, line = [], gap, 0
    for colour, text in entries:
        width = round(font.getlength(text)) + (square + 5 if colour else 0)
        if x > gap and x + width > image.width:
            x, line = gap, line + 1
        placed.append((x, line, colour, text))
        x += width + 2 * gap
    framed = Image.new("RGB", (image.width, image.height + (line + 1) * line_height), _PAPER)
    framed.paste(image, (0, 0))
    draw = ImageDraw.Draw(framed)
    for x, line, colour, text in placed:
        y = image.height + line * line_height + 4
        if colour:
            draw.rectangle((x, y + 1, x + square, y + 1 + square), fill=colour)
            x += square + 5
        draw.text((x, y), text, fill=_INK, font=font)
    return framed
