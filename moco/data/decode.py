"""Fast decoding: plain JPEG files by OpenCV's libjpeg-turbo, everything else by PIL.

Both give the pixels of `decode_rgb`, bit for bit: the same library with the same settings decodes.
The channels are in OpenCV's order, BGR, which it decodes 5 % faster; `store` in augment_fast puts
them right at no cost.
What the two treat differently (CMYK, 12 bits, files without an end, other formats) is left to
PIL, and so are all errors, which name the image.

Decoding at half or quarter scale (libjpeg's scaled DCT) is left out on purpose: Huffman decoding
takes most of the time, so half scale saves 15 % there; at ImageNet's sizes most crops are smaller
than twice the view, so it could not be used; and pixels would differ. Images that are much larger
than the views are better packed once at a smaller size.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from moco.data.images import ImageSource
from moco.data.rgb import PILLOWS_LIMIT, decode_rgb

_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman-coded
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, arithmetic ...


def read_bgr(source: ImageSource, index: int) -> np.ndarray:
    """Image `index` of a source: uint8 [H, W, 3], BGR, contiguous and writable.

    Raises: DataError where it is unreadable.
    """
    data = source.read_bytes(index)
    image = decode_plain_jpeg(data, source.decoding.max_pixels)
    if image is None:
        rgb = decode_rgb(data, source.path(index), source.decoding)
        image = cv2.cvtColor(np.asarray(rgb), cv2.COLOR_RGB2BGR)
    return image


def read_rgb(source: ImageSource, index: int) -> np.ndarray:
    """As `read_bgr`, in RGB."""
    return cv2.cvtColor(read_bgr(source, index), cv2.COLOR_BGR2RGB)


def decode_plain_jpeg(data: bytes, max_pixels: int = PILLOWS_LIMIT) -> np.ndarray | None:
    """uint8 [H, W, 3], BGR, of a JPEG file; None where it is not a plain one, or damaged."""
    if plain_jpeg_size(data, max_pixels) is None:
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS)
    except cv2.error:
        return None


def plain_jpeg_size(data: bytes, max_pixels: int = PILLOWS_LIMIT) -> tuple[int, int] | None:
    """(width, height) of a complete 8-bit grey or RGB (YCbCr) JPEG file; None for anything else.

    Read from the frame header (ITU T.81, B.2.2). A file that does not end with the end marker may
    be cut off, which decoders treat differently, so it does not count as complete.
    """
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _FRAMES:
            precision, components = data[position + 4], data[position + 9]
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            plain = precision == 8 and components in (1, 3) and width and height
            # Above them PIL warns or refuses, so PIL is asked.
            small = width * height <= min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
            return (width, height) if plain and small else None
        if marker in _OTHER_FRAMES or marker == 0xDA or marker == 0x01:
            return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
