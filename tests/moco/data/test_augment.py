from __future__ import annotations

import collections
import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional

from moco.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewParameters,
    apply_pil,
    build_recipe,
    build_view_recipes,
    eval_pil,
    eval_resize,
    normalize,
    sample_parameters,
    to_uint8_CHW,
)
from moco.errors import ConfigError

NUM_DRAWS = 6000
JITTER = (("hue", 0.07), ("brightness", 1.3), ("saturation", 0.7), ("contrast", 1.2))
VIEW = ViewParameters(
    top=3, left=10, height=40, width=31, jitter=JITTER, grey=True, grey_first=False,
    blur_sigma=1.1, flip=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 55), Image.BICUBIC)


@pytest.fixture(scope="module")
def draws():
    def draw(recipe):
        return [sample_parameters(recipe, random.Random(i), 100, 80) for i in range(NUM_DRAWS)]

    return {name: draw(build_recipe(name)) for name in ("v1", "v2", "v3_first", "v3_second")}


def torchvision_view(image, p, size, monkeypatch):
    """The view by torchvision's own transform classes, made to use the parameters `p`."""
    names = ["brightness", "contrast", "saturation", "hue"]
    factors = dict(p.jitter)
    order = torch.tensor([names.index(name) for name, _ in p.jitter])
    with monkeypatch.context() as patch:
        box = (p.top, p.left, p.height, p.width)
        patch.setattr(transforms.RandomResizedCrop, "get_params", lambda *_: box)
        drawn = (order, *[factors[name] for name in names])
        patch.setattr(transforms.ColorJitter, "get_params", lambda *_: drawn)
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        grey = transforms.RandomGrayscale(p=float(p.grey))
        blur = transforms.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(radius=p.blur_sigma)))
        middle = [grey, jitter] if p.grey_first else [jitter, grey]
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                *middle,
                *([] if p.blur_sigma is None else [blur]),
                transforms.RandomSolarize(128, p=float(p.solarize)),
                transforms.RandomHorizontalFlip(p=float(p.flip)),
            ]
        )(image)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grey": False, "flip": False},
        {"grey": False, "jitter": JITTER[::-1]},
        {"grey_first": True, "blur_sigma": None},
        {"grey_first": True, "blur_sigma": None, "grey": False},
        {"solarize": True},
    ],
)
def test_pixels_are_torchvisions(image, monkeypatch, changes):
    p = dataclasses.replace(VIEW, **changes)
    ours = apply_pil(image, p, 32)
    assert ours.size == (32, 32)
    assert ours.tobytes() == torchvision_view(image, p, 32, monkeypatch).tobytes()
    for other in (
        dataclasses.replace(p, flip=not p.flip),
        dataclasses.replace(p, left=p.left + 1),
        dataclasses.replace(p, jitter=p.jitter[::-1]),
        dataclasses.replace(p, blur_sigma=1.5),
        dataclasses.replace(p, grey=not p.grey),
        dataclasses.replace(p, solarize=not p.solarize),
    ):
        assert apply_pil(image, other, 32).tobytes() != ours.tobytes()


def test_solarising_inverts_values_from_128_on():
    row = np.array([[[0, 127, 128], [200, 255, 64]]], dtype=np.uint8)
    p = ViewParameters(top=0, left=0, height=1, width=2, jitter=(), grey=False, grey_first=False,
                       blur_sigma=None, flip=False, solarize=True)  # fmt: skip
    picture = Image.fromarray(np.repeat(row, 2, axis=0))
    view = apply_pil(picture, dataclasses.replace(p, height=2), 2)
    assert np.asarray(view)[0].tolist() == [[0, 127, 127], [55, 0, 64]]


def test_v3_treats_the_views_unequally():
    first, second = build_view_recipes("v3", size=40, crop_scale=(0.08, 1.0))
    assert (first.name, second.name) == ("v3_first", "v3_second")
    assert (first.size, second.crop_scale) == (40, (0.08, 1.0))
    assert build_view_recipes("v2") == (build_recipe("v2"), build_recipe("v2"))
    with pytest.raises(ConfigError, match="'v3_first' is unknown; allowed: v1, v2, v3$"):
        build_view_recipes("v3_first")


def test_solarising_took_no_draw_from_v1_and_v2():
    """It is drawn last: the parameters of a seed are those from before it came."""
    rng = random.Random(7)
    p = sample_parameters(build_recipe("v2"), rng, 100, 80)
    assert (p.top, p.left, p.height, p.width, p.flip) == (1, 18, 64, 82, True)
    assert not p.solarize


