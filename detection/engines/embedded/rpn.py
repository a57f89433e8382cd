"""Region proposal network (detectron2/modeling/proposal_generator/rpn.py, proposal_utils.py).

Shapes: B images, A anchors in an image, boxes (x0, y0, x1, y1) in pixels of the resized image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops import nms as torchvision_nms

from detection.engines.embedded.anchors import AnchorGrid
from detection.engines.embedded.boxes import BoxCoder, Matcher, count_true, true_indices
from detection.engines.embedded.losses import smooth_l1_loss
from detection.engines.embedded.resnet_c4 import STRIDE, channels
from moco.cfgnode import CfgNode
from moco.distributed import any_rank
from moco.errors import NonFiniteError
from moco.kernels.convolution import convolve
from moco.kernels.nms import nms

Sizes = list[tuple[int, int]]  # (height, width) of each image


class RPNHead(nn.Module):
    """3x3 convolution, then objectness logits and box deltas of each anchor from 1x1 ones."""

    def __init__(self, in_channels: int, anchors_per_location: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(in_channels, anchors_per_location, 1)
        self.anchor_deltas = nn.Conv2d(in_channels, anchors_per_location * 4, 1)
        for conv in (self.conv, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, A] and deltas [B, A, 4] in float32, in the order of `AnchorGrid`."""
        hidden = F.relu(convolve(self.conv, features_BCHW))
        logits = self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
        return logits.float(), deltas.flatten(1, 3).float()


