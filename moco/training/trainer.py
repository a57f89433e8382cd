"""The pretraining loop, top to bottom."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from moco import distributed
from moco.cfgnode import CfgNode
from moco.config import OWN_VALUE
from moco.data.augment import build_view_recipes
from moco.data.images import ImageSource
from moco.data.loader import build_pretrain_loader
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, dead_worker_as_data_error
from moco.methods import Method, build_method
from moco.seeding import derive_seed
from moco.training import checkpoint as ckpt
from moco.training import state
from moco.training.batch import check_batch
from moco.training.optimizer import build_optimizer
from moco.training.progress import EpochRecord, Observer, StepRecord
from moco.training.schedule import step_values
from moco.training.signals import caught_signals
from moco.training.step import train_step

# Evaluates the transfer encoder; called on rank 0 only, must not change it.
Evaluate = Callable[[nn.Module], dict[str, float]]


class Trainer:
    """A pretraining run: its model, optimizer and position.

    Args:
        source: the images; output_dir: where checkpoints go.
        resume: continue from the newest verified checkpoint in `output_dir`, or start afresh where
            there is none. Without it a folder that holds a checkpoint is refused.
        resume_from: where `output_dir` holds no checkpoint, continue from this file.
    Raises: ConfigError, CheckpointError before any image is read.
    """

    def __init__(
        self,
        cfg: CfgNode,
        source: ImageSource,
        output_dir: Path,
        process: ProcessInfo,
        *,
        resume: bool = False,
        resume_from: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.cfg, self.source, self.process, self.say = cfg, source, process, say
        self.output_dir = output_dir
        check_batch(cfg, source, process.world_size)
        self.identity = state.RunIdentity.of(cfg, source, process.world_size)
        self.steps_per_epoch = self.identity.steps_per_epoch
        self.total_steps = cfg.TRAIN.EPOCHS * self.steps_per_epoch
        checkpoint = self._find_checkpoint(resume, resume_from)
        torch.manual_seed(derive_seed(cfg.SEED, "init"))
        self.method: Method = build_method(cfg, len(source)).to(process.device)
        if cfg.TRAIN.CHANNELS_LAST:
            self.method.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(cfg, self.method)
        self.first_step = 0
        if checkpoint is not None:
            self.first_step = state.restore(
                checkpoint, method=self.method, optimizer=self.optimizer, identity=self.identity
            )
            say(f"continuing from {checkpoint} at step {self.first_step}/{self.total_steps}")
        if self.first_step >= self.total_steps:
            say("this run is finished; nothing is left to do")
        self.model: nn.Module = self.method
        if process.world_size > 1:
            distributed.broadcast_state(self.method)
            self.model = distributed.data_parallel(self.method, process)

    def train(self, observers: Sequence[Observer] = (), evaluate: Evaluate | None = None) -> int:
        """Run to the last epoch, or to a SIGTERM or SIGINT.

        Returns: 0 when finished; 128 + the signal's number when stopped, with a checkpoint saved.
        """
        with caught_signals() as received, dead_worker_as_data_error("DATA.NUM_WORKERS"):
            stopped = self._run(observers, evaluate, received)
        if not stopped:
            return 0
        self.say(
            f"stopped at step {self.last_step}/{self.total_steps}, checkpoint saved; "
            "continue with the same command and --resume"
        )
        return 128 + (received[0] if received else signal.SIGTERM)

    def _run(self, observers, evaluate, received) -> bool:
        cfg = self.cfg
        loader = self._build_loader()
        self.last_step = self.saved_step = self.first_step
        if self.first_step == 0:
            self._end_epoch(observers, evaluate)
        started, done = time.monotonic(), self.first_step
        for step, batch in enumerate(loader, start=self.first_step):
            epoch = step // self.steps_per_epoch
            lr, momentum = step_values(cfg, step, self.steps_per_epoch)
            self.method.train()
            result = train_step(
                self.model, self.method, self.optimizer, batch,
                step=step, lr=lr, momentum=momentum, cfg=cfg, process=self.process,
                stop_requested=bool(received),
            )  # fmt: skip
            self.last_step = step + 1
            if self.last_step % cfg.LOG.PERIOD == 0 or self.last_step == self.total_steps:
                rate = (self.last_step - done) / (time.monotonic() - started)
                record = self._step_record(epoch, lr, result, rate)
                for observer in observers:
                    observer.on_step(record)
                started, done = time.monotonic(), self.last_step
            if self.last_step % self.steps_per_epoch == 0:
                self._end_epoch(observers, evaluate)
                started, done = time.monotonic(), self.last_step
            if result.stop_requested and self.last_step < self.total_steps:
                if self.saved_step != self.last_step:
                    self._save(milestone=False)
                return True
        return False

    def _step_record(self, epoch, lr, result, steps_per_s) -> StepRecord:
        return StepRecord(
            step=self.last_step,
            total_steps=self.total_steps,
            epoch=epoch,
            num_epochs=self.cfg.TRAIN.EPOCHS,
            loss=result.loss.item(),
            lr=lr,
            images_per_s=steps_per_s * self.cfg.TRAIN.BATCH_SIZE,
            eta_s=(self.total_steps - self.last_step) / steps_per_s,
            metrics={name: value.item() for name, value in result.metrics.items()},
        )

    def _end_epoch(self, observers, evaluate) -> None:
        """Evaluate and save after a whole epoch; before training only evaluate."""
        epoch, last = self.last_step // self.steps_per_epoch, self.last_step == self.total_steps
        if epoch and (epoch % self.cfg.CHECKPOINT.PERIOD == 0 or last):
            self._save(milestone=True)
        period, metrics = self.cfg.KNN.PERIOD, {}
        if evaluate and self.process.is_main and period and (epoch % period == 0 or last):
            metrics = evaluate(self.method.transfer_encoder())
        for observer in observers:
            observer.on_epoch(EpochRecord(self.last_step, epoch, metrics))
        distributed.barrier()

    def _save(self, *, milestone: bool) -> None:
        """Rank 0 writes the state after `last_step` steps, then removes what is no longer kept."""
        epoch = self.last_step // self.steps_per_epoch
        # The reference names the file by the number of the epoch that was finished, from 0.
        name = f"checkpoint_{epoch - 1:04d}" if milestone else f"checkpoint_step_{self.last_step}"
        self._check_ranks()
        self.saved_step = self.last_step
        if self.process.is_main:
            state.save(
                self.output_dir / f"{name}.pth.tar",
                method=self.method,
                optimizer=self.optimizer,
                step=self.last_step,
                arch=self.cfg.MODEL.ARCH,
                identity=self.identity,
            )
            ckpt.prune(
                self.output_dir,
                keep_last=self.cfg.CHECKPOINT.KEEP_LAST,
                milestone=self.cfg.CHECKPOINT.MILESTONE * self.steps_per_epoch,
            )
        distributed.barrier()

    def _check_ranks(self) -> None:
        """Stop where weights or queue differ between ranks; batch-norm statistics may."""
        world = self.process.world_size
        shared = {
            **dict(self.method.named_parameters()),
            **dict(self.method.named_buffers(recurse=False)),
        }
        distributed.check_equal_across_ranks(shared, f"step {self.last_step}", self.process.device)
        if world > 1 and self.last_step == self.total_steps:
            digest = distributed.tensors_digest(shared)[:16]
            self.say(f"all {world} processes hold the same weights and queue (sha256 {digest})")

    def _build_loader(self):
        data = self.cfg.DATA
        blur = data.BLUR_PROBABILITY
        recipes = build_view_recipes(
            data.RECIPE,
            size=data.SIZE,
            crop_scale=data.CROP_SCALE,
            blur_probability=None if blur == OWN_VALUE else blur,
        )
        return build_pretrain_loader(
            self.source,
            recipes,
            seed=self.cfg.SEED,
            global_batch=self.cfg.TRAIN.BATCH_SIZE,
            rank=self.process.rank,
            world_size=self.process.world_size,
            first_step=self.first_step,
            last_step=self.total_steps,
            num_workers=data.NUM_WORKERS,
            pin_memory=self.process.device.type == "cuda",
        )

    def _find_checkpoint(self, resume: bool, resume_from: str | None) -> Path | None:
        found = ckpt.checkpoint_files(self.output_dir)
        if found and not resume:
            raise CheckpointError(
                f"{self.output_dir}: already holds {len(found)} checkpoints of a run; add "
                "--resume to continue it, or give another --output-dir"
            )
        path, _, refused = ckpt.latest_verified(self.output_dir)
        for _, reason in refused:
            self.say(f"refused: {reason}")
        if path is None and resume_from:
            return Path(resume_from)
        if path is None and resume:
            self.say(f"--resume: {self.output_dir} holds no verified checkpoint, starting afresh")
        return path
