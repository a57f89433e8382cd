"""RoIAlign for CPUs: channels-last, by all threads, in the type of its features.

torchvision's (ops/cpu/roi_align_kernel.cpp) runs on one thread, channels first and in float32: a
detector that is channels-last in bfloat16 pays for two copies besides.
"""

from __future__ import annotations

import ctypes

import torch
from torch.autograd.function import once_differentiable

from moco.kernels.compiler import TYPES, kernel


class _RoiAlign(ctypes.Structure):
    """`RoiAlign` of roi_align.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("regions", "side", "sampling", "aligned", "threads")),
        ("scale", ctypes.c_double),
        ("rois", ctypes.c_void_p),
    ]


_POINTER = ctypes.POINTER(_RoiAlign)


def roi_align(
    features_BCHW: torch.Tensor,
    rois_R5: torch.Tensor,
    *,
    side: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """torchvision.ops.roi_align, [R, C, side, side], channels-last, with sums in float32.

    Args:
        features_BCHW: float32 or bfloat16 on a CPU.
        rois_R5: rows of (image, x0, y0, x1, y1), in pixels of an image; no gradient flows to them.
        scale: pixels of the features in one of an image.
        sampling_ratio: samples of a bin along each axis; 0: as many as pixels, rounded up.
    Raises: ValueError for another type, or a row whose image does not exist.
    """
    if features_BCHW.dtype not in TYPES or features_BCHW.device.type != "cpu":
        raise ValueError(
            f"compiled RoIAlign takes {', '.join(TYPES.values())} on a CPU, got "
            f"{features_BCHW.dtype} on {features_BCHW.device}"
        )
    rois_R5 = rois_R5.detach().float().contiguous()
    images = rois_R5[:, 0]
    if len(images) and not bool(((images >= 0) & (images < len(features_BCHW))).all()):
        raise ValueError(
            f"RoIAlign: a region is of an image that is not among {len(features_BCHW)}"
        )
    options = side, sampling_ratio, aligned, scale
    return _Align.apply(features_BCHW, rois_R5, options)


def _describe(shape, rois_R5: torch.Tensor, options) -> _RoiAlign:
    side, sampling_ratio, aligned, scale = options
    return _RoiAlign(
        *shape, len(rois_R5), side, sampling_ratio, aligned, torch.get_num_threads(), scale,
        rois_R5.data_ptr(),
    )  # fmt: skip


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, rois, options):
        ctx.shape, ctx.options = features.shape, options
        ctx.save_for_backward(rois)
        features = features.contiguous(memory_format=torch.channels_last)
        side = options[0]
        out = torch.empty(
            (len(rois), features.shape[1], side, side),
            dtype=features.dtype, memory_format=torch.channels_last,
        )  # fmt: skip
        function = kernel("roi_align", f"roi_align_{TYPES[features.dtype]}", 2, _POINTER)
        function(_describe(features.shape, rois, options), features.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (rois,) = ctx.saved_tensors
        dout = dout.contiguous(memory_format=torch.channels_last)
        dfeatures = torch.empty(ctx.shape, dtype=dout.dtype, memory_format=torch.channels_last)
        name = f"roi_align_backward_{TYPES[dout.dtype]}"
        function = kernel("roi_align", name, 2, _POINTER)
        function(_describe(ctx.shape, rois, ctx.options), dout.data_ptr(), dfeatures.data_ptr())
        return dfeatures, None, None
