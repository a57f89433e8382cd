from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import roi_align

from detection.config import get_defaults
from detection.engines.embedded.roi_heads import BoxPredictor, Regions, build_roi_heads
from moco.errors import ConfigError


def make_predictor(**changes) -> BoxPredictor:
    options = dict(
        num_classes=2,
        class_agnostic=False,
        box_weights=(10.0, 10.0, 5.0, 5.0),
        smooth_l1_beta=0.0,
        box_loss_weight=1.0,
        score_threshold=0.05,
        nms_threshold=0.5,
        max_detections=100,
    )
    return BoxPredictor(8, **{**options, **changes})


REGIONS = [
    Regions(
        boxes=torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 3.0, 5.0, 5.0]]),
        classes=torch.tensor([1, 2]),  # 2 is the background
        targets=torch.tensor([[1.0, 0.0, 11.0, 10.0], [0.0, 0.0, 1.0, 1.0]]),
        gt_index=torch.tensor([0, 0]),
    )
]


def test_losses_worked_by_hand():
    predictor = make_predictor()
    deltas = torch.zeros(2, 8)
    losses = predictor.losses(torch.zeros(2, 3), deltas, REGIONS)
    assert losses["loss_cls"].item() == pytest.approx(math.log(3))
    # One foreground region, off by 1 / 10 of its width: 10 x 0.1; divided by both regions.
    assert losses["loss_box_reg"].item() == pytest.approx(0.5)
    deltas[0, 4:] = torch.tensor([1.0, 0.0, 0.0, 0.3])  # the part of class 1
    deltas[1] = 99.0  # background does not count
    losses = predictor.losses(torch.zeros(2, 3), deltas, REGIONS)
    assert losses["loss_box_reg"].item() == pytest.approx(0.15)


def test_class_agnostic_losses_share_one_box():
    predictor = make_predictor(class_agnostic=True, box_loss_weight=2.0)
    assert predictor.bbox_pred.out_features == 4
    losses = predictor.losses(torch.zeros(2, 3), torch.zeros(2, 4), REGIONS)
    assert losses["loss_box_reg"].item() == pytest.approx(1.0)


def test_losses_of_no_regions_are_zero_with_a_gradient():
    predictor = make_predictor()
    logits, deltas = predictor(torch.zeros(0, 8))
    none, no_index = torch.zeros(0, 4), torch.zeros(0).long()
    losses = predictor.losses(logits, deltas, [Regions(none, no_index, none, no_index)])
    assert [loss.item() for loss in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert float(predictor.cls_score.weight.grad.abs().sum()) == 0.0


def test_detections_worked_by_hand():
    predictor = make_predictor()
    proposals = [torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 40, 40]])]
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.01, 0.29], [0.02, 0.04, 0.94]])
    (found,) = predictor.detect(
        probabilities.log(), torch.zeros(3, 8), proposals, image_sizes=[(30, 30)]
    )
    # Class 0: the second suppresses the first (IoU 0.9). Class 1: 0.3 stays, 0.01 and 0.04 are
    # below the threshold. The third region is background.
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.3]))
    assert found.classes.tolist() == [0, 1]
    assert found.boxes.tolist() == [[0, 0, 10, 9], [0, 0, 10, 10]]
    predictor.max_detections = 1
    (found,) = predictor.detect(probabilities.log(), torch.zeros(3, 8), proposals, [(30, 30)])
    assert found.classes.tolist() == [0]


def test_detections_clip_and_skip_non_finite_rows():
    predictor = make_predictor(class_agnostic=True)
    deltas = torch.zeros(2, 4)
    deltas[1, 2] = float("nan")
    proposals = [torch.tensor([[5.0, 5.0, 50.0, 50.0], [0.0, 0.0, 9.0, 9.0]])]
    (found,) = predictor.detect(torch.zeros(2, 3), deltas, proposals, image_sizes=[(20, 30)])
    assert found.boxes.tolist() == [[5, 5, 30, 20], [5, 5, 30, 20]]
    assert found.classes.tolist() == [0, 1]


