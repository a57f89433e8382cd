"""The smallest pretraining run the tests share."""

from __future__ import annotations

from moco.config import load_pretrain_config
from moco.distributed import ProcessInfo, tensors_digest

OVERRIDES = {
    "MODEL.ARCH": "resnet18",
    "MODEL.WIDTH": "0.125",
    "MODEL.STEM": "cifar",
    "MODEL.DIM": "8",
    "MODEL.BN_SPLITS": "2",
    "MOCO.QUEUE_SIZE": "20",
    "DATA.SIZE": "16",
    "DATA.NUM_WORKERS": "0",
    "TRAIN.EPOCHS": "3",
    "TRAIN.BATCH_SIZE": "8",
    "LOG.PERIOD": "1",
    "LOG.TENSORBOARD": "False",
    "KNN.K": "5",
    "CHECKPOINT.KEEP_LAST": "1",
}
STEPS_PER_EPOCH = 4  # of the fixture `image_folder`: 32 images
TOTAL_STEPS = 12


def overrides(**changes: object) -> list[str]:
    """KEY VALUE words; a change is written KEY__SUBKEY=value."""
    merged = dict(OVERRIDES)
    merged.update({key.replace("__", "."): str(value) for key, value in changes.items()})
    return [word for pair in merged.items() for word in pair]


def config(**changes: object):
    return load_pretrain_config(None, overrides(**changes))


def alone() -> ProcessInfo:
    import torch

    return ProcessInfo(0, 1, 0, torch.device("cpu"))


def state_digest(content: dict) -> str:
    """Digest over everything learned: encoders, batch-norm buffers, queue, pointer, optimizer."""
    tensors = dict(content["state_dict"])
    for index, entry in content["optimizer"]["state"].items():
        tensors[f"optimizer.{index}"] = entry["momentum_buffer"]
    return f"{content['epoch']}-{content['extra']['step']}-{tensors_digest(tensors)}"
