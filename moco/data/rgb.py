"""One image file as 8-bit RGB, by PIL."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.data.reading import UnreadableImage, read_file, unreadable

# PIL opens far more by their content, PostScript among them, which it has another program run.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
FULL_RANGE = (0, 65535)
PILLOWS_LIMIT = 178_956_970  # pixels, above which Pillow refuses an image by itself
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SCALED_TO_SIXTEEN_BITS = ("PNG", "PPM")  # what PIL opens as "I" from these has 16 bits


@dataclass(frozen=True)
class Decoding:
    """How files become 8-bit RGB.

    Attributes:
        sixteen_bit_range: (black, white) of 16-bit grey, one for all images: a range of each
            image's own would make equal brightness unequal. None converts as PIL does, which clips
            at 255: Detectron2's reading.
        max_pixels: of an image; larger ones are refused.
        max_pixels_key: what raises it, for messages.
    """

    sixteen_bit_range: tuple[int, int] | None = FULL_RANGE
    max_pixels: int = PILLOWS_LIMIT
    max_pixels_key: str = "DATA.MAX_IMAGE_PIXELS"

    @classmethod
    def of(cls, section: Mapping) -> Decoding:
        """That of the section DATA of a pretraining configuration, perhaps of before its keys."""
        return cls(
            tuple(section.get("SIXTEEN_BIT_RANGE", FULL_RANGE)),
            section.get("MAX_IMAGE_PIXELS", PILLOWS_LIMIT),
        )


DEFAULT_DECODING = Decoding()


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """The image in a file, as `decode_rgb` returns it. Raises DataError as that does."""
    return decode_rgb(read_file(path), path)


def decode_rgb(
    data: bytes, name: str | os.PathLike, decoding: Decoding = DEFAULT_DECODING
) -> Image.Image:
    """Decode one image fully, as 8-bit RGB.

    The same pixels as torchvision's ImageFolder gives, `convert("RGB")`: transparency is dropped,
    of several frames or pages the first is taken, and an orientation written in EXIF is not
    applied. Two kinds differ, see `to_rgb`.

    Args:
        data: the file's bytes.
        name: of the image, for the message.
    Raises: UnreadableImage with the name and the decoder's reason.
    """
    try:
        with opened(io.BytesIO(data), decoding) as image:
            return to_rgb(image, decoding)
    except UnidentifiedImageError as error:
        reason = f"no known image format: {', '.join(IMAGE_FORMATS)}" if data else "it is empty"
        raise unreadable(name, reason) from error
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from error
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, UnknownRange) as error:
        raise unreadable(name, str(error)) from error
    except Exception as error:  # damaged files make decoders raise almost anything
        raise unreadable(name, f"{type(error).__name__}: {error}") from error


class UnknownRange(ValueError):
    """Pixels that cannot become 8 bits, since no file tells their range."""


@contextlib.contextmanager
def opened(file: str | os.PathLike | io.BytesIO, decoding: Decoding) -> Iterator[Image.Image]:
    """An image whose header is read; decode it within the context.

    Raises: Image.DecompressionBombError, with Pillow's reason and the key that raises the limit;
        whatever else Pillow raises for a file.
    """
    limit = decoding.max_pixels
    raise_pillows_limit(limit)
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            num_pixels = image.width * image.height
            if num_pixels > limit:
                raise Image.DecompressionBombError(
                    f"Image size ({num_pixels} pixels) exceeds limit of {limit} pixels"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise Image.DecompressionBombError(
            f"{str(error).rstrip('.')}; for a file that can be trusted raise "
            f"{decoding.max_pixels_key}, now {limit}"
        ) from error


def raise_pillows_limit(num_pixels: int) -> None:
    """Have Pillow open images of so many pixels in this process.

    It keeps its limit in one variable, which threads share, so it is raised only.
    """
    if num_pixels > PILLOWS_LIMIT and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, num_pixels)


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether it has 16 bits of grey, by its header."""
    return image.mode in _SIXTEEN_BITS or (
        image.mode == "I" and image.format in _SCALED_TO_SIXTEEN_BITS
    )


def to_rgb(image: Image.Image, decoding: Decoding) -> Image.Image:
    """The image as 8-bit RGB: `convert("RGB")`, but for two kinds, which PIL would clip at 255.

    Of 16-bit grey `sixteen_bit_range` becomes 256 equal steps; the full range's are the high byte,
    as PIL keeps it of 16-bit colour. 32-bit and floating-point pixels are refused.

    Raises: UnknownRange for the latter.
    """
    if decoding.sixteen_bit_range is None:
        return image.convert("RGB")
    if is_sixteen_bit(image):
        grey = _steps(decoding.sixteen_bit_range)[np.asarray(image).astype(np.uint16)]
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnknownRange(f"pixels of mode {image.mode!r} have no known range")
    return image.convert("RGB")


def grey_levels(low: int, high: int, sixteen_bit_range: tuple[int, int]) -> int:
    """How many of the 256 grey levels the values from `low` to `high` reach."""
    steps = _steps(sixteen_bit_range)
    return int(steps[high]) - int(steps[low]) + 1


@functools.lru_cache(maxsize=4)
def _steps(sixteen_bit_range: tuple[int, int]) -> np.ndarray:
    """uint8 [65536]: the grey level of each 16-bit value."""
    black, white = sixteen_bit_range
    values = np.arange(1 << 16, dtype=np.int64).clip(black, white) - black
    return (values * 256 // (white - black + 1)).astype(np.uint8)
