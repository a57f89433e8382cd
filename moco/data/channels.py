"""Images of one or four channels (DATA.CHANNELS), beside the three of RGB.

1: any image that is read as RGB, as 8-bit grey by PIL's weights; of a grey file its own values.
4: files with four bands, red, green, blue and another (near infrared, depth, a mask), as they are
stored: PNG and WebP with alpha, TIFF with one extra sample of any kind. The fourth is data here,
nothing is multiplied by it. Of 16 bits a channel the high byte is kept. A file of another number of
bands is unreadable in such a run: no value is made up for a band that is missing.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from moco.data.decode import read_bgr
from moco.data.images import ImageSource, decode_rgb
from moco.data.reading import UnreadableImage, unreadable

_FORMATS = ("PNG", "TIFF", "WEBP")
_EXTRA_SAMPLES = 338  # TIFF 6.0, section 18: 0 unspecified, 1 associated, 2 unassociated alpha
_AS_STORED = (None, 2, 999)  # with these PIL leaves the fourth band, and the others, alone


def open_planes(source: ImageSource, index: int, channels: int) -> tuple[Image.Image, ...]:
    """Image `index` as what PIL computes with: (RGB,), (grey,), or (RGB, the fourth as grey).

    Raises: DataError where it is unreadable or has another number of bands.
    """
    if channels == 3:
        return (source.open(index),)
    if channels == 1:
        return (source.open(index).convert("L"),)
    image_HWC = decode_four(source.read_bytes(index), source.path(index))
    colour = Image.fromarray(np.ascontiguousarray(image_HWC[..., :3]))
    return colour, Image.fromarray(np.ascontiguousarray(image_HWC[..., 3]))


def read_grey(source: ImageSource, index: int) -> np.ndarray:
    """Image `index` as uint8 [H, W, 1]. Raises: DataError where it is unreadable."""
    return cv2.cvtColor(read_bgr(source, index), cv2.COLOR_BGR2GRAY)[..., None]


def read_bgrx(source: ImageSource, index: int) -> np.ndarray:
    """Image `index` as uint8 [H, W, 4]: BGR, OpenCV's order, and the fourth band.

    Raises: DataError where it is unreadable or has another number of bands.
    """
    image_HWC = decode_four(source.read_bytes(index), source.path(index))
    return cv2.cvtColor(image_HWC, cv2.COLOR_RGBA2BGRA)


def decode_four(data: bytes, name: str) -> np.ndarray:
    """A file of four bands as uint8 [H, W, 4], in the file's order.

    Args:
        data: the file's bytes. name: of the image, for the message.
    Raises: UnreadableImage with the name and the reason.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            extra = _extra_sample(image)
            if image.mode == "RGBA" and extra in _AS_STORED:
                return np.array(image)
            if image.format == "TIFF" and extra in (0, 1):
                return _by_opencv(data, name)
            mode = image.mode
    except UnreadableImage:
        raise
    except Exception as error:  # damaged files make decoders raise almost anything
        decode_rgb(data, name)  # says what is wrong with it, unless it is another format
        raise unreadable(name, f"it is none of {', '.join(_FORMATS)}; {_needed()}") from error
    raise unreadable(name, f"it is of mode {mode!r}; {_needed()}")


def _extra_sample(image: Image.Image) -> int | None:
    """What a TIFF file says of its fourth band."""
    tags = getattr(image, "tag_v2", {})
    kinds = tags.get(_EXTRA_SAMPLES, ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return kinds[0] if len(kinds) == 1 else None


def _by_opencv(data: bytes, name: str) -> np.ndarray:
    """PIL would drop an unspecified fourth band, and divide by an associated alpha."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None or image.ndim != 3 or image.shape[2] != 4:
        raise unreadable(name, f"OpenCV cannot decode this TIFF; {_needed()}")
    if image.dtype == np.uint16:
        image = np.right_shift(image, 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise unreadable(name, f"pixels of {image.dtype} have no known range")
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)


def _needed() -> str:
    return "DATA.CHANNELS 4 needs four bands: PNG, WebP or TIFF with alpha or an extra sample"
