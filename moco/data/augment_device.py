"""The device backend: what follows the crop, batched on the device, with parameters a sample.

Loader workers decode, draw the parameters and crop; here jitter (each sample in its own order),
grey, blur, solarising and flip are computed for a whole batch, on a GPU or on a CPU. Every
operation follows PIL's arithmetic in 8 bits; in float32 its whole numbers are exact.

Shapes: N samples, C channels (3, or DATA.CHANNELS), H = W = side of the view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from moco.data.box_blur import box_weights
from moco.devices import send

if TYPE_CHECKING:
    from moco.data.augment import ViewParameters

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NONE, _CONTRAST, _SATURATION, _HUE = -1, 1, 2, 3  # positions in _OPERATIONS, in a table's columns
_SLOTS = len(_OPERATIONS)
# Columns of a parameter table [N, NUM_COLUMNS], float32.
BOX = slice(0, 4)  # top, left, height, width of the crop
_ORDER = slice(4, 8)  # operation of each slot, or _NONE
_FACTORS = slice(8, 12)
_GREY, _GREY_FIRST, _SIGMA, _FLIP, _SOLARIZE = range(12, 17)  # _SIGMA 0: no blur
NUM_COLUMNS = 17
_LEVELS_PER_SIXTH = 255 / 6  # of PIL's hue: 255 levels a turn, cut off
_WHOLE = 1e-4  # what float32 may lack of a whole number


def table_row(p: ViewParameters) -> list[float]:
    """The parameters of one view as a row of a table."""
    order = [_OPERATIONS.index(operation) for operation, _ in p.jitter]
    factors = [factor for _, factor in p.jitter]
    rest = _SLOTS - len(order)
    return [
        p.top, p.left, p.height, p.width,
        *order, *[_NONE] * rest, *factors, *[0.0] * rest,
        p.grey, p.grey_first, p.blur_sigma or 0.0, p.flip, p.solarize,
    ]  # fmt: skip


def apply_batch(
    crops_NCHW: torch.Tensor, table: torch.Tensor, *, compiled: bool = False
) -> torch.Tensor:
    """The views of cropped and resized images.

    Args:
        crops_NCHW: uint8, on the device that computes.
        table: parameters [N, NUM_COLUMNS], on the CPU, where they are read without waiting for the
            device.
        compiled: fuse the passes over the images with torch.compile.
    Returns: uint8 [N, C, H, W] on the device of the crops; equal inputs give equal views. Of four
        channels the last is no colour: it is blurred and flipped only.
    """
    if crops_NCHW.shape[1] == 4:
        fourth = table.clone()
        fourth[:, _ORDER], fourth[:, _GREY], fourth[:, _SOLARIZE] = _NONE, 0, 0
        parts = (crops_NCHW[:, :3], table), (crops_NCHW[:, 3:], fourth)
        return torch.cat([apply_batch(*part, compiled=compiled) for part in parts], dim=1)
    blend, hue, box = (_function(f, compiled) for f in (_blend, _shift_hue, _box_pass))
    rows = _rows_of(table, crops_NCHW.device)
    on_device = send(table, crops_NCHW.device)
    operations, factors = on_device[:, _ORDER, None, None], on_device[:, _FACTORS, None, None]
    images = crops_NCHW.to(torch.float32)
    _replace(images, rows["grey first"], _three_greys)
    for slot in range(_SLOTS):
        if rows[f"blend {slot}"]:
            images = blend(images, operations[:, slot, None], factors[:, slot, None])
        _replace(images, rows[f"hue {slot}"], hue, factors[:, slot])
    _replace(images, rows["grey"], _three_greys)
    if rows["blur"]:
        weights = send(_half_boxes(table[:, _SIGMA]), crops_NCHW.device)
        _replace(images, rows["blur"], functools.partial(_blur, box=box), weights)
    views = images.to(torch.uint8)
    _replace(views, rows["solarize"], lambda v: torch.minimum(v, 255 - v))
    _replace(views, rows["flip"], lambda v: v.flip(-1))
    return views


class _Rows:
    """Numbers of some samples of the batch, on its device; false where there is none."""

    def __init__(self, index: torch.Tensor):
        self.index = index

    def __bool__(self) -> bool:
        return len(self.index) > 0


def _rows_of(table: torch.Tensor, device: torch.device) -> dict[str, _Rows]:
    """Which samples an operation concerns, found on the CPU and sent in one transfer."""
    grey, first = table[:, _GREY] > 0, table[:, _GREY_FIRST] > 0
    masks = {
        "grey first": grey & first,
        "grey": grey & ~first,
        "blur": table[:, _SIGMA] > 0,
        "solarize": table[:, _SOLARIZE] > 0,
        "flip": table[:, _FLIP] > 0,
    }
    for slot, operation in enumerate(table[:, _ORDER].unbind(1)):
        masks[f"hue {slot}"] = operation == _HUE
        masks[f"blend {slot}"] = (operation != _HUE) & (operation != _NONE)
    found = [mask.nonzero().squeeze(1) for mask in masks.values()]
    sent = send(torch.cat(found), device).split([len(rows) for rows in found])
    return {name: _Rows(rows) for name, rows in zip(masks, sent, strict=True)}


def _replace(images: torch.Tensor, rows: _Rows, function: Callable, *arguments) -> None:
    """Write function(images[rows], *arguments[rows]) to images[rows]."""
    if rows:
        chosen = (tensor.index_select(0, rows.index) for tensor in (images, *arguments))
        images.index_copy_(0, rows.index, function(*chosen))


@functools.cache
def _function(function: Callable, compiled: bool) -> Callable:
    # dynamic: the number of samples an operation concerns differs from batch to batch.
    return torch.compile(function, dynamic=True) if compiled else function


def _grey(images_NCHW: torch.Tensor) -> torch.Tensor:
    """PIL's "L" [N, 1, H, W]; its sums stay below 2^24, so float32 holds them exactly."""
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    red, green, blue = images_NCHW.split(1, dim=1)
    return torch.floor((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536)


def _three_greys(images_NCHW: torch.Tensor) -> torch.Tensor:
    return _grey(images_NCHW).expand_as(images_NCHW)


def _blend(
    images_NCHW: torch.Tensor, operation_N111: torch.Tensor, factor_N111: torch.Tensor
) -> torch.Tensor:
    """base + factor * (image - base), cut off to whole numbers in 0 .. 255.

    The base is black (brightness), the mean grey (contrast) or each pixel's grey (saturation);
    samples whose operation is another one are returned as they are.
    """
    grey = _grey(images_NCHW)
    mean_N111 = torch.floor(grey.mean((2, 3), keepdim=True) + 0.5)
    base = torch.where(operation_N111 == _SATURATION, grey, 0.0)
    base = torch.where(operation_N111 == _CONTRAST, mean_N111, base)
    other = (operation_N111 == _HUE) | (operation_N111 == _NONE)
    factor_N111 = torch.where(other, 1.0, factor_N111)
    return (images_NCHW - base).mul_(factor_N111).add_(base).clamp_(0, 255).floor_()


def _shift_hue(images_NCHW: torch.Tensor, factor_N11: torch.Tensor) -> torch.Tensor:
    """Shift the hue by `factor` turns through PIL's HSV of 8 bits a channel."""
    shift_N11 = torch.trunc(factor_N11 * 255)
    red, green, blue = images_NCHW.unbind(1)
    value, least = images_NCHW.amax(1), images_NCHW.amin(1)
    chroma = value - least
    sixths = torch.where(
        red == value, green - blue, torch.where(green == value, blue - red, red - green)
    ) / chroma.clamp(min=1)
    sixths = sixths + torch.where(red == value, 0.0, torch.where(green == value, 2.0, 4.0))
    hue = torch.floor(torch.remainder(sixths, 6.0) * _LEVELS_PER_SIXTH + _WHOLE)
    hue = torch.remainder(hue + shift_N11, 256.0)
    saturation = torch.floor(chroma / value.clamp(min=1) * 255 + _WHOLE)
    sixths = hue * (6 / 255)
    spread = value * saturation / 255
    channels = []
    for start in (5.0, 3.0, 1.0):  # red, green, blue: how far along the six edges of the hexagon
        edge = torch.remainder(sixths + start, 6.0)
        channels.append(value - spread * torch.minimum(edge, 4.0 - edge).clamp(0, 1))
    return torch.floor(torch.stack(channels, dim=1) + 0.5)


def _half_boxes(sigmas_N: torch.Tensor) -> torch.Tensor:
    """The boxes of PIL's blur [N, R + 2], from the middle outwards, filled up with zeros."""
    boxes = [box_weights(sigma) for sigma in sigmas_N.tolist()]
    halves = [box[len(box) // 2 :] for box in boxes]
    longest = max(map(len, halves))
    return torch.tensor([half + [0.0] * (longest - len(half)) for half in halves])


def _blur(images_NCHW: torch.Tensor, half_NR: torch.Tensor, box: Callable) -> torch.Tensor:
    """Three box blurs along the rows, then three along the columns, each rounded, as in PIL."""
    weights = half_NR[:, :, None, None, None]
    for dim in (3, 2):
        for _ in range(3):
            images_NCHW = box(images_NCHW, weights, dim)
    return images_NCHW


def _box_pass(images_NCHW: torch.Tensor, half_NR111: torch.Tensor, dim: int) -> torch.Tensor:
    reach, length = half_NR111.shape[1] - 1, images_NCHW.shape[dim]
    margins = [reach, reach, 0, 0] if dim == 3 else [0, 0, reach, reach]
    padded = F.pad(images_NCHW, margins, mode="replicate")
    total = images_NCHW * half_NR111[:, 0]
    for step in range(1, reach + 1):
        sides = padded.narrow(dim, reach - step, length) + padded.narrow(dim, reach + step, length)
        total = total + sides * half_NR111[:, step]
    # PIL's fixed-point weights add up to a little less than 1, so that halves are rounded down.
    return torch.floor(total + (0.5 - _WHOLE))


def crop_batch(images_NCHW: torch.Tensor, table: torch.Tensor, size: int) -> torch.Tensor:
    """Crop and resize images of one size: uint8 [N, 3, size, size] on their device.

    PIL's antialiased bilinear resize as two batched matrix products, along the rows and then along
    the columns, rounded after each.

    Args:
        images_NCHW: uint8; table: parameters [N, NUM_COLUMNS], on any device.
    """
    images = images_NCHW.to(torch.float32)
    top, left, height, width = send(table[:, BOX], images.device).unbind(1)
    columns_NSW = _resize_matrices(left, width, images.shape[3], size)
    images = _rounded(images @ columns_NSW.transpose(1, 2)[:, None])
    rows_NSH = _resize_matrices(top, height, images.shape[2], size)
    return _rounded(rows_NSH[:, None] @ images).to(torch.uint8)


def _rounded(images: torch.Tensor) -> torch.Tensor:
    return torch.floor(images + 0.5).clamp_(0, 255)


def _resize_matrices(
    start_N: torch.Tensor, length_N: torch.Tensor, num_pixels: int, size: int
) -> torch.Tensor:
    """Weights [N, size, num_pixels] that resize pixels start .. start + length - 1 to `size`.

    A triangle around each new pixel's centre, as wide as the scale but at least two pixels
    (PIL's Resample.c); pixels outside the crop count for nothing.
    """
    scale = (length_N / size)[:, None, None]
    start, stop = start_N[:, None, None], (start_N + length_N)[:, None, None]
    new = torch.arange(size, device=start_N.device)[:, None] + 0.5
    old = torch.arange(num_pixels, device=start_N.device) + 0.5
    weights = (1 - (old - (start + new * scale)).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((old > start) & (old < stop))
    return weights / weights.sum(2, keepdim=True)
