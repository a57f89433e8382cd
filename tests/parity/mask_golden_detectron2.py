"""Detectron2's side of golden/mask_head.npz, which record_detectron2.py writes."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from parity.mask_golden import (
    IMAGE,
    IN_CHANNELS,
    NUM_CLASSES,
    NUM_CONVS,
    SEED,
    SIDE,
    WIDTH,
    Inputs,
    named,
    weights,
)
from torchvision.ops import roi_align


def detectron2() -> dict[str, np.ndarray]:
    """Detectron2's answers."""
    given = Inputs()
    torch.manual_seed(SEED)
    head = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=IN_CHANNELS),
        num_classes=NUM_CLASSES,
        conv_dims=[WIDTH] * (NUM_CONVS + 1),
    )
    rng_state = torch.get_rng_state()
    initial = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(weights(head.state_dict()))
    regions = Instances(
        IMAGE,
        proposal_boxes=Boxes(given.boxes),
        gt_classes=given.classes,
        gt_masks=PolygonMasks(given.polygons),
        pred_classes=given.classes,
    )
    features = given.features.requires_grad_()
    with EventStorage():
        loss = head(features, [regions])["loss_mask"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    head.eval()
    with torch.no_grad():
        (found,) = head(features, [regions])
    pasted = paste_masks_in_image(given.probabilities, given.boxes, IMAGE)
    masked = Instances(
        IMAGE,
        pred_boxes=Boxes(given.boxes),
        scores=torch.ones(len(given.boxes)),
        pred_classes=given.classes,
        pred_masks=pasted,
    )
    rles = [item["segmentation"] for item in instances_to_coco_json(masked, 0)]
    return named(
        initial=initial,
        rng_state=rng_state,
        loss=loss,
        gradients={**gradients, "features": features.grad},
        probabilities=found.pred_masks[:, 0],
        targets=regions.gt_masks.crop_and_resize(given.boxes, SIDE),
        bitmask_targets=BitMasks(given.bitmasks).crop_and_resize(given.boxes, SIDE),
        pasted=pasted,
        rle_counts=[rle["counts"].encode() for rle in rles],
    )


def record() -> dict[str, np.ndarray]:
    """The file's content. Raises: SystemExit where a pixel of a mask hangs on rounding."""
    _check_margins()
    return detectron2()


def _check_margins() -> None:
    given = Inputs()
    low, high = (
        paste_masks_in_image(given.probabilities, given.boxes, IMAGE, threshold=0.5 + change)
        for change in (-1e-5, 1e-5)
    )
    index = torch.arange(len(given.boxes))[:, None].double()
    rois = torch.cat([index, given.boxes.double()], dim=1)
    soft = roi_align(given.bitmasks[:, None].double(), rois, SIDE, 1.0, 0, aligned=True)
    if not torch.equal(low, high) or ((soft - 0.5).abs() < 1e-5).any():
        raise SystemExit("mask_head.npz: a pixel hangs on rounding; another SEED is needed")
