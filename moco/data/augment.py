"""Augmentation recipes v1, v2 and v3, the evaluation view, and normalisation.

A view is made in two steps. `sample_parameters` draws everything random about it, from an explicit
generator; `apply_pil` computes its pixels from them, without any randomness. The other backends
(augment_fast, augment_device) replace the second step and agree with it up to rounding
(docs/AUGMENTATION.md).

The recipes are the reference's (facebookresearch/moco, main_moco.py and moco/loader.py):
v1: crop - grey - jitter - flip;  v2: crop - jitter - grey - blur - flip.
v3 (arXiv 2104.02057, appendix A, after BYOL, arXiv 2006.07733) treats the views unequally: crop -
jitter - grey - blur - solarise - flip, always blurred in the first view, seldom in the second,
which alone is solarised now and then.
The operations are torchvision's on PIL images, so the pixels are the reference's too.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from moco.cfgnode import CfgNode
from moco.data.augment_device import apply_batch
from moco.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ASPECT_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_ADJUST = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}


@dataclass(frozen=True)
class Recipe:
    """A distribution over views. Build it with `build_recipe`.

    Attributes:
        size: side of the square view, in pixels.
        crop_scale: range of the crop's share of the image area.
        grey_first: grey comes before the jitter (v1) or after it (v2).
        jitter: strengths of brightness, contrast, saturation and hue.
        blur_sigma: range of the blur's standard deviation, in pixels.
        solarize_probability: of inverting all values from 128 on.
    """

    name: str
    size: int
    crop_scale: tuple[float, float]
    grey_first: bool
    jitter: tuple[float, float, float, float]
    jitter_probability: float
    grey_probability: float
    blur_sigma: tuple[float, float]
    blur_probability: float
    flip_probability: float
    solarize_probability: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        self._require(self.size >= 1, "size", "an integer >= 1")
        self._require(0 < low <= high <= 1, "crop_scale", "0 < low <= high <= 1")
        self._require(
            all(0 <= s < math.inf for s in self.jitter) and self.jitter[3] <= 0.5,
            "jitter",
            "brightness, contrast and saturation >= 0, hue from 0 to 0.5",
        )
        low, high = self.blur_sigma
        self._require(0 <= low <= high < math.inf, "blur_sigma", "0 <= low <= high")
        for field in ("jitter", "grey", "blur", "flip", "solarize"):
            field = f"{field}_probability"
            self._require(0 <= getattr(self, field) <= 1, field, "a number from 0 to 1")

    def _require(self, condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(
                f"augmentation recipe {self.name!r}: {field} is {getattr(self, field)!r}; "
                f"allowed: {allowed}"
            )


_RECIPES = {
    "v1": dict(
        grey_first=True,
        jitter=(0.4, 0.4, 0.4, 0.4),
        jitter_probability=1.0,
        grey_probability=0.2,
        blur_probability=0.0,
    ),
    "v2": dict(
        grey_first=False,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.5,
    ),
    "v3_first": dict(
        grey_first=False,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grey_probability=0.2,
        blur_probability=1.0,
    ),
    "v3_second": dict(
        grey_first=False,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.1,
        solarize_probability=0.2,
    ),
}
# The recipes of the two views.
VIEWS = {"v1": ("v1", "v1"), "v2": ("v2", "v2"), "v3": ("v3_first", "v3_second")}
_SOLARIZE_FROM = 128


def build_recipe(
    name: str,
    *,
    size: int = 224,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    jitter: tuple[float, float, float, float] | None = None,
    jitter_probability: float | None = None,
    grey_probability: float | None = None,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    blur_probability: float | None = None,
    flip_probability: float = 0.5,
) -> Recipe:
    """Recipe of one view, "v1", "v2", "v3_first" or "v3_second"; None keeps its own value.

    The reference's CIFAR demo is v2 with size 32, crop_scale (0.08, 1) and blur_probability 0.

    Raises: ConfigError for an unknown name or a value out of range.
    """
    if name not in _RECIPES:
        raise ConfigError(
            f"augmentation recipe {name!r} is unknown; allowed: {', '.join(_RECIPES)}"
        )
    given = dict(
        jitter=None if jitter is None else tuple(jitter),
        jitter_probability=jitter_probability,
        grey_probability=grey_probability,
        blur_probability=blur_probability,
    )
    return Recipe(
        name=name,
        size=size,
        crop_scale=tuple(crop_scale),
        blur_sigma=tuple(blur_sigma),
        flip_probability=flip_probability,
        **{**_RECIPES[name], **{field: v for field, v in given.items() if v is not None}},
    )


def build_view_recipes(name: str, *, channels: int = 3, **options) -> tuple[Recipe, Recipe]:
    """The recipes of both views of "v1", "v2" or "v3"; `options` as of `build_recipe`.

    Args:
        channels: of the images. Grey ones (1) have no hue, saturation or conversion to grey, so
            these are off; brightness, contrast, blur and solarising stay. All draws stay, too.
    Raises: ConfigError for an unknown name or a value out of range.
    """
    if name not in VIEWS:
        raise ConfigError(f"augmentation recipe {name!r} is unknown; allowed: {', '.join(VIEWS)}")
    first, second = VIEWS[name]
    recipes = build_recipe(first, **options), build_recipe(second, **options)
    if channels == 1:
        return tuple(
            replace(r, jitter=(*r.jitter[:2], 0.0, 0.0), grey_probability=0.0) for r in recipes
        )
    return recipes


@dataclass(frozen=True)
class ViewParameters:
    """Everything random about one view.

    Attributes:
        top, left, height, width: the crop box, in pixels of the image.
        jitter: (operation, factor) pairs in the order they are applied; empty for no jitter.
        grey_first: the recipe's order, see `Recipe`.
        blur_sigma: standard deviation of the blur in pixels of the view, or None.
    """

    top: int
    left: int
    height: int
    width: int
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    grey_first: bool
    blur_sigma: float | None
    flip: bool
    solarize: bool = False

    def geometry(self) -> ViewParameters:
        """Crop, blur and flip alone: of a fourth channel, which is no colour."""
        return replace(self, jitter=(), grey=False, solarize=False)


def sample_parameters(
    recipe: Recipe, rng: random.Random, width: int, height: int
) -> ViewParameters:
    """Draw one view of an image of `width` x `height` pixels.

    Every value is drawn whether or not it is used, and the crop, whose number of draws varies,
    comes after the others. So switching one of them off changes nothing about the rest. (Solarising
    was added after the crop, which left the draws of v1 and v2 as they were.)
    """
    jitter = _sample_jitter(recipe, rng)
    use_jitter = rng.random() < recipe.jitter_probability
    grey = rng.random() < recipe.grey_probability
    sigma = rng.uniform(*recipe.blur_sigma)
    use_blur = rng.random() < recipe.blur_probability
    flip = rng.random() < recipe.flip_probability
    top, left, crop_height, crop_width = _sample_crop(recipe.crop_scale, rng, width, height)
    return ViewParameters(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        jitter=jitter if use_jitter else (),
        grey=grey,
        grey_first=recipe.grey_first,
        blur_sigma=sigma if use_blur else None,
        flip=flip,
        solarize=rng.random() < recipe.solarize_probability,
    )


def _sample_jitter(recipe: Recipe, rng: random.Random) -> tuple[tuple[str, float], ...]:
    """torchvision's ColorJitter: a factor each, in random order; strength 0 leaves one out."""
    pairs = []
    for operation, strength in zip(_ADJUST, recipe.jitter, strict=True):
        if operation == "hue":
            factor = rng.uniform(-strength, strength)
        else:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        pairs.append((operation, factor, strength))
    rng.shuffle(pairs)
    return tuple((operation, factor) for operation, factor, strength in pairs if strength > 0)


