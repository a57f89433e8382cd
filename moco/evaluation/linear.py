"""Linear classification on frozen features, and fine-tuning with few labels: the loop, top to
bottom, and `evaluate_linear`, which a command line or a study calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from moco import distributed
from moco.cfgnode import CfgNode, dump_yaml
from moco.data import workers
from moco.data.augment import normalize
from moco.data.images import ImageSource
from moco.data.labelled import LabelledStream, build_labelled_loader, classification_recipe
from moco.data.loader import build_eval_loader
from moco.data.subset import SubsetSource
from moco.devices import out_of_memory_as_error, set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, MocoError, NonFiniteError, dead_worker_as_data_error
from moco.evaluation import linear_results, linear_state
from moco.evaluation.classifier import (
    Classifier,
    StepResult,
    classify_step,
    new_classifier,
    score,
)
from moco.evaluation.linear_data import choose_labels, pixel_statistics
from moco.evaluation.linear_state import LinearIdentity
from moco.evaluation.results import RESULTS_FILE
from moco.evaluation.splits import find_splits, splits_in_words
from moco.evaluation.weights import Pretrained, read_pretrained
from moco.signals import caught_signals
from moco.training import checkpoint as ckpt
from moco.training.guard import Evidence, StepGuard, skips_updates
from moco.training.optimizer import keep_own_ways_
from moco.training.progress import ConsoleProgress, EpochRecord, JsonLog, Observer, StepRecord
from moco.training.retention import Retention
from moco.training.run_lock import RunLock

# Not config.yaml, which with log.jsonl marks a pretraining run.
CONFIG_FILE = "linear_config.yaml"


class EvaluationStopped(MocoError):
    """The evaluation was asked to stop and saved its state. `code`: 128 + the signal's number."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def learning_rate(base: float, epoch: int, train: CfgNode) -> float:
    """The rate of a whole epoch, from 0 (main_lincls.py, adjust_learning_rate; or a cosine)."""
    if train.SCHEDULE == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * epoch / train.EPOCHS))
    for milestone in train.MILESTONES:
        base *= train.DECAY if epoch >= milestone else 1.0
    return base


