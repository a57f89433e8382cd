"""Trials: the same fine-tuning with several seeds, each in a folder of its own, then the mean.

A folder holds one run only: `config.yaml`, `classes.json`, checkpoints, `metrics.json`,
`tensorboard/`, `result.json`, `pr_curves.npz`, with TEST.EVAL_PERIOD `evaluations.json`. A result
is averaged with others of the same engine and config digest only; a failed trial is listed with its
error and is no number.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from detection.class_names import check_classes
from detection.config import check_processes
from detection.data.datasets import DetectionData, check_and_load
from detection.data.loader import usable_records
from detection.data.masks import check_masks
from detection.data.transforms import decoding_of
from detection.engines.base import Engine, Run, TrainingStopped
from detection.engines.evaluations import finish_evaluations
from detection.finished_runs import finished_runs
from detection.leaks import check_leak, line_of
from detection.pictures import save_detection_pictures
from detection.report import write_report
from detection.run_folder import (
    CONFIG_FILE,
    RESULT_FILE,
    holds_a_run,
    set_result_aside,
    write_class_names,
)
from detection.run_identity import RunIdentity
from detection.scoring import metric_in_words, score_detections
from detection.trial_results import (
    LEFT_OUT,
    SCORES,
    mark_other_data,
    outcome_in_words,
    scores_in_words,
    summarise,
    summarise_second_opinion,
)
from detection.weights_file import find_weights
from moco import distributed
from moco.cfgnode import CfgNode, dump_yaml
from moco.distributed import ProcessInfo
from moco.errors import ConfigError, MocoError, NonFiniteError
from moco.training.changes import Changes
from moco.training.checkpoint import sha256_of, write_json_atomic, write_text_atomic

RESULTS_FILE = "results.json"
EVAL_ONLY_FILE = "eval_only.json"


@dataclass(frozen=True)
class Job:
    """What all trials share; `prepare` makes it, after everything in it was checked."""

    cfg: CfgNode
    engine: Engine
    process: ProcessInfo
    data: DetectionData
    weights: dict
    identity: RunIdentity
    base_seed: int
    output_dir: Path
    allow_change: tuple[str, ...] = ()
    leak: dict | None = None  # of `check_leak`; on rank 0

    @property
    def config_digest(self) -> str:
        return self.identity.config_digest

    def run(self, folder: Path, seed: int, *, resume: bool, eval_only: bool = False) -> Run:
        return Run(
            cfg=self.cfg,
            data=self.data,
            output_dir=folder,
            seed=seed,
            process=self.process,
            config_digest=self.config_digest,
            resume=resume,
            eval_only=eval_only,
            identity=self.identity,
            changes=Changes(self.allow_change, unit="iteration"),
        )

    def trial(self, k: int) -> Run:
        return self.run(self.output_dir / f"trial_{k}", self.base_seed + k, resume=True)


def prepare(
    cfg: CfgNode,
    engine: Engine,
    why: str,
    process: ProcessInfo,
    *,
    eval_only: bool = False,
    allow_change: Sequence[str] = (),
) -> Job:
    """Check the data, the weights and the engine before the first iteration, and say so.

    Args:
        why: why this engine was chosen, for the printed lines.
        allow_change: names of what may differ from the runs that are continued.
    Raises: ConfigError, DataError, CheckpointError.
    """
    if not eval_only:
        check_processes(cfg, process.world_size, process.device.type)
    loaded = engine.check(cfg, eval_only=eval_only)
    data = check_and_load(cfg, engine.name)
    if not eval_only:
        usable_records(data.train_records, cfg)
    check_masks(cfg, data.train_records)
    unknown = check_classes(cfg, data.class_names, eval_only=eval_only)
    output_dir = _make_output_dir(cfg)
    path = cfg.MODEL.WEIGHTS
    weights = {"path": path, "sha256": sha256_of(find_weights(path)) if path else None}
    job = Job(
        cfg=cfg,
        engine=engine,
        process=process,
        data=data,
        weights=weights,
        identity=RunIdentity.of(cfg, engine.name, weights["sha256"], data),
        base_seed=max(cfg.SEED, 0),
        output_dir=output_dir,
        allow_change=tuple(allow_change),
        leak=check_leak(path, data.test_records) if process.is_main else None,
    )
    if process.is_main:
        _print_summary(job, why, "\n".join(filter(None, (loaded, unknown))))
    return job


def _make_output_dir(cfg: CfgNode) -> Path:
    path = Path(cfg.OUTPUT_DIR).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {path}: cannot be created ({error.strerror}); give a folder that can"
        ) from error
    return path


def _print_summary(job: Job, why: str, loaded: str) -> None:
    cfg, process, data = job.cfg, job.process, job.data
    print(f"engine: {job.engine.name} ({why}), {process.world_size} process(es), {process.device}")
    print(
        f"data: {len(data.train_records)} training images ({', '.join(cfg.DATASETS.TRAIN)}), "
        f"{len(data.test_records)} test images ({data.test_name}), {len(data.class_names)} classes"
    )
    for line in data.report.lines():
        print(f"  {line}")
    print(f"weights: {loaded}")
    if line := line_of(job.leak):
        print(line)
    seed_note = f" (SEED is {cfg.SEED}; negative means 0 here)" if cfg.SEED < 0 else ""
    print(f"config digest {job.config_digest}, first seed {job.base_seed}{seed_note}", flush=True)


def run_trials(job: Job, num_trials: int) -> dict:
    """Trials 0 to N - 1 in OUTPUT_DIR/trial_k with seed SEED + k, then results.json and a report.

    A finished trial is not repeated, an unfinished or failed one goes on from its newest
    checkpoint, so the same command can be started again at any time.

    Returns: the content of results.json, see `collect`.
    Raises: CheckpointError if a trial's folder holds a run of other settings; TrainingStopped.
    """
    trials = open_trials(job, num_trials)
    return close_trials(job, [trials[k] or run_trial(job, k) for k in range(num_trials)])


def open_trials(job: Job, num_trials: int) -> list[dict | None]:
    """The results of the trials that are finished already, None for the others.

    Raises: CheckpointError, before anything is written, if a folder holds another run.
    """
    if num_trials < 1:
        raise ConfigError(f"--trials {num_trials}: at least 1 is needed; 5 is usual")
    trials = finished_runs([job.trial(k) for k in range(num_trials)], partial(_say, job))
    distributed.barrier()  # every rank has read the folders before one of them is written to
    if job.process.is_main:
        write_text_atomic(job.output_dir / CONFIG_FILE, dump_yaml(job.cfg))
    for k, result in enumerate(trials):
        if result:
            _say(job, f"trial {k}: finished already, {scores_in_words(result)}")
        if result and result["status"] != "finished":
            _say(job, outcome_in_words(k, result))
    return trials


def run_trial(job: Job, k: int) -> dict:
    """Train and score trial k from where it stands; returns its result, which may be a failure.

    Raises: TrainingStopped, and errors after which the next trial cannot go on either.
    """
    run = job.trial(k)
    _say(job, f"trial {k}: seed {run.seed}, {run.output_dir}")
    try:
        result = _train_and_score(job, run, pictures=k == 0)
    except Exception as error:
        if not _others_can_go_on(error, job.process):
            raise
        result = failed_result(job, run, error)
    _say(job, outcome_in_words(k, result))
    return result


def run_only_trial(job: Job, k: int) -> dict:
    """Trial k of a job whose other trials run in processes of their own; returns its result."""
    return finished_runs([job.trial(k)], partial(_say, job))[0] or run_trial(job, k)


def close_trials(job: Job, trials: Sequence[dict]) -> dict:
    """Write results.json and the report of all trials; returns the content of results.json."""
    results = collect(job, trials)
    if job.process.is_main:
        write_json_atomic(job.output_dir / RESULTS_FILE, results)
        for line in write_report(results, job.output_dir):
            print(line)
    return results


def run_single(job: Job, *, resume: bool) -> dict:
    """One run directly in OUTPUT_DIR, as Detectron2's train_net; returns its result.json.

    Raises: ConfigError if OUTPUT_DIR holds a run and `resume` is not set.
    """
    folder = job.output_dir
    if holds_a_run(folder) and not resume:
        raise ConfigError(
            f"OUTPUT_DIR {folder}: already holds a run; add --resume to continue it, or give "
            "another OUTPUT_DIR"
        )
    run = job.run(folder, job.base_seed, resume=resume)
    (finished,) = finished_runs([run], partial(_say, job))
    distributed.barrier()
    if finished is not None:
        _say(job, f"finished already: {scores_in_words(finished)}")
        if finished["status"] != "finished":
            _say(job, finished["error"])
        return finished
    try:
        result = _train_and_score(job, run, pictures=True)
    except TrainingStopped:
        raise
    except Exception as error:
        failed_result(job, run, error)
        raise
    _say(job, scores_in_words(result))
    return result


def evaluate_only(job: Job) -> dict:
    """Score the fine-tuned model cfg.MODEL.WEIGHTS; returns and writes eval_only.json."""
    run = job.run(job.output_dir, job.base_seed, resume=False, eval_only=True)
    started = time.perf_counter()
    result = _result(job, run, started, **_score(job, run, pictures=False))
    if job.process.is_main:
        write_json_atomic(job.output_dir / EVAL_ONLY_FILE, result)
    _say(job, scores_in_words(result))
    return result


def collect(job: Job, trials: Sequence[dict]) -> dict:
    """The content of results.json: what all trials share, the trials, and `summarise`'s fields.

    Trials that trained on other data than the rest are marked as left out of the mean.
    Raises: ConfigError if results of other engines or configurations are among them.
    """
    for trial in trials:
        # Of a result without "data" the folder's examination has compared the configuration.
        digest = trial["config_digest"] if "data" in trial else job.config_digest
        identity = (trial["engine"], digest)
        if trial["status"] != LEFT_OUT and identity != (job.engine.name, job.config_digest):
            raise ConfigError(
                f"results of {identity} and {(job.engine.name, job.config_digest)} are not averaged"
            )
    trials = mark_other_data(trials)
    second = summarise_second_opinion(trials)
    return {
        "engine": job.engine.name,
        "versions": _versions(job),
        "config_digest": job.config_digest,
        "dataset": job.data.test_name,
        "metric": metric_in_words(job.data, job.cfg),
        "classes_without_test_objects": list(job.data.absent_classes),
        "weights": job.weights,
        "data": job.identity.data.summary(),
        **_leak(job),
        "num_trials": len(trials),
        **summarise(trials),
        **({"detectron2_evaluator": second} if second else {}),
        "trials": list(trials),
    }


def _train_and_score(job: Job, run: Run, *, pictures: bool) -> dict:
    started = time.perf_counter()
    if job.process.is_main:
        own = run.cfg.clone()
        own.defrost()
        own.OUTPUT_DIR, own.SEED = str(run.output_dir), run.seed
        set_result_aside(run.output_dir)
        write_text_atomic(run.output_dir / CONFIG_FILE, dump_yaml(own))
        write_class_names(run.output_dir, job.data.class_names)
        job.identity.data.write_list(run.output_dir)
    job.engine.train(run)
    result = _result(job, run, started, **_score(job, run, pictures=pictures))
    if job.process.is_main:
        result |= finish_evaluations(run, result)
        write_json_atomic(run.output_dir / RESULT_FILE, result)
    distributed.barrier()
    return result


def _score(job: Job, run: Run, *, pictures: bool) -> dict:
    records, names = job.data.test_records, job.data.class_names
    detections = job.engine.predict(run, records)
    others = {}
    if hasattr(job.engine, "second_opinion"):
        second = job.engine.second_opinion(run, records, detections)
        others = {"detectron2_evaluator": second} if second else {}  # {} on other ranks than 0
    folder = run.output_dir if job.process.is_main else None
    scores = score_detections(job.data, job.cfg, detections, folder)
    if pictures and job.process.is_main:
        decoding = decoding_of(run.cfg, job.engine.name)
        folder = run.output_dir / "pictures"
        save_detection_pictures(records, detections, names, folder, decoding=decoding)
    return {"status": "finished", "error": None, **scores, **others}


def failed_result(job: Job, run: Run, error: Exception) -> dict:
    """Record in its folder that a run failed; returns the result."""
    if not isinstance(error, MocoError):  # not the user's doing: the traceback is needed
        traceback.print_exception(error, file=sys.stderr)
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    result = _result(
        job, run, None, status="failed", error=message, **dict.fromkeys(SCORES), per_class={}
    )
    if job.process.is_main:
        write_json_atomic(run.output_dir / RESULT_FILE, result)
    return result


def _others_can_go_on(error: Exception, process: ProcessInfo) -> bool:
    """Of several processes each must have failed in the same way, or the next trial would hang."""
    if isinstance(error, TrainingStopped):
        return False
    return process.world_size == 1 or isinstance(error, NonFiniteError)


def _result(job: Job, run: Run, started: float | None, **scores: object) -> dict:
    """`seconds` is the time of this session: a resumed run's earlier ones are not in it."""
    return {
        "engine": job.engine.name,
        "versions": _versions(job),
        "config_digest": job.config_digest,
        "dataset": job.data.test_name,
        "metric": metric_in_words(job.data, job.cfg),
        "seed": run.seed,
        "weights": job.weights,
        "data": job.identity.data.summary(),
        "changes": run.changes.all(),
        **_leak(job),
        "num_processes": job.process.world_size,
        "seconds": None if started is None else round(time.perf_counter() - started, 1),
        **scores,
    }


def _leak(job: Job) -> dict:
    return {"test_images_in_pretraining": job.leak} if job.leak else {}


def _versions(job: Job) -> dict[str, str]:
    device = job.process.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {**job.engine.versions(), "device": name}


def _say(job: Job, line: str) -> None:
    if job.process.is_main:
        print(line, flush=True)
