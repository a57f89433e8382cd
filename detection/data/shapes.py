"""Generated VOC-format data: textured shapes on textured backgrounds.

The classes differ in outline and kind of texture; colours, scales, sizes and turns are drawn at
random, so no class can be told by its colour, and a small detector learns them in minutes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco.errors import DataError
from moco.seeding import derive_seed

_SUPERSAMPLING = 4
_JPEG_QUALITY = 95
_MAX_IOU = 0.05
_MIN_CONTRAST = 90.0
_RECORD = "shapes.json"


def _polygon(*radii_degrees: tuple[float, float]) -> list[tuple[float, float]]:
    return [
        (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
        for radius, angle in radii_degrees
    ]


_ARM, _REACH = 0.3, 0.95
# Outlines within the unit circle, to be scaled and turned.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(*((0.85, angle) for angle in range(0, 360, 6))),
    "square": _polygon(*((1.0, angle) for angle in (45, 135, 225, 315))),
    "triangle": _polygon(*((1.0, angle) for angle in (-90, 30, 150))),
    "cross": [
        *((-_ARM, -_REACH), (_ARM, -_REACH), (_ARM, -_ARM), (_REACH, -_ARM), (_REACH, _ARM)),
        *((_ARM, _ARM), (_ARM, _REACH), (-_ARM, _REACH), (-_ARM, _ARM), (-_REACH, _ARM)),
        *((-_REACH, -_ARM), (-_ARM, -_ARM)),
    ],
    "star": _polygon(*((1.0 if k % 2 == 0 else 0.42, 36 * k - 90) for k in range(10))),
}
# The texture of a class; backgrounds have the kinds that are common to all images.
TEXTURES = {
    "circle": "spots",
    "square": "stripes",
    "triangle": "checks",
    "cross": "gradient",
    "star": "noise",
}
_BACKGROUNDS = ("gradient", "noise")
DEFAULT_CLASSES = ("circle", "square", "triangle", "cross")


def make_shapes_dataset(
    root: str | os.PathLike,
    *,
    num_train: int,
    num_test: int,
    num_unlabelled: int,
    size: int = 128,
    seed: int,
    class_names: Sequence[str] = DEFAULT_CLASSES,
) -> Path:
    """Write Annotations, JPEGImages, ImageSets/Main/{train,test}.txt and unlabelled/ under `root`.

    The same arguments give the same files. They are written beside `root` and renamed at the
    end, so an interrupted run leaves no half data set; a finished one with equal arguments is
    kept as it is.

    Args:
        size: the longer side in pixels; the shorter one is 0.75 to 1 of it, on either axis.
        class_names: a choice of `OUTLINES`.
    Returns: `root`.
    Raises: DataError if `root` holds anything else, or for an unknown class or a bad number.
    """
    root = Path(root)
    class_names = tuple(class_names)
    unknown = [name for name in class_names if name not in OUTLINES]
    if unknown or not class_names:
        raise DataError(f"shapes: classes {class_names} are given; allowed: {', '.join(OUTLINES)}")
    if min(num_train, num_test) < 1 or num_unlabelled < 0 or size < 48:
        raise DataError(
            f"shapes: {num_train} train, {num_test} test, {num_unlabelled} unlabelled images of "
            f"{size} pixels are asked for; allowed: at least 1, 1, 0 and 48"
        )
    numbers = {"train": num_train, "test": num_test, "unlabelled": num_unlabelled}
    record = {**numbers, "size": size, "seed": seed, "classes": list(class_names), "version": 1}
    if root.exists():
        if not _holds(root, record):
            raise DataError(
                f"{root}: exists and is not this generated data set ({json.dumps(record)}); "
                "give a new folder or remove this one"
            )
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    try:
        _write_all(draft, numbers, size, seed, class_names)
        (draft / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp's folder is for its owner only
        draft.rename(root)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return root


def _holds(root: Path, record: dict) -> bool:
    try:
        return json.loads((root / _RECORD).read_text(encoding="utf-8")) == record
    except (OSError, ValueError):
        return False


def _write_all(root: Path, numbers: dict, size: int, seed: int, class_names: tuple) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "unlabelled"):
        (root / folder).mkdir(parents=True)
    for split, number in numbers.items():
        labelled = split != "unlabelled"
        ids = [f"{split}_{index:05d}" for index in range(number)]
        for index, image_id in enumerate(ids):
            rng = np.random.default_rng(derive_seed(seed, f"shapes-{split}", index))
            image, objects = render(rng, size, class_names)
            folder = root / ("JPEGImages" if labelled else "unlabelled")
            Image.fromarray(image).save(folder / f"{image_id}.jpg", quality=_JPEG_QUALITY)
            if labelled:
                text = _annotation(image_id, image.shape, objects)
                (root / "Annotations" / f"{image_id}.xml").write_text(text, encoding="utf-8")
        if labelled:
            path = root / "ImageSets" / "Main" / f"{split}.txt"
            path.write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")


def render(
    rng: np.random.Generator, size: int, class_names: Sequence[str]
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """One image, uint8 [H, W, 3], and its objects: (class, (xmin, ymin, xmax, ymax)), 1-based.

    1 to 4 objects, a quarter to a half of `size` across, that overlap by an IoU of 0.05 at most.
    """
    image, objects = render_outlined(rng, size, class_names)
    return image, [(name, box) for name, box, _ in objects]


def render_outlined(
    rng: np.random.Generator, size: int, class_names: Sequence[str]
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int], list[tuple[float, float]]]]]:
    """`render`'s image and objects, each with its outline: corners (x, y) in pixels from 0."""
    short = int(size * rng.uniform(0.75, 1.0))
    height, width = (short, size) if rng.random() < 0.5 else (size, short)
    base = rng.uniform(100, 155, 3)
    image = _texture(rng, height, width, base, str(rng.choice(_BACKGROUNDS)), strength=(12, 38))
    for _ in range(rng.integers(3, 9)):
        _add_clutter(rng, image)
    objects: list[tuple[str, tuple, list]] = []
    for _ in range(rng.integers(1, 5)):
        for _attempt in range(20):
            name = str(rng.choice(list(class_names)))
            outline = _outline(rng, name, height, width, size)
            mask = _mask(outline, height, width)
            box = _tight_box(mask)
            if all(_iou(box, other) <= _MAX_IOU for _, other, _ in objects):
                colour, kind = _contrasting_colour(rng, base), TEXTURES[name]
                paint = _texture(rng, height, width, colour, kind, strength=(35, 65))
                image += mask[..., None] * (paint - image)
                objects.append((name, box, outline))
                break
    image += rng.normal(0.0, rng.uniform(1.0, 8.0), image.shape)
    return image.clip(0, 255).astype(np.uint8), objects


