"""Runs made by the command lines as people give them: no TRAIN.REFERENCE, nothing made up."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, load_tool

from detection import train_net
from detection.data.shapes import make_shapes_dataset

CLASSES = ("circle", "square", "triangle", "cross")
# Widths that the kernels have: multiples of 32 channels.
C4 = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32, "MODEL.RESNETS.RES2_OUT_CHANNELS": 128,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10, "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64, "SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": "(1,)", "SOLVER.WARMUP_ITERS": 1, "TEST.PRECISE_BN.NUM_ITER": 1,
    "DATALOADER.NUM_WORKERS": 0,
    # What README recommends for a CPU without hardware for bfloat16.
    "MODEL.CHANNELS_LAST": True, "MODEL.COMPILE": "kernels", "SOLVER.AMP.ENABLED": False,
}  # fmt: skip


def ended(main, *words: object) -> int:
    """Exit status of a command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def tool(name: str, *words: object) -> None:
    assert ended(load_tool(name).main, *words) == 0


def pretrain(data: Path, out: Path, *words: object) -> Path:
    """Two epochs of tools/pretrain.py. Left to the defaults: channels last, own kernels, fused SGD,
    fast augmentation; bfloat16 is asked for, since few CPUs have it by default."""
    tool(
        "pretrain", "--config-file", ROOT / "configs/pretrain/moco_v2_200ep.yaml", "--data", data,
        "--output-dir", out, "--device", "cpu", "MODEL.BN_SPLITS", 2, "MOCO.QUEUE_SIZE", 24,
        "DATA.SIZE", 32, "DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 2, "TRAIN.BATCH_SIZE", 8,
        "TRAIN.AMP", True, *words,
    )  # fmt: skip
    return out


def detector(runs: DefaultRuns, out: Path, *words: object, trials: int = 1) -> Path:
    """Trials of detection/train_net.py from the run's converted weights, the built-in engine."""
    pairs = [word for pair in C4.items() for word in pair]
    code = ended(
        train_net.main, "--config-file", ROOT / "configs/demo/detection.yaml", "--engine",
        "embedded", "--device", "cpu", "--trials", trials, *pairs, "DATASETS.VOC_ROOT", runs.voc,
        "MODEL.WEIGHTS", runs.converted, "OUTPUT_DIR", out, *words,
    )  # fmt: skip
    assert code == 0
    return out


def as_before(content: dict) -> dict:
    """A checkpoint's content as it was written until November 2026: everything lies as in the
    run's memory, and the optimizer is said to be fused."""

    def last(tensor):
        if torch.is_tensor(tensor) and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    old = copy.deepcopy(content)
    old["state_dict"] = {name: last(tensor) for name, tensor in old["state_dict"].items()}
    for state in old["optimizer"]["state"].values():
        state.update({name: last(value) for name, value in state.items()})
    for group in old["optimizer"]["param_groups"]:
        group["fused"] = True
    return old


@dataclass(frozen=True)
class DefaultRuns:
    """What the command lines left of one small data set.

    images: train/{a,b} and test/{a,b}; voc: a folder in VOC's format. run: of a ResNet-50 of half
    width; converted: its weights for detection; trials: a detector's OUTPUT_DIR.
    """

    images: Path
    voc: Path
    run: Path
    converted: Path
    trials: Path


def make(base: Path) -> DefaultRuns:
    """Make all of it below `base`; some 15 s of a core."""
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 8), ("test", 4)):
        for channel, name in ((0, "a"), (2, "b")):
            folder = base / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    make_shapes_dataset(
        base / "voc", num_train=12, num_test=4, num_unlabelled=0, size=64, seed=0
    )
    run = pretrain(base / "images", base / "run", "MODEL.WIDTH", 0.5, "KNN.K", 5)
    tool("convert_to_d2", run, base / "moco.pth")
    runs = DefaultRuns(base / "images", base / "voc", run, base / "moco.pth", base / "trials")
    detector(runs, runs.trials, trials=2)
    return runs
