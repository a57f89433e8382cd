"""Ground-truth masks as Detectron2 prepares them, to the last bit: polygons, which stay exact
under resizing, or bit masks.

Source of the rules: Detectron2 data/detection_utils.py, structures/masks.py. A segmentation is a
list of polygons [x0, y0, x1, y1, ...] in pixels from 0, or a COCO RLE dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from moco.cfgnode import CfgNode
from moco.errors import ConfigError, DataError

# Of the objects of one image: for each its polygons, each a float64 vector; or bool [N, H, W].
Masks = list[list[np.ndarray]] | torch.Tensor


def transform_polygons(
    polygons: Iterable[Sequence[float]],
    old_shape: tuple[int, int],
    new_shape: tuple[int, int],
    flip: bool,
) -> list[np.ndarray]:
    """Move the polygons of one object with their image: resize, then flip; no clipping.

    Args:
        old_shape, new_shape: (height, width) in pixels.
    Returns: float64 vectors. (Detectron2 keeps polygons of whole numbers as integers and so
        truncates them after resizing; here they stay exact.)
    """
    (old_height, old_width), (new_height, new_width) = old_shape, new_shape
    moved = []
    for polygon in polygons:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        corners[:, 0] *= new_width * 1.0 / old_width
        corners[:, 1] *= new_height * 1.0 / old_height
        if flip:
            corners[:, 0] = new_width - corners[:, 0]
        moved.append(corners.reshape(-1))
    return moved


def rasterize_polygons(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The pixels that any of the polygons covers, by COCO's rule: bool [height, width]."""
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    pieces = coco_mask.frPyObjects(polygons, height, width)
    return coco_mask.decode(coco_mask.merge(pieces)).astype(bool)


def transform_masks(
    segmentations: Sequence[list | dict],
    mask_format: str,
    old_shape: tuple[int, int],
    new_shape: tuple[int, int],
    flip: bool,
) -> Masks:
    """The masks of one image's objects, moved with it.

    Args:
        mask_format: INPUT.MASK_FORMAT. "polygon" needs polygons; "bitmask" takes both kinds and
            rasterises polygons after they were moved.
    """
    if mask_format == "polygon":
        return [transform_polygons(s, old_shape, new_shape, flip) for s in segmentations]
    masks = torch.zeros(len(segmentations), *new_shape, dtype=torch.bool)
    for row, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, dict):
            mask = _transform_bitmask(coco_mask.decode(segmentation), new_shape, flip)
        else:
            moved = transform_polygons(segmentation, old_shape, new_shape, flip)
            mask = rasterize_polygons(moved, *new_shape)
        row.copy_(torch.from_numpy(mask))
    return masks


def _transform_bitmask(mask_HW: np.ndarray, new_shape: tuple[int, int], flip: bool) -> np.ndarray:
    height, width = new_shape
    image = Image.fromarray(np.ascontiguousarray(mask_HW))
    resized = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
    return np.ascontiguousarray(resized[:, ::-1] if flip else resized).astype(bool)


def nonempty_masks(masks: Masks) -> np.ndarray:
    """bool [N]: the objects with at least one polygon, or at least one pixel."""
    if isinstance(masks, torch.Tensor):
        return masks.flatten(1).any(dim=1).numpy()
    return np.array([len(polygons) > 0 for polygons in masks], dtype=bool)


def select_masks(masks: Masks, kept: np.ndarray) -> Masks:
    """The masks of the objects for which `kept`, bool [N], is true."""
    if isinstance(masks, torch.Tensor):
        return masks[torch.from_numpy(kept)]
    return [polygons for polygons, keep in zip(masks, kept, strict=True) if keep]


def check_masks(cfg: CfgNode, records: Iterable[dict]) -> None:
    """Under MODEL.MASK_ON every training object must have a mask that can be used.

    Objects with `iscrowd` 1 are not trained on and may have any. That a segmentation is well
    formed was checked when it was read.
    Raises:
        ConfigError: no object has a mask, or one has an RLE under INPUT.MASK_FORMAT "polygon".
        DataError: some objects have no mask.
    """
    if not cfg.MODEL.MASK_ON:
        return
    num_objects, without = 0, []
    for record in records:
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            num_objects += 1
            segmentation = annotation.get("segmentation")
            if segmentation is None:
                without.append(record["file_name"])
            elif isinstance(segmentation, dict) and cfg.INPUT.MASK_FORMAT == "polygon":
                raise ConfigError(
                    f"INPUT.MASK_FORMAT is 'polygon', but {record['file_name']} has an object with "
                    "an RLE mask; allowed with such data: bitmask; set INPUT.MASK_FORMAT bitmask"
                )
    if without and len(without) == num_objects:
        raise ConfigError(
            f"MODEL.MASK_ON is True, but none of the {num_objects} objects of DATASETS.TRAIN "
            f"{tuple(cfg.DATASETS.TRAIN)} has a mask (VOC annotations have boxes only); name a "
            "COCO data set with segmentations, or set MODEL.MASK_ON False"
        )
    if without:
        raise DataError(
            f"{without[0]}: an object has no segmentation ({len(without)} of {num_objects} have "
            "none), which MODEL.MASK_ON True needs; add it, or set MODEL.MASK_ON False"
        )


def encode_rle(masks_NHW: np.ndarray) -> list[dict]:
    """Each mask as COCO RLE: {"size": [height, width], "counts": bytes}."""
    return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks_NHW]


def decode_rle(encoded: Sequence[dict], height: int, width: int) -> np.ndarray:
    """The masks that `encode_rle` got: bool [N, height, width]."""
    masks = np.zeros((len(encoded), height, width), dtype=bool)
    for row, rle in zip(masks, encoded, strict=True):
        row[:] = coco_mask.decode(rle)
    return masks
