"""The range of 16-bit grey, and the limit of pixels: every reader of the pretraining side."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hostile_images import GREY16, PIXELS, saved
from packs import pack_folder
from PIL import Image

from moco.config import load_pretrain_config
from moco.data import rgb
from moco.data.decode import read_rgb
from moco.data.images import find_images, left_out_in_words
from moco.data.reading import UnreadableImage
from moco.data.rgb import FULL_RANGE, PILLOWS_LIMIT, Decoding, decode_rgb, grey_levels
from moco.data.sixteen_bit import look_at_sixteen_bits, proposed_range
from moco.data.subset import SubsetSource
from moco.errors import ConfigError, DataError

TWELVE_BITS = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.fixture
def pillow(monkeypatch):
    """Pillow's own limit, put back at the end."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    return monkeypatch


def test_the_default_is_pillows_limit():
    assert PILLOWS_LIMIT == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("ends", "given", "expected"),
    [
        (FULL_RANGE, [0, 255, 256, 65279, 65535], [0, 0, 1, 254, 255]),
        ((0, 4095), [0, 15, 16, 4095, 5000], [0, 0, 1, 255, 255]),
        ((1000, 1511), [0, 1000, 1001, 1002, 1511, 65535], [0, 0, 0, 1, 255, 255]),
        ((7, 8), [6, 7, 8, 9], [0, 0, 128, 128]),
    ],
)
def test_a_range_becomes_256_equal_steps(ends, given, expected):
    data = saved(Image.fromarray(np.array([given], dtype=np.uint16)), "PNG")
    found = np.asarray(decode_rgb(data, "x", Decoding(ends)))
    assert found[0].tolist() == [[level] * 3 for level in expected]


def test_the_range_changes_no_other_image():
    for image, kind in ((PIXELS, "PNG"), (PIXELS[:, :, 0], "PNG"), (PIXELS, "JPEG")):
        data = saved(Image.fromarray(image), kind)
        assert decode_rgb(data, "x", Decoding((0, 9))).tobytes() == decode_rgb(data, "x").tobytes()


def test_every_source_decodes_by_the_range(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(TWELVE_BITS).save(tmp_path / "images/x.png")
    decoding = Decoding((0, 4095))
    source = find_images(tmp_path / "images", decoding)
    packed = pack_folder(tmp_path / "images", tmp_path / "pack").decoded_as(decoding)
    expected = (TWELVE_BITS >> 4)[..., None]
    sources = (source, SubsetSource(source, [0]), packed, packed.reading_ahead(1, 1))
    for one in (*sources, pickle.loads(pickle.dumps(packed))):
        assert (read_rgb(one, 0) == expected).all() and (np.asarray(one.open(0)) == expected).all()
    plain = find_images(tmp_path / "images")  # control
    assert len(np.unique(np.asarray(plain.open(0)))) == 16
    assert len(np.unique(np.asarray(source.open(0)))) == 256


def test_few_grey_levels_are_said_with_the_range_that_gives_more(tmp_path):
    for number, values in enumerate((TWELVE_BITS, TWELVE_BITS[::-1])):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    Image.fromarray(PIXELS).save(tmp_path / "z.png")
    (line,) = look_at_sixteen_bits(find_images(tmp_path))
    assert line == (
        "warning: 16-bit grey: 2 such images looked at, values 4 to 4090: 16 of 256 grey levels by "
        "DATA.SIXTEEN_BIT_RANGE (0, 65535); DATA.SIXTEEN_BIT_RANGE '(0, 4095)' would give 256"
    )
    (line,) = look_at_sixteen_bits(find_images(tmp_path, Decoding((0, 4095))))
    assert "warning" not in line and "256 of 256" in line
    (line,) = look_at_sixteen_bits(find_images(tmp_path, Decoding((0, 2047))))
    assert "warning: 50% of their pixels lie outside" in line


def test_eight_bits_and_unreadable_images_are_not_spoken_of(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x")
    assert look_at_sixteen_bits(find_images(tmp_path)) == []


@pytest.mark.parametrize(
    ("low", "high", "proposed"),
    [(0, 4000, (0, 4095)), (30, 1023, (0, 1023)), (0, 65000, (0, 65535)),
     (30000, 34000, (30000, 34000)), (5, 5, (5, 6)), (0, 0, (0, 1))],
)  # fmt: skip
def test_proposed_range(low, high, proposed):
    assert proposed_range(low, high) == proposed
    if low < high:
        assert grey_levels(low, high, proposed) >= 64


@pytest.mark.parametrize("ends", ["(0,)", "(5, 5)", "(-1, 9)", "(0, 65536)", "(0, 9.5)"])
def test_wrong_ranges_are_refused(ends):
    with pytest.raises(ConfigError, match="DATA.SIXTEEN_BIT_RANGE"):
        load_pretrain_config(None, ["DATA.SIXTEEN_BIT_RANGE", ends])


def test_a_large_image_is_refused_with_pillows_reason_and_the_key(pillow):
    data = saved(Image.fromarray(PIXELS), "PNG")  # 50 x 40 pixels
    pillow.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    pillow.setattr(rgb, "PILLOWS_LIMIT", 1800)
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(data, "x.png", Decoding(max_pixels=1800))
    assert str(caught.value) == (
        "x.png: cannot be read as an image (Image size (2000 pixels) exceeds limit of 1800 pixels, "
        "could be decompression bomb DOS attack; for a file that can be trusted raise "
        "DATA.MAX_IMAGE_PIXELS, now 1800); replace or remove it"
    )
    allowed = decode_rgb(data, "x.png", Decoding(max_pixels=2000))  # and without a warning
    assert (np.asarray(allowed) == PIXELS).all()
    with pytest.raises(UnreadableImage, match="limit of 1800 pixels; for a file"):
        decode_rgb(data, "x.png", Decoding(max_pixels=1800))  # though Pillow's own is higher now


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_lower_limit_holds_for_both_decoders(tmp_path, kind):
    (tmp_path / f"x.{kind.lower()}").write_bytes(saved(Image.fromarray(PIXELS), kind))
    source = find_images(tmp_path, Decoding(max_pixels=1999))
    for read in (lambda: source.open(0), lambda: read_rgb(source, 0)):
        with pytest.raises(DataError, match="2000 pixels.* exceeds limit of 1999"):
            read()
    source = find_images(tmp_path, Decoding(max_pixels=2000))  # control
    assert (read_rgb(source, 0) == np.asarray(source.open(0))).all()


def test_what_is_no_image_is_counted(tmp_path):
    for folder in ("a", "b/deep", "b/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a/1.png", "b/deep/2.png"):
        Image.fromarray(GREY16).save(tmp_path / name)
    for name in ("a/1.txt", "b/2.TXT", "b/README", "a/.3.png", "b/.hidden/4.png", "labels.csv"):
        (tmp_path / name).write_bytes(b"")
    source = find_images(tmp_path)
    assert source.paths == ("a/1.png", "b/deep/2.png")
    assert source.left_out == {
        ".txt file": 2,
        "file without a suffix": 1,
        "file whose name begins with a dot": 1,
        "folder whose name begins with a dot": 1,
        ".csv file": 1,
    }
    assert left_out_in_words(source) == (
        "; left out: 1 x .csv file, 2 x .txt file, 1 x file whose name begins with a dot, "
        "1 x file without a suffix, 1 x folder whose name begins with a dot"
    )
    assert left_out_in_words(find_images(tmp_path / "b/deep")) == ""
    assert source == find_images(tmp_path)
