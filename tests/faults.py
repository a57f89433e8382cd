"""Ways to end a pretraining process at a chosen point; armed in a child process, for its life."""

from __future__ import annotations

import os
import pathlib
import signal
import tempfile
from dataclasses import dataclass

import torch

from moco.training import checkpoint as ckpt
from moco.training import trainer

# Points inside the writing of a checkpoint, in their order.
WRITE_POINTS = (
    "file opened",
    "half written",
    "before fsync",
    "before rename",
    "before the manifest",
    "before the manifest's rename",
    "inside prune",
)


@dataclass(frozen=True)
class Stop:
    """How a process ends.

    Args:
        how: "SIGTERM" or "kill -9" once `step` steps are done, or one of WRITE_POINTS: kill -9
            there in the writing of the checkpoint of `step`.
        rank: the rank it happens to; None: all.
        term_at: SIGTERM to all ranks once so many steps are done; 0: none.
    """

    how: str
    step: int
    rank: int | None = 0
    term_at: int = 0

    def __str__(self) -> str:
        if self.how not in WRITE_POINTS:
            return self.how
        return f"kill -9, {self.how}" + (" (of the stop's checkpoint)" if self.term_at else "")


# Of the tiny run: 12 steps, a checkpoint after 4, 8 and 12 of which one is kept.
STOPS = (
    Stop("SIGTERM", 1),
    Stop("SIGTERM", 3),
    Stop("SIGTERM", 6, rank=None),
    Stop("SIGTERM", 10),
    Stop("kill -9", 1, rank=None),
    Stop("kill -9", 5),
    Stop("kill -9", 11, rank=None),
    *(Stop(point, 8) for point in WRITE_POINTS),
    Stop("half written", 4),
    Stop("before the manifest", 12),
    Stop("half written", 7, term_at=6),
    Stop("before the manifest", 7, term_at=6),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stop: Stop, rank: int) -> None:
    """Patch this process so that it ends as `stop` says; there is no way back."""
    if stop.term_at:
        _after_step(stop.term_at, lambda: signal.raise_signal(signal.SIGTERM))
    if stop.rank not in (None, rank):
        return
    if stop.how == "SIGTERM":
        _after_step(stop.step, lambda: signal.raise_signal(signal.SIGTERM))
    elif stop.how == "kill -9":
        _after_step(stop.step, die)
    else:
        _in_write(stop.how, stop.step)


def _after_step(step: int, act) -> None:
    train_step = trainer.train_step

    def wrapped(*args, **kwargs):
        result = train_step(*args, **kwargs)
        if kwargs["step"] + 1 == step:
            act()
        return result

    trainer.train_step = wrapped


def _in_write(point: str, step: int) -> None:
    assert point in WRITE_POINTS, point
    save = ckpt.save_checkpoint

    def save_checkpoint(path, content, **fields):
        if fields["step"] == step:
            _arm_write(point)
        save(path, content, **fields)

    ckpt.save_checkpoint = save_checkpoint


def _arm_write(point: str) -> None:
    if point == "file opened":
        _after(tempfile, "mkstemp")
    elif point == "half written":
        save = torch.save
        torch.save = lambda content, file: save(content, _HalfFile(file, content))
    elif point == "before fsync":
        os.fsync = lambda handle: die()
    elif point == "before rename":
        os.replace = lambda *paths: die()
    elif point == "before the manifest":
        ckpt.write_manifest = lambda *args, **fields: die()
    elif point == "before the manifest's rename":
        write = ckpt.write_manifest

        def write_manifest(*args, **fields):
            os.replace = lambda *paths: die()
            write(*args, **fields)

        ckpt.write_manifest = write_manifest
    else:
        _after(pathlib.Path, "unlink")


def _after(where, name: str) -> None:
    """Die as soon as a function has done its work."""
    function = getattr(where, name)

    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        die()

    setattr(where, name, wrapped)


class _HalfFile:
    def __init__(self, file, content):
        self.file, self.left = file, ckpt.tensor_bytes(content) // 2

    def write(self, data) -> int:
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            die()
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