def test_sampled_regions_are_foreground_first_and_ground_truth_joins(tiny_cfg):
    heads = build_roi_heads(tiny_cfg(MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=4))
    gt_boxes, gt_classes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([1])
    proposals = torch.tensor([[0.0, 0, 10, 4.9], [0, 0, 10, 5], [50, 50, 60, 60], [0, 0, 1, 1]])
    regions = heads.sample_regions(proposals, gt_boxes, gt_classes)
    # IoU 0.49, 0.5 (foreground), 0, 0.01, and the ground truth itself; at most a quarter of 4 is
    # foreground, so one of the two.
    assert regions.classes.tolist() == [1, 3, 3, 3]
    assert regions.boxes[0].tolist() in ([0, 0, 10, 5], [0, 0, 10, 10])
    assert regions.targets[0].tolist() == [0, 0, 10, 10]
    assert regions.gt_index[0] == 0
    heads.append_gt = False
    assert heads.sample_regions(proposals, gt_boxes, gt_classes).boxes[0].tolist() == [0, 0, 10, 5]


@pytest.mark.parametrize("box", [[20.0, 20.0, 20.0, 20.0], [20.0, 20.0, 20.0, 50.0]])
def test_ground_truth_without_an_area_is_background_and_its_loss_finite(tiny_cfg, box):
    """Its overlap with itself, which joins the proposals, is 0 / 0: 0, as in Detectron2."""
    heads = build_roi_heads(tiny_cfg(MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=16))
    gt_boxes, gt_classes = torch.tensor([box, [0.0, 0.0, 10.0, 10.0]]), torch.tensor([0, 1])
    proposals = torch.tensor([[0.0, 0, 10, 9], [15, 15, 60, 60], [40, 40, 60, 60]])
    regions = heads.sample_regions(proposals, gt_boxes, gt_classes)
    by_box = {tuple(b): c for b, c in zip(regions.boxes.tolist(), regions.classes, strict=True)}
    assert by_box[tuple(box)] == 3 and by_box[0, 0, 10, 10] == by_box[0, 0, 10, 9] == 1
    losses = heads.losses(torch.randn(1, 128, 8, 8), [proposals], [gt_boxes], [gt_classes])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_regions_of_an_image_without_boxes_are_background(tiny_cfg):
    heads = build_roi_heads(tiny_cfg())
    proposals = torch.rand(5, 4)
    regions = heads.sample_regions(proposals, torch.zeros(0, 4), torch.zeros(0).long())
    assert regions.classes.tolist() == [3] * 5
    nothing = heads.sample_regions(proposals[:0], torch.zeros(0, 4), torch.zeros(0).long())
    assert nothing.boxes.shape == (0, 4)


def test_no_proposals_give_no_detections(tiny_cfg):
    heads = build_roi_heads(tiny_cfg()).eval()
    nothing = [torch.zeros(0, 4), torch.zeros(0, 4)]
    with torch.no_grad():
        found = heads.detect(torch.randn(2, 128, 5, 6), nothing, [(80, 90), (80, 90)])
    assert [len(f.scores) for f in found] == [0, 0]


def test_pooling_under_autocast_keeps_box_coordinates_in_float32(tiny_cfg):
    heads = build_roi_heads(tiny_cfg())
    features = torch.randn(1, 128, 20, 20).bfloat16()
    box = torch.tensor([[100.3, 57.7, 301.9, 255.1]])  # bfloat16 keeps 8 bits: 100.5, 57.75, 302
    seen = {}
    heads.res5.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = heads.predict(features, [box])
    assert logits.dtype == deltas.dtype == torch.float32
    rois = torch.cat([torch.zeros(1, 1), box], dim=1)

    def pooled(rois):
        return roi_align(features.float(), rois, 14, 1 / 16, 0, aligned=True).bfloat16()

    assert torch.equal(seen["pooled"], pooled(rois))
    assert not torch.equal(seen["pooled"], pooled(rois.bfloat16().float()))


def test_head_names(tiny_cfg):
    assert "norm" in dict(build_roi_heads(tiny_cfg()).res5.named_children())
    plain = build_roi_heads(tiny_cfg(MODEL__ROI_HEADS__NAME="Res5ROIHeads"))
    assert "norm" not in dict(plain.res5.named_children())
    cfg = get_defaults()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(ConfigError, match="'StandardROIHeads'; allowed: Res5ROIHeads, "):
        build_roi_heads(cfg)
