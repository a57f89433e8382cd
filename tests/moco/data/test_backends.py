"""Every backend makes the views PIL makes: operation by operation, and as whole recipes."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import augment_distance as ad
import numpy as np
import pytest
import torch
from augment_distance import WHOLE, Distance, distance, view_of
from PIL import Image

from moco.benchmarks.pictures import natural_picture
from moco.data import augment_fast
from moco.data.augment_device import apply_batch, crop_batch, table_row
from moco.data.augment_fast import crop, store

SIZE = 64
# (mean, 99.9th percentile, maximum), in levels of 0 .. 255. docs/AUGMENTATION.md has the measured
# ones; "*" is what no other name fits.
BOUNDS = {
    "opencv": {
        "brightness": (0, 0, 0),
        "contrast": (0.02, 1, 1),
        "saturation": (0.002, 1, 1),
        "hue": (0.008, 1, 6),
        "jitter": (0.1, 2, 8),
        "grey before": (0.02, 1, 2),
        "grey": (0.002, 1, 1),
        "blur": (0.8, 3, 5),
        "flip": (0, 0, 0),
        "solarize": (0, 0, 0),
        "crop": (0.1, 1, 2),
        "recipe v1": (0.1, 4, 10),
        "recipe": (0.5, 4, 10),
        "view eval": (0.02, 1, 1),
    },
    "device": {
        "hue": (0.008, 1, 6),
        # A level of hue can move the mean grey, and with it a whole picture by one level.
        "jitter": (0.1, 2, 8),
        "blur 2.0": (0.2, 1, 2),  # halves are common with this sigma, and rounded either way
        "blur": (0.005, 1, 1),
        "crop": (0.1, 1, 2),
        "recipe": (0.1, 4, 10),
        "view eval": (0.02, 1, 1),
        "*": (0, 0, 0),
    },
}


def bound(backend: str, name: str) -> tuple[float, float, int]:
    found = [key for key in BOUNDS[backend] if name.startswith(key)]
    return BOUNDS[backend][found[0] if found else "*"]


def name_of(value) -> str:
    return value if isinstance(value, str) else ""


@pytest.fixture(scope="module")
def squares():
    return [natural_picture(seed, SIZE, SIZE) for seed in range(6)]


@pytest.fixture(scope="module")
def pictures():
    sizes = [(150, 120), (90, 140), (70, 64), (200, 65), (64, 64), (130, 100), (40, 50), (300, 200)]
    return [natural_picture(seed, *size) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("backend", ["opencv", "device"])
@pytest.mark.parametrize(("name", "parameters"), list(ad.operations()), ids=name_of)
def test_an_operation_is_pils(squares, backend, name, parameters):
    found = distance(backend, squares, parameters, SIZE)
    assert found.within(bound(backend, name)), found


@pytest.mark.parametrize("backend", ["opencv", "device"])
@pytest.mark.parametrize(("name", "parameters"), list(ad.recipes(SIZE)), ids=name_of)
def test_crops_and_recipes_are_pils(pictures, backend, name, parameters):
    found = distance(backend, pictures, parameters, SIZE)
    assert found.within(bound(backend, name)), found


def test_the_evaluation_view_is_pils(pictures):
    found = ad.eval_distance("opencv", pictures, 56)
    assert found.within(bound("opencv", "view eval")), found
    other = [ad.eval_view_of("opencv", image[::-1].copy(), 56) for image in pictures]
    views = [ad.eval_view_of("pil", image, 56) for image in pictures]
    assert not Distance.of(views, other).within(bound("opencv", "view eval"))


WRONG = {
    "blur 0.86": {"blur_sigma": 1.0},
    "hue": {"jitter": (("hue", 0.05 + 2 / 255),)},
    "contrast": {"jitter": (("contrast", 1.33),)},
    "saturation": {"jitter": (("saturation", 0.71),)},
    "brightness": {"jitter": (("brightness", 0.81),)},
    "jitter": {"jitter": (("contrast", 1.3), ("brightness", 0.7))},
    "grey": {"grey": False},
    "flip": {"flip": True},
    "solarize": {"solarize": False},
}
RIGHT = {
    "blur 0.86": {"blur_sigma": 0.86},
    "hue": {"jitter": (("hue", 0.05),)},
    "contrast": {"jitter": (("contrast", 1.3),)},
    "saturation": {"jitter": (("saturation", 0.7),)},
    "brightness": {"jitter": (("brightness", 0.8),)},
    "jitter": {"jitter": (("brightness", 0.7), ("contrast", 1.3))},
    "grey": {"grey": True},
    "flip": {"flip": False},
    "solarize": {"solarize": True},
}


@pytest.mark.parametrize("backend", ["opencv", "device"])
@pytest.mark.parametrize("name", WRONG)
def test_slightly_wrong_parameters_are_outside_the_bounds(squares, backend, name):
    """Negative control of the tests above."""
    whole = dataclasses.replace(WHOLE, height=SIZE, width=SIZE)
    right, wrong = (dataclasses.replace(whole, **changes[name]) for changes in (RIGHT, WRONG))
    pils = [view_of("pil", image, right, SIZE) for image in squares]
    for p, expected in ((right, True), (wrong, False)):
        ours = [view_of(backend, image, p, SIZE) for image in squares]
        assert Distance.of(ours, pils).within(bound(backend, name)) is expected


def test_other_channels_or_no_antialiasing_are_outside_the_bounds(pictures, monkeypatch):
    """Negative control: BGR for RGB, and the plain bilinear resize."""
    whole = dict(ad.recipes(SIZE))["crop, scale 0.2 to 1"]
    swapped = [image[..., ::-1].copy() for image in pictures]
    pils = [view_of("pil", i, whole(random.Random(n), *i.shape[1::-1]), SIZE)
            for n, i in enumerate(pictures)]  # fmt: skip
    ours = [view_of("opencv", i, whole(random.Random(n), *i.shape[1::-1]), SIZE)
            for n, i in enumerate(swapped)]  # fmt: skip
    assert not Distance.of(ours, pils).within(bound("opencv", "crop"))
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        augment_fast.F, "interpolate", lambda *a, antialias, **k: interpolate(*a, **k)
    )
    assert not distance("opencv", pictures, whole, SIZE).within(bound("opencv", "crop"))


def test_blurred_borders_are_pils(squares):
    """Where a filter must invent pixels: only the outermost four rows and columns are compared."""
    p = dataclasses.replace(WHOLE, height=SIZE, width=SIZE, blur_sigma=1.93)
    for backend in ("opencv", "device"):
        for image in squares:
            ours, pils = (view_of(b, image, p, SIZE).astype(int) for b in (backend, "pil"))
            gaps = np.abs(ours - pils)
            gaps[:, 4:-4, 4:-4] = 0
            assert gaps.max() <= 2


@pytest.mark.parametrize("name", ["v1", "v2", "v3_second"])
def test_a_batch_is_its_samples(pictures, name):
    """Samples of a batch do not touch each other, and tables and crops are left as they are."""
    parameters = dict(ad.recipes(SIZE))[f"recipe {name}"]
    drawn = [parameters(random.Random(n), *i.shape[1::-1]) for n, i in enumerate(pictures)]
    crops = torch.empty(len(pictures), 3, SIZE, SIZE, dtype=torch.uint8)
    for image, p, out in zip(pictures, drawn, crops.numpy(), strict=True):
        store(crop(ad.given_to("device", image), p, SIZE), out)
    table = torch.tensor([table_row(p) for p in drawn])
    before = crops.clone(), table.clone()
    views = apply_batch(crops, table)
    assert views.dtype == torch.uint8 and views.shape == crops.shape
    assert torch.equal(crops, before[0]) and torch.equal(table, before[1])
    for image, p, view in zip(pictures, drawn, views, strict=True):
        assert (view_of("device", image, p, SIZE) == view.numpy()).all()
    assert not torch.equal(apply_batch(crops, table.flip(0)), views)


def test_views_without_any_operation_are_the_crops():
    crops = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    table = torch.tensor([table_row(dataclasses.replace(WHOLE, height=8, width=8))] * 3)
    assert torch.equal(apply_batch(crops, table), crops)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (32, 24), (96, 64), (20, 40)])
def test_crops_of_resident_images_are_pils(side, size):
    images = [natural_picture(seed, side, side) for seed in range(12)]
    parameters = dict(ad.recipes(size))["crop, scale 0.2 to 1"]
    drawn = [parameters(random.Random(n), side, side) for n in range(len(images))]
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    crops = crop_batch(stacked, torch.tensor([table_row(p) for p in drawn]), size).numpy()
    pils = [view_of("pil", image, p, size) for image, p in zip(images, drawn, strict=True)]
    assert Distance.of(crops, pils).within((0.06, 1, 2))
    if size == side:  # enlarging alone has no weights to round differently
        assert Distance.of(crops, pils).within((1e-3, 0, 1))
    wrong = crop_batch(stacked, torch.tensor([table_row(p) for p in drawn[::-1]]), size).numpy()
    assert not Distance.of(wrong, pils).within((0.06, 1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpus_views_are_the_cpus(pictures, compiled):
    parameters = dict(ad.recipes(SIZE))["recipe v2"]
    drawn = [parameters(random.Random(n), *i.shape[1::-1]) for n, i in enumerate(pictures)]
    crops = torch.empty(len(pictures), 3, SIZE, SIZE, dtype=torch.uint8)
    for image, p, out in zip(pictures, drawn, crops.numpy(), strict=True):
        store(crop(ad.given_to("device", image), p, SIZE), out)
    table = torch.tensor([table_row(p) for p in drawn])
    views = apply_batch(crops.cuda(), table, compiled=compiled).cpu()
    assert Distance.of(views.numpy(), apply_batch(crops, table).numpy()).within((0.01, 1, 6))


@pytest.mark.skipif("MOCO_REAL_DATA" not in os.environ, reason="MOCO_REAL_DATA is not set")
@pytest.mark.parametrize("backend", ["opencv", "device"])
def test_views_of_photographs_are_pils(backend):
    files = sorted((Path(os.environ["MOCO_REAL_DATA"]) / "images").iterdir())[:20]
    images = [np.array(Image.open(file).convert("RGB")) for file in files]
    for name, parameters in ad.recipes(SIZE):
        found = distance(backend, images, parameters, SIZE)
        assert found.within(bound(backend, name)), (name, found)
