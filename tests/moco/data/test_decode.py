"""The fast decoder's pixels are PIL's, bit for bit, and it knows what it must leave to PIL."""

from __future__ import annotations

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from moco.benchmarks.pictures import natural_jpeg, natural_picture
from moco.data import decode
from moco.data.decode import decode_plain_jpeg, plain_jpeg_size, read_bgr, read_rgb
from moco.data.images import find_images
from moco.errors import DataError


def encoded(image: Image.Image, suffix: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


PICTURE = Image.fromarray(natural_picture(0, 93, 61))  # sides that no block divides
EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation: to be turned by 90 degrees
PLAIN = {
    "4:2:0": encoded(PICTURE, quality=75),
    "4:2:2": encoded(PICTURE, quality=95, subsampling=1),
    "4:4:4": encoded(PICTURE, quality=95, subsampling=0),
    "low quality": encoded(PICTURE, quality=10),
    "progressive": encoded(PICTURE, progressive=True),
    "optimised": encoded(PICTURE, optimize=True),
    "restart markers": encoded(PICTURE, restart_marker_rows=1),
    "grey": encoded(PICTURE.convert("L")),
    "orientation": encoded(PICTURE, exif=EXIF),
    "comment": encoded(PICTURE, comment=b"\xff\xc0\xff\xd9" * 9),  # that looks like markers
    "long profile": encoded(PICTURE, icc_profile=b"x" * 70000),
    "RGB without YCbCr": encoded(PICTURE, keep_rgb=True),
    "one pixel": encoded(PICTURE.crop((0, 0, 1, 1))),
    "one row": encoded(PICTURE.crop((0, 0, 93, 1))),
}  # fmt: skip
LEFT_TO_PIL = {
    "CMYK": encoded(PICTURE.convert("CMYK")),
    "PNG": encoded(PICTURE, "png"),
    "PNG with alpha": encoded(PICTURE.convert("RGBA"), "png"),
    "palette": encoded(PICTURE.convert("P"), "png"),
    "16 bits": encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "png"),
    "webp": encoded(PICTURE, "webp"),
    "no end marker": PLAIN["4:2:0"][:-2],
    "bytes after the end": PLAIN["4:2:0"] + b"\0",
}


def source_of(folder: Path, data: bytes):
    (folder / "x.jpg").write_bytes(data)
    return find_images(folder)


@pytest.mark.parametrize("name", PLAIN)
def test_pixels_of_plain_files_are_pils(name, tmp_path):
    data = PLAIN[name]
    reference = Image.open(io.BytesIO(data))
    assert plain_jpeg_size(data) == reference.size
    image = decode_plain_jpeg(data)
    assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous
    assert (image[..., ::-1] == np.asarray(reference.convert("RGB"))).all()
    source = source_of(tmp_path, data)
    assert (read_bgr(source, 0) == image).all()
    assert (read_rgb(source, 0) == np.asarray(source.open(0))).all()


@pytest.mark.parametrize("name", LEFT_TO_PIL)
def test_anything_else_is_left_to_pil(name, tmp_path):
    data = LEFT_TO_PIL[name]
    assert plain_jpeg_size(data) is None and decode_plain_jpeg(data) is None
    source = source_of(tmp_path, data)
    if name == "no end marker":  # whatever PIL says about it
        with pytest.raises(DataError):
            source.open(0)
        with pytest.raises(DataError, match=r"x\.jpg: cannot be read as an image"):
            read_rgb(source, 0)
    else:
        image = read_bgr(source, 0)
        assert image.flags.writeable and image.flags.c_contiguous
        assert (image[..., ::-1] == np.asarray(source.open(0))).all()


def test_a_wrong_pixel_format_would_be_seen(monkeypatch):
    """Negative control: the other order of channels, and the orientation applied."""
    expected = np.asarray(Image.open(io.BytesIO(PLAIN["orientation"])).convert("RGB"))
    assert (decode_plain_jpeg(PLAIN["orientation"]) != expected).any()
    monkeypatch.setattr(decode, "_FLAGS", cv2.IMREAD_COLOR)
    assert decode_plain_jpeg(PLAIN["orientation"]).shape != expected.shape


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8" + b"\xff" * 40, "cut off"])
def test_damaged_files_are_one_line_with_the_path(data, tmp_path):
    data = (PLAIN["4:2:0"][:200] if data == "cut off" else data) + b"\xff\xd9"
    with pytest.raises(DataError) as caught:
        read_rgb(source_of(tmp_path, data), 0)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.jpg'}: cannot be read") and "\n" not in message


def test_damage_within_the_picture_gives_pils_pixels():
    """libjpeg goes on after damage, and both decoders with it."""
    whole = bytearray(natural_jpeg(1, 120, 90))
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(30):
        data = bytearray(whole)
        for position in rng.integers(len(data) // 2, len(data) - 2, 3):
            data[position] = rng.integers(256)
        image = decode_plain_jpeg(bytes(data))
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (image[..., ::-1] == expected).all()
        changed += bool((image != decode_plain_jpeg(bytes(whole))).any())
    assert changed > 20


def test_very_large_pictures_are_left_to_pil(monkeypatch):
    assert plain_jpeg_size(PLAIN["4:2:0"]) == (93, 61)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 93 * 61 - 1)
    assert plain_jpeg_size(PLAIN["4:2:0"]) is None


@pytest.mark.skipif("MOCO_REAL_DATA" not in os.environ, reason="MOCO_REAL_DATA is not set")
@pytest.mark.parametrize("folder", ["images", "bccd/JPEGImages", "cifar10/test"])
def test_pixels_of_photographs_are_pils(folder):
    source = find_images(Path(os.environ["MOCO_REAL_DATA"]) / folder)
    for index in range(min(60, len(source))):
        assert (read_rgb(source, index) == np.asarray(source.open(index))).all()
        assert decode_plain_jpeg(source.read_bytes(index)) is not None
