"""Recipe v2 as others compute it: what `tools/benchmark.py data` compares this project with.

Each function returns image file -> two views, which a process with one thread calls again and
again. All of them draw their own parameters.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import cv2
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import v2

from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD
from moco.data.decode import decode_plain_jpeg

TwoViewsOf = Callable[[bytes], list[torch.Tensor]]
_SCALE, _JITTER, _SIGMA = (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), (0.1, 2.0)


class _PilBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*_SIGMA)))


def reference(size: int) -> TwoViewsOf:
    """torchvision's transforms on PIL images, as the reference's main_moco.py composes them."""
    return _of_pil(
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=_SCALE),
                transforms.RandomApply([transforms.ColorJitter(*_JITTER)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([_PilBlur()], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    )


def torchvision_v2(size: int) -> TwoViewsOf:
    """torchvision's second transforms on uint8 tensors, decoded by the fastest decoder here."""
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=_SCALE, antialias=True),
            v2.RandomApply([v2.ColorJitter(*_JITTER)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, _SIGMA)], p=0.5),  # 13: three sigmas to each side
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def two_views(file: bytes) -> list[torch.Tensor]:
        image_HWC = decode_plain_jpeg(file)
        if image_HWC is None:
            image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(file)).convert("RGB"))
        else:
            image = torch.from_numpy(cv2.cvtColor(image_HWC, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
        return [augment(image), augment(image)]

    return two_views


def lightly(size: int) -> TwoViewsOf | None:
    """The package lightly's transform of MoCo v2; None where it cannot be imported."""
    try:
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        return None
    both = MoCoV2Transform(input_size=size)
    return lambda file: both(Image.open(io.BytesIO(file)).convert("RGB"))


def _of_pil(augment: Callable) -> TwoViewsOf:
    def two_views(file: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        return [augment(image), augment(image)]

    return two_views
