"""ROI heads of a C4 detector: RoIAlign, res5 on every region, a box predictor, a mask head
(detectron2/modeling/roi_heads/roi_heads.py, fast_rcnn.py).

Shapes: R regions over all images, K classes; class K is the background.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import RoIAlign, batched_nms, clip_boxes_to_image

from detection.data.masks import Masks
from detection.engines.embedded.boxes import BoxCoder, Matcher, count_true, true_indices
from detection.engines.embedded.losses import smooth_l1_loss
from detection.engines.embedded.mask_head import MaskHead, build_mask_head, crop_masks, mask_loss
from detection.engines.embedded.norm import build_norm
from detection.engines.embedded.resnet_c4 import STRIDE, Res5, build_head_res5, channels
from detection.engines.embedded.rpn import Sizes, overlaps, sample_balanced
from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.kernels.roi_align import roi_align


class Pooler(RoIAlign):
    """torchvision's RoIAlign, by a kernel where `compiled` is set: [R, C, side, side]."""

    compiled = False

    def forward(self, features_BCHW: torch.Tensor, rois_R5: torch.Tensor) -> torch.Tensor:
        # Under autocast torchvision's casts to float32, and its result back.
        if not self.compiled:
            return super().forward(features_BCHW, rois_R5)
        return roi_align(
            features_BCHW,
            rois_R5,
            side=self.output_size[0],
            scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )


@dataclass(frozen=True)
class Regions:
    """Sampled regions of one image: boxes [R, 4], classes [R] (K: background), the ground-truth
    box [R, 4] each is trained towards and its index [R] (both meaningless for background)."""

    boxes: torch.Tensor
    classes: torch.Tensor
    targets: torch.Tensor
    gt_index: torch.Tensor


@dataclass(frozen=True)
class Detected:
    """Detections of one image, best first: boxes [N, 4], scores [N], classes [N] and, with a
    mask head, mask_probs [N, M, M]: each mask within its box."""

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    mask_probs: torch.Tensor | None = None


