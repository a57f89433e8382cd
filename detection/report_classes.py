"""The scores of each class over trials: a table for results.md, and per_class.csv."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

from detection.trial_results import SCORES
from moco.training.checkpoint import write_text_atomic

PER_CLASS_FILE = "per_class.csv"


def per_class_values(results: dict) -> dict[str, dict[str, list[float | None]]]:
    """class -> score -> its value in each finished trial, in percent.

    None where the trial has no such value: AP is undefined for a class without ground truth.
    """
    finished = [trial for trial in results["trials"] if trial["status"] == "finished"]
    names = dict.fromkeys(name for trial in finished for name in trial.get("per_class", ()))
    return {
        name: {
            score: [trial["per_class"].get(name, {}).get(score) for trial in finished]
            for score in SCORES
        }
        for name in names
    }


def mean_and_std(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where undefined, the latter also for one value."""
    if not values or None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_in_words(values: list[float | None]) -> str:
    mean, std = mean_and_std(values)
    if mean is None:
        return "undefined"
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def per_class_table(results: dict) -> str:
    """Markdown; "" for trials without scores by class."""
    by_class = per_class_values(results)
    if not by_class:
        return ""
    lines = ["| class | AP50 | AP | AP75 |", "|---|---|---|---|"]
    for name, scores in by_class.items():
        cells = " | ".join(spread_in_words(scores[score]) for score in SCORES)
        lines.append(f"| {name.replace('|', '/')} | {cells} |")
    return "By class, over the same trials:\n\n" + "\n".join(lines)


def write_per_class_csv(results: dict, output_dir: Path) -> Path:
    """per_class.csv: for each class mean and std of each score, then the trials' values."""
    by_class = per_class_values(results)
    finished = [k for k, t in enumerate(results["trials"]) if t["status"] == "finished"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    header = ["class"]
    for score in SCORES:
        header += [f"{score}_mean", f"{score}_std", *(f"{score}_trial_{k}" for k in finished)]
    table.writerow(header)
    for name, scores in by_class.items():
        row = [name]
        for score in SCORES:
            row += [*mean_and_std(scores[score]), *scores[score]]
        table.writerow(row)
    path = output_dir / PER_CLASS_FILE
    write_text_atomic(path, text.getvalue())
    return path
