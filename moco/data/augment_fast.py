"""The CPU backend: the views of `apply_pil`, several times faster, by OpenCV and torch.

Every operation follows PIL's arithmetic in 8 bits, rounding between the steps as PIL does, so the
views differ from PIL's by rounding (docs/AUGMENTATION.md has the distances). Images are uint8
arrays [H, W, 3] in BGR, OpenCV's order; from a conversion to grey on they are [H, W], which saves
two thirds of the rest.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from moco.data.augment import ViewParameters
from moco.data.box_blur import box_weights

# Loader workers are the parallelism; and a pool of threads would not survive their fork.
cv2.setNumThreads(0)

# PIL cuts off what a blend leaves behind the point, OpenCV rounds to the nearest.
_TRUNCATE = -0.5 + 1e-4
# Hue as PIL stores it: 255 levels a turn, cut off. The factor keeps whole levels whole.
_DEGREES_TO_LEVELS = 255 / 360 * (1 + 1e-6)
_SHARE_TO_LEVELS = 255 * (1 + 1e-6)
_GREY_WEIGHTS = (7471 / 65536, 38470 / 65536, 19595 / 65536)  # PIL's "L", of B, G, R


def crop(image_HWC: np.ndarray, p: ViewParameters, size: int) -> np.ndarray:
    """The crop box of a writable image [H, W, C], resized to [size, size, C], or [size, size] where
    C is 1."""
    box_HWC = image_HWC[p.top : p.top + p.height, p.left : p.left + p.width]
    view = _resize(box_HWC, size, size)
    return view[..., 0] if view.shape[2] == 1 else view


def finish(view: np.ndarray, p: ViewParameters, out_CHW: np.ndarray) -> None:
    """All that follows the crop; the view is written to `out_CHW`, see `store`.

    Of four channels the last is no colour: it is blurred and flipped only.
    """
    if view.ndim == 3 and view.shape[2] == 4:
        finish(np.ascontiguousarray(view[..., 3]), p.geometry(), out_CHW[3:])
        view, out_CHW = np.ascontiguousarray(view[..., :3]), out_CHW[:3]
    if p.grey and p.grey_first:
        view = to_grey(view)
    for operation, factor in p.jitter:
        view = _ADJUST[operation](view, factor)
    if p.grey and not p.grey_first:
        view = to_grey(view)
    if p.blur_sigma is not None:
        view = blur(view, p.blur_sigma)
    if p.solarize:
        view = cv2.min(view, cv2.bitwise_not(view))
    store(cv2.flip(view, 1) if p.flip else view, out_CHW)


def eval_fast(image_HWC: np.ndarray, size: int, resize: int, out_CHW: np.ndarray) -> None:
    """The view "eval" of `eval_pil`, written to `out_CHW`."""
    height, width = image_HWC.shape[:2]
    long_side = int(resize * max(height, width) / min(height, width))
    height, width = (long_side, resize) if width <= height else (resize, long_side)
    view = _resize(image_HWC, height, width)
    # torchvision's center_crop
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    view = np.ascontiguousarray(view[top : top + size, left : left + size])
    store(view[..., 0] if view.shape[2] == 1 else view, out_CHW)


def store(view: np.ndarray, out_CHW: np.ndarray) -> None:
    """Write a view [H, W, 3] in BGR, or a grey one [H, W], as planes in RGB, uint8 [3, H, W].

    Planes of one or four channels are [1, H, W] of a grey view, and RGB before the fourth.
    """
    if view.ndim == 2:
        out_CHW[:] = view
    else:
        cv2.split(view, [*out_CHW[2::-1], *out_CHW[3:]])


def _resize(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    # torch's antialiased resampling of uint8 is PIL's: a triangle as wide as the scale, fixed-point
    # weights, rounding between the two directions. OpenCV's INTER_AREA and INTER_LINEAR are not.
    # Made a batch by torch, not by numpy, its strides are those of channels_last, and so are the
    # result's.
    image_NCHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
    image_NCHW = F.interpolate(image_NCHW, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(image_NCHW.permute(0, 2, 3, 1)[0].numpy())


def to_grey(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_BGR2GRAY)


def _blend_with(view: np.ndarray, factor: float, value: float) -> np.ndarray:
    """value + factor * (view - value), cut off to whole numbers in 0 .. 255."""
    offset = (1 - factor) * value
    if offset >= 0:  # faster, but loses the sign of what is below -0.5
        return cv2.convertScaleAbs(view, alpha=factor, beta=offset + _TRUNCATE)
    return cv2.addWeighted(view, factor, view, 0.0, offset + _TRUNCATE)


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with(view, factor, 0)


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    means = cv2.mean(view)
    mean = means[0]
    if view.ndim == 3:
        mean = sum(m * weight for m, weight in zip(means[:3], _GREY_WEIGHTS, strict=True))
    return _blend_with(view, factor, int(mean + 0.5))


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    if view.ndim == 2:  # grey: nothing to change, as in PIL
        return view
    grey = cv2.cvtColor(to_grey(view), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(view, factor, grey, 1 - factor, _TRUNCATE)


def adjust_hue(view: np.ndarray, factor: float) -> np.ndarray:
    """Shift the hue by `factor` turns, through PIL's HSV of 8 bits a channel.

    OpenCV's own conversion to 8 bits rounds, and has 256 levels a turn, where PIL cuts off and has
    255, which moves 4 % of the values by more than one level. So it converts in float, and the 8
    bits are PIL's. Its way back has 255 levels too.
    """
    if view.ndim == 2:
        return view
    height, width = view.shape[:2]
    # With channels of 0 .. 255 hue and saturation are the same, and V is 0 .. 255.
    hsv = cv2.cvtColor(view.astype(np.float32), cv2.COLOR_BGR2HSV).reshape(-1)
    hsv *= _hsv_levels(height * width)
    levels = hsv.astype(np.uint8).reshape(height, -1)
    levels += _hue_row(width, int(factor * 255) % 256)  # wraps around at 256
    return cv2.cvtColor(levels.reshape(view.shape), cv2.COLOR_HSV2BGR_FULL)


# numpy is slow where it broadcasts over an axis of 3, so what it would repeat is kept.
@functools.lru_cache(maxsize=4)
def _hsv_levels(num_pixels: int) -> np.ndarray:
    """Factors from OpenCV's HSV to 8 bits, float32 [3 * num_pixels]."""
    return np.tile(np.array([_DEGREES_TO_LEVELS, _SHARE_TO_LEVELS, 1], np.float32), num_pixels)


@functools.lru_cache(maxsize=256)
def _hue_row(width: int, shift: int) -> np.ndarray:
    """Summands of a row of HSV pixels, uint8 [3 * width]."""
    return np.tile(np.array([shift, 0, 0], np.uint8), width)


_ADJUST = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """PIL's GaussianBlur: three box blurs, which also sets what happens at the border."""
    weights = _in_256ths(box_weights(sigma))
    if len(weights) == 1:
        return view
    kernel = np.array(weights, np.float32)
    for _ in range(3):
        view = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return view


def _in_256ths(weights: list[float]) -> list[float]:
    """In the steps of OpenCV's 8-bit filters, which must add up to 1; without ends of 0."""
    steps = [round(weight * 256) for weight in weights]
    if not steps[0]:
        steps = steps[1:-1]
    steps[len(steps) // 2] += 256 - sum(steps)
    return [step / 256 for step in steps]