class BoxPredictor(nn.Module):
    """Class logits and box deltas of each region, their losses, and the final detections."""

    def __init__(
        self,
        in_features: int,
        *,
        num_classes: int,
        class_agnostic: bool,
        box_weights: tuple[float, float, float, float],
        smooth_l1_beta: float,
        box_loss_weight: float,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
    ):
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.box_coder = BoxCoder(box_weights)
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def forward(self, features_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [R, K + 1] and deltas [R, 4 K] (class-agnostic: [R, 4]) in float32."""
        return self.cls_score(features_RC).float(), self.bbox_pred(features_RC).float()

    def losses(
        self, logits: torch.Tensor, deltas: torch.Tensor, regions: list[Regions]
    ) -> dict[str, torch.Tensor]:
        """Mean cross-entropy; L1 of the foreground, divided by the number of all regions."""
        classes = torch.cat([r.classes for r in regions])
        boxes = torch.cat([r.boxes for r in regions])
        targets = torch.cat([r.targets for r in regions])
        foreground = torch.where(classes < self.num_classes)[0]
        if not self.class_agnostic:
            deltas = deltas.view(-1, self.num_classes, 4)
            predicted = deltas[foreground, classes[foreground]]
        else:
            predicted = deltas[foreground]
        wanted = self.box_coder.encode_single(targets[foreground], boxes[foreground])
        location = smooth_l1_loss(predicted, wanted, beta=self.smooth_l1_beta, reduction="sum")
        # The mean of nothing would be NaN; without regions the loss is 0.
        mean_ce = F.cross_entropy(logits, classes) if len(classes) else logits.sum() * 0.0
        return {
            "loss_cls": mean_ce,
            "loss_box_reg": location / max(len(classes), 1.0) * self.box_loss_weight,
        }

    def detect(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        proposals: list[torch.Tensor],
        image_sizes: Sizes,
    ) -> list[Detected]:
        """Detections of each image, in pixels of the resized image."""
        counts = [len(p) for p in proposals]
        scores = F.softmax(logits, dim=-1).split(counts)
        boxes = self.box_coder.decode_single(deltas, torch.cat(proposals)).split(counts)
        return [
            self._detect_one(boxes_i, scores_i, size)
            for boxes_i, scores_i, size in zip(boxes, scores, image_sizes, strict=True)
        ]

    def _detect_one(self, boxes: torch.Tensor, scores: torch.Tensor, size) -> Detected:
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        finite = torch.where(finite)[0]
        boxes = clip_boxes_to_image(boxes[finite].unflatten(1, (-1, 4)), size)
        scores = scores[finite][:, :-1]
        region_index, classes = torch.where(scores > self.score_threshold)
        boxes = boxes[region_index, 0 if self.class_agnostic else classes]
        scores = scores[region_index, classes]
        keep = batched_nms(boxes, scores, classes, self.nms_threshold)
        if self.max_detections >= 0:
            keep = keep[: self.max_detections]
        return Detected(boxes[keep], scores[keep], classes[keep])


class Res5ROIHeads(nn.Module):
    """Pool each region, apply res5, average, predict; the mask head reads res5's output too.

    Args:
        mask_head: None where only boxes are wanted.
        iou_threshold: a region is foreground from this overlap with a ground-truth box on.
        num_sampled: regions of an image that are trained on; positive_fraction: at most this
            part of them is foreground.
        append_gt: ground-truth boxes join the proposals in training.
    """

    def __init__(
        self,
        *,
        pooler: Pooler,
        res5: Res5,
        box_predictor: BoxPredictor,
        mask_head: MaskHead | None,
        iou_threshold: float,
        num_sampled: int,
        positive_fraction: float,
        append_gt: bool,
    ):
        super().__init__()
        self.pooler = pooler
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head
        self.matcher = Matcher(iou_threshold, iou_threshold, allow_low_quality_matches=False)
        self.num_sampled = num_sampled
        self.positive_fraction = positive_fraction
        self.append_gt = append_gt

    def region_features(
        self, features_BCHW: torch.Tensor, boxes: list[torch.Tensor]
    ) -> torch.Tensor:
        """res5's output for the boxes [R_i, 4] of each image, of all images in one batch."""
        # The pooler's rows are (image, x0, y0, x1, y1). It stays float32 under autocast, which
        # casts inside the op: box coordinates do not fit into half precision.
        image_index = [torch.full_like(b[:, :1], number) for number, b in enumerate(boxes)]
        rois = torch.cat([torch.cat(image_index).float(), torch.cat(boxes)], dim=1)
        return self.res5(self.pooler(features_BCHW, rois))

    def predict(
        self, features_BCHW: torch.Tensor, boxes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and deltas of the boxes [R_i, 4] of each image."""
        return self.box_predictor(self.region_features(features_BCHW, boxes).mean(dim=[2, 3]))

    def losses(
        self,
        features_BCHW: torch.Tensor,
        proposals: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
        gt_classes: list[torch.Tensor],
        gt_masks: list[Masks] | None = None,
    ) -> dict[str, torch.Tensor]:
        """`loss_cls` and `loss_box_reg` on sampled proposals; `loss_mask`, with a mask head."""
        regions = [
            self.sample_regions(*one_image)
            for one_image in zip(proposals, gt_boxes, gt_classes, strict=True)
        ]
        regions_RCHW = self.region_features(features_BCHW, [r.boxes for r in regions])
        logits, deltas = self.box_predictor(regions_RCHW.mean(dim=[2, 3]))
        losses = self.box_predictor.losses(logits, deltas, regions)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(regions_RCHW, regions, gt_masks)
        return losses

    def _mask_loss(
        self, regions_RCHW: torch.Tensor, regions: list[Regions], gt_masks: list[Masks]
    ) -> torch.Tensor:
        """The mask head's loss on the foreground among the sampled regions."""
        flags = [r.classes < self.box_predictor.num_classes for r in regions]
        counts = count_true(flags)
        foreground = [true_indices(*pair) for pair in zip(flags, counts, strict=True)]
        logits = self.mask_head(regions_RCHW[true_indices(torch.cat(flags), sum(counts))])
        targets = [
            crop_masks(masks, r.gt_index[keep], r.boxes[keep], side=logits.shape[-1])
            for masks, r, keep in zip(gt_masks, regions, foreground, strict=True)
        ]
        classes = torch.cat([r.classes[keep] for r, keep in zip(regions, foreground, strict=True)])
        return mask_loss(logits, classes, torch.cat(targets))

    def detect(
        self, features_BCHW: torch.Tensor, proposals: list[torch.Tensor], image_sizes: Sizes
    ) -> list[Detected]:
        """Detections of each image, in pixels of the resized image."""
        logits, deltas = self.predict(features_BCHW, proposals)
        detected = self.box_predictor.detect(logits, deltas, proposals, image_sizes)
        if self.mask_head is None:
            return detected
        # Masks are of the final boxes, so their regions are pooled anew.
        regions_RCHW = self.region_features(features_BCHW, [d.boxes for d in detected])
        classes = torch.cat([d.classes for d in detected])
        probs = self.mask_head.probabilities(regions_RCHW, classes)
        probs = probs.split([len(d.classes) for d in detected])
        return [replace(d, mask_probs=p) for d, p in zip(detected, probs, strict=True)]

    @torch.no_grad()
    def sample_regions(
        self, proposals: torch.Tensor, gt_boxes: torch.Tensor, gt_classes: torch.Tensor
    ) -> Regions:
        """Regions of one image to train on: foreground first, each part in drawn order."""
        num_classes = self.box_predictor.num_classes
        boxes = torch.cat([proposals, gt_boxes]) if self.append_gt else proposals
        if len(gt_boxes) == 0 or len(boxes) == 0:
            classes = torch.full_like(boxes[:, 0], num_classes, dtype=torch.int64)
            targets, nearest = boxes, torch.zeros_like(classes)
        else:
            matches = self.matcher(overlaps(gt_boxes, boxes))
            nearest = matches.clamp(min=0)
            classes = torch.where(matches >= 0, gt_classes[nearest], num_classes)
            targets = gt_boxes[nearest]
        is_background = classes == num_classes
        sampled = torch.cat(
            sample_balanced(~is_background, is_background, self.num_sampled, self.positive_fraction)
        )
        return Regions(boxes[sampled], classes[sampled], targets[sampled], nearest[sampled])


def build_roi_heads(cfg: CfgNode) -> Res5ROIHeads:
    """The heads named in `MODEL.ROI_HEADS.NAME`: Res5ROIHeads or Res5ROIHeadsExtraNorm.

    The latter has one more norm after the last ReLU of res5 (MoCo v1, appendix A.3), as the
    child `norm` of `res5`. `MODEL.MASK_ON` adds the mask head.
    Raises: ConfigError for another name.
    """
    options, box_options = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    if options.NAME not in ("Res5ROIHeads", "Res5ROIHeadsExtraNorm"):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME is {options.NAME!r}; allowed: Res5ROIHeads, "
            "Res5ROIHeadsExtraNorm; change the value"
        )
    pooler = Pooler(
        (box_options.POOLER_RESOLUTION, box_options.POOLER_RESOLUTION),
        spatial_scale=1.0 / STRIDE,
        sampling_ratio=box_options.POOLER_SAMPLING_RATIO,
        aligned=box_options.POOLER_TYPE == "ROIAlignV2",
    )
    res5 = build_head_res5(cfg)
    if options.NAME == "Res5ROIHeadsExtraNorm":
        res5.add_module("norm", build_norm(cfg.MODEL.RESNETS.NORM, channels(cfg, 5)))
    box_predictor = BoxPredictor(
        channels(cfg, 5),
        num_classes=options.NUM_CLASSES,
        class_agnostic=box_options.CLS_AGNOSTIC_BBOX_REG,
        box_weights=tuple(box_options.BBOX_REG_WEIGHTS),
        smooth_l1_beta=box_options.SMOOTH_L1_BETA,
        box_loss_weight=box_options.BBOX_REG_LOSS_WEIGHT,
        score_threshold=options.SCORE_THRESH_TEST,
        nms_threshold=options.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return Res5ROIHeads(
        pooler=pooler,
        res5=res5,
        box_predictor=box_predictor,
        mask_head=build_mask_head(cfg, channels(cfg, 5)),
        iou_threshold=options.IOU_THRESHOLDS[0],
        num_sampled=options.BATCH_SIZE_PER_IMAGE,
        positive_fraction=options.POSITIVE_FRACTION,
        append_gt=options.PROPOSAL_APPEND_GT,
    )
