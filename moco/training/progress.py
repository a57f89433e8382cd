"""Observers of training: a progress line, a JSON-lines log, TensorBoard. They change nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from moco.errors import CheckpointError
from moco.training.checkpoint import write_text_atomic

_QUIET_SECONDS = 60.0  # between lines when the output is not a terminal
# What a line shows of the metrics, and how; the logs have all of them.
_SHOWN = {
    "acc1": "acc1 {:.1f}",
    "loss_over_chance": "loss/chance {:.3f}",
    "feature_std": "std {:.2f}",
    "gradient_norm": "grad {:.3g}",
}


@dataclass(frozen=True)
class StepRecord:
    """What is known after a step. `step` counts finished steps; rates are over all processes.

    metrics: of rank 0's images. warnings: lines about the run's health, each given once.
    """

    step: int
    total_steps: int
    epoch: int
    num_epochs: int
    loss: float
    lr: float
    images_per_s: float
    eta_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpochRecord:
    """What is known after `epoch` finished epochs (0: before training)."""

    step: int
    epoch: int
    metrics: dict[str, float]


class Observer(Protocol):
    def on_step(self, record: StepRecord) -> None: ...

    def on_epoch(self, record: EpochRecord) -> None: ...

    def close(self) -> None: ...


class ConsoleProgress:
    """On a terminal a tqdm bar; elsewhere a line a minute and one an epoch with an evaluation."""

    def __init__(self, total_steps: int, first_step: int, stream=None):
        self.stream = stream or sys.stdout
        self.bar = None
        self.last_line = 0.0
        if self.stream.isatty():
            self.bar = tqdm(
                total=total_steps, initial=first_step, file=self.stream, unit="step",
                dynamic_ncols=True,
            )

    def on_step(self, record: StepRecord) -> None:
        now = time.monotonic()
        for line in record.warnings:
            self._print(f"warning: step {record.step}: {line}")
        if self.bar is not None:
            self.bar.update(record.step - self.bar.n)
            self.bar.set_postfix_str(
                f"epoch {record.epoch + 1}/{record.num_epochs} loss {record.loss:.3f} "
                f"lr {record.lr:.4g} {record.images_per_s:.0f} img/s"
            )
        elif now - self.last_line >= _QUIET_SECONDS or record.step == record.total_steps:
            self.last_line = now
            metrics = "".join(
                f" {text.format(record.metrics[name])}"
                for name, text in _SHOWN.items()
                if name in record.metrics
            )
            self._print(
                f"step {record.step}/{record.total_steps} epoch {record.epoch + 1}/"
                f"{record.num_epochs} loss {record.loss:.3f} lr {record.lr:.4g}{metrics} "
                f"{record.images_per_s:.1f} img/s ETA {format_duration(record.eta_s)}"
            )

    def on_epoch(self, record: EpochRecord) -> None:
        if record.metrics:
            figures = " ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
            self._print(f"after epoch {record.epoch}: {figures}")

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class JsonLog:
    """One JSON object a line: {"kind": "step", "epoch" or "change", ...}.

    Continuing a run drops the records after `first_step`: those steps are done again.

    Args:
        changes: what `--allow-change` let differ at this start, as of `Changes.new`.
    """

    def __init__(self, path: Path, first_step: int, changes: Sequence[dict] = ()):
        _drop_after(path, first_step)
        self.file = open(path, "a", encoding="utf-8")  # closed by close()
        for change in changes:
            self._write("change", change)

    def on_step(self, record: StepRecord) -> None:
        self._write("step", asdict(record))

    def on_epoch(self, record: EpochRecord) -> None:
        self._write("epoch", asdict(record))

    def _write(self, kind: str, record: dict) -> None:
        line = {"kind": kind, "time": round(time.time(), 3), **record}
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.file.name}: cannot be written ({error.strerror}); free space, then start "
                "the same command with --resume"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # said by the write that failed; closing tries it once more
            self.file.close()


class TensorBoardLog:
    """The same figures as TensorBoard scalars; its package is imported only here (slow)."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def on_step(self, record: StepRecord) -> None:
        figures = {"loss": record.loss, "lr": record.lr, "images_per_s": record.images_per_s}
        for name, value in {**figures, **record.metrics}.items():
            self.writer.add_scalar(f"train/{name}", value, record.step)

    def on_epoch(self, record: EpochRecord) -> None:
        for name, value in record.metrics.items():
            self.writer.add_scalar(f"evaluation/{name}", value, record.step)

    def close(self) -> None:
        self.writer.close()


def format_duration(seconds: float) -> str:
    """Seconds as 1d02h, 3h05m, 4m10s or 12s."""
    seconds = int(round(seconds))
    for unit, below, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if seconds >= size:
            small = {"d": 3600, "h": 60, "m": 1}[unit]
            return f"{seconds // size}{unit}{seconds % size // small:02d}{below}"
    return f"{seconds}s"


def _drop_after(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            # A change made at this very step is given again, by the same start or another one.
            if record["step"] < first_step + (record["kind"] != "change"):
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a process killed while writing leaves one cut line, whose step is redone
    write_text_atomic(path, "".join(f"{line}\n" for line in kept))
