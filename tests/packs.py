"""Packs for tests: folders of small images, packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import load_tool

from moco.data.images import find_images
from moco.data.shard_writer import PackOptions, pack_images
from moco.data.shards import ShardSource, open_pack

pack_tool = load_tool("pack_images")


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


def run(*words, workers=0) -> int:
    """Exit status of tools/pack_images.py."""
    with pytest.raises(SystemExit) as end:
        pack_tool.main([*map(str, words), "--workers", str(workers)])
    return end.value.code


def refused(capsys, *words) -> str:
    """The one line with which tools/pack_images.py refuses."""
    assert run(*words) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line
