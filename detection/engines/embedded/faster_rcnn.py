"""Faster R-CNN on a C4 backbone (detectron2/modeling/meta_arch/rcnn.py, postprocessing.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import clip_boxes_to_image

from detection.engines.embedded.resnet_c4 import ResNet, build_backbone
from detection.engines.embedded.roi_heads import Detected, Res5ROIHeads, build_roi_heads
from detection.engines.embedded.rpn import RPN, Sizes, build_rpn
from moco.cfgnode import CfgNode
from moco.devices import send


class GeneralizedRCNN(nn.Module):
    """Backbone, region proposals, ROI heads.

    A batch is a list of dicts: image [C, H, W] uint8 in the order of `INPUT.FORMAT`; in training
    gt_boxes [N, 4] float32 and gt_classes [N] int64, with a mask head also gt_masks (`Masks`); in
    test height and width, the size that detections are wanted in (missing: the image's own).
    """

    def __init__(
        self,
        *,
        backbone: ResNet,
        proposal_generator: RPN,
        roi_heads: Res5ROIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channels_last: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """In training the losses `loss_cls`, `loss_box_reg`, `loss_rpn_cls`, `loss_rpn_loc` and,
        with a mask head, `loss_mask`, whose plain sum is minimised; else `inference(batch)`.

        Raises: NonFiniteError where the RPN predicts NaN or Inf in training.
        """
        if not self.training:
            return self.inference(batch)
        device = self.pixel_mean.device
        gt_boxes = [send(sample["gt_boxes"], device) for sample in batch]
        gt_classes = [send(sample["gt_classes"], device) for sample in batch]
        gt_masks = None
        if self.roi_heads.mask_head is not None:
            gt_masks = [sample["gt_masks"] for sample in batch]
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)["res4"]
        proposals, rpn_losses = self.proposal_generator(features, sizes, gt_boxes)
        roi_losses = self.roi_heads.losses(features, proposals, gt_boxes, gt_classes, gt_masks)
        return roi_losses | rpn_losses

    @torch.no_grad()
    def inference(self, batch: list[dict]) -> list[dict[str, torch.Tensor]]:
        """For each image boxes [N, 4] in pixels of (height, width), scores [N], classes [N] and,
        with a mask head, mask_probs [N, M, M], for `mask_head.encode_masks`."""
        assert not self.training, "call model.eval() before inference"
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)["res4"]
        proposals, _ = self.proposal_generator(features, sizes)
        detected = self.roi_heads.detect(features, proposals, sizes)
        wanted = [
            (sample.get("height", size[0]), sample.get("width", size[1]))
            for sample, size in zip(batch, sizes, strict=True)
        ]
        return [_to_wanted_size(*one) for one in zip(detected, sizes, wanted, strict=True)]

    def preprocess(self, batch: list[dict]) -> tuple[torch.Tensor, Sizes]:
        """Normalised images [B, C, max H, max W], zero beyond each image, and their sizes."""
        images = [
            (send(sample["image"], self.pixel_mean.device) - self.pixel_mean) / self.pixel_std
            for sample in batch
        ]
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
        padded = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        padded = padded.contiguous(memory_format=self.memory_format)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return padded, sizes


def _to_wanted_size(
    found: Detected, size: tuple[int, int], wanted: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Scale boxes from `size` to `wanted` (height, width), clip them, drop empty ones."""
    scale_y, scale_x = (new / old for new, old in zip(wanted, size, strict=True))
    scales = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=found.boxes.dtype)
    boxes = clip_boxes_to_image(found.boxes * send(scales, found.boxes.device), wanted)
    keep = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
    kept = {"boxes": boxes[keep], "scores": found.scores[keep], "classes": found.classes[keep]}
    return kept if found.mask_probs is None else {**kept, "mask_probs": found.mask_probs[keep]}


def build_model(cfg: CfgNode) -> GeneralizedRCNN:
    """The detector of a configuration (`detection.config`), randomly initialised, in train mode.

    With the same torch seed it equals Detectron2's `build_model(cfg)`, tensor for tensor.
    Raises: ConfigError for a depth, norm or head that is not implemented.
    """
    return GeneralizedRCNN(
        backbone=build_backbone(cfg),
        proposal_generator=build_rpn(cfg),
        roi_heads=build_roi_heads(cfg),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        channels_last=cfg.MODEL.CHANNELS_LAST,
    )
