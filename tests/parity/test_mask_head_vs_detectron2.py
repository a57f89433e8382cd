"""The mask head against Detectron2's: every comparison is bitwise, on a CPU in fp32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import detection_utils  # noqa: E402
from detectron2.data.transforms import HFlipTransform, ResizeTransform, TransformList  # noqa: E402
from detectron2.evaluation.coco_evaluation import instances_to_coco_json  # noqa: E402
from detectron2.layers import paste_masks_in_image  # noqa: E402
from detectron2.modeling import build_model as build_theirs  # noqa: E402
from detectron2.structures import BitMasks, BoxMode, PolygonMasks  # noqa: E402
from parity.cases import config_pairs  # noqa: E402
from parity.detectron2_side import Detectron2  # noqa: E402
from parity.mask_cases import (  # noqa: E402
    MASK_CASES,
    liven_masks,
    mask_batch,
    random_polygons,
    segmentation,
    with_other,
)
from parity.observed import Embedded  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.data.loader import _ground_truth  # noqa: E402
from detection.engines.embedded import mask_head  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from detection.engines.embedded.mask_head import crop_masks, encode_masks, paste_mask  # noqa: E402

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits; all of them must be there."""
    assert list(ours) == list(theirs)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def pair(name: str):
    case = MASK_CASES[name]
    sides = Embedded(case), Detectron2(case)
    for side in sides:
        liven_masks(side.model)
    return *sides, case


def in_their_form(side: Detectron2, batch: list[dict]) -> list[dict]:
    converted = side.batch(batch)
    for sample, theirs in zip(batch, converted, strict=True):
        masks = sample["gt_masks"]
        kind = BitMasks if isinstance(masks, torch.Tensor) else PolygonMasks
        theirs["instances"].gt_masks = kind(copy.deepcopy(masks))
    return converted


def train_once(side, batch: list[dict], seed: int):
    side.model.train()
    side.model.zero_grad()
    torch.manual_seed(seed)
    losses = side.run(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in side.model.named_parameters() if p.requires_grad}
    return losses, gradients, torch.get_rng_state()


FULL_WIDTH = {
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 256,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 64,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 256,
    "MODEL__ROI_HEADS__NUM_CLASSES": 80,
}
MODELS = {
    name: MASK_CASES[name] for name in ("polygon", "class_agnostic", "convolutions", "supervised")
} | {"full_width": with_other(MASK_CASES["polygon"], **FULL_WIDTH)}


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_gives_the_same_model_and_random_state(name):
    case = MODELS[name]
    their_cfg = get_cfg()
    their_cfg.merge_from_file(str(case.yaml))
    their_cfg.merge_from_list(config_pairs(case))
    torch.manual_seed(11)
    theirs = build_theirs(their_cfg)
    state_after = torch.get_rng_state()
    torch.manual_seed(11)
    ours = build_model(load_detection_config(str(case.yaml), config_pairs(case)))
    assert torch.equal(torch.get_rng_state(), state_after)
    assert differing(ours.state_dict(), theirs.state_dict()) == []
    of_masks = [key for key in ours.state_dict() if key.startswith("roi_heads.mask_head.")]
    assert len(of_masks) == (8 if name == "convolutions" else 4)
    trainable = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in theirs.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", MASK_CASES)
def test_losses_gradients_and_random_state_are_equal(name):
    ours, theirs, case = pair(name)
    for step, indices in enumerate(((0, 1, 2), (0,))):
        batch = mask_batch(case, indices, step)
        losses, gradients, state = train_once(ours, batch, seed=step)
        their_losses, their_gradients, their_state = train_once(
            theirs, in_their_form(theirs, batch), seed=step
        )
        assert "loss_mask" in losses
        assert differing(losses, their_losses) == []
        assert differing(gradients, their_gradients) == []
        assert torch.equal(state, their_state)
        has_objects = any(case.boxes[index] for index in indices)
        assert (losses["loss_mask"] > 0) == has_objects
        assert (gradients["roi_heads.mask_head.deconv.weight"].abs().sum() > 0) == has_objects


@pytest.mark.parametrize("name", ["polygon", "bitmask", "supervised"])
def test_five_sgd_steps_leave_equal_weights(name):
    ours, theirs, case = pair(name)
    before = copy.deepcopy(ours.model.state_dict())
    our_step, their_step = ours.start_training(), theirs.start_training()
    for step in range(5):
        batch = mask_batch(case, step=step)
        train_once(ours, batch, seed=step)
        train_once(theirs, in_their_form(theirs, batch), seed=step)
        assert our_step(step) == their_step(step)
    assert differing(ours.model.state_dict(), theirs.model.state_dict()) == []
    moved = differing(ours.model.state_dict(), before)
    assert {n for n in before if "mask_head" in n} <= set(moved)


