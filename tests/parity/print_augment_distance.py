"""Print how far each backend's views are from PIL's: the table of docs/AUGMENTATION.md.

    python tests/parity/print_augment_distance.py [--images DIR] [--number 100] [--size 224]

Without --images the pictures are generated. Each operation is given pictures of the view's size,
crops and recipes the whole pictures; the 24 orders of the jitter are printed as the worst of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(_ROOT), str(_ROOT / "tests")]

import numpy as np  # noqa: E402
from augment_distance import (  # noqa: E402
    Distance,
    distance,
    eval_distance,
    operations,
    recipes,
)
from PIL import Image  # noqa: E402

from moco.benchmarks.pictures import natural_picture  # noqa: E402
from moco.data.images import find_images  # noqa: E402


def load_pictures(folder: str | None, number: int) -> list[np.ndarray]:
    if folder is None:
        return [natural_picture(seed) for seed in range(number)]
    source = find_images(folder)
    return [np.array(source.open(index)) for index in range(min(number, len(source)))]


def squares(pictures: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Central squares at the view's size, so that an operation is seen without the crop."""
    out = []
    for picture in pictures:
        image = Image.fromarray(picture)
        side, (width, height) = min(image.size), image.size
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        out.append(np.array(image.resize((size, size), Image.BILINEAR, box)))
    return out


def rows(pictures: list[np.ndarray], size: int) -> dict[str, list[Distance]]:
    """{name: distances of the backends opencv and device}, the jitter's orders as the worst."""
    backends, table = ("opencv", "device"), {}
    small, orders = squares(pictures, size), []
    for cases, images in ((operations(), small), (recipes(size), pictures)):
        for name, parameters in cases:
            found = [distance(backend, images, parameters, size) for backend in backends]
            if name.startswith("jitter "):
                orders.append(found)
                name = "jitter, worst of 24 orders"
                found = [max(column, key=lambda d: d.mean) for column in zip(*orders, strict=True)]
            table[name] = found
    table["view eval"] = [eval_distance(backend, pictures, size) for backend in backends]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", metavar="DIR", help="folder of photographs")
    parser.add_argument("--number", type=int, default=100, help="of pictures")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    print("| | opencv: mean | 99.9 % | max | device: mean | 99.9 % | max |")
    print("|---|---|---|---|---|---|---|")
    for name, distances in rows(load_pictures(args.images, args.number), args.size).items():
        cells = [f"{d.mean:.4f} | {d.p999:.0f} | {d.largest}" for d in distances]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
