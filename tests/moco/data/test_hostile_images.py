"""Images as the internet and broken disks have them: decoded as PIL does, or one line that says
which and why. Never a crash, never a hang."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import struct
import zlib

import numpy as np
import pytest
from peak_memory import peak_kib
from PIL import Image, PngImagePlugin

from moco.data import reading
from moco.data.augment import build_recipe
from moco.data.images import find_images
from moco.data.loader import TwoViews
from moco.data.reading import UnreadableImage, read_file
from moco.data.rgb import decode_rgb, load_rgb
from moco.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
GREY16 = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A read that waits for ever ends in an error here."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand: 8-bit RGB of the given size with these chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in (header, *chunks, (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + data))
        parts.append(struct.pack(">I", len(data)) + name + data + crc)
    return b"".join(parts)


def bomb(megabytes: int = 200) -> bytes:
    """Zeros that zlib made small, made without having them all in memory."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def png_with(name: bytes) -> bytes:
    """A whole PNG whose chunk `name` bursts when it is unpacked."""
    return png(8, 8, (name, b"k\0\0" + bomb()), (b"IDAT", zlib.compress(bytes(8 * 25))))


def commented() -> bytes:
    comments = PngImagePlugin.PngInfo()
    comments.add_text("k", "x" * 900_000)
    return saved(RGB, "PNG", pnginfo=comments)


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(RGB, "JPEG", exif=exif)


def frames(kind: str, **options) -> bytes:
    others = [Image.new("RGB", RGB.size, c) for c in ("red", "blue")]
    return saved(RGB, kind, save_all=True, append_images=others, **options)


# What is decoded, to the pixels of PIL's convert("RGB") of its first frame.
DECODED = {
    "JPEG": saved(RGB, "JPEG"),
    "progressive JPEG": saved(RGB, "JPEG", progressive=True),
    "JPEG with garbage after its end": saved(RGB, "JPEG") + os.urandom(3000),
    "CMYK JPEG": saved(RGB.convert("CMYK"), "JPEG"),
    "grey JPEG": saved(RGB.convert("L"), "JPEG"),
    "EXIF-rotated JPEG": exif_rotated(),
    "grey PNG": saved(RGB.convert("L"), "PNG"),
    "grey PNG with alpha": saved(RGB.convert("LA"), "PNG"),
    "PNG with alpha": saved(RGB.convert("RGBA"), "PNG"),
    "palette PNG": saved(RGB.convert("P"), "PNG"),
    "palette PNG with transparency": saved(RGB.convert("P"), "PNG", transparency=3),
    "two-colour PNG": saved(RGB.convert("1"), "PNG"),
    "animated GIF": frames("GIF"),
    "animated PNG": frames("PNG"),
    "TIFF of several pages": frames("TIFF"),
    "CMYK TIFF": saved(RGB.convert("CMYK"), "TIFF"),
    "WebP": saved(RGB, "WEBP"),
    "animated WebP": frames("WEBP"),
    "BMP": saved(RGB, "BMP"),
    "one pixel": saved(Image.new("RGB", (1, 1), "red"), "PNG"),
    "one pixel wide, 3000 high": saved(Image.new("RGB", (1, 3000), "red"), "JPEG"),
    "3000 wide, one pixel high": saved(Image.new("RGB", (3000, 1), "red"), "PNG"),
    "PNG with a large comment": commented(),
}  # fmt: skip


def interlaced_png() -> tuple[bytes, np.ndarray]:
    """Adam7 by hand: PIL writes none."""
    pixels = PIXELS[:8, :8]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1)]  # fmt: skip
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]
    )
    whole = bytearray(png(8, 8, (b"IDAT", zlib.compress(rows))))
    whole[28] = 1  # the header's interlace method
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    return bytes(whole), pixels


# What is refused, and the words of the reason.
REFUSED = {
    "zero bytes": (b"", "it is empty"),
    "zeros": (bytes(1000), "no known image format"),
    "text": (b"<html>404 Not Found</html>", "no known image format"),
    "cut JPEG": (saved(RGB, "JPEG")[:-200], "truncated"),
    "JPEG cut in its header": (saved(RGB, "JPEG")[:30], "cannot be read as an image"),
    "cut PNG": (saved(RGB, "PNG")[:-500], "truncated"),
    "PNG with a broken checksum": (
        saved(RGB, "PNG")[:50] + bytes(20) + saved(RGB, "PNG")[70:], "cannot be read as an image"),
    "cut WebP": (saved(RGB, "WEBP")[:-100], "cannot be read as an image"),
    "decompression bomb": (
        png(30000, 30000, (b"IDAT", zlib.compress(bytes(1000)))), "decompression bomb"),
    "enormous header": (
        png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(bytes(1000)))), "decompression bomb"),
    "header without pixels": (png(100, 100), "cannot be read as an image"),
    "PNG of no width": (png(0, 10, (b"IDAT", b"")), "cannot be read as an image"),
    "PNG with a comment that bursts": (png_with(b"zTXt"), "Decompressed"),
    "PNG with a profile that bursts": (png_with(b"iCCP"), "Decompressed"),
    "float TIFF": (saved(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "'F'"),
    "32-bit TIFF": (saved(Image.fromarray(PIXELS[..., 0].astype(np.int32)), "TIFF"), "'I'"),
    "PostScript, which PIL gives to another program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
        "no known image format"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known image format"),
    "GIF without a frame": (b"GIF89a\x0a\0\x0a\0\0\0\0;", "cannot be read as an image"),
    "TIFF whose directory points at itself": (
        b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "cannot be read as an image"),
}  # fmt: skip


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


def grey16_pgm() -> bytes:
    return b"P5 50 40 65535\n" + GREY16.astype(">u2").tobytes()


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


def odd_file(path, kind, monkeypatch):
    if kind == "missing":
        return "No such file"
    if kind == "pipe":
        os.mkfifo(path)
        return "no regular file"
    if kind == "device":
        os.symlink("/dev/zero", path)
        return "no regular file"
    if kind == "terminal":
        os.symlink("/dev/tty", path)
        return "cannot be read as an image"
    if kind == "folder":
        path.mkdir()
        return "a folder"
    if kind == "link to itself":
        os.symlink(path, path)
        return "Too many levels"
    if kind == "link to nothing":
        os.symlink(path.with_name("nothing"), path)
        return "No such file"
    if kind == "socket":
        monkeypatch.chdir(path.parent)  # the whole path may be too long for one
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        return "cannot be read as an image"
    if kind == "not allowed":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.write_bytes(DECODED["JPEG"])
        path.chmod(0)
        return "Permission denied"
    assert kind == "larger than any photograph"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    return "at most"


@pytest.mark.parametrize(
    "kind",
    ["missing", "pipe", "device", "terminal", "folder", "link to itself", "link to nothing",
     "socket", "not allowed", "larger than any photograph"],
)  # fmt: skip
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
