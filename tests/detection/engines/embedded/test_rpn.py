from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torchvision.ops import box_iou

from detection.engines.embedded.anchors import AnchorGrid
from detection.engines.embedded.rpn import RPN, RPNHead, build_rpn, overlaps, sample_balanced
from moco.errors import NonFiniteError


def make_rpn(**changes) -> RPN:
    """One anchor of 16 x 16 pixels at every location."""
    options = dict(
        head=RPNHead(4, 1),
        anchor_grid=AnchorGrid(sizes=[16], aspect_ratios=[1.0], stride=16, offset=0.5),
        iou_thresholds=(0.3, 0.7),
        num_sampled=4,
        positive_fraction=0.5,
        box_weights=(1.0, 1.0, 1.0, 1.0),
        smooth_l1_beta=0.0,
        loss_weight=1.0,
        box_loss_weight=1.0,
        pre_nms_topk=(100, 100),
        post_nms_topk=(50, 3),
        nms_threshold=0.7,
        min_box_size=0.0,
    )
    return RPN(**{**options, **changes})


def test_losses_worked_by_hand():
    rpn = make_rpn()
    anchors = rpn.anchor_generator(1, 2)  # [0, 0, 16, 16] and [16, 0, 32, 16]
    gt_boxes = [torch.tensor([[16.0, 0.0, 32.0, 16.0]])]
    deltas = torch.tensor([[[9.0, 9.0, 9.0, 9.0], [0.1, 0.0, 0.0, -0.2]]])
    losses = rpn.losses(anchors, torch.zeros(1, 2), deltas, gt_boxes)
    # Two anchors are sampled, but both sums are divided by num_sampled = 4.
    assert losses["loss_rpn_cls"].item() == pytest.approx(2 * math.log(2) / 4)
    assert losses["loss_rpn_loc"].item() == pytest.approx((0.1 + 0.2) / 4)
    # The second image has no boxes: four anchors are sampled, one of them foreground.
    losses = rpn.losses(
        anchors, torch.zeros(2, 2), deltas.repeat(2, 1, 1), [*gt_boxes, torch.zeros(0, 4)]
    )
    assert losses["loss_rpn_cls"].item() == pytest.approx(4 * math.log(2) / 8)
    assert losses["loss_rpn_loc"].item() == pytest.approx(0.3 / 8)


def test_loss_weights_multiply_and_beta_rounds_the_corner():
    rpn = make_rpn(loss_weight=2.0, box_loss_weight=3.0, smooth_l1_beta=1.0)
    anchors = rpn.anchor_generator(1, 1)
    deltas = torch.tensor([[[0.5, 0.0, 0.0, 0.0]]])
    losses = rpn.losses(anchors, torch.zeros(1, 1), deltas, [anchors.clone()])
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2) / 4 * 2)
    assert losses["loss_rpn_loc"].item() == pytest.approx(0.5 * 0.5**2 / 4 * 2 * 3)


def test_labels_are_foreground_background_and_unused():
    rpn = make_rpn(num_sampled=100)
    anchors = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]]
    )
    labels, targets = rpn.label_anchors(anchors, torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]))
    # IoU 1, 0.8, 0.5 (in between: unused), 0.2; the last has 1/16, the best of its box.
    assert labels.tolist() == [1, 1, -1, 0, 1]
    assert targets[4].tolist() == [50, 50, 90, 90]


def test_labels_without_ground_truth_are_background():
    labels, targets = make_rpn(num_sampled=3).label_anchors(torch.rand(7, 4), torch.zeros(0, 4))
    assert sorted(labels.tolist()) == [-1] * 4 + [0] * 3
    assert targets.shape == (7, 4)


def test_sampling_takes_at_most_the_fraction_and_fills_up_with_background():
    flags = torch.arange(20) < 12
    foreground, background = sample_balanced(flags, ~flags, 10, 0.5)
    assert len(foreground) == 5 and bool(flags[foreground].all())
    assert len(background) == 5 and not bool(flags[background].any())
    few = torch.arange(20) < 2
    foreground, background = sample_balanced(few, ~few, 10, 0.5)
    assert (len(foreground), len(background)) == (2, 8)
    foreground, background = sample_balanced(few, few & False, 10, 0.5)
    assert (len(foreground), len(background)) == (2, 0)


