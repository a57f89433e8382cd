"""The mask head of Mask R-CNN: per region a small mask of every class, its loss, and the way back
to masks of the whole image (detectron2/modeling/roi_heads/mask_head.py, structures/masks.py,
layers/mask_ops.py).

Shapes: R regions over all images, K classes, masks of M x M pixels (14 x 14 on a C4 detector).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from detection.data.masks import Masks, encode_rle, rasterize_polygons
from moco.cfgnode import CfgNode
from moco.devices import send
from moco.errors import ConfigError

THRESHOLD = 0.5  # a pixel at or above it belongs to the object
_PASTED_BYTES = 64 << 20  # masks of whole images that are read from the device at once
_MIN_SIDE = 0.1  # pixels; keeps the scale of polygons in a thin box finite


class MaskHead(nn.Sequential):
    """Convolutions `mask_fcn1` ..., a transposed one that doubles the side, a 1x1 predictor.

    Names and random draws are those of Detectron2's MaskRCNNConvUpsampleHead.

    Args:
        width: output channels of every layer but the predictor.
        num_convs: 3x3 convolutions before the transposed one; a C4 detector has none.
        num_masks: masks of a region: one a class, or 1 if the head is class-agnostic.
    """

    def __init__(self, in_channels: int, *, width: int, num_convs: int, num_masks: int):
        super().__init__()
        for number in range(1, num_convs + 1):
            conv = nn.Conv2d(in_channels, width, 3, padding=1)
            self.add_module(f"mask_fcn{number}", conv)
            self.add_module(f"mask_fcn{number}_relu", nn.ReLU())
            in_channels = width
        self.deconv = nn.ConvTranspose2d(in_channels, width, 2, stride=2)
        self.deconv_relu = nn.ReLU()
        self.predictor = nn.Conv2d(width, num_masks, 1)
        # All layers are first initialised by torch, then in order by MSRA, the predictor last.
        for layer in self.children():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer is not self.predictor:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, regions_RCHW: torch.Tensor) -> torch.Tensor:
        """Mask logits [R, K, M, M] (class-agnostic: [R, 1, M, M]) in float32, M = 2 H."""
        return super().forward(regions_RCHW).float()

    def probabilities(self, regions_RCHW: torch.Tensor, classes_R: torch.Tensor) -> torch.Tensor:
        """[R, M, M]: how likely each pixel belongs to the object of the region's class."""
        return _of_class(self(regions_RCHW), classes_R).sigmoid()


def _of_class(logits_RKMM: torch.Tensor, classes_R: torch.Tensor) -> torch.Tensor:
    if logits_RKMM.shape[1] == 1:
        return logits_RKMM[:, 0]
    return logits_RKMM[torch.arange(len(classes_R), device=classes_R.device), classes_R]


def mask_loss(
    logits_RKMM: torch.Tensor, classes_R: torch.Tensor, targets_RMM: torch.Tensor
) -> torch.Tensor:
    """Mean binary cross-entropy over the pixels of each region's own class.

    Args: the foreground regions' logits, classes and bool targets.
    Returns: a scalar; 0 with a gradient path if there is no foreground.
    """
    if len(classes_R) == 0:
        return logits_RKMM.sum() * 0
    logits_RMM = _of_class(logits_RKMM, classes_R)
    return F.binary_cross_entropy_with_logits(logits_RMM, targets_RMM.float())


def crop_masks(
    masks: Masks, index_R: torch.Tensor, boxes_R4: torch.Tensor, side: int
) -> torch.Tensor:
    """What the head should predict: the part of a mask inside a box, as side x side pixels.

    Args:
        masks: of one image's objects.
        index_R: which of the masks each box is trained towards.
    Returns: bool [R, side, side] on the device of the boxes.
    """
    device = boxes_R4.device
    if len(index_R) == 0:
        return torch.zeros(0, side, side, dtype=torch.bool, device=device)
    rois = torch.cat([index_R[:, None].to(boxes_R4.dtype), boxes_R4], dim=1)
    if isinstance(masks, torch.Tensor):
        soft = send(masks[:, None], device).float()
        return roi_align(soft, rois, side, 1.0, 0, aligned=True)[:, 0] >= THRESHOLD
    crops = [
        torch.from_numpy(_crop_polygons(masks[int(roi[0])], roi[1:], side))
        for roi in rois.cpu().numpy()  # polygons are drawn on the CPU; one wait for both
    ]
    # Stacked by torch into rows: numpy would keep COCO's order of columns, and a sum over pixels
    # in another order differs in its last bit.
    return send(torch.stack(crops), device)


