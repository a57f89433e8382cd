"""TEST.EVAL_PERIOD: the scores of the test set during training, and the model with the best AP.

As in Detectron2 (engine/hooks.py, EvalHook) the last iteration's are those of the whole run, which
`detection.trials` computes; they stay the reported ones, since the best of several scores on a test
set is not an estimate for other images.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detection.engines.base import BEST_MODEL, FINAL_MODEL, Detections, Run
from detection.engines.progress import Progress, record_final_scores
from detection.engines.session import say
from detection.scoring import flat_scores, score_detections
from detection.trial_results import SCORES, scores_in_words
from moco import distributed
from moco.errors import CheckpointError
from moco.training.checkpoint import (
    read_json,
    remove_checkpoint,
    verify_manifest,
    write_atomic,
    write_json_atomic,
    write_manifest,
)

EVALUATIONS_FILE = "evaluations.json"


class PeriodicEvaluation:
    """The evaluations of one session of training, which begins at iteration `start`.

    evaluations.json holds their scores with the number of iterations done; those of iterations
    that will be done again are dropped. The AP of model_best.pth is in its manifest.
    """

    def __init__(self, run: Run, progress: Progress, start: int):
        self._run, self._progress = run, progress
        self._done: set[int] = set()
        if run.process.is_main and run.cfg.TEST.EVAL_PERIOD:
            kept = [scores for scores in _read(run.output_dir) if scores["iteration"] <= start]
            write_json_atomic(run.output_dir / EVALUATIONS_FILE, kept)
            self._done = {scores["iteration"] for scores in kept}
            if start == 0:
                remove_checkpoint(run.output_dir / BEST_MODEL)

    def due(self, iteration: int) -> bool:
        """Whether to evaluate after `iteration` (0-based): each period but at the end."""
        period, num_done = self._run.cfg.TEST.EVAL_PERIOD, iteration + 1
        is_inside = 0 < num_done < self._run.cfg.SOLVER.MAX_ITER
        return period > 0 and is_inside and num_done % period == 0

    def run(
        self,
        iteration: int,
        predict: Callable[[], Detections],
        save: Callable[..., None],
    ) -> None:
        """Evaluate after `iteration`, unless that is done; every rank calls it.

        Args:
            predict: the detections of all test images, on every rank.
            save: (path, fields of the manifest) writes the state; called on every rank.
        """
        run, num_done = self._run, iteration + 1
        if distributed.any_rank(num_done in self._done, run.process.device):
            return
        detections = predict()
        found: dict = {}
        distributed.on_main(lambda: found.update(self._score(num_done, detections)))
        if distributed.any_rank(found.get("is_best", False), run.process.device):
            save(run.output_dir / BEST_MODEL, AP=found.get("AP"))
        if found:
            say(run, f"evaluation after iteration {num_done}: {scores_in_words(found)}")
            write_json_atomic(run.output_dir / EVALUATIONS_FILE, found["evaluations"])
        distributed.barrier()

    def _score(self, num_done: int, detections: Detections) -> dict:
        run = self._run
        scores = score_detections(run.data, run.cfg, detections, None)
        self._progress.scores(num_done - 1, flat_scores(scores))
        overall = {name: scores[name] for name in SCORES}
        evaluations = [*_read(run.output_dir), {"iteration": num_done, **overall}]
        is_best = _is_better(overall["AP"], _best(run.output_dir))
        return {**overall, "evaluations": evaluations, "is_best": is_best}


def finish_evaluations(run: Run, scores: Mapping) -> dict:
    """Record the scores of the finished run; on rank 0.

    Returns: with TEST.EVAL_PERIOD, {"evaluations": the scores of all, the last iteration's among
        them, "best": {"iteration", "AP", "file"} of the model with the best AP, or None}, else {}.
    """
    num_done, period = run.cfg.SOLVER.MAX_ITER, run.cfg.TEST.EVAL_PERIOD
    tensorboard = run.cfg.LOG.TENSORBOARD
    record_final_scores(run.output_dir, num_done, flat_scores(scores), tensorboard=tensorboard)
    if not period:
        return {}
    last = {"iteration": num_done, **{name: scores[name] for name in SCORES}}
    evaluations = [e for e in _read(run.output_dir) if e["iteration"] < num_done]
    evaluations.append(last)
    write_json_atomic(run.output_dir / EVALUATIONS_FILE, evaluations)
    if _is_better(last["AP"], _best(run.output_dir)):
        _copy_model(run.output_dir / FINAL_MODEL, run.output_dir / BEST_MODEL, AP=last["AP"])
    best = _best(run.output_dir)
    if best is not None:
        best = {"iteration": best["iteration"] + 1, "AP": best["AP"], "file": BEST_MODEL}
    return {"evaluations": evaluations, "best": best}


def _copy_model(source: Path, copy: Path, **fields: object) -> None:
    manifest = verify_manifest(source)
    with open(source, "rb") as content:
        write_atomic(copy, lambda file: shutil.copyfileobj(content, file))
    write_manifest(copy, **{**manifest, **fields})


def _read(output_dir: Path) -> Sequence[dict]:
    path = output_dir / EVALUATIONS_FILE
    return read_json(path) if path.is_file() else []


def _best(output_dir: Path) -> dict | None:
    """The manifest of model_best.pth, None where there is no whole one."""
    try:
        return verify_manifest(output_dir / BEST_MODEL)
    except CheckpointError:
        return None


def _is_better(ap: float | None, best: Mapping | None) -> bool:
    """An undefined AP is never the best; of equal ones the first is."""
    return ap is not None and (best is None or ap > best["AP"])
