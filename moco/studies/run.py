"""Running a study: each run a chain of commands, in a folder of its own, resumed where it stopped.

The commands are the project's own (tools/pretrain.py, ...), so a study can do nothing a user
could not do by hand, and a stopped one continues as they do.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moco import slots
from moco.errors import CheckpointError, Stopped
from moco.studies.plan import PlannedRun
from moco.training.checkpoint import read_json, write_json_atomic
from moco.training.progress import format_duration

RESULT_FILE, LOG_FILE = "result.json", "log.txt"
_STOPPED = {
    code: number
    for number in (signal.SIGTERM, signal.SIGINT)
    for code in (128 + number, -number)
}


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
    """Runs planned runs, side by side where there are several slots.

    Args:
        output_dir: of the study; run r has the folder output_dir / r.folder.
        stages: run -> the commands of it, in order.
        environments: of the commands in each slot (a GPU, a share of the cores).
    """

    def __init__(
        self,
        output_dir: Path,
        stages: Callable[[PlannedRun, Path], Sequence[Stage]],
        *,
        environments: Sequence[Mapping[str, str]] = (os.environ,),
        say: Callable[[str], None] = print,
    ):
        self.output_dir, self.stages, self.say = output_dir, stages, say
        self.environments = environments

    def run_all(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Run what is not finished. A failed run stops no other.

        Returns: the errors of failed runs.
        Raises: Stopped after SIGTERM, SIGINT or SIGHUP to this process or one of a run's, once all
            commands have saved and ended.
        """
        todo = [run for run in runs if self._unfinished(run)]
        self.say(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
        self._num_runs, self._num_started = len(todo), 0
        self._seconds: list[float] = []
        self._errors: list[str] = []
        stopped_by = slots.run_jobs(
            [partial(self._run, run) for run in todo], len(self.environments), say=self.say
        )
        if stopped_by is not None:
            raise self._stopped(stopped_by)
        return self._errors

    def _unfinished(self, run: PlannedRun) -> bool:
        folder = self.output_dir / run.folder
        return finished_result(folder, run, self.stages(run, folder)) is None

    def _stopped(self, number: int) -> Stopped:
        return Stopped(
            f"{self.output_dir}: the study was stopped; the same command continues it", number
        )

    def _run(self, run: PlannedRun, slot: int) -> slots.Job:
        self._num_started += 1
        started = time.monotonic()
        name = f"{run.row}, seed {run.seed}"
        place = f"[{self._num_started}/{self._num_runs}] {name}"
        self.say(f"{place}: begins")
        folder = self.output_dir / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        result = {"row": run.row, "seed": run.seed, "config_digest": run.digest, "stages": {}}
        for stage in self.stages(run, folder):
            ended = yield slots.Command(
                stage.command, folder / LOG_FILE, self.environments[slot]
            )
            if ended.stopping:
                return
            if ended.code in _STOPPED:
                raise self._stopped(_STOPPED[ended.code])
            if ended.code:
                last = _last_line(folder)
                result["error"] = f"{stage.name} ended with exit code {ended.code}: {last}"
                break
            peak = {"peak_rss_bytes": ended.peak_bytes}
            result["stages"][stage.name] = {**stage.read(folder), **peak}
        write_json_atomic(folder / RESULT_FILE, result)
        outcome = "done"
        if "error" in result:
            outcome = f"failed: {result['error']}"
            self._errors.append(f"{name}: {result['error']}")
        self._say_outcome(f"{place}: {outcome}", time.monotonic() - started)

    def _say_outcome(self, text: str, seconds: float) -> None:
        self._seconds.append(seconds)
        num_left = self._num_runs - len(self._seconds)
        left = num_left * statistics.mean(self._seconds) / len(self.environments)
        self.say(f"{text} in {format_duration(seconds)}; about {format_duration(left)} left")


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
