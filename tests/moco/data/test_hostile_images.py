"""Hostile images are decoded as PIL does, or refused in one line that says which and why.

Never a crash, never a hang."""

from __future__ import annotations

import errno
import io
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from hostile_images import (
    DECODED,
    GREY16,
    ODD_FILES,
    REFUSED,
    grey16_pgm,
    interlaced_png,
    odd_file,
    png,
    saved,
)
from peak_memory import peak_kib
from PIL import Image

from moco.data import reading
from moco.data.augment import build_recipe
from moco.data.images import find_images
from moco.data.loader import TwoViews
from moco.data.reading import UnreadableImage, read_file
from moco.data.rgb import decode_rgb, load_rgb
from moco.errors import DataError


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A read that waits for ever ends in an error here."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", DECODED)
def test_decoded_as_pil_does_whatever_the_suffix(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(DECODED[kind])
    image = load_rgb(path)
    with Image.open(path) as expected:
        expected = expected.convert("RGB")
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert image.tobytes() == expected.tobytes()


def test_negative_control_the_peak_is_seen():
    before = peak_kib(anew=True)
    np.ones(150 << 20, dtype=np.uint8)
    assert peak_kib() - before > 100 << 10


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "x.jpg"
    data, reason = REFUSED[kind]
    path.write_bytes(data)
    before = peak_kib(anew=True)
    with pytest.raises(UnreadableImage) as caught:
        load_rgb(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as an image") and reason in message
    assert "\n" not in message
    assert peak_kib() - before < 100 << 10


def test_interlaced_png(tmp_path):
    data, pixels = interlaced_png()
    (tmp_path / "x.png").write_bytes(data)
    assert (np.asarray(load_rgb(tmp_path / "x.png")) == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(tmp_path, kind):
    data = saved(Image.fromarray(GREY16), kind) if kind != "PPM" else grey16_pgm()
    found = np.asarray(decode_rgb(data, "x"))
    assert (found == (GREY16 >> 8)[..., None]).all()
    clipped = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (clipped == 255).mean() > 0.9  # negative control: what PIL makes of them


def test_16_bit_grey_is_16_bit_colour_of_equal_channels():
    """PIL keeps the high byte of colour, so grey does the same."""
    rows = np.repeat(GREY16[:8, :8, None].astype(">u2"), 3, axis=2)
    data = bytearray(
        png(8, 8, (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    )
    data[24] = 16  # bits a sample
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    colour = decode_rgb(bytes(data), "x")
    grey = decode_rgb(saved(Image.fromarray(GREY16[:8, :8]), "PNG"), "x")
    assert grey.tobytes() == colour.tobytes()


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.jpg"
    reason = odd_file(path, kind, monkeypatch)
    for read in (load_rgb, read_file):
        with pytest.raises(UnreadableImage) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


def test_negative_control_a_plain_open_would_wait_for_the_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    read_end = os.open(tmp_path / "x.jpg", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(read_end, 10) == b""
    os.close(read_end)

    class Waited(Exception):
        pass

    def waited(*_):
        raise Waited

    signal.signal(signal.SIGALRM, waited)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(Waited):
        open(tmp_path / "x.jpg", "rb")


def test_extreme_aspect_ratios_give_views(tmp_path):
    for number, kind in enumerate(k for k in DECODED if "one pixel" in k):
        (tmp_path / f"{number}.png").write_bytes(DECODED[kind])
    source = find_images(tmp_path)
    assert len(source) == 3
    for backend in ("pil", "opencv"):
        views = TwoViews(source, build_recipe("v2", size=16), seed=0, backend=backend)
        view_q, view_k, index = views.batch([(0, 0), (0, 1), (0, 2)])[:3]
        assert view_q.shape == view_k.shape == (3, 3, 16, 16)


def test_passing_errors_are_tried_again(tmp_path, monkeypatch, capsys):
    """A disk that gives EIO twice, then its data; then one that always does."""
    monkeypatch.setattr(reading, "_DELAYS", (0.01, 0.02, 0.03))
    (tmp_path / "x.png").write_bytes(DECODED["BMP"])
    real_open, waits, failing = os.open, [], [errno.EIO, errno.EIO]
    monkeypatch.setattr(reading.time, "sleep", waits.append)

    def flaky(path, *rest):
        if str(path).endswith("x.png") and failing:
            raise OSError(failing.pop(), "Input/output error", path)
        return real_open(path, *rest)

    monkeypatch.setattr(os, "open", flaky)
    before = reading.num_retries()
    assert read_file(tmp_path / "x.png") == DECODED["BMP"]
    assert waits == [0.01, 0.02] and reading.num_retries() == before + 2
    said = capsys.readouterr().err
    assert said.count("x.png: Input/output error; trying again") == 2
    assert f"retry {before + 2} of process" in said
    failing[:] = [errno.ESTALE] * 4
    with pytest.raises(DataError) as caught:
        read_file(tmp_path / "x.png")
    # The disk failed, not the image: it must not be replaced by another.
    assert not isinstance(caught.value, UnreadableImage)
    assert "in each of 4 tries" in str(caught.value) and waits[2:] == [0.01, 0.02, 0.03]
    failing[:] = [errno.EACCES]
    with pytest.raises(UnreadableImage):  # will not pass by itself
        read_file(tmp_path / "x.png")
    assert len(waits) == 5
