"""Hashes by which an image is known again: its very file, or a re-encoded or resized copy of it.

A row of `ROW_BYTES` an image: `EXACT_BYTES` of the file's bytes (XXH3), then `NEAR_BYTES` of its
pixels, a perceptual hash of 128 bits: the signs of the lowest frequencies of a 48 x 48 grey
thumbnail's cosine transform. Copies differ in a few bits, other images in about 64. All zeros stand
for no perceptual hash: an image of one colour has no signs. What thresholds find and miss, and what
a row costs: docs/LEAKS.md.

The package ImageHash has the same idea, but looks at every pixel by Pillow: its `phash` takes about
as long as decoding. Neither hash is made to withstand someone who wants to hide an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
import xxhash
from PIL import Image

from moco.data.decode import decode_plain_jpeg
from moco.data.reading import read_file
from moco.data.rgb import decode_rgb
from moco.errors import DataError

EXACT_BYTES, NEAR_BYTES = 8, 16
ROW_BYTES = EXACT_BYTES + NEAR_BYTES
MAX_DISTANCE = 12  # bits in which two near copies may differ
THUMBNAIL = 48  # pixels a side
DIFFERENT, NEAR, EXACT = 0, 1, 2

_NUM_BITS = 8 * NEAR_BYTES
_NUM_WAVES = 16  # lowest frequencies an axis
_BLOCK = 4096  # rows of each side that are compared at a time
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


class Matches(NamedTuple):
    """Of each row: kind int8 [M], DIFFERENT, NEAR or EXACT; partner int64 [M], the number of the
    row it matches, -1 where none; distance int64 [M], in bits, of near copies."""

    kind: np.ndarray
    partner: np.ndarray
    distance: np.ndarray


def exact_hash(data: bytes) -> bytes:
    """`EXACT_BYTES` that equal files share, whatever their names."""
    return xxhash.xxh3_64_digest(data)


def thumbnail(image: np.ndarray | Image.Image) -> np.ndarray:
    """uint8 [48, 48], grey, of an image: uint8 [H, W, 3] in OpenCV's order, or PIL's in RGB."""
    to_grey = cv2.COLOR_BGR2GRAY
    if isinstance(image, Image.Image):
        image, to_grey = np.asarray(image), cv2.COLOR_RGB2GRAY
    # Not INTER_AREA, which looks at every pixel: that alone takes a tenth of decoding.
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(small, to_grey)


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
    contrast = np.sqrt(np.mean(np.square(lowest), axis=1)) / (THUMBNAIL / 2)
    found[contrast < _FLAT] = 0
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
        yield from pool.map(work, items)


def has_pixels(rows: np.ndarray) -> np.ndarray:
    """bool [N]: which rows have a perceptual hash."""
    return rows[:, EXACT_BYTES:].any(axis=1)


def match(rows: np.ndarray, pool: np.ndarray, max_distance: int = MAX_DISTANCE) -> Matches:
    """Which of `rows` [M, 24] are in `pool` [P, 24]: by their bytes, else as the nearest copy of at
    most `max_distance` bits. Compares all pairs: 5,000 rows with 1.3 million take some 20 s on two
    cores.
    """
    partner = _same_bytes(rows, pool)
    kind = np.where(partner >= 0, EXACT, DIFFERENT).astype(np.int8)
    distance = np.zeros(len(rows), np.int64)
    asked = np.flatnonzero((partner < 0) & has_pixels(rows))
    known = np.flatnonzero(has_pixels(pool))
    for first in range(0, len(asked) if len(known) else 0, _BLOCK):
        block = asked[first : first + _BLOCK]
        nearest, place = _nearest(rows[block, EXACT_BYTES:], pool, known)
        near = nearest <= max_distance
        kind[block[near]] = NEAR
        partner[block[near]], distance[block[near]] = place[near], nearest[near]
    return Matches(kind, partner, distance)


def _same_bytes(rows: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """int64 [M]: a row of the pool with the same exact hash; -1 where there is none."""
    found = np.full(len(rows), -1, np.int64)
    if len(pool) and len(rows):
        theirs, ours = (
            np.ascontiguousarray(r[:, :EXACT_BYTES]).view("<u8").ravel() for r in (pool, rows)
        )
        order = np.argsort(theirs, kind="stable")
        place = np.minimum(np.searchsorted(theirs[order], ours), len(order) - 1)
        same = theirs[order[place]] == ours
        found[same] = order[place[same]]
    return found


def _nearest(hashes: np.ndarray, pool: np.ndarray, known: np.ndarray):
    """Distance in bits to the nearest of `pool[known]`, and its number, int64 [M] each."""
    signs = _signs(hashes)
    best = torch.full((len(hashes),), -float("inf"))
    place = torch.zeros(len(hashes), dtype=torch.int64)
    for first in range(0, len(known), _BLOCK):
        block = known[first : first + _BLOCK]
        agreement, at = (signs @ _signs(pool[block, EXACT_BYTES:]).T).max(dim=1)
        better = agreement > best
        best[better] = agreement[better]
        place[better] = torch.from_numpy(block)[at[better]]
    return ((_NUM_BITS - best) / 2).round().long().numpy(), place.numpy()


def _signs(hashes: np.ndarray) -> torch.Tensor:
    """float32 [N, 128] of -1 and 1: the product of two is 128 minus twice their distance."""
    return torch.from_numpy(np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1)