def _contrasting_colour(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    while True:
        colour = rng.uniform(10, 245, 3)
        if np.linalg.norm(colour - base) >= _MIN_CONTRAST:
            return colour


def _texture(
    rng: np.random.Generator,
    height: int,
    width: int,
    colour: np.ndarray,
    kind: str,
    *,
    strength: tuple[float, float],
) -> np.ndarray:
    """Float [H, W, 3] around `colour`; `strength` is the range of the texture's amplitude."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(5, 12)
    phase = rng.uniform(0, 2 * math.pi, 2)
    u = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period + phase[0]
    v = (y * math.cos(angle) - x * math.sin(angle)) * 2 * math.pi / period + phase[1]
    if kind == "stripes":
        wave = np.sign(np.sin(u))
    elif kind == "checks":
        wave = np.sign(np.sin(u) * np.sin(v))
    elif kind == "spots":
        wave = np.where(np.cos(u) + np.cos(v) > 0.8, 1.0, -0.6)
    elif kind == "gradient":
        wave = np.sin(u * period / max(height, width))
    else:
        wave = _smooth_noise(rng, height, width)
    shift = rng.normal(0.0, 1.0, 3)
    shift *= rng.uniform(*strength) / np.linalg.norm(shift)
    return colour + wave[..., None] * shift + 10.0 * _smooth_noise(rng, height, width)[..., None]


def _smooth_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W] in about -1 to 1, with features of a few pixels."""
    cells = int(rng.integers(4, 17))
    coarse = rng.uniform(-1.5, 1.5, (cells, cells)).astype(np.float32)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)


def _add_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """A line or an open arc, thin and soft: an edge that belongs to no object."""
    height, width = image.shape[:2]
    mask = Image.new("L", (width * 2, height * 2))
    draw = ImageDraw.Draw(mask)
    xs, ys = rng.uniform(0, 2 * width, 2), rng.uniform(0, 2 * height, 2)
    thick, strength = int(rng.integers(2, 5)), int(rng.integers(90, 220))
    if rng.random() < 0.6:
        draw.line((xs[0], ys[0], xs[1], ys[1]), fill=strength, width=thick)
    else:
        start = rng.uniform(0, 360)
        corners = (min(xs), min(ys), max(xs) + 8, max(ys) + 8)
        draw.arc(corners, start, start + rng.uniform(40, 140), fill=strength, width=thick)
    soft = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) / 255.0
    image += soft[..., None] * (rng.uniform(10, 245, 3) - image)


def _outline(
    rng: np.random.Generator, name: str, height: int, width: int, size: int
) -> list[tuple[float, float]]:
    """The corners (x, y) of one shape, scaled, turned and placed wholly inside the image."""
    radius = size * rng.uniform(0.125, 0.25)
    turn, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.85, 1.0)
    centre_x = rng.uniform(radius + 1, width - radius - 1)
    centre_y = rng.uniform(radius + 1, height - radius - 1)
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (
            centre_x + radius * (x * cos - stretch * y * sin),
            centre_y + radius * (x * sin + stretch * y * cos),
        )
        for x, y in OUTLINES[name]
    ]


def _mask(outline: Sequence[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """[H, W] cover of one shape in 0 to 1."""
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    corners = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in outline]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255.0


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
    return int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _annotation(image_id: str, shape: tuple[int, ...], objects: Sequence[tuple]) -> str:
    height, width = shape[:2]
    lines = [
        "<annotation>",
        f"  <filename>{image_id}.jpg</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for name, box in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        lines += [
            f"  <object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
            "<difficult>0</difficult><bndbox>"
            + "".join(f"<{tag}>{value}</{tag}>" for tag, value in sides)
            + "</bndbox></object>"
        ]
    return "\n".join([*lines, "</annotation>", ""])
