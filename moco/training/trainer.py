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
from moco.data import workers
from moco.data.images import ImageSource
from moco.data.reading import num_retries
from moco.devices import out_of_memory_as_error, set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import dead_worker_as_data_error
from moco.lost_rank import lost_rank_as_error
from moco.methods import Method, build_method
from moco.seeding import derive_seed
from moco.signals import caught_signals
from moco.training import acceleration, state
from moco.training.agreement import check_ranks, check_same_job, say_that_ranks_agree
from moco.training.batch import build_loader, check_batch
from moco.training.changes import pretraining_changes
from moco.training.evaluations import Evaluate, Evaluations
from moco.training.guard import StepGuard, skips_updates
from moco.training.health import Health
from moco.training.initial_weights import Start, start_from_weights
from moco.training.nonfinite import NonFiniteReport, check_state_is_finite
from moco.training.optimizer import build_optimizer
from moco.training.prefetch import ahead_on_device
from moco.training.progress import EpochRecord, Observer, StepRecord
from moco.training.recipe import out_of_memory_remedy
from moco.training.retention import Retention
from moco.training.schedule import step_values
from moco.training.seen_images import SeenImages
from moco.training.shares import Shares
from moco.training.step import train_step


class Trainer:
    """A pretraining run: its model, optimizer and position.

    Args:
        source: the images; output_dir: where checkpoints go.
        resume: continue from the newest verified checkpoint in `output_dir`, or start afresh where
            there is none. Without it a folder that holds a checkpoint is refused.
        resume_from: where `output_dir` holds no checkpoint, continue from this file.
        elastic: continue with another number of processes than the checkpoint's.
        allow_change: configuration keys, and "data", that may differ from the checkpoint's.
        excluded: what was left out of the images, for the record (`moco.data.exclude`).
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
        elastic: bool = False,
        allow_change: Sequence[str] = (),
        excluded: Sequence[dict] = (),
        say: Callable[[str], None] = print,
    ):
        cfg = acceleration.resolve(cfg, process.device).cfg
        self.cfg, self.source, self.process, self.say = cfg, source, process, say
        self.output_dir, self.excluded = output_dir, excluded
        check_batch(cfg, source, process.world_size)
        self.identity = state.RunIdentity.of(cfg, source, process.world_size)
        check_same_job(self.identity)
        self.steps_per_epoch = self.identity.steps_per_epoch
        self.total_steps = cfg.TRAIN.EPOCHS * self.steps_per_epoch
        checkpoint = state.find_checkpoint(output_dir, resume, resume_from, say)
        torch.manual_seed(derive_seed(cfg.SEED, "init"))
        self.method: Method = build_method(cfg, len(source)).to(process.device)
        self.start = start_from_weights(cfg, self.method, say) if not checkpoint else Start()
        acceleration.accelerate_(self.method, cfg)
        set_arithmetic(process.device, tf32=cfg.TRAIN.TF32)
        self.optimizer = build_optimizer(cfg, self.method)
        self.loss_scale = acceleration.build_loss_scale(cfg, process.device)
        self.first_step, self.changes = 0, pretraining_changes(allow_change)
        self.seen = SeenImages(len(source), process)
        if self.start.images is not None:
            self.seen.begin_with(self.start.images)
        if checkpoint is not None:
            self.first_step = state.restore(
                checkpoint, method=self.method, optimizer=self.optimizer, identity=self.identity,
                elastic=elastic, changes=self.changes, start=self.start,
                loss_scale=self.loss_scale, seen=self.seen, say=say,
            )  # fmt: skip
            say(f"continuing from {checkpoint} at step {self.first_step}/{self.total_steps}")
        self.changes.say_unused(say)
        if self.first_step >= self.total_steps:
            say("this run is finished; nothing is left to do")
        state.agree_on_step(self.first_step, output_dir, process.device)
        self.retention = Retention(
            output_dir,
            keep_last=cfg.CHECKPOINT.KEEP_LAST,
            milestone=cfg.CHECKPOINT.MILESTONE * self.steps_per_epoch,
        )
        distributed.on_main(self._prepare_folder)
        self.health = Health(
            self.method,
            global_batch=cfg.TRAIN.BATCH_SIZE,
            steps_per_epoch=self.steps_per_epoch,
        )
        report = NonFiniteReport(
            self.method, process, source=source, output_dir=output_dir, identity=self.identity
        )
        self.guard = StepGuard(process, report, delayed=skips_updates(self.optimizer, process))
        self.model: nn.Module = self.method
        if process.world_size > 1:
            distributed.broadcast_state(self.method)
            self.model = distributed.data_parallel(self.method, process)

    def train(self, observers: Sequence[Observer] = (), evaluate: Evaluate | None = None) -> int:
        """Run to the last epoch, or to a SIGTERM or SIGINT.

        Returns: 0 when finished; 128 + the signal's number when stopped, with a checkpoint saved.
        """
        self.last_step = self.saved_step = self.first_step
        self.retries_before = num_retries()
        self.evaluations = Evaluations(
            evaluate, period=self.cfg.KNN.PERIOD, max_share=self.cfg.KNN.MAX_SHARE,
            steps_per_epoch=self.steps_per_epoch, say=self.say,
        )  # fmt: skip
        with (
            caught_signals() as received,
            dead_worker_as_data_error("DATA.NUM_WORKERS", workers.doing),
            lost_rank_as_error(lambda: f"step {self.last_step}"),
            out_of_memory_as_error(
                lambda: f"step {self.last_step} (rank {self.process.rank})", self._memory_remedy
            ),
        ):
            stopped = self._run(observers, received)
        if not stopped:
            return 0
        self.say(
            f"stopped at step {self.last_step}/{self.total_steps}, checkpoint saved; "
            "continue with the same command and --resume"
        )
        return 128 + (received[0] if received else signal.SIGTERM)

    def _memory_remedy(self) -> str:
        process = self.process
        return out_of_memory_remedy(
            self.cfg, len(self.source), process.world_size, process.device
        )

    def _run(self, observers, received) -> bool:
        cfg = self.cfg
        loader = build_loader(
            cfg, self.source, self.process, first_step=self.first_step, last_step=self.total_steps,
            output_dir=self.output_dir, seen=self.seen,
        )  # fmt: skip
        shares = Shares(loader, self.process, replaces=cfg.DATA.MAX_BAD_FRACTION > 0)
        if self.first_step == 0:
            self._end_epoch(observers, received)
        self.evaluations.resumed(self.first_step)
        started, done = time.monotonic(), self.first_step
        batches = ahead_on_device(shares, self.process.device)
        for step, batch in enumerate(batches, start=self.first_step):
            lr, momentum = step_values(cfg, step, self.steps_per_epoch)
            is_logged = (step + 1) % cfg.LOG.PERIOD == 0 or step + 1 == self.total_steps
            self.method.train()
            result = train_step(
                self.model, self.method, self.optimizer, batch,
                step=step, lr=lr, momentum=momentum, cfg=cfg, process=self.process,
                guard=self.guard, loss_scale=self.loss_scale, stop_requested=bool(received),
                measure=is_logged,
            )  # fmt: skip
            self.last_step = step + 1
            if step == self.first_step and cfg.TRAIN.COMPILE == "torch":
                seconds = time.monotonic() - started
                self.say(f"torch.compile: the first batch and step took {seconds:.0f} s")
            if self.last_step % (cfg.TRAIN.RANK_CHECK_PERIOD or self.total_steps) == 0:
                shares.check(self.last_step)
                check_ranks(self.method, self.optimizer, self.last_step, self.process.device)
            if is_logged:
                record = self._step_record(lr, result, done, started)
                for observer in observers:
                    observer.on_step(record)
                started, done = time.monotonic(), self.last_step
            if self.last_step % self.steps_per_epoch == 0:
                self._end_epoch(observers, received)
                started, done = time.monotonic(), self.last_step
            if self.guard.stop_requested and self.last_step < self.total_steps:
                if self.saved_step != self.last_step:
                    self._save(milestone=False)
                return True
        return False

    def _step_record(self, lr, result, done, started) -> StepRecord:
        step, loss = self.last_step - 1, result.loss.item()
        measured = {name: value.item() for name, value in result.metrics.items()}
        metrics = self.health.figures(step, loss, measured)
        if retries := num_retries() - self.retries_before:
            metrics["read_retries"] = float(retries)
        # Only now has a GPU done what it was given.
        steps_per_s = (self.last_step - done) / (time.monotonic() - started)
        return StepRecord(
            step=self.last_step,
            total_steps=self.total_steps,
            epoch=step // self.steps_per_epoch,
            num_epochs=self.cfg.TRAIN.EPOCHS,
            loss=loss,
            lr=lr,
            images_per_s=steps_per_s * self.cfg.TRAIN.BATCH_SIZE,
            eta_s=(self.total_steps - self.last_step) / steps_per_s,
            metrics=metrics,
            warnings=self.health.warnings(step, metrics),
        )

    def _end_epoch(self, observers, received) -> None:
        """Save and evaluate after a whole epoch; before training only evaluate."""
        epoch, last = self.last_step // self.steps_per_epoch, self.last_step == self.total_steps
        self.guard.settle()
        self.seen.gather(self.last_step)
        if epoch and self._is_saved(epoch):
            self._save(milestone=True)
        encoder = self.method.transfer_encoder()
        metrics = self.evaluations.after_epoch(encoder, self.last_step, received, last=last)
        for observer in observers:
            observer.on_epoch(EpochRecord(self.last_step, epoch, metrics))
        distributed.barrier()
        self.evaluations.resumed(self.last_step)

    def _is_saved(self, epoch: int) -> bool:
        return epoch % self.cfg.CHECKPOINT.PERIOD == 0 or epoch == self.cfg.TRAIN.EPOCHS

    def _prepare_folder(self) -> None:
        """On rank 0: remove what a killed writer left, and see that the checkpoints will fit."""
        self.retention.sweep()
        epochs = range(self.first_step // self.steps_per_epoch + 1, self.cfg.TRAIN.EPOCHS + 1)
        self.retention.check_space(
            checkpoint_bytes=state.checkpoint_bytes(self.method, self.optimizer, self.seen),
            steps=[epoch * self.steps_per_epoch for epoch in epochs if self._is_saved(epoch)],
        )

    def _save(self, *, milestone: bool) -> None:
        """Rank 0 writes the state after `last_step` steps, then removes what is no longer kept."""
        epoch = self.last_step // self.steps_per_epoch
        # The reference names the file by the number of the epoch that was finished, from 0.
        name = f"checkpoint_{epoch - 1:04d}" if milestone else f"checkpoint_step_{self.last_step}"
        self.guard.settle()
        check_state_is_finite(self.method, self.optimizer, f"step {self.last_step}", self.process)
        check_ranks(self.method, self.optimizer, self.last_step, self.process.device)
        if self.last_step == self.total_steps:
            say_that_ranks_agree(self.method, self.say)
        self.seen.gather(self.last_step)
        self.saved_step = self.last_step
        distributed.on_main(lambda: self._write(self.output_dir / f"{name}.pth.tar"))

    def _write(self, path: Path) -> None:
        state.save(
            path, method=self.method, optimizer=self.optimizer, step=self.last_step,
            arch=self.cfg.MODEL.ARCH, identity=self.identity, changes=self.changes,
            start=self.start, loss_scale=self.loss_scale, seen=self.seen,
            excluded=self.excluded,
        )  # fmt: skip
        self.retention.prune(written=path)
