"""The embedded engine against Detectron2 itself: every comparison is bitwise, on a CPU in fp32.

Widths are cut to an eighth; no image side is a multiple of 16, or a wrong stride would not show.
"""

from __future__ import annotations

import copy

import pytest
import torch

detectron2 = pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import get_norm  # noqa: E402
from detectron2.modeling import ROI_HEADS_REGISTRY  # noqa: E402
from detectron2.modeling import build_model as build_theirs  # noqa: E402
from detectron2.modeling.roi_heads import Res5ROIHeads  # noqa: E402
from detectron2.solver import build_lr_scheduler  # noqa: E402
from detectron2.solver import build_optimizer as build_their_optimizer  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from fvcore.nn.precise_bn import update_bn_stats  # noqa: E402
from torchvision.ops import box_iou  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.config_keys import has_basic_blocks  # noqa: E402
from detection.engines.d2 import _register_heads  # noqa: E402
from detection.engines.embedded import roi_heads  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from detection.engines.embedded.precise_bn import update_bn_statistics  # noqa: E402
from detection.engines.embedded.solver import build_optimizer, set_lr  # noqa: E402
from moco.errors import NonFiniteError  # noqa: E402

pytestmark = pytest.mark.detectron2

if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:

    @ROI_HEADS_REGISTRY.register(None)
    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        """MoCo v1, appendix A.3: one more norm at the end of res5."""

        @classmethod
        def _build_res5_block(cls, cfg):
            res5, num_channels = super()._build_res5_block(cfg)
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, num_channels))
            return res5, num_channels


