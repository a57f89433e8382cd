"""Images as the internet and broken disks have them: what is decoded, what is refused and why."""

from __future__ import annotations

import errno
import io
import os
import socket
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
GREY16 = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32


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


def grey16_pgm() -> bytes:
    return b"P5 50 40 65535\n" + GREY16.astype(">u2").tobytes()


ODD_FILES = (
    "missing", "pipe", "device", "terminal", "folder", "link to itself", "link to nothing",
    "socket", "not allowed", "larger than any photograph",
)  # fmt: skip


def refusing(path, real_open):
    def refuse(name, *rest, **options):
        if os.fspath(name) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real_open(name, *rest, **options)

    return refuse


def odd_file(path, kind, monkeypatch) -> str:
    """Put what is no readable file at `path`. Returns: words of the reason it is refused with."""
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
        path.write_bytes(DECODED["JPEG"])
        path.chmod(0)
        if os.geteuid() == 0:  # who may read everything
            monkeypatch.setattr(os, "open", refusing(path, os.open))
        return "Permission denied"
    assert kind == "larger than any photograph"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    return "at most"
