"""What a training run tells: a line on the terminal and metrics.json.

It only watches: nothing here changes a number, and losses are read from the device only at the
iterations that are `due`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from moco.distributed import all_reduce_sum, rank, world_size

METRICS_FILE = "metrics.json"
MAX_LINES_OFF_TERMINAL = 20


class Progress:
    """Reports every `period` iterations and at the last one.

    Args:
        output_dir: folder of metrics.json (JSON lines, as Detectron2 writes it).
        start: first iteration of this session; records of later ones, left by an interrupted
            session, are dropped.
        end: number of iterations of the whole run.
        show: print lines; on a terminal one line that is refreshed, elsewhere at most 20 a run.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        start: int,
        end: int,
        period: int,
        show: bool,
        stream: TextIO | None = None,
    ):
        self._path = output_dir / METRICS_FILE
        self._end = end
        self._period = period
        self._stream = stream or sys.stdout
        self._show = show and rank() == 0
        self._is_terminal = self._stream.isatty()
        self._line_period = max(period, math.ceil(end / MAX_LINES_OFF_TERMINAL))
        self._last_time, self._last_iteration = time.perf_counter(), start - 1
        if rank() == 0:
            _drop_records_from(self._path, start)

    def due(self, iteration: int) -> bool:
        return (iteration + 1) % self._period == 0 or iteration + 1 == self._end

    def report(self, iteration: int, losses: Mapping[str, torch.Tensor], lr: float) -> None:
        """Record one iteration; every rank calls it, losses are averaged over ranks."""
        stacked = torch.stack([loss.detach().float() for loss in losses.values()])
        values = (all_reduce_sum(stacked) / world_size()).tolist()
        if rank() != 0:
            return
        now = time.perf_counter()
        seconds = (now - self._last_time) / max(iteration - self._last_iteration, 1)
        self._last_time, self._last_iteration = now, iteration
        record = {
            "iteration": iteration,
            "total_loss": sum(values),
            **dict(zip(losses, values, strict=True)),
            "lr": lr,
            "time": seconds,
            "eta_seconds": seconds * (self._end - iteration - 1),
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._print(record, list(losses))

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