NUM_CLASSES = 3
SIZES = ((117, 165), (131, 93))  # height, width
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 24,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 400,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 300,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 80,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
    "TEST.DETECTIONS_PER_IMAGE": 30,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.MAX_ITER": 10,
    "SOLVER.STEPS": (4,),
    "SOLVER.BASE_LR": 0.02,
}
MOCO = {
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}
# Detectron2 builds basic blocks at full width only.
BASIC = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}
CASES = {
    "moco": MOCO,
    "supervised": {},  # Detectron2's defaults: BGR, std 1, stride in the 1x1, FrozenBN, freeze 2
    "agnostic": {**MOCO, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    "bn_freeze_3": {**MOCO, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 3},
    "sync_bn": {**MOCO, "MODEL.RESNETS.NORM": "SyncBN"},
    "depth_101_groups": {
        **MOCO,
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.RESNETS.NUM_GROUPS": 2,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    },
    "depth_18": {**MOCO, **BASIC, "MODEL.RESNETS.DEPTH": 18},
    "no_norm": {"MODEL.RESNETS.NORM": "", "MODEL.BACKBONE.FREEZE_AT": 1},
    "other_losses": {
        **MOCO,
        "MODEL.RPN.SMOOTH_L1_BETA": 0.1,
        "MODEL.RPN.LOSS_WEIGHT": 0.7,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 1.3,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.2,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 0.9,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 12,
    },
}


# What makes random predictions vary without saturating; images are not normalised in these two.
HEAD_GAINS = {"supervised": 1.0, "no_norm": 0.5}


def configs(case: str | dict, **changes):
    """Our node and Detectron2's, from the same pairs."""
    settings = {**TINY, **(CASES[case] if isinstance(case, str) else case), **changes}
    pairs = [item for pair in settings.items() for item in pair]
    theirs = get_cfg()
    theirs.merge_from_list(pairs)
    ours = load_detection_config(None, pairs)
    if has_basic_blocks(ours):
        _register_heads()
        theirs.MODEL.ROI_HEADS.NAME += "BasicBlocks"
    return ours, theirs


def pair_of_models(case: str | dict):
    """Both models in the same lively state: random statistics, predictions that differ."""
    our_cfg, their_cfg = configs(case)
    torch.manual_seed(3)
    ours = build_model(our_cfg)
    theirs = build_theirs(their_cfg)
    generator = torch.Generator().manual_seed(4)
    state = ours.state_dict()
    for name, tensor in state.items():
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith("running_mean"):
            tensor.copy_(noise - 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(noise + 0.5)
        elif "norm.weight" in name:
            tensor.copy_(noise * 0.4 + 0.4)  # below 1: deep nets without batch statistics grow
        elif "norm.bias" in name:
            tensor.copy_(noise - 0.5)
        elif case == "no_norm" and "conv3" in name:
            tensor.mul_(0.1)
    with torch.no_grad():
        for name in ("cls_score", "bbox_pred"):
            state[f"roi_heads.box_predictor.{name}.weight"].mul_(HEAD_GAINS.get(str(case), 10.0))
        for name in ("objectness_logits", "anchor_deltas"):
            state[f"proposal_generator.rpn_head.{name}.weight"].mul_(HEAD_GAINS.get(str(case), 5.0))
    theirs.load_state_dict(state)
    return ours, theirs


def make_batch(seed: int = 0, num_boxes: tuple[int, ...] = (3, 2)) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for (height, width), count in zip(SIZES, num_boxes, strict=True):
        limits = torch.tensor([width, height, width, height]) * 1.0
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append(
            {
                "image": image,
                "height": int(height * 1.7),
                "width": int(width * 1.3),
                "gt_boxes": corners.reshape(count, 4) * limits,
                "gt_classes": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            }
        )
    return batch


def in_their_form(batch: list[dict]) -> list[dict]:
    converted = []
    for sample in batch:
        instances = Instances(tuple(sample["image"].shape[-2:]))
        instances.gt_boxes = Boxes(sample["gt_boxes"].clone())
        instances.gt_classes = sample["gt_classes"].clone()
        kept = {key: sample[key] for key in ("image", "height", "width")}
        converted.append({**kept, "instances": instances})
    return converted


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits; all of them must be there."""
    assert list(ours) == list(theirs)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def run_losses(model, batch, seed: int):
    """Losses, gradients, and the random state after a training forward and backward pass."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses, gradients, torch.get_rng_state()


def detections_equal(ours: list[dict], theirs: list[dict]) -> bool:
    return all(
        torch.equal(a["boxes"], b["instances"].pred_boxes.tensor)
        and torch.equal(a["scores"], b["instances"].scores)
        and torch.equal(a["classes"], b["instances"].pred_classes)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_same_seed_gives_the_same_model_and_random_state(case):
    our_cfg, their_cfg = configs(case)
    torch.manual_seed(11)
    theirs = build_theirs(their_cfg)
    state_after = torch.get_rng_state()
    torch.manual_seed(11)
    ours = build_model(our_cfg)
    assert torch.equal(torch.get_rng_state(), state_after)
    assert differing(ours.state_dict(), theirs.state_dict()) == []
    trainable = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in theirs.named_parameters() if p.requires_grad]


def test_same_seed_at_full_width_gives_the_same_333_tensors():
    full = {f"MODEL.RESNETS.{key}": 64 for key in ("STEM_OUT_CHANNELS", "WIDTH_PER_GROUP")}
    our_cfg, their_cfg = configs({**MOCO, **full, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256})
    torch.manual_seed(12)
    theirs = build_theirs(their_cfg)
    torch.manual_seed(12)
    ours = build_model(our_cfg)
    assert len(ours.state_dict()) == 333
    assert differing(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("depth", [18, 34])
def test_detectron2s_own_heads_have_another_res5_but_the_backbone_is_equal(depth):
    """Of its R18-C4 and R34-C4 as they are: no pretrained layer4 fits its bottlenecks."""
    our_cfg, their_cfg = configs({**MOCO, **BASIC, "MODEL.RESNETS.DEPTH": depth})
    their_cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    torch.manual_seed(13)
    theirs = build_theirs(their_cfg)
    torch.manual_seed(13)
    ours = build_model(our_cfg)
    assert differing(ours.backbone.state_dict(), theirs.backbone.state_dict()) == []
    image = torch.randn(1, 3, 93, 117)
    for network in (ours, theirs):
        network.eval()
    with torch.no_grad():
        features = ours.backbone(image), theirs.backbone(image)
        assert torch.equal(features[0]["res4"], features[1]["res4"])
        ours.backbone.res4[1].conv2.norm.bias += 0.01  # control
        assert not torch.equal(ours.backbone(image)["res4"], features[1]["res4"])
    shapes = [tuple(m.roi_heads.res5[0].conv1.weight.shape) for m in (ours, theirs)]
    assert shapes == [(512, 256, 3, 3), (64, 256, 1, 1)]
    assert len(theirs.roi_heads.res5) == 3 and hasattr(theirs.roi_heads.res5[0], "conv3")


@pytest.mark.parametrize("case", CASES)
def test_detections_are_equal_alone_and_in_a_padded_batch(case):
    ours, theirs = pair_of_models(case)
    ours.eval()
    theirs.eval()
    batch = make_batch()
    for images in (batch[:1], batch[1:], batch):
        detected = ours(images)
        with torch.no_grad():
            assert detections_equal(detected, theirs(in_their_form(images)))
        assert all(len(found["scores"]) >= 5 for found in detected)
        assert all(found["scores"].unique().numel() > 3 for found in detected)


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_buffers_and_random_state_are_equal(case):
    ours, theirs = pair_of_models(case)
    for step in range(2):
        batch = make_batch(seed=step)
        losses, gradients, state = run_losses(ours, batch, seed=step)
        their_losses, their_gradients, their_state = run_losses(
            theirs, in_their_form(batch), seed=step
        )
        assert differing(losses, their_losses) == []
        assert differing(gradients, their_gradients) == []
        assert torch.equal(state, their_state)
        assert all(loss > 0 for loss in losses.values())
    assert differing(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("num_boxes", [(0, 2), (0, 0)])
def test_images_without_ground_truth_give_equal_losses(num_boxes):
    ours, theirs = pair_of_models("moco")
    batch = make_batch(num_boxes=num_boxes)
    losses, gradients, _ = run_losses(ours, batch, seed=0)
    their_losses, their_gradients, _ = run_losses(theirs, in_their_form(batch), seed=0)
    assert differing(losses, their_losses) == []
    assert differing(gradients, their_gradients) == []


def _batch_with_flat_boxes() -> list[dict]:
    batch = make_batch()
    flat = torch.tensor([[30.0, 40.0, 30.0, 90.0], [50.0, 60.0, 50.0, 60.0]])
    for sample in batch:
        sample["gt_boxes"] = torch.cat([sample["gt_boxes"], flat])
        sample["gt_classes"] = torch.cat([sample["gt_classes"], torch.tensor([0, 1])])
    return batch


def test_ground_truth_without_an_area_gives_the_same_losses_and_gradients(monkeypatch):
    """Both data paths drop such boxes; given all the same, the heads take them as background."""
    ours, theirs = pair_of_models("moco")
    batch = _batch_with_flat_boxes()
    losses, _, state = run_losses(ours, batch, seed=0)
    their_losses, _, their_state = run_losses(theirs, in_their_form(batch), seed=0)
    assert differing(losses, their_losses) == [] and torch.equal(state, their_state)
    assert all(torch.isfinite(loss) for loss in losses.values())
    monkeypatch.setattr(roi_heads, "overlaps", box_iou)  # control: torchvision's way
    losses, _, _ = run_losses(ours, batch, seed=0)
    assert not torch.isfinite(losses["loss_box_reg"])


def test_no_proposals_at_all_give_equal_results():
    case = {**MOCO, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 1000}
    ours, theirs = pair_of_models(case)
    batch = make_batch()
    losses, _, _ = run_losses(ours, batch, seed=0)  # the ground truth remains
    their_losses, _, _ = run_losses(theirs, in_their_form(batch), seed=0)
    assert differing(losses, their_losses) == []
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        assert detections_equal(ours(batch), theirs(in_their_form(batch)))
    assert all(len(found["scores"]) == 0 for found in ours(batch))


def test_both_refuse_non_finite_proposals_in_training_and_drop_them_in_test():
    ours, theirs = pair_of_models("moco")
    batch = make_batch()
    for model in (ours, theirs):
        # One anchor shape of 15 predicts NaN.
        model.proposal_generator.rpn_head.anchor_deltas.bias.data[7] = float("nan")
    with pytest.raises(NonFiniteError, match="proposals of this rank are NaN or Inf"):
        ours(batch)
    with pytest.raises(FloatingPointError), EventStorage():
        theirs(in_their_form(batch))
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        assert detections_equal(ours(batch), theirs(in_their_form(batch)))


@pytest.mark.parametrize("case", ["moco", "supervised"])
def test_five_sgd_steps_leave_equal_weights(case):
    our_cfg, their_cfg = configs(case)
    ours, theirs = pair_of_models(case)
    optimizer = build_optimizer(our_cfg, ours)
    their_optimizer = build_their_optimizer(their_cfg, theirs)
    scheduler = build_lr_scheduler(their_cfg, their_optimizer)
    for step in range(5):
        batch = make_batch(seed=step)
        run_losses(ours, batch, seed=step)
        set_lr(optimizer, our_cfg, step)
        optimizer.step()
        run_losses(theirs, in_their_form(batch), seed=step)
        their_optimizer.step()
        scheduler.step()
    before = pair_of_models(case)[0].state_dict()
    assert differing(ours.state_dict(), theirs.state_dict()) == []
    assert len(differing(ours.state_dict(), before)) > 50
    own, other = optimizer.state_dict(), their_optimizer.state_dict()
    assert [g["params"] for g in own["param_groups"]] == [
        g["params"] for g in other["param_groups"]
    ]
    for index, entry in own["state"].items():
        assert torch.equal(entry["momentum_buffer"], other["state"][index]["momentum_buffer"])


@pytest.mark.parametrize("case", ["moco", "bn_freeze_3", "supervised"])
def test_precise_batch_norm_is_equal(case):
    ours, theirs = pair_of_models(case)
    before = copy.deepcopy(ours.state_dict())
    batches = [make_batch(seed=seed) for seed in range(3)]
    torch.manual_seed(5)
    update_bn_statistics(ours, batches, num_iters=3)
    torch.manual_seed(5)
    with EventStorage():
        update_bn_stats(theirs, [in_their_form(batch) for batch in batches], num_iters=3)
    assert differing(ours.state_dict(), theirs.state_dict()) == []
    assert bool(differing(ours.state_dict(), before)) == (case != "supervised")


def _round_anchors(model):
    model.proposal_generator.anchor_generator.cell.round_()


def _shift_pooling(model):
    model.roi_heads.pooler.aligned = False


def _smooth_rpn_loss(model):
    model.proposal_generator.smooth_l1_beta = 1 / 9


def _smooth_box_loss(model):
    model.roi_heads.box_predictor.smooth_l1_beta = 1 / 9


@pytest.mark.parametrize(
    "break_it", [_round_anchors, _shift_pooling, _smooth_rpn_loss, _smooth_box_loss]
)
def test_the_comparison_notices_torchvision_s_ways(break_it):
    ours, theirs = pair_of_models("moco")
    break_it(ours)
    batch = make_batch()
    losses, _, _ = run_losses(ours, batch, seed=0)
    their_losses, _, _ = run_losses(theirs, in_their_form(batch), seed=0)
    assert differing(losses, their_losses) != []
    if break_it in (_round_anchors, _shift_pooling):
        ours, theirs = pair_of_models("moco")
        break_it(ours)
        ours.eval()
        theirs.eval()
        with torch.no_grad():
            assert not detections_equal(ours(batch), theirs(in_their_form(batch)))
