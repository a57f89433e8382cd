"""How far a backend's views are from PIL's, operation by operation, in levels of 0 .. 255."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from moco.data.augment import (
    Recipe,
    ViewParameters,
    build_recipe,
    eval_resize,
    sample_parameters,
)
from moco.data.augment_device import apply_batch, table_row
from moco.data.backends import BACKENDS

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
SIGMAS = tuple(round(0.1 + 0.19 * step, 2) for step in range(11))  # 0.1 .. 2
WHOLE = ViewParameters(
    top=0, left=0, height=1, width=1, jitter=(), grey=False, grey_first=False, blur_sigma=None,
    flip=False,
)  # fmt: skip
Parameters = Callable[[random.Random, int, int], ViewParameters]  # of an image's width and height


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of the absolute differences of all values: mean, 99.9th percentile and maximum."""

    mean: float
    p999: float
    largest: int

    @classmethod
    def of(cls, views: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Distance:
        pairs = zip(views, others, strict=True)
        gaps = np.concatenate([np.abs(a.astype(np.int16) - b).ravel() for a, b in pairs])
        return cls(float(gaps.mean()), float(np.percentile(gaps, 99.9)), int(gaps.max()))

    def within(self, bound: tuple[float, float, int]) -> bool:
        return self.mean <= bound[0] and self.p999 <= bound[1] and self.largest <= bound[2]


def given_to(backend: str, image: np.ndarray) -> Image.Image | np.ndarray:
    """A picture in RGB as the backend's `read` would give it."""
    return Image.fromarray(image) if backend == "pil" else image[..., ::-1].copy()


def view_of(backend: str, image: np.ndarray, p: ViewParameters, size: int) -> np.ndarray:
    """The view of uint8 RGB [H, W, 3] as a backend makes it, uint8 [3, size, size]."""
    out = np.empty((3, size, size), np.uint8)
    crop = BACKENDS[backend].crop(given_to(backend, image), p, size)
    BACKENDS[backend].finish(crop, p, out)
    if BACKENDS[backend].on_device:
        table = torch.tensor([table_row(p)], dtype=torch.float32)
        return apply_batch(torch.from_numpy(out)[None], table)[0].numpy()
    return out


def eval_view_of(backend: str, image: np.ndarray, size: int) -> np.ndarray:
    out = np.empty((3, size, size), np.uint8)
    BACKENDS[backend].write_eval(given_to(backend, image), size, eval_resize(size), out)
    return out


def operations() -> Iterator[tuple[str, Parameters]]:
    """(name, parameters) of one operation on a whole picture that already has the view's size."""

    def alone(**changes) -> Parameters:
        def parameters(rng: random.Random, width: int, height: int) -> ViewParameters:
            drawn = {name: v(rng) if callable(v) else v for name, v in changes.items()}
            return dataclasses.replace(WHOLE, width=width, height=height, **drawn)

        return parameters

    for operation in OPERATIONS[:3]:
        yield operation, alone(jitter=lambda rng, o=operation: ((o, rng.uniform(0.6, 1.4)),))
    for most in (0.1, 0.4):
        yield (
            f"hue up to {most}",
            alone(jitter=lambda rng, most=most: (("hue", rng.uniform(-most, most)),)),
        )
    for order in itertools.permutations(OPERATIONS):
        name = "jitter " + "".join(operation[0] for operation in order)
        yield name, alone(jitter=lambda rng, order=order: tuple((o, factor(rng, o)) for o in order))
    yield "grey", alone(grey=True)
    yield "grey before jitter", alone(grey=True, grey_first=True, jitter=_any_order)
    for sigma in SIGMAS:
        yield f"blur {sigma}", alone(blur_sigma=sigma)
    yield "blur, grey", alone(blur_sigma=lambda rng: rng.uniform(0.1, 2.0), grey=True)
    yield "flip", alone(flip=True)
    yield "solarize", alone(solarize=True)


def factor(rng: random.Random, operation: str) -> float:
    return rng.uniform(-0.1, 0.1) if operation == "hue" else rng.uniform(0.6, 1.4)


def _any_order(rng: random.Random) -> tuple[tuple[str, float], ...]:
    order = rng.sample(OPERATIONS, 4)
    return tuple((operation, factor(rng, operation)) for operation in order)


def recipes(size: int) -> Iterator[tuple[str, Parameters]]:
    """(name, parameters) of crops and of whole recipes on pictures of any size."""

    def drawn(recipe: Recipe, **changes) -> Parameters:
        return lambda rng, width, height: dataclasses.replace(
            sample_parameters(recipe, rng, width, height), **changes
        )

    crop = dict(jitter=(), grey=False, blur_sigma=None, flip=False, solarize=False)
    for scale in ((0.2, 1.0), (0.05, 0.1)):
        recipe = build_recipe("v2", size=size, crop_scale=scale)
        yield f"crop, scale {scale[0]:g} to {scale[1]:g}", drawn(recipe, **crop)
    for name in ("v1", "v2", "v3_first", "v3_second"):
        yield f"recipe {name}", drawn(build_recipe(name, size=size))


def distance(
    backend: str, images: Sequence[np.ndarray], parameters: Parameters, size: int
) -> Distance:
    """Between a backend and PIL, both given the same parameters, drawn anew for each image."""
    ours, pils = [], []
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        p = parameters(random.Random(number), width, height)
        ours.append(view_of(backend, image, p, size))
        pils.append(view_of("pil", image, p, size))
    return Distance.of(ours, pils)


def eval_distance(backend: str, images: Sequence[np.ndarray], size: int) -> Distance:
    views = zip(*[[eval_view_of(b, image, size) for b in (backend, "pil")] for image in images],
                strict=True)  # fmt: skip
    return Distance.of(*views)
