"""Images and boxes as Detectron2 prepares them: pure functions, equal to the last bit.

Pixels are decoded as in pretraining (`moco.data.rgb`), so that a backbone sees in fine-tuning what
it saw before: 16-bit grey, which Detectron2 clips at 255, is scaled (`decoding_of`).

Source of the rules: Detectron2 data/detection_utils.py, data/dataset_mapper.py and
data/transforms (ResizeShortestEdge, RandomFlip). Boxes are [x0, y0, x1, y1] in pixels from 0.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from moco.cfgnode import CfgNode
from moco.data.rgb import DEFAULT_DECODING, Decoding, opened, to_rgb
from moco.errors import ConfigError, DataError

_MIN_BOX_SIDE = 1e-5
_FORMATS = ("BGR", "RGB")
_EXIF_ORIENTATION = 274
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def reads_as_detectron2(cfg: CfgNode, engine: str) -> bool:
    """Whether a run has Detectron2's reading of images: its own engine, or the replay of its
    stream."""
    return "detectron2" in (engine, cfg.DATALOADER.STREAM)


def decoding_of(cfg: CfgNode, engine: str = "embedded") -> Decoding:
    """How a run of an engine decodes images: INPUT.SIXTEEN_BIT_RANGE and MAX_IMAGE_PIXELS."""
    ends = None if reads_as_detectron2(cfg, engine) else tuple(cfg.INPUT.SIXTEEN_BIT_RANGE)
    return Decoding(ends, cfg.INPUT.MAX_IMAGE_PIXELS, "INPUT.MAX_IMAGE_PIXELS")


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it is absent or the EXIF is damaged."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # PIL raises many kinds for damaged EXIF; Detectron2 ignores it too
        return 1
    return value if value in _EXIF_TURNS else 1


def read_image(
    path: str | os.PathLike, channel_format: str, decoding: Decoding = DEFAULT_DECODING
) -> np.ndarray:
    """Decode an image with its EXIF orientation applied; grey and palette images become colour.

    Args:
        channel_format: "BGR" or "RGB", the order of the last dimension.
    Returns: uint8 [H, W, 3].
    Raises: DataError if it is missing or damaged; ConfigError for another format.
    """
    if channel_format not in _FORMATS:
        raise ConfigError(f"INPUT.FORMAT: {channel_format!r} is given; allowed: BGR, RGB")
    try:
        with opened(path, decoding) as image:
            orientation = exif_orientation(image)
            upright = to_rgb(image, decoding)
            if orientation != 1:
                upright = upright.transpose(_EXIF_TURNS[orientation])
            rgb = np.asarray(upright)
    except Exception as error:  # damaged files make decoders raise almost anything
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError):
            reason = f"{type(error).__name__}: {reason}"
        raise DataError(
            f"{path}: this image cannot be read ({reason}); a whole JPEG or PNG file is needed, "
            "replace it, or leave it out"
        ) from error
    return rgb[:, :, ::-1] if channel_format == "BGR" else rgb


def shortest_edge_shape(
    height: int, width: int, short_edge: int, max_size: int
) -> tuple[int, int]:
    """(height, width) after resizing the shorter side to `short_edge` pixels.

    The longer side is capped at `max_size`. `short_edge` 0 means no resizing.
    """
    if short_edge == 0:
        return height, width
    scale = short_edge * 1.0 / min(height, width)
    new_height, new_width = scale * height, scale * width
    # The shorter side is set, not computed: scale * side can miss it by a rounding error.
    if height < width:
        new_height = short_edge * 1.0
    else:
        new_width = short_edge * 1.0
    longest = max(new_height, new_width)
    if longest > max_size:
        shrink = max_size * 1.0 / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    return int(new_height + 0.5), int(new_width + 0.5)


def resize_image(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's bilinear resize of a uint8 [H, W, 3] image (it filters when it shrinks)."""
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def flip_image(image_HWC: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    return image_HWC[:, ::-1]


def transform_boxes(
    boxes_N4: np.ndarray,
    old_shape: tuple[int, int],
    new_shape: tuple[int, int],
    flip: bool,
) -> np.ndarray:
    """Move boxes with their image: resize, then flip, then clip to the new image.

    Args:
        boxes_N4: float64 boxes in the old image.
        old_shape, new_shape: (height, width) in pixels.
    Returns: float32 [N, 4]. The arithmetic is float64, as in Detectron2.
    """
    boxes = np.array(boxes_N4, dtype=np.float64).reshape(-1, 4)
    (old_height, old_width), (new_height, new_width) = old_shape, new_shape
    boxes[:, 0::2] *= new_width * 1.0 / old_width
    boxes[:, 1::2] *= new_height * 1.0 / old_height
    if flip:
        boxes[:, 0::2] = new_width - boxes[:, 2::-2]
    limits = np.array([new_width, new_height, new_width, new_height], dtype=np.float64)
    return np.minimum(boxes.clip(min=0), limits).astype(np.float32)


def nonempty_boxes(boxes_N4: np.ndarray) -> np.ndarray:
    """Mask [N] of float32 boxes whose sides are both longer than 1e-5 pixels."""
    sides = boxes_N4[:, 2:] - boxes_N4[:, :2]
    return (sides > np.float32(_MIN_BOX_SIDE)).all(axis=1)
