"""The augmentation backends (`AUGMENT.BACKEND`): how an image is read and a view of it written.

The draws are the same for all of them (`draw_views`); a backend only computes pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from moco import seeding
from moco.data.augment import (
    Recipe,
    ViewParameters,
    apply_pil,
    eval_pil,
    sample_parameters,
)
from moco.data.augment_fast import crop, eval_fast, finish, store
from moco.data.decode import read_bgr
from moco.data.images import ImageSource


@dataclass(frozen=True)
class Backend:
    """Functions of one backend; `image` is whatever its `read` returns.

    Attributes:
        read: (source, index) -> image. Raises DataError where it is unreadable.
        size: image -> (width, height).
        crop: (image, parameters, size) -> crop, whatever `finish` takes.
        finish: (crop, parameters, out) writes a view to `out`, uint8 [3, size, size].
        write_eval: (image, size, resize, out) writes the view "eval" to it.
        on_device: `finish` writes the resized crop; the rest is left to `apply_batch`.
    """

    read: Callable[[ImageSource, int], Any]
    size: Callable[[Any], tuple[int, int]]
    crop: Callable[[Any, ViewParameters, int], Any]
    finish: Callable[[Any, ViewParameters, np.ndarray], None]
    write_eval: Callable[[Any, int, int, np.ndarray], None]
    on_device: bool = False


def draw_views(
    recipes: tuple[Recipe, ...], seed: int, epoch: int, index: int, width: int, height: int
) -> list[ViewParameters]:
    """The views of an image in an epoch: functions of (seed, epoch, index, view) and its size."""
    return [
        sample_parameters(
            recipe, seeding.python_random(seed, "augment", epoch, index, view), width, height
        )
        for view, recipe in enumerate(recipes)
    ]


def _finish_pil(image, parameters: ViewParameters, out_CHW: np.ndarray) -> None:
    _store_rgb(apply_pil(image, parameters, out_CHW.shape[-1]), out_CHW)


def _write_eval_pil(image, size: int, resize: int, out_CHW: np.ndarray) -> None:
    _store_rgb(eval_pil(image, size, resize), out_CHW)


def _store_rgb(view: Image.Image, out_CHW: np.ndarray) -> None:
    out_CHW[:] = np.asarray(view).transpose(2, 0, 1)


def _array_size(image_HWC: np.ndarray) -> tuple[int, int]:
    height, width = image_HWC.shape[:2]
    return width, height


BACKENDS = {
    "pil": Backend(
        read=lambda source, index: source.open(index),
        size=lambda image: image.size,
        crop=lambda image, parameters, size: image,
        finish=_finish_pil,
        write_eval=_write_eval_pil,
    ),
    "opencv": Backend(read_bgr, _array_size, crop, finish, eval_fast),
    "device": Backend(
        read_bgr,
        _array_size,
        crop,
        finish=lambda view, parameters, out_CHW: store(view, out_CHW),
        write_eval=eval_fast,
        on_device=True,
    ),
}
