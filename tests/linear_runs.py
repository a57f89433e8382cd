"""The smallest linear classification the tests share."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from parity.moco_sides import named_state

from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo, tensors_digest
from moco.evaluation.config import load_linear_config
from moco.evaluation.linear import LinearTrainer
from moco.evaluation.linear_data import choose_labels
from moco.evaluation.splits import find_splits
from moco.evaluation.weights import read_pretrained
from moco.models.backbone import build_backbone
from moco.training.checkpoint import read_torch_file

OVERRIDES = {
    "DATA.SIZE": "16",
    "DATA.NUM_WORKERS": "0",
    "TRAIN.EPOCHS": "3",
    "TRAIN.BATCH_SIZE": "12",  # of 32 images: 12, 12 and 8
    "TRAIN.LR": "0.003",
    "TRAIN.MILESTONES": "(2,)",
    "LOG.PERIOD": "1",
    "EVAL.BATCH_SIZE": "3",
}
STEPS_PER_EPOCH, TOTAL_STEPS, LAST = 3, 9, "checkpoint_0002.pth.tar"


def overrides(**changes: object) -> list[str]:
    """KEY VALUE words; a change is written KEY__SUBKEY=value."""
    merged = dict(OVERRIDES)
    merged.update({key.replace("__", "."): str(value) for key, value in changes.items()})
    return [word for pair in merged.items() for word in pair]


def config(**changes: object) -> CfgNode:
    return load_linear_config(None, overrides(**changes))


def write_weights(folder: Path) -> str:
    """A checkpoint of MoCo as the reference writes them, made of its tensors' names."""
    network = build_backbone("resnet18", num_classes=8, width=0.125, stem="cifar")
    state = named_state(network.state_dict(), 0)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    path = folder / "weights.pth.tar"
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)
    return str(path)


def trainer(
    images: Path,
    weights: str,
    folder: Path,
    process: ProcessInfo | None = None,
    *,
    resume: bool = False,
    **changes: object,
) -> LinearTrainer:
    cfg = config(**changes)
    train, test = find_splits(str(images))
    return LinearTrainer(
        cfg, read_pretrained(weights), choose_labels(train, cfg.DATA), test, folder,
        process or tiny.alone(), resume=resume, say=lambda line: None,
    )  # fmt: skip


def digest(folder: Path, name: str = LAST) -> str:
    """Over weights, optimizer, position and scores of a checkpoint."""
    content = read_torch_file(folder / name)
    tensors = dict(content["state_dict"])
    for index, entry in content["optimizer"]["state"].items():
        tensors.update({f"optimizer.{index}.{n}": torch.as_tensor(v) for n, v in entry.items()})
    extra = content["extra"]
    return f"{content['epoch']}-{extra['step']}-{extra['curve']}-{tensors_digest(tensors)}"
