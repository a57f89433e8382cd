"""The hashes of `moco.data.image_rows`: of a file's bytes and of its pixels.

Bytes: XXH3. Pixels: a perceptual hash of 128 bits, the signs of the lowest frequencies of a 48 x 48
grey thumbnail's cosine transform. Copies differ in a few bits, other images in about 64. An image
of one colour has no signs, so no such hash. What they cost: docs/LEAKS.md.

The package ImageHash has the same idea, but looks at every pixel by Pillow: its `phash` takes about
as long as decoding. Neither hash is made to withstand someone who wants to hide an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
import xxhash
from PIL import Image

from moco.data.decode import decode_plain_jpeg
from moco.data.image_rows import EXACT_BYTES, NEAR_BYTES, ROW_BYTES
from moco.data.reading import read_file
from moco.data.rgb import decode_rgb
from moco.errors import DataError

THUMBNAIL = 48  # pixels a side

_NUM_BITS = 8 * NEAR_BYTES
_NUM_WAVES = 16  # lowest frequencies an axis
_WAITING = 4096  # items that threads have before them
_FLAT = 1.0  # grey levels: with less contrast the signs are the encoder's noise
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B, as in both libraries


def _waves() -> np.ndarray:
    """float32 [16, 48]: the cosines of the type 2 transform, not normalised."""
    frequency, place = np.arange(_NUM_WAVES), np.arange(THUMBNAIL) + 0.5
    return np.cos(np.pi / THUMBNAIL * np.outer(frequency, place)).astype(np.float32)


def _lowest() -> np.ndarray:
    """int64 [128]: places in a flattened [16, 16] transform, by ascending frequency, the mean left
    out."""
    pairs = [(v, u) for v in range(_NUM_WAVES) for u in range(_NUM_WAVES) if v + u]
    pairs.sort(key=lambda pair: (sum(pair), pair))
    return np.array([v * _NUM_WAVES + u for v, u in pairs[:_NUM_BITS]])


_WAVES, _LOWEST = _waves(), _lowest()


def exact_hash(data: bytes) -> bytes:
    """`EXACT_BYTES` that equal files share, whatever their names."""
    return xxhash.xxh3_64_digest(data)


def thumbnail(image: np.ndarray | Image.Image | tuple[Image.Image, ...]) -> np.ndarray:
    """uint8 [48, 48], grey, of an image: uint8 [H, W, 3] in OpenCV's order, or PIL's in RGB; of
    one band, [H, W] or [H, W, 1], that band; of four the first three."""
    to_grey = cv2.COLOR_BGR2GRAY
    if isinstance(image, tuple):  # bands apart, of `moco.data.channels`
        image = image[0]
    if isinstance(image, Image.Image):
        image, to_grey = np.asarray(image), cv2.COLOR_RGB2GRAY
    # Not INTER_AREA, which looks at every pixel: that alone takes a tenth of decoding.
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_LINEAR)
    if small.ndim == 2 or small.shape[2] == 1:
        return small.reshape(THUMBNAIL, THUMBNAIL)
    return cv2.cvtColor(np.ascontiguousarray(small[..., :3]), to_grey)


def thumbnail_on_device(image_CHW: torch.Tensor) -> np.ndarray:
    """As `thumbnail`, of uint8 [3, H, W] in RGB on any device: the same samples."""
    small = torch.nn.functional.interpolate(
        image_CHW[None].float(), (THUMBNAIL, THUMBNAIL), mode="bilinear", align_corners=False
    )
    return np.rint(_GREY @ small[0].flatten(1).cpu().numpy()).astype(np.uint8).reshape(
        THUMBNAIL, THUMBNAIL
    )


def near_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [N, 16] of thumbnails uint8 [N, 48, 48]; zeros for an image without contrast."""
    count = len(thumbnails)
    rows = thumbnails.reshape(-1, THUMBNAIL).astype(np.float32) @ _WAVES.T
    waves = np.matmul(_WAVES, rows.reshape(count, THUMBNAIL, _NUM_WAVES))
    lowest = waves.reshape(count, _NUM_WAVES**2)[:, _LOWEST]
    found = np.packbits(lowest > 0, axis=1)
    # White noise of one grey level has coefficients of about 24.
    contrast = np.einsum("ij,ij->i", lowest, lowest) / _NUM_BITS / (THUMBNAIL / 2) ** 2
    found[contrast < _FLAT**2] = 0
    return found


def rows_of(exact: Sequence[bytes], thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [N, 24]: the rows of N images."""
    rows = np.zeros((len(exact), ROW_BYTES), np.uint8)
    if len(exact):
        rows[:, :EXACT_BYTES] = np.frombuffer(b"".join(exact), np.uint8).reshape(-1, EXACT_BYTES)
        rows[:, EXACT_BYTES:] = near_hashes(np.stack(thumbnails))
    return rows


def hash_bytes(data: bytes, name: str | os.PathLike, *, with_pixels: bool = True) -> np.ndarray:
    """uint8 [24]: the row of an image file. Without pixels, or where they cannot be decoded, it
    has no perceptual hash."""
    row = np.zeros(ROW_BYTES, np.uint8)
    row[:EXACT_BYTES] = np.frombuffer(exact_hash(data), np.uint8)
    if with_pixels:
        image = decode_plain_jpeg(data)
        if image is None:
            try:
                image = decode_rgb(data, name)
            except DataError:
                return row
        row[EXACT_BYTES:] = near_hashes(thumbnail(image)[None])[0]
    return row


def hash_file(path: str | os.PathLike) -> np.ndarray:
    """`hash_bytes` of a file. Raises: DataError where it cannot be read."""
    return hash_bytes(read_file(path), path)


def in_threads(work: Callable, items: Sequence) -> Iterator:
    """`work` of each item, in order; decoding and hashing leave Python to the other threads."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    with ThreadPoolExecutor(num_threads) as pool:
        for first in range(0, len(items), _WAITING):  # a million at once would take gigabytes
            yield from pool.map(work, items[first : first + _WAITING])
