"""NaN or Inf put into one place of one step of the tiny run of two processes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import tiny
import torch
from PIL import Image

from moco.data.images import find_images
from moco.distributed import ProcessInfo, tensors_digest
from moco.errors import exit_on_error
from moco.training.batch import build_loader
from moco.training.trainer import Trainer

PLACES = ("loss", "gradient", "keys", "queue")
RANKS = (0, 1)
BAD_STEP = 5  # the second of the second epoch: one checkpoint is there


def make_images(folder: Path) -> Path:
    folder.mkdir()
    for i in range(32):
        image = Image.new("RGB", (20, 20), (8 * i, 255 - 6 * i, 100))
        image.paste((255 - 8 * i, 40, 7 * i), (i % 5, i % 7, i % 5 + 9, i % 7 + 6))
        image.save(folder / f"{i:02d}.png")
    return folder


def make_trainer(rank, images, folder, reading="at once", resume=False) -> Trainer:
    """reading: "at once" as on a CPU, "a step later" as on a GPU, or "blind": without the guard."""
    cfg = tiny.config(TRAIN__EPOCHS=2, LOG__PERIOD=5 if reading == "a step later" else 1)
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    trainer = Trainer(cfg, find_images(images), folder, process, resume=resume, say=lambda _: None)
    if reading == "a step later":
        options = dict(lr=cfg.TRAIN.LR, momentum=0.9, weight_decay=cfg.TRAIN.WEIGHT_DECAY)
        trainer.optimizer = torch.optim.SGD(trainer.method.parameters(), fused=True, **options)
        trainer.guard.delayed = True
    if reading == "blind":
        trainer.guard.check = lambda *args, **options: None
    return trainer


def learned(trainer: Trainer) -> str:
    """Digest of what an update changes: query encoder, queue, pointer, optimizer."""
    state = dict(trainer.method.encoder_q.named_parameters())
    state |= dict(trainer.method.named_buffers(recurse=False))
    for number, entry in trainer.optimizer.state_dict()["state"].items():
        state[f"optimizer.{number}"] = entry["momentum_buffer"]
    return tensors_digest(state)


class Poison:
    """Puts a value into one place of step BAD_STEP, and notes the state before it."""

    def __init__(self, trainer: Trainer, place: str, active: bool, value: float = float("nan")):
        self.trainer, self.method, self.place, self.active = trainer, trainer.method, place, active
        self.value = value
        self.step, self.before, self.bad_images, self.images = -1, None, None, None
        self.prepare, self.contrast = self.method.prepare, self.method.contrast
        self.method.prepare, self.method.contrast = self._prepare, self._contrast
        self.method.encoder_q.layer1[0].conv1.weight.register_hook(self._gradient)

    def _now(self, place):
        """Also when the step is done again, to find out whose gradient it was."""
        bad = self.bad_images is not None and torch.equal(self.images, self.bad_images)
        return self.active and self.place == place and bad

    def _prepare(self, *args, **options):
        self.step += 1
        if self.step == BAD_STEP:
            if self.active and self.place == "queue":
                self.method.queue[0, 3] = self.value
            self.before = learned(self.trainer)
        return self.prepare(*args, **options)

    def _contrast(self, view_q, view_k, index, *others):
        self.images = index
        if self.step == BAD_STEP:
            self.bad_images = index
        output = self.contrast(view_q, view_k, index, *others)
        if self._now("loss"):
            output.loss = output.loss * self.value
        if self._now("keys"):
            output.keys_VBD = output.keys_VBD.clone()
            output.keys_VBD[0, 1, 2] = self.value
        return output

    def _gradient(self, gradient):
        return gradient * self.value if self._now("gradient") else gradient


def poisoned(rank, images, folder, place, bad_rank, reading, value=float("nan")) -> dict:
    """Train with the poison on `bad_rank`; what this rank ends with."""
    trainer = make_trainer(rank, images, folder, reading)
    poison = Poison(trainer, place, active=rank == bad_rank, value=value)
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            exit_on_error(trainer.train)()
        except SystemExit as ended:
            code = ended.code
    return {
        "code": code,
        "message": said.getvalue(),
        "step": poison.step,
        "unchanged": learned(trainer) == poison.before,
        "key encoder is finite": all(
            bool(torch.isfinite(p).all()) for p in trainer.method.encoder_k.parameters()
        ),
        "files": sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")),
    }


def replay_lists_the_batch(path: Path, images: Path) -> bool:
    """Whether the file names the images of both ranks, as docs/TRAINING.md makes them again."""
    replay = torch.load(path, weights_only=True)
    if (replay["step"], replay["epoch"], replay["world_size"]) != (BAD_STEP, 1, 2):
        return False
    source = find_images(images)
    for rank, report in enumerate(replay["ranks"]):
        again = build_loader(
            tiny.config(), source, ProcessInfo(rank, 2, 0, torch.device("cpu")),
            first_step=BAD_STEP, last_step=BAD_STEP + 1,
        )  # fmt: skip
        indices = next(iter(again))[2].tolist()
        names = [f"{index:02d}.png" for index in indices]
        if (report["rank"], report["indices"], report["names"]) != (rank, indices, names):
            return False
    return len(replay["ranks"]) == 2
