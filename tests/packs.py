"""Packs for tests: folders of small images, packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from moco.data.images import find_images
from moco.data.shard_writer import PackOptions, pack_images
from moco.data.shards import ShardSource, open_pack


def write_images(folder: Path, names, size=(9, 7)) -> Path:
    """Noise images, a different one for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0], 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def pack_folder(root: Path, folder: Path, order=None, **options) -> ShardSource:
    source = find_images(root)
    folder.mkdir(parents=True)
    order = range(len(source)) if order is None else order
    pack_images(source, folder, PackOptions(**options), order)
    return open_pack(folder)
