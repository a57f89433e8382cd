"""Precision-recall curves over trials: pr_curves.png and pr_curves.csv of a set of trials."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from detection.evaluation.pr_curves import (
    CURVES_FILE,
    IOUS,
    RECALLS,
    PrCurves,
    mean_over_classes,
    read_curves,
)
from detection.report_classes import mean_and_std, per_class_values
from moco.training.checkpoint import write_atomic, write_text_atomic

CURVES_PLOT = "pr_curves.png"
CURVES_TABLE = "pr_curves.csv"
MEAN_NAME = "mean over classes"
MAX_CLASS_PANELS = 20
_COLOURS = ("C0", "C3")  # of IOUS
_SCORE_OF_IOU = ("AP50", "AP75")
_PANEL = 2.7  # inches


def read_trial_curves(results: dict, output_dir: Path) -> dict[int, PrCurves]:
    """Trial number -> its curves, for the finished trials that have them.

    Raises: CheckpointError for a damaged file.
    """
    curves = {}
    for k, trial in enumerate(results["trials"]):
        path = output_dir / f"trial_{k}" / CURVES_FILE
        if trial["status"] == "finished" and path.is_file():
            curves[k] = read_curves(path)
    return curves


def write_curves_report(results: dict, output_dir: Path) -> str:
    """Write pr_curves.png and pr_curves.csv; returns the words for results.md."""
    curves = read_trial_curves(results, output_dir)
    finished = [k for k, trial in enumerate(results["trials"]) if trial["status"] == "finished"]
    without = [str(k) for k in finished if k not in curves]
    note = f"Trials without {CURVES_FILE}, which an older version scored: {', '.join(without)}."
    if not curves:
        return note if without else ""
    stacked = np.stack([one.precision for one in curves.values()])  # [T, 2, K, 101]
    names = next(iter(curves.values())).class_names
    write_text_atomic(output_dir / CURVES_TABLE, curves_csv(names, stacked))
    write_curves_plot(results, names, stacked, output_dir / CURVES_PLOT)
    words = (
        f"Precision against recall at IoU {IOUS[0]:.2f} and {IOUS[1]:.2f}: at each recall the best "
        f"precision there or beyond; thin lines are trials, thick ones their mean. Numbers: "
        f"`{CURVES_TABLE}`, and `{CURVES_FILE}` of each trial.\n\n![the curves]({CURVES_PLOT})"
    )
    return f"{words}\n\n{note}" if without else words


def with_mean(names: tuple[str, ...], precision_TIKR: np.ndarray) -> Mapping[str, np.ndarray]:
    """Name -> curves [T, 2, 101]: first the mean over classes, then each class."""
    return {
        MEAN_NAME: mean_over_classes(precision_TIKR),
        **{name: precision_TIKR[:, :, k] for k, name in enumerate(names)},
    }


def curves_csv(names: tuple[str, ...], precision_TIKR: np.ndarray) -> str:
    """Rows: class, iou, recall, precision_mean, precision_std (n - 1), num_trials.

    Args:
        precision_TIKR: [T trials, 2 IoUs, K classes, 101 recalls]; a class without ground truth
            is left out.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "iou", "recall", "precision_mean", "precision_std", "num_trials"])
    num_trials = len(precision_TIKR)
    for name, curves_TIR in with_mean(names, precision_TIKR).items():
        if np.isnan(curves_TIR).any():
            continue
        mean = curves_TIR.mean(axis=0)
        std = curves_TIR.std(axis=0, ddof=1) if num_trials > 1 else None
        for number, iou in enumerate(IOUS):
            for place, recall in enumerate(RECALLS):
                spread = "" if std is None else f"{std[number, place]:.6f}"
                row = [name, iou, f"{recall:.2f}", f"{mean[number, place]:.6f}", spread]
                table.writerow([*row, num_trials])
    return text.getvalue()


def write_curves_plot(
    results: dict, names: tuple[str, ...], precision_TIKR: np.ndarray, path: Path
) -> None:
    """A panel of the mean over classes and, of up to 20 classes, one a class.

    Args:
        precision_TIKR: see `curves_csv`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = with_mean(names, precision_TIKR)
    if len(names) > MAX_CLASS_PANELS:
        shown = {MEAN_NAME: shown[MEAN_NAME]}
    scores = {MEAN_NAME: _overall_values(results), **per_class_values(results)}
    columns = min(5 if len(shown) <= 10 else 7, len(shown))  # 20 classes and the mean: 3 x 7
    rows = math.ceil(len(shown) / columns)
    size = (max(columns * _PANEL, 6.0), rows * _PANEL * (1.0 if len(shown) > 1 else 1.6) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, curves_TIR) in zip(panels, shown.items(), strict=False):
        _draw_curves(axes, name, curves_TIR, scores.get(name, {}))
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    # With shared axes only the outer panels are labelled; the last row may be short.
    for axes in panels[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel("recall")
        axes.tick_params(labelbottom=True)
    for axes in panels[::columns]:
        axes.set_ylabel("precision")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        f"{results['dataset']}, {len(precision_TIKR)} trial(s) (thin) and their mean (thick)",
        fontsize=11,
    )
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _overall_values(results: dict) -> dict[str, list[float | None]]:
    finished = [trial for trial in results["trials"] if trial["status"] == "finished"]
    return {score: [trial[score] for trial in finished] for score in _SCORE_OF_IOU}


def _draw_curves(axes, name: str, curves_TIR: np.ndarray, scores: dict) -> None:
    for number, (iou, colour) in enumerate(zip(IOUS, _COLOURS, strict=True)):
        curves = curves_TIR[:, number]
        for curve in curves:
            axes.plot(RECALLS, curve, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(RECALLS, curves.mean(axis=0), color=colour, linewidth=1.8, label=f"IoU {iou:.2f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.2)
    title = name
    if np.isnan(curves_TIR).all():
        title += "\nno ground truth"
    else:
        means = [mean_and_std(scores.get(score, []))[0] for score in _SCORE_OF_IOU]
        if None not in means:
            title += f"\nAP50 {means[0]:.1f}, AP75 {means[1]:.1f}"
    axes.set_title(title, fontsize=9)