def _sample_crop(
    scale: tuple[float, float], rng: random.Random, width: int, height: int
) -> tuple[int, int, int, int]:
    """Crop box (top, left, height, width) by torchvision's RandomResizedCrop: area and log aspect
    ratio uniform, ten tries to fit, then the largest central crop of an allowed ratio."""
    log_ratio = (math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1]))
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.randint(0, height - crop_height)
            left = rng.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    crop_width, crop_height = width, height
    if width / height < _ASPECT_RATIO[0]:
        crop_height = round(width / _ASPECT_RATIO[0])
    elif width / height > _ASPECT_RATIO[1]:
        crop_width = round(height * _ASPECT_RATIO[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def apply_pil(image: Image.Image, parameters: ViewParameters, size: int) -> Image.Image:
    """The `size` x `size` view of an RGB or grey image that `parameters` describes."""
    p = parameters
    image = functional.resized_crop(
        image, p.top, p.left, p.height, p.width, [size, size], InterpolationMode.BILINEAR
    )
    if p.grey and p.grey_first:
        image = functional.to_grayscale(image, 3)
    for operation, factor in p.jitter:
        image = _ADJUST[operation](image, factor)
    if p.grey and not p.grey_first:
        image = functional.to_grayscale(image, 3)
    if p.blur_sigma is not None:
        # PIL calls the standard deviation "radius".
        image = image.filter(ImageFilter.GaussianBlur(radius=p.blur_sigma))
    if p.solarize:
        image = functional.solarize(image, _SOLARIZE_FROM)
    return functional.hflip(image) if p.flip else image


def eval_resize(size: int) -> int:
    """Shorter side before the central crop: 256 for 224 (main_lincls.py), and in proportion."""
    return round(size * 256 / 224)


def eval_pil(image: Image.Image, size: int, resize: int) -> Image.Image:
    """The view "eval": shorter side to `resize` (bilinear), then the central `size` x `size`."""
    image = functional.resize(image, resize, InterpolationMode.BILINEAR)
    return functional.center_crop(image, [size, size])


def to_uint8_CHW(image: Image.Image) -> torch.Tensor:
    """An RGB or grey image as a contiguous uint8 tensor [C, H, W]."""
    return functional.pil_to_tensor(image).contiguous()


def normalize(
    images_BCHW: torch.Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> torch.Tensor:
    """(x / 255 - mean) / std as float32, on the device of the images.

    Bitwise what torchvision's ToTensor and Normalize give. `images_BCHW` is uint8 [B, C, H, W],
    with C means and stds.
    """
    assert images_BCHW.dtype == torch.uint8, f"uint8 images are needed, got {images_BCHW.dtype}"
    device = images_BCHW.device
    # Divided by a tensor: on a GPU, torch turns division by a number into multiplication by its
    # reciprocal, which rounds differently.
    images_BCHW = images_BCHW.to(torch.float32).div_(_constant((255.0,), device))
    return images_BCHW.sub_(_constant(tuple(mean), device)).div_(_constant(tuple(std), device))


def to_inputs(
    batch: Sequence[torch.Tensor], cfg: CfgNode, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A loader's batch as a network's inputs: the device's part of the augmentation, normalised.

    A pure function of the batch, which is left as it is.

    Args:
        batch: (view_q, view_k, index), or (crop_q, crop_k, index, table_q, table_k) of the backend
            "device"; images uint8 [B, C, H, W].
    Returns: (view_q, view_k, index) on `device`: float32 [B, C, H, W] twice, in the memory format
        of TRAIN.CHANNELS_LAST, and int64 [B].
    """
    view_q, view_k, index, *tables = batch
    view_q, view_k, index = (
        tensor.to(device, non_blocking=True) for tensor in (view_q, view_k, index)
    )
    if tables:
        # Both at once: on small images a GPU spends more time on starting than on computing.
        compiled = device.type == "cuda" and cfg.TRAIN.COMPILE == "torch"
        both = apply_batch(torch.cat([view_q, view_k]), torch.cat(tables), compiled=compiled)
        view_q, view_k = both.chunk(2)
    inputs = [normalize(view, cfg.DATA.MEAN, cfg.DATA.STD) for view in (view_q, view_k)]
    if cfg.TRAIN.CHANNELS_LAST:
        inputs = [view.to(memory_format=torch.channels_last) for view in inputs]
    return *inputs, index


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Cached because creating it on a GPU waits for all work queued there.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
