"""The inputs of the parity tests: settings, weights and images, the same for both engines.

Nothing here is random and nothing is stored: weights are a function of a tensor's name and a
seed, images of their index and a seed, by SHAKE-256. So no version of numpy or torch can change
them. Widths are an eighth of ResNet-50's; no image side is a multiple of 16, or a wrong stride
would not show.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
MOCO_YAML = CONFIGS / "pascal_voc_R_50_C4_24k_moco.yaml"
SUPERVISED_YAML = CONFIGS / "pascal_voc_R_50_C4_24k.yaml"
NUM_CLASSES = 3
NUM_STEPS = 5
SIZES = ((69, 93), (83, 61), (53, 107))  # height, width
BOXES = (
    [[8.25, 5.5, 52.75, 44.25], [40.5, 20.25, 90.0, 66.5], [60.25, 3.0, 79.5, 25.75]],
    [[3.0, 10.5, 40.25, 70.75], [22.5, 45.25, 58.75, 80.5]],
    [[10.25, 8.5, 35.5, 47.25], [50.75, 4.25, 104.5, 49.0]],
)
CLASSES = ([0, 2, 1], [1, 0], [2, 1])
CUT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[11, 23, 43]],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 90,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 70,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 24,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 12,
    "TEST.DETECTIONS_PER_IMAGE": 12,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.STEPS": (4,),
    "SOLVER.MAX_ITER": 10,
    "SOLVER.BASE_LR": 0.005,
}
# Images are not divided by their standard deviation there.
RAW_IMAGES = {"stem.conv1.weight": 1 / 60}
TIED = {"objectness_logits.weight": 0.0, "cls_score.weight": 0.0}


# Variance of a layer's output for inputs of variance 1; elsewhere what keeps the network's scale.
GAINS = {
    "stem.conv1.weight": 1.0,
    "rpn_head.conv.weight": 1.0,
    "objectness_logits.weight": 32.0,
    "anchor_deltas.weight": 0.05,
    "cls_score.weight": 16.0,
    "bbox_pred.weight": 16.0,
}


@dataclass(frozen=True)
class Case:
    """What one parity case runs.

    Args:
        settings: keys on top of the YAML file and `CUT`.
        gains: end of a tensor's name -> what it is multiplied with.
        boxes, classes: ground truth of each image.
        gated: no ReLU is near its kink, so that gradients are continuous and another CPU's
            rounding stays rounding; else (lively) ReLUs open and close from pixel to pixel.
        seed: of weights and images; chosen so that no discrete choice hangs on a last bit.
    """

    yaml: Path = MOCO_YAML
    settings: dict = field(default_factory=dict)
    gains: dict = field(default_factory=dict)
    boxes: tuple = BOXES
    classes: tuple = CLASSES
    gated: bool = True
    constant_images: bool = False
    phases: tuple[str, ...] = ("detect", "train")
    seed: int = 0


CASES = {
    "moco": Case(phases=("detect", "train", "steps", "precise_bn")),
    "supervised_yaml": Case(
        yaml=SUPERVISED_YAML,
        gains=RAW_IMAGES,
        phases=("detect", "train", "steps", "precise_bn"),
    ),
    "supervised_frozen_bn": Case(
        yaml=SUPERVISED_YAML,
        settings={"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.BACKBONE.FREEZE_AT": 2},
        gains=RAW_IMAGES,
        phases=("detect", "train", "steps"),
    ),
    "supervised_bn": Case(
        yaml=SUPERVISED_YAML,
        settings={"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 2},
        gains=RAW_IMAGES,
        phases=("detect", "train", "precise_bn"),
    ),
    "class_agnostic": Case(settings={"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}),
    "no_ground_truth": Case(
        boxes=(BOXES[0], [], BOXES[2]), classes=(CLASSES[0], [], CLASSES[2]), phases=("train",)
    ),
    "thin_box": Case(
        boxes=([[30.25, 10.5, 30.75, 50.0]], [[5.25, 40.5, 50.0, 41.5]], BOXES[2]),
        classes=([1], [2], CLASSES[2]),
        phases=("train",),
    ),
    "duplicate_boxes": Case(
        boxes=(BOXES[0] + BOXES[0], [BOXES[1][0]] * 3, BOXES[2]),
        classes=(CLASSES[0] + [1, 2, 0], [2, 2, 0], CLASSES[2]),
        phases=("train",),
    ),
    "tied_scores": Case(gains=TIED),
    "tied_constant_images": Case(gains=TIED, constant_images=True),
    "saturated_logits": Case(gains={"objectness_logits.bias": 200.0}),
}
LIVELY_CASES = {name: replace(case, gated=False) for name, case in CASES.items()}
# Ties that the convolutions must compute alike at every position exist on one platform only.
GOLDEN_CASES = [name for name in CASES if name != "tied_constant_images"]


def config_pairs(case: Case, changes: dict | None = None) -> list:
    """KEY, VALUE, KEY, VALUE ... on top of `case.yaml`."""
    settings = {**CUT, **case.settings, **(changes or {})}
    return [item for pair in settings.items() for item in pair]


def uniform(name: str, seed: int, count: int) -> np.ndarray:
    """`count` float64 numbers in (-1, 1), a function of name and seed alone."""
    words = np.frombuffer(hashlib.shake_256(f"{seed}:{name}".encode()).digest(4 * count), "<u4")
    return (words.astype(np.float64) + 0.5) * 2.0**-31 - 1.0


def named_weights(state: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """A tensor for every entry of a state dict (Detectron2's names)."""
    return {name: _named_tensor(name, tensor, case) for name, tensor in state.items()}


def _named_tensor(name: str, like: torch.Tensor, case: Case) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    values = uniform(name, case.seed, like.numel()).reshape(tuple(like.shape))
    if name.endswith("running_mean"):
        values = 0.2 * values
    elif name.endswith("running_var"):
        values = 1.0 + 0.4 * values
    elif name.endswith("norm.weight"):
        values = _norm_weight(name, values, case)
    elif name.endswith("bias"):
        values = _bias(name, values, case)
    else:
        values = _linear_weight(name, values, case)
    for ending, gain in case.gains.items():
        if name.endswith(ending):
            values = gain * values
    return torch.from_numpy(values.astype(np.float32))


def _norm_weight(name: str, values: np.ndarray, case: Case) -> np.ndarray:
    if name.endswith("conv3.norm.weight"):
        return 0.2 + 0.05 * values  # residual branches are weak, or activations would grow
    if name.endswith("res5.norm.weight") or not case.gated:
        return 1.0 + 0.2 * values
    return 0.5 + 0.1 * values


def _bias(name: str, values: np.ndarray, case: Case) -> np.ndarray:
    """Gated: ReLUs are open or closed by four standard deviations, two channels by two."""
    ends = ("norm.bias", "rpn_head.conv.bias")
    if not case.gated or not name.endswith(ends) or name.endswith("res5.norm.bias"):
        return 0.1 * values
    is_open = np.arange(len(values)) // 2 % 2 == 0
    if name.endswith("conv3.norm.bias"):
        return np.where(is_open, 0.0, -1.5) + 0.1 * values
    return np.where(is_open, 2.0, -4.0) + 0.1 * values


def _linear_weight(name: str, values: np.ndarray, case: Case) -> np.ndarray:
    if values.shape[1] % 2 == 0:
        # Activations are positive: weights that cancel in pairs keep sums around zero.
        values[:, 1::2] = -values[:, 0::2]
    gain = next((g for end, g in GAINS.items() if name.endswith(end)), 7.0 if case.gated else 2.0)
    return math.sqrt(3.0 * gain / math.prod(values.shape[1:])) * values


def make_batch(case: Case, indices: tuple[int, ...] = (0, 1, 2), step: int = 0) -> list[dict]:
    """The images `indices` with their ground truth, in the embedded engine's form."""
    batch = []
    for index in indices:
        height, width = SIZES[index]
        batch.append(
            {
                "image": _image(case, index, step),
                "height": int(height * 1.7),
                "width": int(width * 1.3),
                "gt_boxes": torch.tensor(case.boxes[index]).reshape(-1, 4),
                "gt_classes": torch.tensor(case.classes[index], dtype=torch.int64),
            }
        )
    return batch


def _image(case: Case, index: int, step: int) -> torch.Tensor:
    """Patches of nine pixels and noise: [3, height, width] uint8."""
    height, width = SIZES[index]
    if case.constant_images:
        return torch.full((3, height, width), 40 + 50 * index, dtype=torch.uint8)
    rows, columns = -(-height // 9), -(-width // 9)
    name = f"image {index} of step {step}"
    patches = uniform(f"{name}, patches", case.seed, 3 * rows * columns)
    patches = patches.reshape(3, rows, columns).repeat(9, axis=1).repeat(9, axis=2)
    noise = uniform(f"{name}, noise", case.seed, 3 * height * width).reshape(3, height, width)
    values = 127.5 + 80.0 * patches[:, :height, :width] + 40.0 * noise
    return torch.from_numpy(np.rint(values).astype(np.uint8))
