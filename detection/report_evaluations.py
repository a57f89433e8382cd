"""The scores during training (TEST.EVAL_PERIOD), for results.md."""

from __future__ import annotations

from detection.engines.base import BEST_MODEL
from detection.trial_results import SCORES, mean_and_std


def evaluations_table(results: dict) -> str:
    """A row for each iteration that was evaluated, and which one was best in each trial; "" where
    nothing was evaluated during training."""
    trials = {
        k: trial
        for k, trial in enumerate(results["trials"])
        if trial["status"] == "finished" and trial.get("evaluations")
    }
    if not trials:
        return ""
    by_iteration: dict[int, list[dict]] = {}
    for trial in trials.values():
        for scores in trial["evaluations"]:
            by_iteration.setdefault(scores["iteration"], []).append(scores)
    lines = [
        "Scores during training, mean ± standard deviation over trials.",
        "",
        f"| iteration | {' | '.join(SCORES)} | trials |",
        "|---|---|---|---|---|",
    ]
    for iteration in sorted(by_iteration):
        mean, std = mean_and_std(by_iteration[iteration])
        cells = " | ".join(_spread(mean[score], std[score]) for score in SCORES)
        lines.append(f"| {iteration} | {cells} | {len(by_iteration[iteration])} |")
    best = [
        f"trial {k}: {trial['best']['AP']:.2f} after {trial['best']['iteration']}"
        for k, trial in trials.items()
        if trial["best"]
    ]
    if best:
        lines += [
            "",
            f"Best AP (`{BEST_MODEL}`): {'; '.join(best)}. The reported figures are the last "
            "iteration's: the best of several scores is chosen by these very test images, so it "
            "is too high for others.",
        ]
    return "\n".join(lines)


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "undefined"
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