def test_grey_before_jitter_differs_from_grey_after_it(image):
    v2_order = apply_pil(image, VIEW, 32)
    v1_order = apply_pil(image, dataclasses.replace(VIEW, grey_first=True), 32)
    assert v1_order.tobytes() != v2_order.tobytes()
    channels = np.asarray(v2_order)
    assert (channels[..., 0] == channels[..., 1]).all()
    without_grey = dataclasses.replace(VIEW, grey=False)
    assert (
        apply_pil(image, without_grey, 32).tobytes()
        == apply_pil(image, dataclasses.replace(without_grey, grey_first=True), 32).tobytes()
    )


def share(draws, condition):
    return sum(map(condition, draws)) / len(draws)


def test_probabilities(draws):
    v3 = ("v3_first", 0.8, 1.0), ("v3_second", 0.8, 0.1)
    for name, jitter, blur in (("v1", 1.0, 0.0), ("v2", 0.8, 0.5), *v3):
        solarize = 0.2 if name == "v3_second" else 0.0
        assert share(draws[name], lambda p: p.solarize) == pytest.approx(solarize, abs=0.02)
        assert share(draws[name], lambda p: p.jitter != ()) == pytest.approx(jitter, abs=0.02)
        assert share(draws[name], lambda p: p.blur_sigma is not None) == pytest.approx(
            blur, abs=0.025
        )
        assert share(draws[name], lambda p: p.grey) == pytest.approx(0.2, abs=0.02)
        assert share(draws[name], lambda p: p.flip) == pytest.approx(0.5, abs=0.025)
    assert all(p.grey_first for p in draws["v1"]) and not any(p.grey_first for p in draws["v2"])


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov distance to the uniform distribution, at 1e-4 significance."""
    scaled = np.sort((np.asarray(values) - low) / (high - low))
    assert scaled[0] >= 0 and scaled[-1] <= 1
    distance = np.abs(scaled - (np.arange(len(scaled)) + 0.5) / len(scaled)).max()
    assert distance < 2.2 / len(scaled) ** 0.5


def test_factors_are_uniform_in_the_recipes_ranges(draws):
    assert_uniform([p.blur_sigma for p in draws["v2"] if p.blur_sigma is not None], 0.1, 2.0)
    for name, hue in (("v1", 0.4), ("v2", 0.1)):
        factors = collections.defaultdict(list)
        for p in draws[name]:
            for operation, factor in p.jitter:
                factors[operation].append(factor)
        for operation in ("brightness", "contrast", "saturation"):
            assert_uniform(factors[operation], 0.6, 1.4)
        assert_uniform(factors["hue"], -hue, hue)
    with pytest.raises(AssertionError):
        assert_uniform(factors["hue"], -0.4, 0.4)


def test_jitter_order_takes_all_24_values_equally(draws):
    orders = collections.Counter(tuple(o for o, _ in p.jitter) for p in draws["v1"])
    assert len(orders) == 24
    assert max(orders.values()) < 1.35 * NUM_DRAWS / 24
    assert min(orders.values()) > 0.65 * NUM_DRAWS / 24


@pytest.mark.parametrize("size", [(100, 80), (500, 40), (30, 300)])
def test_crops_follow_torchvisions_distribution(size):
    width, height = size
    recipe = build_recipe("v2", crop_scale=(0.08, 1.0))
    ours = []
    for i in range(NUM_DRAWS // 2):
        p = sample_parameters(recipe, random.Random(i), width, height)
        ours.append((p.top, p.left, p.height, p.width))
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    ratio = (3 / 4, 4 / 3)
    theirs = [
        transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], ratio)
        for _ in range(NUM_DRAWS // 4)
    ]
    ours, theirs = np.array(ours), np.array(theirs)
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, :2] >= 0).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all() and (ours[:, 2:] > 0).all()

    def distance(a, b):  # two-sample Kolmogorov-Smirnov
        points = np.unique(np.concatenate([a, b]))
        rank_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
        rank_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
        return np.abs(rank_a - rank_b).max()

    limit = 2.2 * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    for column in range(4):
        assert distance(ours[:, column], theirs[:, column]) < limit
    area = ours[:, 2] * ours[:, 3]
    assert distance(area, theirs[:, 2] * theirs[:, 3]) < limit
    narrower = [
        sample_parameters(build_recipe("v2", crop_scale=(0.2, 1)), random.Random(i), width, height)
        for i in range(NUM_DRAWS // 2)
    ]
    if size == (100, 80):  # the other two always fall back to the central crop
        assert distance(np.array([p.height * p.width for p in narrower]), area) > limit


def test_area_and_log_aspect_ratio_of_a_crop_are_uniform():
    recipe = build_recipe("v2", crop_scale=(0.2, 0.5))  # such crops always fit a square image
    boxes = [sample_parameters(recipe, random.Random(i), 2000, 2000) for i in range(NUM_DRAWS)]
    assert_uniform([p.height * p.width / 2000**2 for p in boxes], 0.1999, 0.5001)
    ratios = np.array([p.width / p.height for p in boxes])
    assert_uniform(np.log(ratios), np.log(0.7485), np.log(1.336))  # rounding to whole pixels
    with pytest.raises(AssertionError):
        assert_uniform(ratios, 0.7485, 1.336)


def test_central_fallback_is_torchvisions():
    for width, height in ((400, 4), (4, 400), (1, 1)):
        recipe = build_recipe("v2", crop_scale=(1, 1))
        p = sample_parameters(recipe, random.Random(0), width, height)
        theirs = transforms.RandomResizedCrop.get_params(
            torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3]
        )
        assert (p.top, p.left, p.height, p.width) == theirs


def test_switching_one_operation_off_changes_no_other():
    full = build_recipe("v2")
    for seed in range(20):
        with_blur = sample_parameters(full, random.Random(seed), 50, 60)
        without = sample_parameters(
            build_recipe("v2", blur_probability=0), random.Random(seed), 50, 60
        )
        assert without == dataclasses.replace(with_blur, blur_sigma=None)


def test_jitter_of_strength_zero_is_left_out():
    recipe = build_recipe("v1", jitter=(0.4, 0, 0.4, 0))
    p = sample_parameters(recipe, random.Random(0), 50, 60)
    assert {operation for operation, _ in p.jitter} == {"brightness", "saturation"}


def test_recipe_values_are_checked():
    cifar = build_recipe("v2", size=32, crop_scale=(0.08, 1), blur_probability=0)
    assert (cifar.size, cifar.crop_scale, cifar.blur_probability) == (32, (0.08, 1), 0)
    assert cifar.jitter == (0.4, 0.4, 0.4, 0.1)
    for name, change in (
        ("v2", {"size": 0}),
        ("v2", {"crop_scale": (0.0, 1.0)}),
        ("v2", {"crop_scale": (0.5, 0.2)}),
        ("v2", {"crop_scale": (0.2, 1.1)}),
        ("v2", {"blur_probability": 1.5}),
        ("v2", {"blur_probability": float("nan")}),
        ("v2", {"blur_sigma": (2.0, 0.1)}),
        ("v1", {"jitter": (0.4, 0.4, 0.4, 0.6)}),
        ("v1", {"jitter": (-0.1, 0.4, 0.4, 0.1)}),
        ("v1", {"flip_probability": -0.1}),
    ):
        with pytest.raises(ConfigError) as caught:
            build_recipe(name, **change)
        (field, value), message = change.popitem(), str(caught.value)
        assert field in message and str(value) in message and "allowed: " in message
    with pytest.raises(ConfigError, match="'v9' is unknown; allowed: v1, v2, v3_first, v3_second$"):
        build_recipe("v9")


def test_eval_view_is_torchvisions(image):
    theirs = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])(image)
    assert eval_pil(image, 32, eval_resize(32)).tobytes() == theirs.tobytes()
    assert eval_pil(image, 32, 38).tobytes() != theirs.tobytes()
    assert (eval_resize(224), eval_resize(32)) == (256, 37)
    square = image.crop((0, 0, 32, 32))
    assert eval_pil(square, 32, 32).tobytes() == square.tobytes()


def normalized_by_torchvision(pixels):
    to_float = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    return torch.stack([to_float(p) for p in pixels])


def all_values():
    """One image that holds each of the 256 values in each channel."""
    return np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)


def test_normalize_is_bitwise_torchvisions():
    pixels = all_values()
    images_BCHW = torch.stack([to_uint8_CHW(Image.fromarray(p)) for p in pixels])
    before = images_BCHW.clone()
    theirs = normalized_by_torchvision(pixels)
    assert torch.equal(normalize(images_BCHW), theirs)
    assert torch.equal(images_BCHW, before)
    reciprocal = normalize(images_BCHW).mul(0) + functional.normalize(
        images_BCHW.float() * (1 / 255), IMAGENET_MEAN, IMAGENET_STD
    )
    assert not torch.equal(reciprocal, theirs)
    with pytest.raises(AssertionError, match="uint8"):
        normalize(images_BCHW.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalize_on_a_gpu_is_bitwise_the_cpus():
    images_BCHW = torch.from_numpy(all_values()).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(normalize(images_BCHW.cuda()).cpu(), normalize(images_BCHW))


def test_uint8_views_are_contiguous(image):
    tensor = to_uint8_CHW(image)
    assert tensor.shape == (3, 55, 70) and tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert tensor[:, 2, 3].tolist() == list(image.getpixel((3, 2)))
