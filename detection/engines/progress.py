"""What a training run tells: a line on the terminal, metrics.json and TensorBoard.

It only watches: nothing here changes a number, and losses are read from the device only at the
iterations that are `due`. Figures and their names are Detectron2's (utils/events.py): of a loss
and of a time the median over the last `WINDOW` iterations, of the learning rate the last one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from moco.distributed import gather_objects, rank

METRICS_FILE = "metrics.json"
TENSORBOARD_FOLDER = "tensorboard"
MAX_LINES_OFF_TERMINAL = 20
WINDOW = 20  # iterations
_WARMUP = 2  # iterations of a session whose time tells nothing about the others'
_ETA_WINDOW = 1000  # iterations


class Progress:
    """Reports every `period` iterations and at the last one.

    In each iteration: `begin`, `loaded` where the batch is there, `report` after the update.

    Args:
        output_dir: folder of metrics.json (JSON lines, as Detectron2 writes it).
        start: first iteration of this session; records of later ones, left by an interrupted
            session, are dropped.
        end: number of iterations of the whole run.
        show: print lines; on a terminal one line that is refreshed, elsewhere at most 20 a run.
        tensorboard: write the figures to `output_dir`/tensorboard too.
        figures: gives more figures, or others, of the iteration that is reported.
        losses: what `recent_losses` of the interrupted session gave, else the window is empty.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        start: int,
        end: int,
        period: int,
        show: bool,
        tensorboard: bool = False,
        figures: Callable[[], Mapping[str, float]] | None = None,
        losses: Sequence[Sequence[float]] = (),
        stream: TextIO | None = None,
    ):
        self._path = output_dir / METRICS_FILE
        self._end = end
        self._period = period
        self._stream = stream or sys.stdout
        self._show = show and rank() == 0
        self._is_terminal = self._stream.isatty()
        self._line_period = max(period, math.ceil(end / MAX_LINES_OFF_TERMINAL))
        self._figures = figures
        self._losses: deque[torch.Tensor | Sequence[float]] = deque(losses, maxlen=WINDOW)
        self._seconds: deque[float] = deque(maxlen=_ETA_WINDOW)
        self._load_seconds: deque[float] = deque(maxlen=WINDOW)
        self._num_timed, self._begun = 0, time.perf_counter()
        self._writer = None
        if rank() == 0:
            _drop_records_from(self._path, start)
            if tensorboard:
                self._writer = _tensorboard(output_dir, start)

    def due(self, iteration: int) -> bool:
        return (iteration + 1) % self._period == 0 or iteration + 1 == self._end

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def loaded(self) -> None:
        self._load_seconds.append(time.perf_counter() - self._begun)

    def report(self, iteration: int, losses: Mapping[str, torch.Tensor], lr: float) -> None:
        """Note an iteration and record it where that is due; every rank calls it."""
        self._note_time()
        self._losses.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        if not self.due(iteration):
            return
        rows = self.recent_losses()
        load_seconds = np.max(gather_objects(list(self._load_seconds)), axis=0)
        if rank() != 0:
            return
        record = {"iteration": iteration, "total_loss": _median([sum(row) for row in rows])}
        for name, values in zip(losses, zip(*rows, strict=True), strict=True):
            record[name] = _median(values)
        record["lr"] = lr
        record["time"] = _median(list(self._seconds)[-WINDOW:])
        if len(load_seconds):
            record["data_time"] = _median(load_seconds)
        record["eta_seconds"] = _median(self._seconds) * (self._end - iteration - 1)
        if self._figures is not None:
            record.update(self._figures())
        self._write(record)
        self._print(record, list(losses))

    def recent_losses(self) -> list[list[float]]:
        """Of each of the last `WINDOW` iterations the losses, averaged over ranks; every rank
        calls it."""
        restored = [row for row in self._losses if not torch.is_tensor(row)]
        here = [row for row in self._losses if torch.is_tensor(row)]
        own = [*restored, *(torch.stack(here).tolist() if here else ())]
        return np.mean(gather_objects(own), axis=0).tolist()

    def scores(self, iteration: int, scores: Mapping[str, float | None]) -> None:
        """Record scores of the state before `iteration`; on rank 0."""
        self._write(_score_record(iteration, scores))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _note_time(self) -> None:
        self._num_timed += 1
        if self._num_timed == _WARMUP + 1:
            self._seconds.clear()
        self._seconds.append(time.perf_counter() - self._begun)

    def _write(self, record: Mapping[str, float]) -> None:
        _append(self._path, record)
        if self._writer is not None:
            _add_scalars(self._writer, record)

    def _print(self, record: dict, names: list[str]) -> None:
        done = record["iteration"] + 1
        is_last = done == self._end
        if not self._show:
            return
        if not (self._is_terminal or is_last or done % self._line_period < self._period):
            return
        parts = " ".join(f"{name} {record[name]:.4f}" for name in names)
        line = (
            f"iteration {done}/{self._end}  loss {record['total_loss']:.4f} ({parts})  "
            f"lr {record['lr']:.6f}  {record['time']:.3f} s/iter  "
            f"ETA {timedelta(seconds=round(record['eta_seconds']))}"
        )
        start, end = ("\r\x1b[K", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        self._stream.write(f"{start}{line}{end}")
        self._stream.flush()


def record_final_scores(
    output_dir: Path, end: int, scores: Mapping[str, float | None], *, tensorboard: bool
) -> None:
    """Record the scores of the whole run of `end` iterations; on rank 0."""
    _drop_records_from(output_dir / METRICS_FILE, end)
    record = _score_record(end, scores)
    _append(output_dir / METRICS_FILE, record)
    if tensorboard:
        writer = _tensorboard(output_dir, end)
        _add_scalars(writer, record)
        writer.close()


def _score_record(iteration: int, scores: Mapping[str, float | None]) -> dict:
    known = {name: value for name, value in scores.items() if value is not None}
    return {"iteration": iteration, **known}


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _append(path: Path, record: Mapping[str, float]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _tensorboard(output_dir: Path, start: int):
    """A writer that hides what an interrupted session left of iteration `start` and later."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=start)


def _add_scalars(writer, record: Mapping[str, float]) -> None:
    for name, value in record.items():
        if name != "iteration":
            writer.add_scalar(name, value, record["iteration"])


def _drop_records_from(path: Path, start: int) -> None:
    """Keep the records before iteration `start`: those after it will be written again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            iteration = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a killed process; its iteration is done again
        if iteration < start:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
