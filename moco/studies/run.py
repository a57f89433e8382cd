"""Running a study: each run a chain of commands, in a folder of its own, resumed where it stopped.

The commands are the project's own (tools/pretrain.py, ...), so a study can do nothing a user
could not do by hand, and a stopped one continues as they do.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moco.errors import CheckpointError, MocoError
from moco.studies.plan import PlannedRun
from moco.training.checkpoint import read_json, write_json_atomic
from moco.training.progress import format_duration

RESULT_FILE, LOG_FILE = "result.json", "log.txt"
_POLL_SECONDS = 0.2
_STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}


class StudyStopped(MocoError):
    """The study was asked to stop; its runs saved their state."""


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    read: its results, from the run's folder, once it ended well.
    """

    name: str
    command: Sequence[str]
    read: Callable[[Path], dict]


def finished_result(folder: Path, run: PlannedRun, stages: Sequence[Stage]) -> dict | None:
    """The result of a run that is finished; None for one that is not, or failed.

    Raises: CheckpointError where the folder holds another configuration's result.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    result = read_json(path)
    if result.get("config_digest") != run.digest:
        raise CheckpointError(
            f"{path}: is the result of another configuration (digest "
            f"{result.get('config_digest')}, now {run.digest}); give another --output-dir, or "
            "restore the configuration"
        )
    names = [stage.name for stage in stages]
    return result if "error" not in result and set(names) <= set(result["stages"]) else None


class Runner:
    """Runs planned runs, up to `num_slots` at once.

    Args:
        output_dir: of the study; run r has the folder output_dir / r.folder.
        stages: run -> the commands of it, in order.
        environment: slot -> variables for the commands in it (a GPU, a share of the cores).
    """

    def __init__(
        self,
        output_dir: Path,
        stages: Callable[[PlannedRun, Path], Sequence[Stage]],
        *,
        num_slots: int = 1,
        environment: Callable[[int], Mapping[str, str]] = lambda slot: {},
        say: Callable[[str], None] = print,
    ):
        self.output_dir, self.stages, self.say = output_dir, stages, say
        self.num_slots, self.environment = num_slots, environment
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen] = set()
        self._free_slots = list(range(num_slots))

    def run_all(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Run what is not finished. A failed run stops no other.

        Returns: the errors of failed runs.
        Raises: StudyStopped after SIGTERM or SIGINT, once all commands have saved and ended.
        """
        todo = [run for run in runs if self._unfinished(run)]
        self.say(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
        self._started, self._seconds = 0, []
        previous = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.num_slots) as pool:
                errors = list(pool.map(lambda run: self._run(run, len(todo)), todo))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stop.is_set():
            raise StudyStopped(
                f"{self.output_dir}: the study was stopped; the same command continues it"
            )
        return [error for error in errors if error]

    def _unfinished(self, run: PlannedRun) -> bool:
        folder = self.output_dir / run.folder
        return finished_result(folder, run, self.stages(run, folder)) is None

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop.set()
        for child in list(self._children):
            child.send_signal(signal.SIGTERM)

    def _run(self, run: PlannedRun, num_runs: int) -> str | None:
        if self.stop.is_set():
            return None
        with self._lock:
            slot = self._free_slots.pop(0)
            self._started += 1
            number = self._started
        name, started = f"{run.row}, seed {run.seed}", time.monotonic()
        self.say(f"[{number}/{num_runs}] {name}: begins")
        try:
            error = self._run_stages(run, slot)
        finally:
            with self._lock:
                self._free_slots.append(slot)
        if self.stop.is_set():
            return None
        self._seconds.append(time.monotonic() - started)
        left = (num_runs - len(self._seconds)) * statistics.mean(self._seconds) / self.num_slots
        took = format_duration(self._seconds[-1])
        outcome = f"failed: {error}" if error else "done"
        self.say(
            f"[{number}/{num_runs}] {name}: {outcome} in {took}; about {format_duration(left)} left"
        )
        return f"{name}: {error}" if error else None

    def _run_stages(self, run: PlannedRun, slot: int) -> str | None:
        folder = self.output_dir / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        result = {"row": run.row, "seed": run.seed, "config_digest": run.digest, "stages": {}}
        error = None
        for stage in self.stages(run, folder):
            code, peak_bytes = self._execute(stage, folder, slot)
            if self.stop.is_set() or code in _STOPPED:
                self.stop.set()
                return None
            if code:
                error = f"{stage.name} ended with exit code {code}: {_last_line(folder)}"
                break
            result["stages"][stage.name] = {**stage.read(folder), "peak_rss_bytes": peak_bytes}
        if error:
            result["error"] = error
        write_json_atomic(folder / RESULT_FILE, result)
        return error

    def _execute(self, stage: Stage, folder: Path, slot: int) -> tuple[int, int]:
        """Run a command to its end; its output goes to the run's log.

        Returns: exit code, and the most memory it held, in bytes.
        """
        with open(folder / LOG_FILE, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(stage.command)}\n")
            log.flush()
            child = subprocess.Popen(
                stage.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment(slot)},
            )
            self._children.add(child)
            if self.stop.is_set():  # the signal came while it was started
                child.send_signal(signal.SIGTERM)
            # wait4 instead of Popen.wait: it alone tells the child's memory.
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                time.sleep(_POLL_SECONDS)
            child.returncode = os.waitstatus_to_exitcode(status)
            self._children.discard(child)
        return child.returncode, usage.ru_maxrss * 1024


def read_pretraining(folder: Path) -> dict:
    """Figures of a finished pretraining run, from its log.jsonl.

    Returns: loss, seconds_per_step and images_per_s (medians), and, where measured, untrained
        and last knn_top1 with the curve by epoch, and the GPU's peak memory.
    """
    path = folder / "pretrain" / "log.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch" and "knn_top1" in r["metrics"]]
    # The first record has the warm-up in it.
    rate = statistics.median(r["images_per_s"] for r in steps[1:] or steps)
    out = {"loss": steps[-1]["loss"], "images_per_s": rate, "steps": steps[-1]["step"]}
    if epochs:
        out["knn_untrained"] = epochs[0]["metrics"]["knn_top1"] if epochs[0]["epoch"] == 0 else None
        out["knn_top1"] = epochs[-1]["metrics"]["knn_top1"]
        out["knn_curve"] = {str(r["epoch"]): r["metrics"]["knn_top1"] for r in epochs}
    return out


def _last_line(folder: Path) -> str:
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")