def _crop_polygons(polygons: list[np.ndarray], box: np.ndarray, side: int) -> np.ndarray:
    width, height = box[2] - box[0], box[3] - box[1]
    scale_x, scale_y = side / max(width, _MIN_SIDE), side / max(height, _MIN_SIDE)
    cropped = []
    for polygon in polygons:
        corners = polygon.reshape(-1, 2) - box[:2]
        cropped.append((corners * np.stack([scale_x, scale_y])).reshape(-1))
    return rasterize_polygons(cropped, side, side)


def paste_mask(
    probabilities_MM: torch.Tensor,
    box: torch.Tensor,
    height: int,
    width: int,
    threshold: float = THRESHOLD,
    corners: list[float] | None = None,
) -> torch.Tensor:
    """Stretch one mask over its box [4] in an image: bool [height, width].

    Pixels are sampled at their centres, bilinearly, with nothing beyond the mask.

    Args:
        corners: the box as numbers, where they were read already.
    """
    x0, y0, x1, y1 = box
    left, top, right, bottom = box.tolist() if corners is None else corners
    # Only the part around the box is sampled; all else stays false.
    left, top = max(math.floor(left) - 1, 0), max(math.floor(top) - 1, 0)
    right, bottom = min(math.ceil(right) + 1, width), min(math.ceil(bottom) + 1, height)
    xs = torch.arange(left, right, device=box.device, dtype=torch.float32) + 0.5
    ys = torch.arange(top, bottom, device=box.device, dtype=torch.float32) + 0.5
    xs, ys = (xs - x0) / (x1 - x0) * 2 - 1, (ys - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], dim=2)
    sampled = F.grid_sample(probabilities_MM[None, None], grid[None], align_corners=False)[0, 0]
    mask = torch.zeros(height, width, dtype=torch.bool, device=box.device)
    mask[top:bottom, left:right] = sampled >= threshold
    return mask


def encode_masks(
    probabilities_NMM: torch.Tensor, boxes_N4: torch.Tensor, height: int, width: int
) -> list[dict]:
    """The masks of one image's detections as COCO RLE: {"size": [height, width], "counts": bytes}.

    Args:
        boxes_N4: in pixels of the wanted image.
    """
    # Some at a time: 100 masks of a large photograph are more than a gigabyte.
    encoded, together = [], max(1, _PASTED_BYTES // (height * width))
    corners = boxes_N4.tolist()
    for first in range(0, len(corners), together):
        rows = range(first, min(first + together, len(corners)))
        pasted = [
            paste_mask(probabilities_NMM[n], boxes_N4[n], height, width, corners=corners[n])
            for n in rows
        ]
        encoded += encode_rle(torch.stack(pasted).cpu().numpy())
    return encoded


def build_mask_head(cfg: CfgNode, in_channels: int) -> MaskHead | None:
    """The head of `MODEL.ROI_MASK_HEAD`, or None where `MODEL.MASK_ON` is False.

    Raises: ConfigError for a head or norm that is not implemented.
    """
    if not cfg.MODEL.MASK_ON:
        return None
    options = cfg.MODEL.ROI_MASK_HEAD
    for key, allowed in (("NAME", "MaskRCNNConvUpsampleHead"), ("NORM", "")):
        if options[key] != allowed:
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD.{key} is {options[key]!r}; allowed: {allowed!r}; change it"
            )
    return MaskHead(
        in_channels,
        width=options.CONV_DIM,
        num_convs=options.NUM_CONV,
        num_masks=1 if options.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
    )
