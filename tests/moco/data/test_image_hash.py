"""Exact and perceptual hashes against scipy's transform, and what they take for the same image."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

from moco.benchmarks.pictures import natural_jpeg, natural_picture
from moco.data import image_hash, image_rows
from moco.data.decode import decode_plain_jpeg
from moco.data.image_hash import near_hashes, thumbnail
from moco.data.image_rows import DIFFERENT, EXACT, EXACT_BYTES, NEAR, match

PICTURES = [natural_picture(seed, 200, 150) for seed in range(24)]  # RGB


def row(data: bytes) -> np.ndarray:
    return image_hash.hash_bytes(data, "image")


def file_of(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Differing bits of two rows' perceptual hashes, counted one by one."""
    return np.unpackbits(one[..., EXACT_BYTES:] ^ others[..., EXACT_BYTES:], axis=-1).sum(-1)


def test_the_perceptual_hash_is_the_signs_of_scipys_cosine_transform():
    thumbnails = np.stack([thumbnail(p[..., ::-1]) for p in PICTURES])
    transforms = scipy.fft.dctn(thumbnails.astype(np.float64), axes=(1, 2))
    order = sorted(((v, u) for v in range(16) for u in range(16) if v + u),
                   key=lambda p: (p[0] + p[1], p[0]))[:128]  # fmt: skip
    lowest = np.stack([transforms[:, v, u] for v, u in order], axis=1)
    bits = np.unpackbits(near_hashes(thumbnails), axis=1)
    clear = np.abs(lowest) > 1.0  # a coefficient of nearly 0 may be rounded to either sign
    assert clear.mean() > 0.99
    assert (bits[clear] == (lowest > 0)[clear]).all()
    assert (bits[clear] != (np.roll(lowest, 1, axis=1) > 0)[clear]).any()  # control


COPIES = {
    "JPEG 90": lambda p: file_of(p, "JPEG", quality=90),
    "JPEG 40": lambda p: file_of(p, "JPEG", quality=40),
    "WebP": lambda p: file_of(p, "WEBP", quality=70),
    "BMP": lambda p: file_of(p, "BMP"),
    "half": lambda p: file_of(cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)),
    "double": lambda p: file_of(cv2.resize(p, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)),
    "square": lambda p: file_of(cv2.resize(p, (160, 160), interpolation=cv2.INTER_AREA)),
    "grey": lambda p: file_of(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY)),
    "brighter": lambda p: file_of(cv2.convertScaleAbs(p, alpha=1.0, beta=12)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_near_and_other_pictures_are_not(copy):
    pool = np.stack([row(file_of(p)) for p in PICTURES])
    rows = np.stack([row(COPIES[copy](p)) for p in PICTURES])
    found = match(rows, pool)
    assert (found.kind == NEAR).all() and (found.partner == np.arange(len(PICTURES))).all()
    assert (found.distance == [distances(r, p) for r, p in zip(rows, pool, strict=True)]).all()
    for number in range(len(PICTURES)):  # control: its own original away, nothing matches
        others = np.delete(pool, number, axis=0)
        assert match(rows[number : number + 1], others).kind.tolist() == [DIFFERENT]
        assert distances(rows[number], others).min() > 2 * image_rows.MAX_DISTANCE


def test_equal_files_match_by_their_bytes_whatever_is_near():
    data = [file_of(p) for p in PICTURES[:4]]
    pool = np.stack([row(file_of(PICTURES[2], "JPEG", quality=95)), *map(row, data)])
    found = match(np.stack([row(d) for d in data]), pool)
    assert found.kind.tolist() == [EXACT] * 4 and found.partner.tolist() == [1, 2, 3, 4]
    changed = bytearray(natural_jpeg(1, 64, 48))
    before = row(bytes(changed))
    changed[2:2] = b"\xff\xfe\x00\x04ab"  # a comment: other bytes, the same pixels
    found = match(row(bytes(changed))[None], before[None])
    assert found.kind.tolist() == [NEAR] and found.distance.tolist() == [0]


def test_match_is_that_of_all_pairs_one_by_one(monkeypatch):
    monkeypatch.setattr(image_rows, "_BLOCK", 7)  # several blocks on both sides
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (40, image_rows.ROW_BYTES), dtype=np.uint8)
    rows = pool[rng.permutation(40)[:20]].copy()
    for number in range(20):  # up to 19 bits away, the bytes changed too
        bits = np.unpackbits(rows[number, EXACT_BYTES:])
        bits[rng.permutation(128)[:number]] ^= 1
        rows[number, EXACT_BYTES:] = np.packbits(bits)
        rows[number, 0] ^= 1
    found = match(rows, pool)
    apart = np.stack([distances(r, pool) for r in rows])
    near = apart.min(1) <= image_rows.MAX_DISTANCE
    assert 0 < near.sum() < 20
    assert (found.kind == np.where(near, NEAR, DIFFERENT)).all()
    assert (found.partner == np.where(near, apart.argmin(1), -1)).all()
    none = np.zeros((0, image_rows.ROW_BYTES), np.uint8)
    assert match(rows, none).kind.tolist() == [DIFFERENT] * 20 and len(match(none, pool).kind) == 0


@pytest.mark.parametrize("quality", [None, 30])
def test_images_of_one_colour_have_no_perceptual_hash(quality):
    """Else a black and a white page, and all other empty ones, would be one image."""
    rows = []
    for level in (0, 90, 255):
        pixels = np.full((60, 80, 3), level, np.uint8)
        rows.append(row(file_of(pixels, "JPEG", quality=quality) if quality else file_of(pixels)))
    rows = np.stack(rows)
    assert not image_rows.has_pixels(rows).any()
    assert match(rows[:1], rows[1:]).kind.tolist() == [DIFFERENT]
    assert match(rows[:1], rows).kind.tolist() == [EXACT]


def test_libraries_and_devices_give_the_same_row():
    for seed in range(6):
        data = natural_jpeg(seed, 70 + 9 * seed, 64)
        image = decode_plain_jpeg(data)
        by_opencv = thumbnail(image)
        rgb = image[..., ::-1].copy()
        assert (thumbnail(Image.fromarray(rgb)) == by_opencv).all()
        on_device = image_hash.thumbnail_on_device(torch.from_numpy(rgb).permute(2, 0, 1))
        assert np.abs(on_device.astype(int) - by_opencv).max() <= 2
        one, other = near_hashes(np.stack([by_opencv, on_device]))
        assert np.unpackbits(one ^ other).sum() <= 2


def test_what_cannot_be_decoded_still_has_its_bytes():
    broken = row(b"no image")
    assert broken[:EXACT_BYTES].any() and not broken[EXACT_BYTES:].any()
    assert match(broken[None], broken[None]).kind.tolist() == [EXACT]
