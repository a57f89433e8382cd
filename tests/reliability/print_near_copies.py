"""What the near-copy threshold finds and misses in a folder of photographs, and what a row costs.

python tests/reliability/print_near_copies.py IMAGES [--copies 125] [--cost]

Pairs: how many pairs of different files are at most so many bits apart (docs/LEAKS.md). Look at
the pairs that are printed: some are copies. Copies: the share of re-encoded, resized or otherwise
changed images that are found. --cost times the hashes beside decoding, hot, the best of nine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco.data import image_hash, image_rows  # noqa: E402
from moco.data.decode import decode_plain_jpeg, read_bgr  # noqa: E402
from moco.data.images import ImageSource, find_images, list_images  # noqa: E402

BITS = (4, 8, 10, 12, 14, 16, 20, 24, 28)
_SHOWN = 5
_ROUNDS = 9


def jpeg(quality: int):
    return lambda image: cv2.imdecode(
        cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR
    )


def scale(factor: float, how: int = cv2.INTER_AREA):
    return lambda image: cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)


def cut(share: float):
    """Cut `share` of the width and height away, evenly."""

    def apply(image: np.ndarray) -> np.ndarray:
        dy, dx = (max(1, round(side * share / 2)) for side in image.shape[:2])
        return np.ascontiguousarray(image[dy:-dy, dx:-dx])

    return apply


COPIES = {
    **{f"JPEG quality {quality}": jpeg(quality) for quality in (90, 75, 50, 30, 10)},
    "half size": scale(0.5),
    "0.7 of the size, quality 75": lambda image: jpeg(75)(scale(0.7)(image)),
    "quarter of the size": scale(0.25),
    "double size": scale(2.0, cv2.INTER_CUBIC),
    "squeezed to 224 x 224": lambda image: cv2.resize(
        image, (224, 224), interpolation=cv2.INTER_AREA
    ),
    "grey": lambda image: cv2.cvtColor(
        cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR
    ),
    "20 levels brighter": lambda image: cv2.convertScaleAbs(image, alpha=1.0, beta=20),
    "contrast x 1.2": lambda image: cv2.convertScaleAbs(image, alpha=1.2, beta=-10),
    "2 % cut off": cut(0.02),
    "10 % cut off": cut(0.10),
    "mirrored": lambda image: cv2.flip(image, 1),
}


def source_of(folder: str) -> ImageSource:
    try:
        return find_images(folder)
    except ValueError:  # classes beside images, or the like: all of it will do
        return ImageSource(folder, tuple(list_images(folder)), None, ())


def bits_apart(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """int64 [M, N]: differing bits of hashes [M, 16] and [N, 16]."""
    signs = [np.unpackbits(h, axis=1).astype(np.float32) * 2 - 1 for h in (some, others)]
    return np.rint((8 * image_rows.NEAR_BYTES - signs[0] @ signs[1].T) / 2).astype(np.int64)


def print_pairs(source: ImageSource, hashes: np.ndarray) -> None:
    counts, closest = np.zeros(8 * image_rows.NEAR_BYTES + 1, np.int64), []
    for first in range(0, len(hashes), 1000):
        apart = bits_apart(hashes[first : first + 1000], hashes)
        for row, distances in enumerate(apart):
            later = distances[first + row + 1 :]
            counts += np.bincount(later, minlength=len(counts))
            for place in np.flatnonzero(later <= 2 * image_rows.MAX_DISTANCE):
                closest.append((int(later[place]), first + row, first + row + 1 + int(place)))
    print(f"{len(hashes)} images, {counts.sum()} pairs; at most so many bits apart:")
    print("  " + ", ".join(f"{bits}: {counts[: bits + 1].sum()}" for bits in BITS))
    for bits, one, other in sorted(closest)[:_SHOWN]:
        print(f"  {bits} bits: {source.paths[one]}, {source.paths[other]}")


def print_copies(source: ImageSource, num: int) -> None:
    chosen = np.linspace(0, len(source) - 1, min(num, len(source))).astype(int).tolist()
    images = [read_bgr(source, index) for index in chosen]
    originals = _hashes(images)
    print(f"copies of {len(chosen)} images: found within {image_rows.MAX_DISTANCE} bits, furthest")
    for name, change in COPIES.items():
        changed = _hashes([change(image) for image in images])
        apart = np.unpackbits(originals ^ changed, axis=1).sum(axis=1)
        found = 100 * np.mean(apart <= image_rows.MAX_DISTANCE)
        print(f"  {name}: {found:.1f} %, {apart.max()}")


def _hashes(images: list[np.ndarray]) -> np.ndarray:
    return image_hash.near_hashes(np.stack([image_hash.thumbnail(image) for image in images]))


def print_cost(source: ImageSource, num: int = 128, together: int = 16) -> None:
    """Of plain JPEG files, one thread: seconds beside those of decoding the same file."""
    cv2.setNumThreads(1)
    files = [source.read_bytes(index) for index in range(min(num, len(source)))]
    files = [data for data in files if decode_plain_jpeg(data) is not None]
    best = {name: np.full(len(files), np.inf) for name in ("decoding", "bytes", "thumbnail")}
    transform = np.inf
    for _ in range(_ROUNDS):
        thumbnails = []
        for number, data in enumerate(files):
            times = [time.perf_counter()]
            image = decode_plain_jpeg(data)
            times.append(time.perf_counter())
            thumbnails.append(image_hash.thumbnail(image))
            times.append(time.perf_counter())
            image_hash.exact_hash(data)
            times.append(time.perf_counter())
            for name, spent in zip(("decoding", "thumbnail", "bytes"), np.diff(times), strict=True):
                best[name][number] = min(best[name][number], spent)
        start = time.perf_counter()
        for first in range(0, len(files), together):
            image_hash.near_hashes(np.stack(thumbnails[first : first + together]))
        transform = min(transform, (time.perf_counter() - start) / len(files))
    microseconds = {name: 1e6 * values.mean() for name, values in best.items()}
    microseconds["transform"] = 1e6 * transform
    decoding = microseconds.pop("decoding")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in microseconds.items())
    spent = sum(microseconds.values())
    print(
        f"microseconds an image: decoding {decoding:.0f}; hashes {spent:.1f} ({parts}), "
        f"{100 * spent / decoding:.2f} % of decoding"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--copies", type=int, default=125, help="images that are copied")
    parser.add_argument("--cost", action="store_true", help="time the hashes beside decoding")
    args = parser.parse_args(argv)
    source = source_of(args.images)
    rows = image_hash.in_threads(
        lambda index: image_hash.hash_bytes(source.read_bytes(index), source.path(index)),
        range(len(source)),
    )
    print_pairs(source, np.stack(list(rows))[:, image_rows.EXACT_BYTES :])
    print_copies(source, args.copies)
    if args.cost:
        print_cost(source)


if __name__ == "__main__":
    main()
