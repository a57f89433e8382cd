"""One image file as 8-bit RGB, by PIL."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.data.reading import UnreadableImage, read_file, unreadable

# PIL opens far more by their content, PostScript among them, which it has another program run.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SCALED_TO_SIXTEEN_BITS = ("PNG", "PPM")  # what PIL opens as "I" from these has 16 bits


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """The image in a file, as `decode_rgb` returns it. Raises DataError as that does."""
    return decode_rgb(read_file(path), path)


def decode_rgb(data: bytes, name: str | os.PathLike) -> Image.Image:
    """Decode one image fully, as 8-bit RGB.

    The same pixels as torchvision's ImageFolder gives, `convert("RGB")`: transparency is dropped,
    of several frames or pages the first is taken, and an orientation written in EXIF is not
    applied. Two kinds differ, which PIL would clip at 255. Of 16-bit grey the high byte is kept, as
    PIL does with 16-bit colour. 32-bit and floating-point pixels, whose range no file tells, are
    refused.

    Args:
        data: the file's bytes.
        name: of the image, for the message.
    Raises: UnreadableImage with the name and the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode in _SIXTEEN_BITS or (
                image.mode == "I" and image.format in _SCALED_TO_SIXTEEN_BITS
            ):
                high_bytes = np.right_shift(np.asarray(image), 8).astype(np.uint8)
                return Image.fromarray(high_bytes).convert("RGB")
            if image.mode in ("I", "F"):
                raise unreadable(name, f"pixels of mode {image.mode!r} have no known range")
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        reason = f"no known image format: {', '.join(_FORMATS)}" if data else "it is empty"
        raise unreadable(name, reason) from error
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from error
    except UnreadableImage:
        raise
    except Exception as error:  # damaged files make decoders raise almost anything
        raise unreadable(name, f"{type(error).__name__}: {error}") from error