def pasted(found: dict, sample: dict, **options) -> torch.Tensor:
    height, width = sample["height"], sample["width"]
    masks = [
        paste_mask(probs, box, height, width, **options)
        for probs, box in zip(found["mask_probs"], found["boxes"], strict=True)
    ]
    return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def detect(ours: Embedded, theirs: Detectron2, batch: list[dict]):
    """Our outputs, theirs, and their soft masks."""
    ours.model.eval()
    theirs.model.eval()
    with torch.no_grad():
        found = ours.run(batch)
        soft = theirs.model.inference(theirs.batch(batch), do_postprocess=False)
        their_found = [output["instances"] for output in theirs.run(theirs.batch(batch))]
    return found, their_found, [one.pred_masks[:, 0] for one in soft]


@pytest.mark.parametrize("name", ["polygon", "class_agnostic", "convolutions", "supervised"])
def test_masks_are_equal_alone_and_in_a_padded_batch(name):
    ours, theirs, case = pair(name)
    for indices in ((0,), (1,), (2,), (0, 1, 2)):
        batch = mask_batch(case, indices)
        for sample, found, theirs_one, soft in zip(
            batch, *detect(ours, theirs, batch), strict=True
        ):
            assert torch.equal(found["boxes"], theirs_one.pred_boxes.tensor)
            assert torch.equal(found["classes"], theirs_one.pred_classes)
            assert torch.equal(found["mask_probs"], soft)
            assert torch.equal(pasted(found, sample), theirs_one.pred_masks)
            rles = encode_masks(
                found["mask_probs"], found["boxes"], sample["height"], sample["width"]
            )
            expected = [item["segmentation"] for item in instances_to_coco_json(theirs_one, 1)]
            assert [{**rle, "counts": rle["counts"].decode()} for rle in rles] == expected
            # Neither nothing nor everything: else the comparison would say little.
            assert len(rles) > 3 and 0.01 < theirs_one.pred_masks.float().mean() < 0.9


def test_no_detections_give_no_masks():
    ours, theirs, case = pair("polygon")
    ours.model.roi_heads.box_predictor.score_threshold = 1.1
    theirs.model.roi_heads.box_predictor.test_score_thresh = 1.1
    batch = mask_batch(case)
    for sample, found, theirs_one, soft in zip(batch, *detect(ours, theirs, batch), strict=True):
        assert len(theirs_one) == len(found["boxes"]) == 0
        assert found["mask_probs"].shape == soft.shape == (0, 14, 14)
        assert encode_masks(found["mask_probs"], found["boxes"], 3, 4) == []
        assert pasted(found, sample).shape == theirs_one.pred_masks.shape


def random_boxes(rng: np.random.Generator, count: int, scale: float) -> torch.Tensor:
    """Some of them thinner than the 0.1 pixels below which Detectron2 divides by 0.1."""
    corners = np.sort(rng.uniform(0, scale, (count, 2, 2)), axis=1).reshape(count, 4)
    corners[::7, 2] = corners[::7, 0] + rng.uniform(0.001, 0.2, len(corners[::7]))
    corners[::5, 3] = corners[::5, 1] + rng.uniform(0.001, 0.2, len(corners[::5]))
    return torch.from_numpy(corners.astype(np.float32))


def test_targets_of_polygons_are_equal_on_random_cases():
    rng = np.random.default_rng(0)
    num_set = 0
    for scale in (3.0, 50.0, 700.0):
        masks = [random_polygons(rng, scale) for _ in range(40)] + [[]]
        index = torch.from_numpy(rng.integers(0, len(masks), 200))
        boxes = random_boxes(rng, 200, scale)
        ours = crop_masks(masks, index, boxes, 14)
        theirs = PolygonMasks(copy.deepcopy(masks))[index].crop_and_resize(boxes, 14)
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        num_set += int(ours.sum())
    assert 0.1 < num_set / (3 * 200 * 14 * 14) < 0.9


def test_targets_of_bit_masks_are_equal_on_random_cases():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 61, 83, generator=generator) > 0.4
    rng = np.random.default_rng(1)
    index = torch.from_numpy(rng.integers(0, 20, 200))
    boxes = random_boxes(rng, 200, 61.0)
    ours = crop_masks(masks, index, boxes, 14)
    theirs = BitMasks(masks)[index].crop_and_resize(boxes, 14)
    assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert 0.1 < ours.float().mean() < 0.9


