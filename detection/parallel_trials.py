"""Trials side by side: each in a process of its own, with a GPU (or a share of the cores) for it.

The parent trains nothing. It starts `train_net.py --only-trial K` for each trial that is not
finished, at most as many at once as there are slots, and collects the results. The processes
write the same files as a serial run, so it can be stopped and continued in either way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from detection.engines.base import TrainingStopped
from detection.engines.progress import METRICS_FILE
from detection.run_folder import RESULT_FILE, set_result_aside
from detection.trial_results import outcome_in_words
from detection.trials import Job, close_trials, failed_result, open_trials
from moco import distributed, slots
from moco.distributed import ProcessInfo
from moco.errors import MocoError
from moco.training.checkpoint import read_json

LOG_FILE = "log.txt"
_QUIET_SECONDS = 60.0  # between progress lines that are not on a terminal
_TAIL_BYTES = 4096  # of metrics.json; the last record is shorter
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


class TrialProcessError(MocoError):
    """The process of a trial ended without a result."""


def parent_process(device: str) -> ProcessInfo:
    """What `setup_process` gives a process that runs alone, but without a context on a GPU, which
    its trial may need as a whole. Raises: DistributedError."""
    if device == "cpu" or not torch.cuda.is_available():
        return distributed.setup_process(device)
    return ProcessInfo(0, 1, 0, torch.device("cuda", 0))


def run_trials_side_by_side(
    job: Job, num_trials: int, command: Callable[[int], list[str]], num_slots: int
) -> dict:
    """`trials.run_trials` with up to `num_slots` trials at once; a failed one stops no other.

    Args:
        command: the command line of a process that does `trials.run_only_trial` for trial k.
        num_slots: slot s has the s-th visible GPU, or on a CPU its share of the cores.
    Returns: the content of results.json.
    Raises: CheckpointError before anything is started; TrainingStopped after SIGTERM, SIGINT or
        SIGHUP, once all processes have saved their state and ended.
    """
    trials = open_trials(job, num_trials)
    to_do = [k for k, result in enumerate(trials) if result is None]
    num_slots = max(1, min(num_slots, len(to_do)))
    progress = _Progress(job, num_trials)
    if to_do:
        progress.say(f"{len(to_do)} trial(s) to do, {num_slots} side by side")
    side_by_side = _SideBySide(job, trials, command, num_slots, progress)
    stopped_by = slots.run_jobs(
        [partial(side_by_side.trial, k) for k in to_do], num_slots,
        watch=side_by_side.show, say=progress.say,
    )  # fmt: skip
    progress.clear()
    if stopped_by is not None:
        raise TrainingStopped(
            f"stopped by {signal.Signals(stopped_by).name}, trials that were training have saved "
            "their state; start the same command again to continue them",
            stopped_by,
        )
    return close_trials(job, trials)


class _SideBySide:
    """The trials as jobs, and how far they are.

    Args:
        trials: trial -> its result, None where there is none; results are put there.
    """

    def __init__(self, job: Job, trials: list[dict | None], command, num_slots: int, progress):
        self._job, self._trials, self._command, self._progress = job, trials, command, progress
        self._running: list[int] = []
        self._num_waiting = sum(result is None for result in trials)
        self._is_on_gpu = job.process.device.type == "cuda"
        num_gpus = torch.cuda.device_count() if self._is_on_gpu else 0
        self._environments = slots.slot_environments(num_slots, num_gpus, os.environ)

    def trial(self, k: int, slot: int) -> slots.Job:
        run, environment = self._job.trial(k), self._environments[slot]
        run.output_dir.mkdir(parents=True, exist_ok=True)
        # The failure of an earlier session must not be taken for what this one ends with.
        set_result_aside(run.output_dir)
        (run.output_dir / RESULT_FILE).unlink(missing_ok=True)
        log = run.output_dir / LOG_FILE
        if self._is_on_gpu:
            where = f"GPU {environment['CUDA_VISIBLE_DEVICES']}"
        else:
            where = f"{environment['OMP_NUM_THREADS']} thread(s)"
        self._progress.say(f"trial {k}: seed {run.seed}, {where}, lines in {log}")
        self._running.append(k)
        self._num_waiting -= 1
        ended = yield slots.Command(self._command(k), log, environment)
        self._running.remove(k)
        result = self._trials[k] = _result_of(self._job, k, log, ended)
        self._progress.say(outcome_in_words(k, result) if result else f"trial {k}: stopped")

    def show(self) -> None:
        num_done = sum(result is not None for result in self._trials)
        self._progress.show(num_done, self._running, self._num_waiting)


def _result_of(job: Job, k: int, log: Path, ended: slots.Ended) -> dict | None:
    """What the process wrote or, where it wrote nothing, a failure that says what is known.

    None for a process that ended because all were told to stop: it can be continued.
    """
    run = job.trial(k)
    path = run.output_dir / RESULT_FILE
    if path.is_file():
        return read_json(path)
    if ended.stopping:
        return None
    if ended.code in _STOPPED:
        reason = "was stopped by SIGTERM; start the same command again to continue it"
    elif ended.code < 0:
        reason = f"was ended by {_signal_name(-ended.code)}"
    else:
        reason = f"ended with status {ended.code}: {_last_line(log)}"
    return failed_result(job, run, TrialProcessError(f"its process {reason} (see {log})"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ")  # the first line is the command


class _Progress:
    """One line about all trials: refreshed on a terminal, elsewhere printed once a minute."""

    def __init__(self, job: Job, num_trials: int, stream: TextIO | None = None):
        self._job, self._num_trials = job, num_trials
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._last_time = time.monotonic()

    def say(self, line: str) -> None:
        self.clear()
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")

    def show(self, num_done: int, running: Sequence[int], num_waiting: int) -> None:
        now = time.monotonic()
        if not running or (not self._is_terminal and now - self._last_time < _QUIET_SECONDS):
            return
        self._last_time = now
        folders = {k: self._job.trial(k).output_dir for k in running}
        num_iterations = self._job.cfg.SOLVER.MAX_ITER
        line = progress_line(num_done, self._num_trials, folders, num_waiting, num_iterations)
        if not self._is_terminal:
            self.say(line)
            return
        self.clear()
        self._stream.write(line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()


def progress_line(
    num_done: int,
    num_trials: int,
    running: Mapping[int, Path],
    num_waiting: int,
    num_iterations: int,
) -> str:
    """How far the trials are, and how long their training will take.

    Args:
        running: trial -> its folder, whose metrics.json is read.
        num_iterations: SOLVER.MAX_ITER.
    """
    records = {k: _last_record(folder / METRICS_FILE) for k, folder in running.items()}
    known = [record for record in records.values() if record]
    parts = [
        f"trial {k} {record['iteration'] + 1 if record else 0}/{num_iterations}"
        for k, record in records.items()
    ]
    line = f"{num_done}/{num_trials} trials done; {', '.join(parts)}"
    if known:
        seconds = sum(record["time"] for record in known) / len(known)
        num_left = num_iterations * (len(running) + num_waiting)
        num_left -= sum(record["iteration"] + 1 for record in known)
        left = timedelta(seconds=round(num_left * seconds / len(running)))
        line += f"; ETA of training {left}"
    return line


def _last_record(path: Path) -> dict | None:
    """The newest record of a metrics.json that is being written, None without a whole one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"iteration", "time"} <= record.keys():
            return record
    return None
