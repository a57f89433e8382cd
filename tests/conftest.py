"""Shared by all tests: one thread a process, so that parallel test workers share the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--faults-long", action="store_true", help="the nightly form of -m faults")


@pytest.fixture
def image_folder(tmp_path):
    """Class folders train/{a,b} with 32 images and test/{a,b} with 8: red and blue noise."""
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 16), ("test", 4)):
        for channel, name in ((0, "a"), (2, "b")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 80, (24, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def default_runs(tmp_path_factory):
    """See tests/default_runs.py: made once, for all tests of files that runs leave."""
    from default_runs import make

    return make(tmp_path_factory.mktemp("default_runs"))
