"""The smallest pretraining run the tests share."""

from __future__ import annotations

import signal

import torch

from moco.config import load_pretrain_config
from moco.data.images import find_images
from moco.distributed import ProcessInfo, tensors_digest
from moco.training.trainer import Trainer

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
    # The same on every machine.
    "TRAIN.AMP": "False",
    "TRAIN.CHANNELS_LAST": "False",
    "TRAIN.COMPILE": "eager",
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


# What the tests run of each method; "method: variant" -> changes.
VARIANTS = {
    "moco": {},
    "moco_symmetric": {},
    "memory_bank": {"MEMORY_BANK__NUM_NEGATIVES": 20},
    "end_to_end": {},
    "end_to_end: SimCLR": {"END_TO_END__LOSS": "nt_xent", "END_TO_END__SHARE_ENCODER": True},
    "moco_v3": {
        "MODEL__BN_SPLITS": 1, "MOCO_V3__HIDDEN_DIM": 16, "MOCO__MOMENTUM_SCHEDULE": "cosine",
        "MOCO__MOMENTUM": 0.99, "MOCO__TEMPERATURE": 1.0, "TRAIN__OPTIMIZER": "lars",
        "TRAIN__LR": 0.5, "TRAIN__SCHEDULE": "cosine_by_step", "DATA__RECIPE": "v3",
    },
    "moco_v3: ViT": {
        "MODEL__ARCH": "vit_small", "MODEL__BN_SPLITS": 1, "MOCO_V3__HIDDEN_DIM": 16,
        "MOCO__MOMENTUM_SCHEDULE": "cosine", "TRAIN__OPTIMIZER": "adamw", "TRAIN__LR": 0.001,
        "TRAIN__WEIGHT_DECAY": 0.1, "TRAIN__SCHEDULE": "cosine_by_step",
        "DATA__RECIPE": "v3",
    },
}  # fmt: skip


def method_config(variant: str, **changes: object):
    method = variant.partition(":")[0]
    return config(METHOD=method, **{**VARIANTS[variant], **changes})


def alone() -> ProcessInfo:
    return ProcessInfo(0, 1, 0, torch.device("cpu"))


def state_digest(content: dict) -> str:
    """Digest over everything learned: encoders, batch-norm buffers, queue, pointer, optimizer."""
    tensors = dict(content["state_dict"])
    for index, entry in content["optimizer"]["state"].items():
        for name, value in entry.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return f"{content['epoch']}-{content['extra']['step']}-{tensors_digest(tensors)}"


def trainer(images, folder, said: list[str], *, allow_change=(), resume=True, **changes):
    """The tiny run of one process, continued where `folder` holds a checkpoint of it."""
    return Trainer(
        config(**changes), find_images(images), folder, alone(),
        resume=resume, allow_change=allow_change, say=said.append,
    )  # fmt: skip


class StopAfter:
    """An observer that sends this process a signal once a step is done, as a scheduler would."""

    def __init__(self, step: int, signum: int = signal.SIGTERM):
        self.step, self.signum = step, signum

    def on_step(self, record) -> None:
        if record.step == self.step:
            signal.raise_signal(self.signum)

    def on_epoch(self, record) -> None:
        pass