class RPN(nn.Module):
    """Proposals of each image and, in training, the two RPN losses.

    Args:
        iou_thresholds: an anchor is background below the first, foreground from the second on.
        num_sampled: anchors of an image that the losses use; positive_fraction: at most this
            part of them is foreground.
        pre_nms_topk, post_nms_topk: (in training, in test).
        min_box_size: sides must be longer than this, in pixels.

    Attributes:
        checked_later: whether who trains looks at `num_wild`, how many of the `num_ranked`
            proposals of the last images are NaN or Inf, together with the losses; else `propose`
            does, and raises.
    """

    compiled = False
    checked_later = False
    num_wild: torch.Tensor | None = None
    num_ranked = 0

    def __init__(
        self,
        *,
        head: RPNHead,
        anchor_grid: AnchorGrid,
        iou_thresholds: tuple[float, float],
        num_sampled: int,
        positive_fraction: float,
        box_weights: tuple[float, float, float, float],
        smooth_l1_beta: float,
        loss_weight: float,
        box_loss_weight: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_threshold: float,
        min_box_size: float,
    ):
        super().__init__()
        self.rpn_head = head
        self.anchor_generator = anchor_grid
        background_below, foreground_from = iou_thresholds
        self.matcher = Matcher(foreground_from, background_below, allow_low_quality_matches=True)
        self.num_sampled = num_sampled
        self.positive_fraction = positive_fraction
        self.box_coder = BoxCoder(box_weights)
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weight = loss_weight
        self.box_loss_weight = box_loss_weight
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.nms_threshold = nms_threshold
        self.min_box_size = min_box_size

    def forward(
        self,
        features_BCHW: torch.Tensor,
        image_sizes: Sizes,
        gt_boxes: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Proposals [P_i, 4] of each image, best first, and the losses ({} in test).

        Raises: NonFiniteError in training, on every rank, where a proposal of one is NaN or Inf
            and this is not `checked_later`.
        """
        logits, deltas = self.rpn_head(features_BCHW)
        anchors = self.anchor_generator(*features_BCHW.shape[-2:])
        losses = self.losses(anchors, logits, deltas, gt_boxes) if self.training else {}
        return self.propose(anchors, logits.detach(), deltas.detach(), image_sizes), losses

    @torch.no_grad()
    def label_anchors(
        self, anchors: torch.Tensor, gt_boxes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels [A] of one image, 1 / 0 / -1 (foreground / background / unused), after sampling;
        and for each anchor its ground-truth box [A, 4] (meaningless where the label is not 1)."""
        if len(gt_boxes) == 0:
            matches = torch.full_like(anchors[:, 0], Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
            targets = anchors
        else:
            matches = self.matcher(overlaps(gt_boxes, anchors))
            targets = gt_boxes[matches.clamp(min=0)]
        foreground, background = sample_balanced(
            matches >= 0,
            matches == Matcher.BELOW_LOW_THRESHOLD,
            self.num_sampled,
            self.positive_fraction,
        )
        labels = torch.full_like(matches, -1)
        labels.index_fill_(0, foreground, 1).index_fill_(0, background, 0)
        return labels, targets

    def losses(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Binary cross-entropy and L1, both summed and divided by `num_sampled` x images.

        The divisor is the same where fewer anchors were sampled.
        """
        labelled = [self.label_anchors(anchors, boxes) for boxes in gt_boxes]
        labels = torch.cat([labels_A for labels_A, _ in labelled])
        targets = torch.cat([targets_A4 for _, targets_A4 in labelled])
        flags = labels == 1, labels >= 0
        foreground, sampled = map(true_indices, flags, count_true(flags))
        wanted = self.box_coder.encode_single(
            targets[foreground], anchors[foreground % len(anchors)]
        )
        objectness = F.binary_cross_entropy_with_logits(
            logits.flatten()[sampled], labels[sampled].float(), reduction="sum"
        )
        location = smooth_l1_loss(
            deltas.flatten(0, 1)[foreground], wanted, beta=self.smooth_l1_beta, reduction="sum"
        )
        divisor = self.num_sampled * len(gt_boxes)
        return {
            "loss_rpn_cls": objectness / divisor * self.loss_weight,
            "loss_rpn_loc": location / divisor * (self.loss_weight * self.box_loss_weight),
        }

    @torch.no_grad()
    def propose(
        self,
        anchors: torch.Tensor,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        image_sizes: Sizes,
    ) -> list[torch.Tensor]:
        """The best boxes of each image: ranked by logit, decoded, clipped, NMS."""
        in_test = int(not self.training)
        num_ranked = min(logits.shape[1], self.pre_nms_topk[in_test])
        scores, ranked = logits.topk(num_ranked, dim=1)
        deltas = deltas.gather(1, ranked[..., None].expand(-1, -1, 4))
        boxes = self.box_coder.decode_single(deltas.flatten(0, 1), anchors[ranked.flatten()])
        boxes = boxes.view(-1, num_ranked, 4)
        finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
        if self.training:
            self.num_wild, self.num_ranked = (~finite).sum(), finite.numel()
            # All ranks stop together: one that went on would wait in a synchronised norm.
            if not self.checked_later and any_rank(bool(self.num_wild), finite.device):
                raise NonFiniteError(wild_proposals(int(self.num_wild), finite.numel()))
        clipped = [clip_boxes_to_image(*one) for one in zip(boxes, image_sizes, strict=True)]
        large = [(b[:, 2:] - b[:, :2] > self.min_box_size).all(dim=1) for b in clipped]
        usable = [one & of_image for one, of_image in zip(large, finite, strict=True)]
        proposals = []
        for boxes_i, scores_i, usable_i, count in zip(
            clipped, scores, usable, count_true(usable), strict=True
        ):
            kept = true_indices(usable_i, count)
            boxes_i, scores_i = boxes_i[kept], scores_i[kept]
            proposals.append(boxes_i[self._suppress(boxes_i, scores_i, in_test)])
        return proposals

    def _suppress(self, boxes: torch.Tensor, scores: torch.Tensor, in_test: int) -> torch.Tensor:
        """Indices of the proposals of an image, best first."""
        most = self.post_nms_topk[in_test]
        if self.compiled:
            return nms(boxes, self.nms_threshold, most)
        if boxes.is_cuda:  # the same, without a constant that has to be sent
            return torchvision_nms(boxes, scores, self.nms_threshold)[:most]
        one_group = torch.zeros_like(scores, dtype=torch.int64)
        return batched_nms(boxes, scores, one_group, self.nms_threshold)[:most]


def overlaps(boxes_N4: torch.Tensor, others_M4: torch.Tensor) -> torch.Tensor:
    """Intersection over union [N, M]; 0 where both boxes have no area, as in Detectron2
    (structures/boxes.py, pairwise_iou), where torchvision's is NaN, which a matcher takes."""
    return torch.nan_to_num(box_iou(boxes_N4, others_M4), nan=0.0)


def wild_proposals(num_wild: int, num: int) -> str:
    """What is wrong where proposals of this rank are not finite."""
    return (
        f"RPN: {num_wild} of {num} proposals of this rank are NaN or Inf; finite ones on every "
        "rank are needed to train; lower SOLVER.BASE_LR or check the images"
    )


def sample_balanced(
    foreground: torch.Tensor, background: torch.Tensor, num_sampled: int, positive_fraction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices of foreground and background, `num_sampled` together or all there are.

    At most `positive_fraction` of `num_sampled` is foreground; background fills the rest. Both
    are in drawn order, which decides the order of the ROIs (torchvision's sampler loses it).

    Args:
        foreground, background: [N] bool.
    """
    flags = foreground, background
    foreground, background = map(true_indices, flags, count_true(flags))
    num_foreground = min(len(foreground), int(num_sampled * positive_fraction))
    num_background = min(len(background), num_sampled - num_foreground)
    order = torch.randperm(len(foreground), device=foreground.device)
    foreground = foreground[order[:num_foreground]]
    order = torch.randperm(len(background), device=background.device)
    return foreground, background[order[:num_background]]


def build_rpn(cfg: CfgNode) -> RPN:
    """The RPN of `MODEL.RPN` on res4."""
    options, anchor_options = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
    anchor_grid = AnchorGrid(
        sizes=anchor_options.SIZES[0],
        aspect_ratios=anchor_options.ASPECT_RATIOS[0],
        stride=STRIDE,
        offset=anchor_options.OFFSET,
    )
    return RPN(
        head=RPNHead(channels(cfg, 4), anchor_grid.num_per_location),
        anchor_grid=anchor_grid,
        iou_thresholds=tuple(options.IOU_THRESHOLDS),
        num_sampled=options.BATCH_SIZE_PER_IMAGE,
        positive_fraction=options.POSITIVE_FRACTION,
        box_weights=tuple(options.BBOX_REG_WEIGHTS),
        smooth_l1_beta=options.SMOOTH_L1_BETA,
        loss_weight=options.LOSS_WEIGHT,
        box_loss_weight=options.BBOX_REG_LOSS_WEIGHT,
        pre_nms_topk=(options.PRE_NMS_TOPK_TRAIN, options.PRE_NMS_TOPK_TEST),
        post_nms_topk=(options.POST_NMS_TOPK_TRAIN, options.POST_NMS_TOPK_TEST),
        nms_threshold=options.NMS_THRESH,
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
    )