def test_proposals_are_ranked_clipped_and_cut():
    rpn = make_rpn().eval()
    anchors = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 50, 10], [60, 0, 70, 10], [5, 5, 9, 9]]
    )
    logits = torch.tensor([[0.0, 1.0, 5.0, 9.0, -1.0]])
    (proposals,) = rpn.propose(anchors, logits, torch.zeros(1, 5, 4), [(8, 40)])
    # The fourth lies outside, the third is clipped, the first is suppressed by the second
    # (IoU after clipping: 1), and the test limit of three is not reached.
    assert proposals.tolist() == [[20, 0, 40, 8], [0, 0, 10, 8], [5, 5, 9, 8]]
    rpn.post_nms_topk = (50, 1)
    assert rpn.propose(anchors, logits, torch.zeros(1, 5, 4), [(8, 40)])[0].tolist() == [
        [20, 0, 40, 8]
    ]


def test_growth_is_limited_to_1000_over_16():
    rpn = make_rpn().eval()
    anchors = torch.tensor([[1000.0, 1000.0, 1016.0, 1016.0]])
    deltas = torch.tensor([[[0.0, 0.0, 50.0, 0.0]]])
    (proposal,) = rpn.propose(anchors, torch.zeros(1, 1), deltas, [(5000, 5000)])
    torch.testing.assert_close(proposal, torch.tensor([[508.0, 1000.0, 1508.0, 1016.0]]))


def test_boxes_up_to_the_minimum_size_are_dropped():
    rpn = make_rpn(min_box_size=10.0).eval()
    anchors = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10.5, 20]])
    (proposals,) = rpn.propose(anchors, torch.zeros(1, 2), torch.zeros(1, 2, 4), [(99, 99)])
    assert proposals.tolist() == [[0, 0, 10.5, 20]]


def test_non_finite_proposals_stop_training_and_are_dropped_in_test():
    rpn = make_rpn()
    anchors = rpn.anchor_generator(1, 2)
    deltas = torch.zeros(1, 2, 4)
    deltas[0, 1, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="RPN: 1 of 2 proposals of this rank are NaN"):
        rpn.propose(anchors, torch.zeros(1, 2), deltas, [(16, 32)])
    (proposals,) = rpn.eval().propose(anchors, torch.zeros(1, 2), deltas, [(16, 32)])
    assert proposals.tolist() == [[0, 0, 16, 16]]


def test_head_outputs_follow_the_order_of_the_anchors(tiny_cfg):
    rpn = build_rpn(tiny_cfg())
    features = torch.randn(2, 128, 3, 5)
    logits, deltas = rpn.rpn_head(features)
    assert logits.shape == (2, 3 * 5 * 15) and deltas.shape == (2, 3 * 5 * 15, 4)
    hidden = torch.relu(rpn.rpn_head.conv(features))
    row, column, shape = 1, 4, 7
    index = (row * 5 + column) * 15 + shape
    assert logits[1, index] == rpn.rpn_head.objectness_logits(hidden)[1, shape, row, column]
    planes = slice(4 * shape, 4 * shape + 4)
    assert torch.equal(deltas[1, index], rpn.rpn_head.anchor_deltas(hidden)[1, planes, row, column])


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rdzv", rank=rank, world_size=2)
    rpn = make_rpn()
    anchors = rpn.anchor_generator(1, 2)
    deltas = torch.full((1, 2, 4), float("nan") if rank == 1 else 0.0)
    with pytest.raises(NonFiniteError, match=f"RPN: {2 * rank} of 2 proposals of this rank"):
        rpn.propose(anchors, torch.zeros(1, 2), deltas, [(16, 32)])
    (proposals,) = rpn.propose(anchors, torch.zeros(1, 2), torch.zeros(1, 2, 4), [(16, 32)])
    assert len(proposals) == 2
    dist.destroy_process_group()


def test_all_ranks_stop_where_one_has_non_finite_proposals(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)


def test_overlaps_of_boxes_without_an_area_are_0():
    """Where torchvision's are NaN; all others are torchvision's bits."""
    corners = torch.rand(9, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = corners.reshape(9, 4) * 50
    boxes[3:6, 2] = boxes[3:6, 0]
    boxes[6, 2:] = boxes[6, :2]
    theirs, ours = box_iou(boxes, boxes), overlaps(boxes, boxes)
    assert theirs.isnan().sum() == 16  # control: four boxes without an area
    assert torch.equal(ours, torch.where(theirs.isnan(), 0.0, theirs))
