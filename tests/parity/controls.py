"""Ways to be wrong: each breaks one thing in the embedded engine, and names what must differ.

Most are what torchvision's detector does where Detectron2 does otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from parity.observed import Embedded

from detection.engines.embedded.precise_bn import update_bn_statistics


@dataclass(frozen=True)
class Control:
    """`quantity` is what must differ in `phase` of `case`, after `changes` of the settings or
    after `break_it(side)`."""

    case: str
    phase: str
    quantity: str
    changes: dict = field(default_factory=dict)
    break_it: Callable[[Embedded], None] | None = None

    def side(self, case) -> Embedded:
        side = Embedded(case, self.changes)
        if self.break_it:
            self.break_it(side)
        return side


def _round_anchors(side: Embedded) -> None:
    side.model.proposal_generator.anchor_generator.cell.round_()


def _divide_image_by_grid(side: Embedded) -> None:
    side.model.proposal_generator.anchor_generator.stride = 107 // 7


def _order_anchors_by_ratio(side: Embedded) -> None:
    grid = side.model.proposal_generator.anchor_generator
    grid.cell = grid.cell.view(3, 3, 4).transpose(0, 1).reshape(9, 4)


def _pad_to_a_multiple_of_32(side: Embedded) -> None:
    preprocess = side.model.preprocess

    def padded(batch):
        images, sizes = preprocess(batch)
        return F.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32)), sizes

    side.model.preprocess = padded


def _rank(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Embedded], None]:
    """Proposals ranked by a function of their logits."""

    def break_it(side: Embedded) -> None:
        propose = side.model.proposal_generator.propose

        def ranked(anchors, logits, deltas, image_sizes):
            return propose(anchors, change(logits), deltas, image_sizes)

        side.model.proposal_generator.propose = ranked

    return break_it


def _earlier_first(logits: torch.Tensor) -> torch.Tensor:
    return logits - 1e-6 * torch.arange(logits.shape[1])


def _turn_tied_detections_round(side: Embedded) -> None:
    predictor = side.model.roi_heads.box_predictor
    detect_one = predictor._detect_one
    predictor._detect_one = lambda boxes, scores, size: detect_one(
        boxes.flip(0), scores.flip(0), size
    )


def _ignore_images_without_ground_truth(side: Embedded) -> None:
    label_anchors = side.model.proposal_generator.label_anchors

    def label(anchors, gt_boxes):
        labels, targets = label_anchors(anchors, gt_boxes)
        return (labels if len(gt_boxes) else torch.full_like(labels, -1)), targets

    side.model.proposal_generator.label_anchors = label


def _change_ground_truth(keep: Callable[[torch.Tensor], torch.Tensor]):
    """`keep` gives the indices of the boxes to keep, in order."""

    def break_it(side: Embedded) -> None:
        def batch(samples):
            kept = [(sample, keep(sample["gt_boxes"])) for sample in samples]
            return [
                {**s, "gt_boxes": s["gt_boxes"][index], "gt_classes": s["gt_classes"][index]}
                for s, index in kept
            ]

        side.batch = batch

    return break_it


def _wider_than_a_pixel(boxes: torch.Tensor) -> torch.Tensor:
    return torch.where((boxes[:, 2:] - boxes[:, :2] > 1.0).all(dim=1))[0]


def _last_first(boxes: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(boxes)).flip(0)


def _sample(change: Callable) -> Callable[[Embedded], None]:
    def break_it(side: Embedded) -> None:
        sample_regions = side.model.roi_heads.sample_regions
        side.model.roi_heads.sample_regions = lambda *given: change(sample_regions, *given)

    return break_it


def _in_order_of_index(sample_regions, proposals, gt_boxes, gt_classes):
    regions = sample_regions(proposals, gt_boxes, gt_classes)
    candidates = torch.cat([proposals, gt_boxes])
    index = (regions.boxes[:, None] == candidates[None]).all(dim=2).long().argmax(dim=1)
    order = index.argsort()
    return replace(regions, **{f.name: getattr(regions, f.name)[order] for f in fields(regions)})


def _after_one_more_draw(sample_regions, *given):
    torch.rand(1)
    return sample_regions(*given)


def _weigh_batches_alike(side: Embedded) -> None:
    def update(batches):
        means: dict[str, torch.Tensor] = {}
        for batch in batches:
            update_bn_statistics(side.model, [batch], num_iters=1)
            for name, tensor in side.model.state_dict().items():
                if "running_" in name:
                    means[name] = means.get(name, 0.0) + tensor / len(batches)
        side.model.load_state_dict({**side.model.state_dict(), **means})

    side.update_bn = update


_NINTH = 1.0 / 9.0
_BGR_MEAN = [103.53, 116.28, 123.675]
CONTROLS = {
    "anchors rounded": Control("moco", "detect", "anchors", break_it=_round_anchors),
    "stride is image // grid": Control(
        "moco", "detect", "anchors", break_it=_divide_image_by_grid
    ),
    "anchors ratio by ratio": Control(
        "moco", "detect", "anchors", break_it=_order_anchors_by_ratio
    ),
    "images padded to 32": Control(
        "moco", "detect", "padded_images", break_it=_pad_to_a_multiple_of_32
    ),
    "pooling not aligned": Control(
        "moco", "detect", "res5", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}
    ),
    "pooling with ratio 2": Control(
        "moco", "detect", "res5", {"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2}
    ),
    "no norm after res5": Control(
        "moco", "detect", "res5", {"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}
    ),
    "RPN loss with beta 1/9": Control(
        "moco", "train", "loss_rpn_loc", {"MODEL.RPN.SMOOTH_L1_BETA": _NINTH}
    ),
    "box loss with beta 1/9": Control(
        "moco", "train", "loss_box_reg", {"MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NINTH}
    ),
    "regions sorted by index": Control(
        "moco", "train", "sampled_index", break_it=_sample(_in_order_of_index)
    ),
    "one more random number": Control(
        "moco", "train", "rng_state", break_it=_sample(_after_one_more_draw)
    ),
    "no warm-up": Control("moco", "steps", "weight", {"SOLVER.WARMUP_ITERS": 0}),
    "Nesterov's momentum": Control("moco", "steps", "weight", {"SOLVER.NESTEROV": True}),
    "batches weigh alike": Control(
        "moco", "precise_bn", "statistics", break_it=_weigh_batches_alike
    ),
    "stride in the 3x3": Control(
        "supervised_yaml", "detect", "res4", {"MODEL.RESNETS.STRIDE_IN_1X1": False}
    ),
    "mean in the other order": Control(
        "supervised_yaml", "detect", "padded_images", {"MODEL.PIXEL_MEAN": _BGR_MEAN[::-1]}
    ),
    "frozen norms trained": Control(
        "supervised_frozen_bn", "train", "res4", {"MODEL.RESNETS.NORM": "BN"}
    ),
    "no part frozen": Control(
        "supervised_bn", "train", "res4", {"MODEL.BACKBONE.FREEZE_AT": 0}
    ),
    "deltas of another scale": Control(
        "class_agnostic",
        "detect",
        "boxes",
        {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (8.0, 8.0, 4.0, 4.0)},
    ),
    "images without boxes ignored": Control(
        "no_ground_truth", "train", "loss_rpn_cls", break_it=_ignore_images_without_ground_truth
    ),
    "thin boxes dropped": Control(
        "thin_box",
        "train",
        "anchor_labels",
        break_it=_change_ground_truth(_wider_than_a_pixel),
    ),
    "thin regions made a cell wide": Control(
        "thin_box", "train", "res5", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}
    ),
    "the last of equal boxes wins": Control(
        "duplicate_boxes", "train", "loss_cls", break_it=_change_ground_truth(_last_first)
    ),
    "ranked by sigmoid": Control(
        "saturated_logits", "detect", "proposals", break_it=_rank(torch.sigmoid)
    ),
    "tied logits in index order": Control(
        "tied_scores", "detect", "proposals", break_it=_rank(_earlier_first)
    ),
    "tied logits of constant images in index order": Control(
        "tied_constant_images", "detect", "proposals", break_it=_rank(_earlier_first)
    ),
    "tied scores the other way round": Control(
        "tied_scores", "detect", "boxes", break_it=_turn_tied_detections_round
    ),
}
