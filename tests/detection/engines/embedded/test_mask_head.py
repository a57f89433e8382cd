from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detection.config import get_defaults
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.mask_head import (
    MaskHead,
    build_mask_head,
    crop_masks,
    encode_masks,
    mask_loss,
    paste_mask,
)
from moco.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MASKS = {"MODEL__MASK_ON": True, "MODEL__ROI_MASK_HEAD__CONV_DIM": 8}


def box_polygon(box) -> list[np.ndarray]:
    x0, y0, x1, y1 = box
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


@pytest.fixture
def mask_batch(batch):
    for sample in batch:
        sample["gt_masks"] = [box_polygon(box) for box in sample["gt_boxes"].tolist()]
    return batch


def test_shapes_and_names():
    head = MaskHead(12, width=8, num_convs=0, num_masks=3)
    assert list(head.state_dict()) == [
        "deconv.weight",
        "deconv.bias",
        "predictor.weight",
        "predictor.bias",
    ]
    assert head(torch.randn(5, 12, 7, 7)).shape == (5, 3, 14, 14)
    assert head(torch.randn(0, 12, 7, 7)).shape == (0, 3, 14, 14)
    deeper = MaskHead(12, width=8, num_convs=2, num_masks=1)
    assert list(deeper.state_dict())[:3] == [
        "mask_fcn1.weight",
        "mask_fcn1.bias",
        "mask_fcn2.weight",
    ]
    assert deeper(torch.randn(5, 12, 7, 7)).shape == (5, 1, 14, 14)
    probs = head.probabilities(torch.randn(5, 12, 7, 7), torch.tensor([0, 2, 1, 1, 0]))
    assert probs.shape == (5, 14, 14) and ((probs > 0) & (probs < 1)).all()


def test_half_precision_ends_at_the_logits():
    head = MaskHead(12, width=8, num_convs=0, num_masks=3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.randn(4, 12, 7, 7).bfloat16())
    assert logits.dtype == torch.float32


def test_loss_worked_by_hand():
    logits = torch.zeros(2, 3, 1, 2)
    targets = torch.tensor([[[True, False]], [[False, False]]])
    classes = torch.tensor([1, 2])
    assert mask_loss(logits, classes, targets).item() == pytest.approx(math.log(2))
    logits[0, 1, 0] = torch.tensor([5.0, -5.0])  # right on both pixels
    logits[1, 2, 0] = torch.tensor([2.0, -40.0])  # wrong by 2, right
    logits[:, 0] = 77.0  # no region has class 0
    wanted = (2 * math.log1p(math.exp(-5)) + math.log1p(math.exp(2)) + 0) / 4
    assert mask_loss(logits, classes, targets).item() == pytest.approx(wanted)
    agnostic = mask_loss(logits[:, 1:2], classes, targets).item()
    assert agnostic == pytest.approx((2 * math.log1p(math.exp(-5)) + 2 * math.log(2)) / 4)


def test_without_foreground_the_loss_is_zero_with_a_gradient(tiny_cfg, mask_batch):
    head = MaskHead(12, width=8, num_convs=0, num_masks=3)
    no_class = torch.zeros(0, dtype=torch.int64)
    loss = mask_loss(head(torch.zeros(0, 12, 7, 7)), no_class, torch.zeros(0, 14, 14))
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(p.grad.abs().sum()) == 0.0 for p in head.parameters())
    for sample in mask_batch:
        sample["gt_boxes"], sample["gt_classes"] = torch.zeros(0, 4), no_class
        sample["gt_masks"] = []
    model = build_model(tiny_cfg(**MASKS))
    losses = model(mask_batch)
    sum(losses.values()).backward()
    assert losses["loss_mask"].item() == 0.0 and losses["loss_cls"].item() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_targets_worked_by_hand():
    # The left half of a box of 8 x 4 pixels at (10, 20), as 4 x 4 pixels.
    masks = [box_polygon((0, 0, 1, 1)), box_polygon((10, 20, 14, 24))]
    boxes = torch.tensor([[10.0, 20.0, 18.0, 24.0]])
    left_half = [[True, True, False, False]] * 4
    assert crop_masks(masks, torch.tensor([1]), boxes, 4).tolist() == [left_half]
    bitmask = torch.zeros(2, 30, 30, dtype=torch.bool)
    bitmask[1, 20:24, 10:14] = True
    assert crop_masks(bitmask, torch.tensor([1]), boxes, 4).tolist() == [left_half]
    assert crop_masks(masks, torch.tensor([0]), boxes, 4).sum() == 0
    # An object in several pieces; the input stays as it is.
    pieces = [box_polygon((10, 20, 12, 24)) + box_polygon((16, 20, 18, 24))]
    before = [piece.copy() for piece in pieces[0]]
    outer = crop_masks(pieces, torch.tensor([0]), boxes, 4)
    assert outer.tolist() == [[[True, False, False, True]] * 4]
    assert all(np.array_equal(a, b) for a, b in zip(before, pieces[0], strict=True))
    for nothing in (masks, bitmask):
        assert crop_masks(nothing, torch.zeros(0).long(), boxes[:0], 4).shape == (0, 4, 4)


