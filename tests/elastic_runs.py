"""Runs that are continued by another number of processes, and the batches they see."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from pretrain_runs import make_images
from processes import in_processes

from moco.data.images import find_images
from moco.distributed import ProcessInfo, tensors_digest
from moco.training import trainer as trainer_module
from moco.training.trainer import Trainer

CHANGES = {"MODEL__BN_SPLITS": 1, "MODEL__NORM": "SyncBN", "CHECKPOINT__KEEP_LAST": 3}


def train_recorded(rank, num, images, folder, **changes):
    """Train to the end, in a process of its own.

    Returns: images' numbers and pixels of each step, losses, lines said, the digest of the end.
    """
    steps, losses, said = [], [], []
    run = Trainer(
        tiny.config(**{**CHANGES, **changes}), find_images(images), folder,
        ProcessInfo(rank, num, rank, torch.device("cpu")),
        resume=True, elastic=True, say=said.append,
    )  # fmt: skip
    train_step = trainer_module.train_step

    def recording(model, method, optimizer, batch, **kwargs):
        view_q, view_k, index = batch[:3]
        steps.append((index.clone(), torch.stack([view_q, view_k], 1)))
        result = train_step(model, method, optimizer, batch, **kwargs)
        losses.append(result.loss)
        return result

    trainer_module.train_step = recording
    run.train()
    return {
        "steps": steps, "losses": torch.stack(losses), "said": said, "first": run.first_step,
        "digest": tensors_digest(run.method.state_dict()),
    }  # fmt: skip


def _work(rank, num, images, folder, changes, arm):
    if arm is not None:
        arm()
    return train_recorded(rank, num, images, folder, **changes)


def make_base(folder: Path) -> Path:
    """folder/images, and in folder what `start_with_two` leaves."""
    (folder / "images").mkdir()
    make_images(folder / "images")
    in_processes(start_with_two, folder, folder / "images", folder, {}, num=2)
    return folder


def start_with_two(rank, images, folder, changes):
    """Two processes for one epoch of three."""
    run = Trainer(
        tiny.config(**{**CHANGES, **changes}), find_images(images), folder / "whole",
        ProcessInfo(rank, 2, rank, torch.device("cpu")), say=lambda line: None,
    )  # fmt: skip
    run.train()
    return True


def joined(ranks, order=None):
    """Global batches of each step, the ranks' slices joined in rank order."""
    order = range(len(ranks)) if order is None else order
    return [
        tuple(torch.cat([ranks[rank]["steps"][step][i] for rank in order]) for i in (0, 1))
        for step in range(len(ranks[0]["steps"]))
    ]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)
    )


def continued(num, base, images, *, arm: Callable[[], None] | None = None, **changes):
    """What each of `num` processes records from the first epoch's checkpoint on.

    Args:
        arm: called in each process before.
    """
    folder = Path(tempfile.mkdtemp(dir=base))
    for path in (base / "whole").glob("checkpoint_0000.*"):
        shutil.copy(path, folder)
    ranks = in_processes(_work, base, num, images, folder, changes, arm, num=num)
    assert [rank["first"] for rank in ranks] == [4] * num
    return ranks
