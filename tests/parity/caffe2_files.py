"""Files as Detectron2's model zoo holds them: a ResNet-50 under Caffe2's names, at an eighth width.

Two layouts exist. "zoo" is Detectron2's own MSRA/R-50.pkl: norms with running statistics, and
`conv1_b` and `fc1000_*` beside the backbone. "fused" is Detectron's older file of that name: norms
are a scale and a bias, each convolution has a bias, and there is momentum.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

STEM, RES2, WIDTH = 8, 32, 8
LAYOUTS = ("zoo", "fused")
SETTINGS = {  # of a detector that these files fit
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": STEM,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": RES2,
    "MODEL.RESNETS.WIDTH_PER_GROUP": WIDTH,
}


def convolutions() -> dict[str, tuple[int, int, int]]:
    """Caffe2's name of each of the 53 -> (channels out, channels in, kernel side)."""
    found = {"conv1": (STEM, 3, 7)}
    channels = STEM
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        width, out = WIDTH * 2 ** (stage - 2), RES2 * 2 ** (stage - 2)
        for block in range(blocks):
            start = f"res{stage}_{block}_branch"
            if block == 0:
                found[f"{start}1"] = (out, channels, 1)
            found[f"{start}2a"] = (width, channels, 1)
            found[f"{start}2b"] = (width, width, 3)
            found[f"{start}2c"] = (out, width, 1)
            channels = out
    return found


def backbone(layout: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        arrays[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)

    for name, (out, channels, side) in convolutions().items():
        norm = "res_conv1_bn" if name == "conv1" else f"{name}_bn"
        add(f"{name}_w", out, channels, side, side)
        if layout == "zoo":
            for entry in ("beta", "gamma", "running_mean", "running_var"):
                add(f"{norm}_{entry}", out)
        else:
            add(f"{norm}_s", out)
            add(f"{norm}_b", out)
            add(f"{name}_w_momentum", out, channels, side, side)
        if layout == "fused" or name == "conv1":
            add(f"{name}_b", out)
    add("fc1000_w", 1000, RES2 * 8)
    add("fc1000_b", 1000)
    return arrays


def heads(num_classes: int, seed: int = 1) -> dict[str, np.ndarray]:
    """RPN, box predictor and mask head of Detectron's C4 detectors; class 0 is the background."""
    rng = np.random.default_rng(seed)
    res4, res5, anchors, classes = RES2 * 4, RES2 * 8, 15, num_classes + 1
    shapes = {
        "conv_rpn": ((res4, res4, 3, 3), res4),
        "rpn_cls_logits": ((anchors, res4, 1, 1), anchors),
        "rpn_bbox_pred": ((4 * anchors, res4, 1, 1), 4 * anchors),
        "cls_score": ((classes, res5), classes),
        "bbox_pred": ((4 * classes, res5), 4 * classes),
        "conv5_mask": ((res5, 256, 2, 2), 256),
        "mask_fcn_logits": ((classes, 256, 1, 1), classes),
    }
    arrays = {}
    for name, (weight, bias) in shapes.items():
        arrays[f"{name}_w"] = rng.normal(size=weight).astype(np.float32)
        arrays[f"{name}_b"] = rng.normal(size=bias).astype(np.float32)
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray], wrapper: str = "plain") -> Path:
    """`wrapper`: "plain" (the dict alone), "author" (Detectron2's form), "blobs" (Detectron's)."""
    content = {
        "plain": arrays,
        "author": {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True},
        "blobs": {"blobs": arrays, "cfg": "MODEL:\n  TYPE: generalized_rcnn\n"},
    }[wrapper]
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path