def pasted_by_hand(probs: np.ndarray, box, height: int, width: int) -> np.ndarray:
    """Every pixel centre of the image, looked up in the mask bilinearly, in float64."""
    side = len(probs)
    padded = np.pad(probs, 1)
    out = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            if not (-1 < x < side and -1 < y < side):
                continue
            i, j = math.floor(y), math.floor(x)
            across = padded[i + 1 : i + 3, j + 1] * (1 - (x - j)) + padded[i + 1 : i + 3, j + 2] * (
                x - j
            )
            out[row, column] = across[0] * (1 - (y - i)) + across[1] * (y - i)
    return out


def test_pasting_one_to_one_gives_the_mask_itself():
    probs = torch.zeros(4, 4)
    probs[1:3, :2] = 1.0
    box = torch.tensor([3.0, 5.0, 7.0, 9.0])
    mask = paste_mask(probs, box, 11, 8)
    assert mask.shape == (11, 8) and mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[6, 3], [6, 4], [7, 3], [7, 4]]
    assert paste_mask(torch.full((4, 4), 0.5), box, 11, 8).sum() == 16


def test_pasting_equals_sampling_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for box in ([2.3, 1.2, 19.6, 12.9], [0.0, 0.0, 23.0, 17.0], [5.2, 6.0, 5.9, 16.5]):
        probs = rng.random((14, 14), dtype=np.float32)
        wanted = pasted_by_hand(probs, box, 17, 23)
        sure = np.abs(wanted - 0.5) > 1e-4
        mask = paste_mask(torch.from_numpy(probs), torch.tensor(box), 17, 23).numpy()
        assert np.array_equal(mask[sure], (wanted >= 0.5)[sure]) and sure.mean() > 0.9
        lower = paste_mask(torch.from_numpy(probs), torch.tensor(box), 17, 23, threshold=0.3)
        assert lower.sum() > mask.sum()


def test_encoded_masks_decode_to_the_pasted_ones():
    probs = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 3.0, 30.0, 20.0], [0.0, 0.0, 5.0, 5.0], [10.0, 1.0, 39.0, 24.0]])
    encoded = encode_masks(probs, boxes, 25, 40)
    assert [rle["size"] for rle in encoded] == [[25, 40]] * 3
    for rle, prob, box in zip(encoded, probs, boxes, strict=True):
        mask = paste_mask(prob, box, 25, 40).numpy()
        assert isinstance(rle["counts"], bytes)
        assert np.array_equal(coco_mask.decode(rle).astype(bool), mask)
    assert encode_masks(probs[:0], boxes[:0], 25, 40) == []


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_detector_learns_and_predicts_masks(tiny_cfg, mask_batch, agnostic):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**MASKS, MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=agnostic))
    losses = model(mask_batch)
    assert list(losses)[:3] == ["loss_cls", "loss_box_reg", "loss_mask"]
    # Predictions start at zero: log 2 a pixel.
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.02)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "mask_head" in n}
    assert len(gradients) == 4
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients.values())
    model.eval()
    for found in model(mask_batch):
        assert found["mask_probs"].shape == (len(found["boxes"]), 14, 14)
        assert len(found["boxes"]) > 0


def test_the_mask_head_improves_its_loss_on_one_batch(tiny_cfg, mask_batch):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**MASKS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = []
    for _ in range(20):  # processors round differently: after 12 some are above the bound
        torch.manual_seed(1)
        loss = model(mask_batch)["loss_mask"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_training_in_bfloat16_gives_close_losses(tiny_cfg, mask_batch):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**MASKS))
    torch.manual_seed(1)
    exact = model(mask_batch)["loss_mask"]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(mask_batch)["loss_mask"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)


def test_without_masks_there_is_no_head(tiny_cfg, batch):
    model = build_model(tiny_cfg())
    assert model.roi_heads.mask_head is None
    assert not any("mask_head" in name for name in model.state_dict())
    assert "loss_mask" not in model(batch)


def test_another_head_is_refused():
    cfg = get_defaults()
    cfg.MODEL.MASK_ON = True
    for key, value in (("NAME", "PointRendMaskHead"), ("NORM", "GN")):
        changed = cfg.clone()
        changed.MODEL.ROI_MASK_HEAD[key] = value
        with pytest.raises(ConfigError, match=f"ROI_MASK_HEAD.{key} is '{value}'; allowed: "):
            build_mask_head(changed, 32)