def test_pasted_masks_are_equal_on_random_cases():
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(2)
    for height, width in ((1, 1), (5, 90), (47, 33), (333, 500)):
        probs = torch.rand(60, 14, 14, generator=generator)
        boxes = random_boxes(rng, 60, float(min(height, width)))
        boxes = boxes.clamp(max=torch.tensor([width, height, width, height]))
        theirs = paste_masks_in_image(probs, boxes, (height, width))
        ours = [
            paste_mask(prob, box, height, width) for prob, box in zip(probs, boxes, strict=True)
        ]
        assert torch.equal(torch.stack(ours), theirs)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("flip", [False, True])
def test_ground_truth_moves_as_theirs(mask_format, flip):
    old, new = (69, 93), (101, 137)
    rng = np.random.default_rng(3)
    boxes = random_boxes(rng, 20, 69.0).double().tolist()
    boxes[4] = [93.0, 10.0, 93.5, 20.0]  # outside: empty once clipped
    annotations = []
    for number, box in enumerate(boxes):
        if mask_format == "bitmask":
            mask = segmentation(box, number % 3, old)  # thin ones have no pixel
        else:
            mask = [polygon.tolist() for polygon in random_polygons(rng, 69.0)]
        annotations.append({"bbox": box, "category_id": number % 3, "segmentation": mask})
    if mask_format == "polygon":
        annotations[2]["segmentation"] = []
    transforms = [ResizeTransform(*old, *new)] + ([HFlipTransform(new[1])] if flip else [])
    moved = [
        detection_utils.transform_instance_annotations(
            {**copy.deepcopy(annotation), "bbox_mode": BoxMode.XYXY_ABS},
            TransformList(transforms),
            new,
        )
        for annotation in annotations
    ]
    theirs = detection_utils.filter_empty_instances(
        detection_utils.annotations_to_instances(moved, new, mask_format=mask_format)
    )
    ours = _ground_truth(annotations, (old, new, flip), mask_format)
    assert 10 < len(theirs) < 20
    assert torch.equal(ours["gt_boxes"], theirs.gt_boxes.tensor)
    assert torch.equal(ours["gt_classes"], theirs.gt_classes)
    if mask_format == "bitmask":
        assert torch.equal(ours["gt_masks"], theirs.gt_masks.tensor)
        return
    for mine, other in zip(ours["gt_masks"], theirs.gt_masks.polygons, strict=True):
        assert len(mine) == len(other)
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
        assert all(a.dtype == b.dtype == np.float64 for a, b in zip(mine, other, strict=True))


def test_polygons_of_whole_numbers_stay_exact_here_and_are_truncated_there():
    polygon = [1, 2, 30, 2, 30, 33]
    their_move = ResizeTransform(40, 60, 55, 83)
    moved = their_move.apply_polygons([np.asarray(polygon).reshape(-1, 2)])[0].reshape(-1)
    box = {"bbox": [1.0, 2.0, 30.0, 33.0], "category_id": 0, "segmentation": [polygon]}
    truth = _ground_truth([box], ((40, 60), (55, 83), False), "polygon")
    assert np.array_equal(np.trunc(truth["gt_masks"][0][0]), moved)
    assert not np.array_equal(truth["gt_masks"][0][0], moved)


def test_negative_control_pooling_without_alignment_is_noticed():
    ours, theirs, case = pair("polygon")
    batch = mask_batch(case)
    ours.model.roi_heads.pooler.aligned = False
    losses, _, _ = train_once(ours, batch, seed=0)
    their_losses, _, _ = train_once(theirs, in_their_form(theirs, batch), seed=0)
    assert "loss_mask" in differing(losses, their_losses)
    found, _, soft = detect(ours, theirs, batch)
    assert not torch.equal(found[0]["mask_probs"], soft[0])


def test_negative_control_another_threshold_is_noticed():
    ours, theirs, case = pair("polygon")
    batch = mask_batch(case)
    found, their_found, _ = detect(ours, theirs, batch)
    assert torch.equal(pasted(found[0], batch[0]), their_found[0].pred_masks)
    assert not torch.equal(pasted(found[0], batch[0], threshold=0.4), their_found[0].pred_masks)


def test_negative_control_the_mask_of_another_class_is_noticed(monkeypatch):
    ours, theirs, case = pair("polygon")
    own = mask_head._of_class
    monkeypatch.setattr(
        mask_head, "_of_class", lambda logits, classes: own(logits, (classes + 1) % 3)
    )
    batch = mask_batch(case)
    losses, _, _ = train_once(ours, batch, seed=0)
    their_losses, _, _ = train_once(theirs, in_their_form(theirs, batch), seed=0)
    assert differing(losses, their_losses) == ["loss_mask"]
    found, _, soft = detect(ours, theirs, batch)
    assert not torch.equal(found[0]["mask_probs"], soft[0])
