"""Trials side by side: each in a process of its own, with a GPU (or a share of the cores) for it.

The parent trains nothing. It starts `train_net.py --only-trial K` for each trial that is not
finished, at most as many at once as there are slots, and collects the results. The processes
write the same files as a serial run, so it can be stopped and continued in either way.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from detection.engines.base import TrainingStopped
from detection.engines.progress import METRICS_FILE
from detection.run_folder import RESULT_FILE, set_result_aside
from detection.trial_results import outcome_in_words
from detection.trials import Job, close_trials, failed_result, open_trials
from moco import distributed
from moco.distributed import ProcessInfo
from moco.errors import MocoError
from moco.training.checkpoint import read_json

LOG_FILE = "log.txt"
_POLL_SECONDS = 0.5
_QUIET_SECONDS = 60.0  # between progress lines that are not on a terminal
_TAIL_BYTES = 4096  # of metrics.json; the last record is shorter
_STOPPED = (TrainingStopped.exit_code, -signal.SIGTERM)


class TrialProcessError(MocoError):
    """The process of a trial ended without a result."""


@dataclass
class _Child:
    trial: int
    slot: int
    process: subprocess.Popen
    log: Path
    told_to_stop: bool = False


@dataclass
class _Stop:
    signal: int | None = None


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
    environments = slot_environments(num_slots, job.process.device.type, os.environ)
    progress = _Progress(job, num_trials)
    children: list[_Child] = []
    if to_do:
        progress.say(f"{len(to_do)} trial(s) to do, {num_slots} side by side")
    with _noting_signals() as stop:
        while children or (to_do and not stop.signal):
            free = sorted(set(range(num_slots)) - {child.slot for child in children})
            for slot in free[: len(to_do)] if not stop.signal else ():
                k = to_do.pop(0)
                child, line = _start(job, k, slot, command(k), environments[slot])
                children.append(child)
                progress.say(line)
            time.sleep(_POLL_SECONDS)
            if stop.signal:
                _tell_to_stop(children)
            for child in [c for c in children if c.process.poll() is not None]:
                children.remove(child)
                result = trials[child.trial] = _result_of(job, child, stopping=bool(stop.signal))
                progress.say(
                    outcome_in_words(child.trial, result)
                    if result
                    else f"trial {child.trial}: stopped"
                )
            num_done = sum(result is not None for result in trials)
            progress.show(num_done, [child.trial for child in children], len(to_do))
    progress.clear()
    if stop.signal:
        raise _stopped(stop.signal)
    return close_trials(job, trials)


def slot_environments(
    num_slots: int, device_type: str, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """The environment of the processes of each slot.

    On GPUs a process sees one of the visible ones only; on a CPU it gets its share of the cores,
    unless OMP_NUM_THREADS is set already.
    """
    if device_type == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(n) for n in range(num_slots)]
        return [{**environment, "CUDA_VISIBLE_DEVICES": gpus[s]} for s in range(num_slots)]
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = max(1, num_cores // num_slots)
    return [{"OMP_NUM_THREADS": str(threads), **environment} for _ in range(num_slots)]


def _start(
    job: Job, k: int, slot: int, command: list[str], environment: dict[str, str]
) -> tuple[_Child, str]:
    """Start the process of trial k; returns it and the line that says so."""
    run = job.trial(k)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    # The failure of an earlier session must not be taken for what this one ends with.
    set_result_aside(run.output_dir)
    (run.output_dir / RESULT_FILE).unlink(missing_ok=True)
    log = run.output_dir / LOG_FILE
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if run.process.device.type == "cuda":
        where = f"GPU {environment['CUDA_VISIBLE_DEVICES']}"
    else:
        where = f"{environment['OMP_NUM_THREADS']} thread(s)"
    return _Child(k, slot, process, log), f"trial {k}: seed {run.seed}, {where}, lines in {log}"


def _tell_to_stop(children: Sequence[_Child]) -> None:
    for child in children:
        if not child.told_to_stop:  # a second SIGTERM would end it while it saves
            child.process.terminate()
            child.told_to_stop = True


def _stopped(number: int) -> TrainingStopped:
    error = TrainingStopped(
        f"stopped by {_signal_name(number)}, trials that were training have saved their state; "
        "start the same command again to continue them"
    )
    error.exit_code = 128 + number
    return error


def _result_of(job: Job, child: _Child, *, stopping: bool) -> dict | None:
    """What the process wrote or, where it wrote nothing, a failure that says what is known.

    None for a process that ended because all were told to stop: it can be continued.
    """
    run, status = job.trial(child.trial), child.process.returncode
    path = run.output_dir / RESULT_FILE
    if path.is_file():
        return read_json(path)
    if stopping:
        return None
    if status in _STOPPED:
        reason = "was stopped by SIGTERM; start the same command again to continue it"
    elif status < 0:
        reason = f"was ended by {_signal_name(-status)}"
    else:
        reason = f"ended with status {status}: {_last_line(child.log)}"
    return failed_result(job, run, TrialProcessError(f"its process {reason} (see {child.log})"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ")  # the first line is the command


@contextmanager
def _noting_signals() -> Iterator[_Stop]:
    """SIGTERM, Ctrl-C and a closed terminal set a flag instead of ending this process."""
    stop = _Stop()

    def note(signum, frame) -> None:
        stop.signal = signum

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


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
