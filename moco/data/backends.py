"""The augmentation backends (`AUGMENT.BACKEND`): how an image is read and a view of it written.

The draws are the same for all of them (`draw_views`); a backend only computes pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from moco.data.channels import open_planes, read_bgrx, read_grey
from moco.data.decode import read_bgr
from moco.data.images import ImageSource


@dataclass(frozen=True)
class Backend:
    """Functions of one backend; `image` is whatever its `read` returns.

    Attributes:
        read: (source, index) -> image. Raises DataError where it is unreadable.
        size: image -> (width, height).
        crop: (image, parameters, size) -> crop, whatever `finish` takes.
        finish: (crop, parameters, out) writes a view to `out`, uint8 [C, size, size].
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
    _store(apply_pil(image, parameters, out_CHW.shape[-1]), out_CHW)


def _write_eval_pil(image, size: int, resize: int, out_CHW: np.ndarray) -> None:
    _store(eval_pil(image, size, resize), out_CHW)


def _store(view: Image.Image, out_CHW: np.ndarray) -> None:
    out_CHW[:] = np.atleast_3d(np.asarray(view)).transpose(2, 0, 1)


def _finish_planes(planes, parameters: ViewParameters, out_CHW: np.ndarray) -> None:
    """Of `open_planes`: colour or grey, and the fourth, which has the geometry only."""
    _finish_pil(planes[0], parameters, out_CHW[:3])
    for plane in planes[1:]:
        _finish_pil(plane, parameters.geometry(), out_CHW[3:])


def _write_eval_planes(planes, size: int, resize: int, out_CHW: np.ndarray) -> None:
    for first, plane in zip((0, 3), planes, strict=False):
        _write_eval_pil(plane, size, resize, out_CHW[first : first + 3])


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
_READ = {1: read_grey, 4: read_bgrx}  # by DATA.CHANNELS, of the other backends


def choose_backend(name: str, channels: int = 3) -> Backend:
    """The backend `name` for images of 1, 3 or 4 channels (DATA.CHANNELS)."""
    backend = BACKENDS[name]
    if channels == 3:
        return backend
    if name == "pil":
        return replace(
            backend,
            read=lambda source, index: open_planes(source, index, channels),
            size=lambda planes: planes[0].size,
            finish=_finish_planes,
            write_eval=_write_eval_planes,
        )
    return replace(backend, read=_READ[channels])
