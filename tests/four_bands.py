"""Images of one and four channels: files of four bands as other programs write them, folders."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = {1: ("(0.5,)", "(0.25,)"), 4: ("(0.5, 0.5, 0.5, 0.3)", "(0.25, 0.25, 0.25, 0.2)")}


def changes(channels: int) -> dict[str, object]:
    """The keys of a run on such images, for `tiny.config`."""
    mean, std = PIXELS[channels]
    return {"DATA__CHANNELS": channels, "DATA__MEAN": mean, "DATA__STD": std}


def tiff(image_HWC: np.ndarray, extra_sample: int | None, photometric: int = 2) -> bytes:
    """An uncompressed TIFF 6.0 file with that entry ExtraSamples (338), or without it."""
    height, width, bands = image_HWC.shape
    data, bits = image_HWC.tobytes(), 8 * image_HWC.itemsize
    header = struct.pack(f"<{bands}H", *[bits] * bands)
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, bands, 8), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, 8 + len(header)), (277, 3, 1, bands),
        (278, 3, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    if extra_sample is not None:
        entries.append((338, 3, 1, extra_sample))
    out = b"II*\0" + struct.pack("<I", 8 + len(header) + len(data)) + header + data
    out += struct.pack("<H", len(entries))
    for entry in entries:
        out += struct.pack("<HHII", *entry)
    return out + struct.pack("<I", 0)


def noise(channels: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, channels]."""
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_folder(folder: Path, channels: int, per_class: int = 16) -> Path:
    """train/{a,b} and test/{a,b}; the classes differ in the last channel alone."""
    for split, num in (("train", per_class), ("test", 4)):
        for name, level in (("a", 40), ("b", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = noise(channels, (24, 24), seed=1000 * level + 100 * len(split) + i)
                last = pixels if channels == 1 else pixels[..., -1]
                last[:] = level + last // 8
                Image.fromarray(pixels).save(folder / split / name / f"{i:02d}.png")
    return folder