class LinearTrainer:
    """One run: the classifier, its optimizer and its position.

    Args:
        train, test: labelled images of the same classes; output_dir: where checkpoints go.
        resume: continue from the newest verified checkpoint there, or start afresh where there is
            none. Without it a folder that holds a checkpoint is refused.
    Raises: ConfigError, CheckpointError before any image is read.
    """

    def __init__(
        self,
        cfg: CfgNode,
        weights: Pretrained,
        train: ImageSource,
        test: ImageSource,
        output_dir: Path,
        process: ProcessInfo,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.cfg, self.weights, self.process, self.say = cfg, weights, process, say
        self.source, self.test, self.output_dir = train, test, output_dir
        self.pixels = pixel_statistics(cfg, weights)
        self.stream = LabelledStream(
            num_images=len(train),
            global_batch=cfg.TRAIN.BATCH_SIZE,
            rank=process.rank,
            world_size=process.world_size,
            seed=cfg.SEED,
            drop_last=cfg.FINETUNE.ENABLED,  # batch norm needs as many images in every process
        )
        self.steps_per_epoch = self.stream.steps_per_epoch
        self.total_steps = cfg.TRAIN.EPOCHS * self.steps_per_epoch
        self.identity = LinearIdentity.of(cfg, weights, train, test, process.world_size)
        checkpoint = ckpt.find_checkpoint(self.output_dir, resume, self.say)
        self.classifier = self._build_classifier()
        self.base_rates = [cfg.TRAIN.LR]
        if cfg.FINETUNE.ENABLED:
            self.base_rates.insert(0, cfg.FINETUNE.BACKBONE_LR)
        set_arithmetic(process.device)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameter_groups(cfg.TRAIN.LR, cfg.FINETUNE.BACKBONE_LR),
            momentum=cfg.TRAIN.SGD_MOMENTUM,
            weight_decay=cfg.TRAIN.WEIGHT_DECAY,
            # On a GPU it leaves out an update by itself, so that no step waits for the GPU.
            fused=process.device.type == "cuda" or None,
        )
        self.guard = StepGuard(
            process, self._not_finite, delayed=skips_updates(self.optimizer, process)
        )
        keep_own_ways_(self.optimizer)
        self.progress, self.saved_step = linear_state.Progress(), -1
        if checkpoint is not None:
            self.progress = linear_state.restore(
                checkpoint,
                encoder=self.classifier.encoder,
                optimizer=self.optimizer,
                identity=self.identity,
            )
            for group in self.optimizer.param_groups:  # not of the device that saved it
                group["fused"] = self.optimizer.defaults["fused"]
            say(f"continuing from {checkpoint} at step {self.progress.step}/{self.total_steps}")
        self.stream.first_step, self.stream.last_step = self.progress.step, self.total_steps

    def train(self, observers: Sequence[Observer] = ()) -> int | None:
        """Run to the last epoch, or to a SIGTERM or SIGINT, then with a checkpoint saved.

        Returns: None when finished, else the signal's number.
        """
        with (
            caught_signals() as received,
            dead_worker_as_data_error("DATA.NUM_WORKERS", workers.doing),
            out_of_memory_as_error(
                lambda: f"step {self.progress.step} (rank {self.process.rank})",
                lambda: "Lower TRAIN.BATCH_SIZE or EVAL.BATCH_SIZE, or set TRAIN.AMP True",
            ),
        ):
            stopped = self._run(observers, received)
        return (received or [15])[0] if stopped else None

    def _run(self, observers: Sequence[Observer], received: list[int]) -> bool:
        cfg, progress = self.cfg, self.progress
        started, before = time.monotonic(), progress.seconds
        since, done = started, progress.step
        for batch in self._train_loader():
            epoch = progress.step // self.steps_per_epoch
            rates = [learning_rate(rate, epoch, cfg.TRAIN) for rate in self.base_rates]
            is_logged = (progress.step + 1) % cfg.LOG.PERIOD == 0
            is_logged |= progress.step + 1 == self.total_steps
            result = self._step(batch, rates, stop_requested=bool(received), wait=is_logged)
            progress.step += 1
            progress.seconds = before + time.monotonic() - started
            if is_logged:
                steps_per_s = (progress.step - done) / (time.monotonic() - since)
                record = self._step_record(epoch, rates[-1], result, steps_per_s)
                for observer in observers:
                    observer.on_step(record)
                since, done = time.monotonic(), progress.step
            if progress.step % self.steps_per_epoch == 0:
                self._end_epoch(epoch, rates[-1], observers)
                since, done = time.monotonic(), progress.step
            if self.guard.stop_requested and progress.step < self.total_steps:
                if self.saved_step != progress.step:
                    self._save(f"checkpoint_step_{progress.step}")
                return True
        progress.seconds = before + time.monotonic() - started
        return False

    def _step(self, batch, rates: list[float], *, stop_requested: bool, wait: bool) -> StepResult:
        """One update; the rates are those of the optimizer's groups. `wait`: as of `StepGuard`."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        images, labels = (t.to(self.process.device, non_blocking=True) for t in batch[:2])
        num_own, num_global = self.stream.num_images_of(self.progress.step)

        def settle(loss: torch.Tensor) -> torch.Tensor | None:
            evidence = Evidence(self.progress.step, rates[-1], loss, None, labels, lambda: None)
            return self.guard.check(evidence, None, stop=stop_requested, wait=wait)

        return classify_step(
            self.classifier,
            self.optimizer,
            normalize(images, *self.pixels),
            labels,
            num_own=num_own,
            num_global=num_global,
            settle=settle,
        )

    def _not_finite(self, evidence: Evidence, named: frozenset[str]) -> NoReturn:
        raise NonFiniteError(
            f"step {evidence.step}: the loss is not finite (rank {self.process.rank}: "
            f"loss={evidence.loss.item()}, lr={evidence.lr:.6g}); nothing was updated with it. "
            "Lower TRAIN.LR, or look at the weights"
        )

    def _step_record(self, epoch, lr, result, steps_per_s) -> StepRecord:
        return StepRecord(
            step=self.progress.step,
            total_steps=self.total_steps,
            epoch=epoch,
            num_epochs=self.cfg.TRAIN.EPOCHS,
            loss=result.loss.item(),
            lr=lr,
            images_per_s=steps_per_s * self.cfg.TRAIN.BATCH_SIZE,
            eta_s=(self.total_steps - self.progress.step) / steps_per_s,
            metrics={"top1": result.top1.item()},
        )

    def _end_epoch(self, epoch: int, lr: float, observers: Sequence[Observer]) -> None:
        """Evaluate and save after a whole epoch."""
        self.guard.settle()
        last, metrics = self.progress.step == self.total_steps, {}
        if (epoch + 1) % self.cfg.EVAL.PERIOD == 0 or last:
            scores = score(
                self.classifier, self._test_loader(), *self.pixels
            )
            metrics = {"top1": scores.top1, "top5": scores.top5, "test_loss": scores.loss}
            self.progress.curve.append({"epoch": epoch + 1, "lr": lr, **metrics})
        for observer in observers:
            observer.on_epoch(EpochRecord(self.progress.step, epoch + 1, metrics))
        if (epoch + 1) % self.cfg.CHECKPOINT.PERIOD == 0 or last:
            self._save(f"checkpoint_{epoch:04d}")

    def _save(self, name: str) -> None:
        """Rank 0 writes the state, after all ranks were found equal."""
        self.guard.settle()
        self.saved_step = self.progress.step
        encoder = self.classifier.encoder
        distributed.check_equal_across_ranks(
            encoder.state_dict(), f"step {self.progress.step}", self.process.device
        )
        path = self.output_dir / f"{name}.pth.tar"

        def write() -> None:
            linear_state.save(
                path,
                encoder=encoder,
                optimizer=self.optimizer,
                progress=self.progress,
                steps_per_epoch=self.steps_per_epoch,
                arch=self.weights.arch,
                identity=self.identity,
            )
            keep = self.cfg.CHECKPOINT.KEEP_LAST
            Retention(self.output_dir, keep_last=keep, milestone=0).prune(path)

        distributed.on_main(write)

    def check_backbone(self) -> dict[str, object]:
        """Compare every tensor of the frozen backbone, batch norm's buffers included, with the
        weights as they were read, bit for bit.

        Returns: what was compared. Raises: CheckpointError that names what changed.
        """
        changed = self.weights.differing(self.classifier.encoder)
        if changed:
            raise CheckpointError(
                f"{self.output_dir}: {len(changed)} tensors of the frozen backbone changed during "
                f"linear classification ({', '.join(changed[:3])}); the result is not valid"
            )
        return {"tensors": len(self.weights.backbone), "sha256": self.weights.digest()}

    def _build_classifier(self) -> Classifier:
        cfg = self.cfg
        norm = "SyncBN" if cfg.FINETUNE.ENABLED else "BN"
        encoder = self.weights.build_encoder(image_size=cfg.DATA.SIZE, norm=norm)
        encoder.fc = new_classifier(
            encoder.fc.in_features, len(self.source.class_names), cfg.TRAIN.INIT_STD, cfg.SEED
        )
        return Classifier(
            encoder,
            self.process,
            finetune=cfg.FINETUNE.ENABLED,
            amp=cfg.TRAIN.AMP,
            channels_last=cfg.TRAIN.CHANNELS_LAST,
        )

    def _train_loader(self):
        data = self.cfg.DATA
        return build_labelled_loader(
            self.source,
            classification_recipe(data.SIZE, data.CROP_SCALE, data.FLIP_PROBABILITY),
            self.stream,
            num_workers=data.NUM_WORKERS,
            pin_memory=self.process.device.type == "cuda",
            backend=data.BACKEND,
            channels=self.weights.channels,
        )

    def _test_loader(self):
        data, process = self.cfg.DATA, self.process
        own = SubsetSource(self.test, range(process.rank, len(self.test), process.world_size))
        return build_eval_loader(
            own,
            data.SIZE,
            self.cfg.EVAL.BATCH_SIZE,
            data.NUM_WORKERS,
            resize=data.RESIZE or None,
            pin_memory=process.device.type == "cuda",
            backend=data.BACKEND,
            channels=self.weights.channels,
        )


def evaluate_linear(
    cfg: CfgNode,
    weights: str | Pretrained,
    data_dir: str,
    output_dir: str | Path,
    process: ProcessInfo,
    *,
    test_dir: str | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Train and score a linear classifier; write results.json and results.md to `output_dir`.

    Args:
        cfg: see `config.py`. weights: a path, see `read_pretrained`, or what that returned.
        data_dir, test_dir: see `find_splits`.
        resume: continue a run; a finished one's results are returned.
    Returns: the content of results.json, on every process.
    Raises: EvaluationStopped after a SIGTERM or SIGINT; MocoError for what the user gave.
    """
    output_dir = Path(output_dir)
    weights = read_pretrained(weights) if isinstance(weights, str) else weights
    for note in weights.notes:
        say(note)
    train, test = find_splits(data_dir, test_dir, weights.decoding)
    whole, train = train, choose_labels(train, cfg.DATA)
    lock = RunLock(output_dir, say)
    distributed.on_main(lock.acquire)
    try:
        keep = Retention(output_dir, keep_last=cfg.CHECKPOINT.KEEP_LAST, milestone=0)
        distributed.on_main(keep.sweep)  # what a killed writer left
        trainer = LinearTrainer(
            cfg, weights, train, test, output_dir, process, resume=resume, say=say
        )
        if trainer.progress.step == trainer.total_steps and (output_dir / RESULTS_FILE).is_file():
            say(f"this run is finished; its results are in {output_dir / RESULTS_FILE}")
            return ckpt.read_json(output_dir / RESULTS_FILE)
        say(
            f"{linear_results.protocol(cfg)}: {splits_in_words(whole, train, test)}; "
            f"{weights.path} ({weights.arch}, {weights.layout}); "
            f"{process.world_size} process(es) on {process.device.type}"
        )
        stopped_by = _train_observed(trainer, output_dir)
        if stopped_by is not None:
            raise EvaluationStopped(
                f"stopped at step {trainer.progress.step}/{trainer.total_steps}, checkpoint saved; "
                "continue with the same command and --resume",
                128 + stopped_by,
            )
        results = linear_results.collect(trainer)
        distributed.on_main(lambda: linear_results.write(output_dir, results))
        say(linear_results.in_words(results))
        return results
    finally:
        lock.release()


def _train_observed(trainer: LinearTrainer, output_dir: Path) -> int | None:
    observers: list[Observer] = []
    if trainer.process.is_main:
        ckpt.write_text_atomic(output_dir / CONFIG_FILE, dump_yaml(trainer.cfg))
        first = trainer.progress.step
        observers = [
            ConsoleProgress(trainer.total_steps, first),
            JsonLog(output_dir / "log.jsonl", first),
        ]
    try:
        return trainer.train(observers)
    finally:
        for observer in observers:
            observer.close()
