"""The results of trials: reading one, naming it, and the mean of several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moco.training.changes import DATA

SCORES = ("AP50", "AP", "AP75")
LEFT_OUT = "left out"  # the status in results.json of a finished trial that is not in the mean


def left_out(result: dict, reason: str) -> dict:
    return {**result, "status": LEFT_OUT, "error": reason}


def mark_other_data(trials: Sequence[dict]) -> list[dict]:
    """Leave out of the mean the trials whose data changed while they trained.

    Where each finished trial saw the same changes of data they stay: they are alike.
    """
    finished = [trial for trial in trials if trial["status"] == "finished"]
    histories = [[(c["before"], c["now"]) for c in _data_changes(trial)] for trial in finished]
    if all(history == histories[0] for history in histories):
        return list(trials)
    marked = []
    for trial in trials:
        changes = _data_changes(trial)
        if trial["status"] == "finished" and changes:
            steps = ", ".join(str(change["step"]) for change in changes)
            trial = left_out(trial, f"its data changed at iteration {steps}, others' did not")
        marked.append(trial)
    return marked


def _data_changes(trial: dict) -> list[dict]:
    return [change for change in trial.get("changes", ()) if change["name"] == DATA]


def summarise(trials: Sequence[dict]) -> dict:
    """Counts, mean and sample standard deviation (n - 1) of the finished trials.

    Returns: {"num_finished", "num_failed", "num_left_out", "mean": {score: float or None}, "std":
        the same}; mean is None without a finished trial, std with fewer than 2. A score that a
        finished trial does not have (AP is undefined for a class without ground truth under the
        area metric) makes both None.
    """
    finished = [trial for trial in trials if trial["status"] == "finished"]
    mean, std = mean_and_std(finished)
    return {
        "num_finished": len(finished),
        "num_failed": sum(trial["status"] == "failed" for trial in trials),
        "num_left_out": sum(trial["status"] == LEFT_OUT for trial in trials),
        "mean": mean,
        "std": std,
    }


def summarise_second_opinion(trials: Sequence[dict]) -> dict | None:
    """{"mean", "std"} as `summarise`'s, of the scores that Detectron2's own evaluator gave.

    Returns: None where the engine has no such evaluator.
    """
    finished = [trial for trial in trials if trial["status"] == "finished"]
    found = [trial["detectron2_evaluator"] for trial in finished if "detectron2_evaluator" in trial]
    if not found:
        return None
    mean, std = mean_and_std(found)
    return {"mean": mean, "std": std}


def mean_and_std(scored: Sequence[dict]) -> tuple[dict, dict]:
    """Mean and standard deviation (n - 1) by score; None as in `summarise`."""
    mean, std = {}, {}
    for score in SCORES:
        values = [scores[score] for scores in scored]
        known = bool(values) and None not in values
        mean[score] = statistics.fmean(values) if known else None
        std[score] = statistics.stdev(values) if known and len(values) > 1 else None
    return mean, std


def scores_in_words(result: dict) -> str:
    """AP50, AP and AP75 in percent."""
    shown = [
        f"{score} {'undefined' if result[score] is None else f'{result[score]:.2f}'}"
        for score in SCORES
    ]
    return ", ".join(shown)


def outcome_in_words(k: int, result: dict) -> str:
    """The line about the end of trial k."""
    if result["status"] == LEFT_OUT:
        return f"trial {k} is not in the mean: {result['error']}"
    if result["status"] != "finished":
        return f"trial {k} failed: {result['error']}"
    return f"trial {k}: {scores_in_words(result)}"
