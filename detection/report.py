"""The report of a set of trials: results.md and results.png, beside the published numbers, with
the scores by class and the precision-recall curves (`report_classes`, `report_curves`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from detection.data.account import meaning_of_absent_classes
from detection.report_classes import per_class_table, write_per_class_csv
from detection.report_coco import coco_table
from detection.report_curves import write_curves_report
from detection.report_data import data_lines
from detection.report_evaluations import evaluations_table
from moco.errors import ConfigError
from moco.training.checkpoint import write_atomic, write_text_atomic

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")
REPORT_FILE = "results.md"
PLOT_FILE = "results.png"
_SCORES = ("AP50", "AP", "AP75")
# Rows drawn into the plot; all of them would hide the trials.
_PLOTTED_ROWS = ("supervised ImageNet", "MoCo v1", "(d) MoCo v2", "(e) MoCo v2")


def read_published() -> dict:
    """published.yaml: {"comparable_dataset", "expected_std", "rows"}."""
    return yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))


def is_comparable(results: dict) -> bool:
    """Whether the trials were scored on the test set of the published rows."""
    return results["dataset"] == read_published()["comparable_dataset"]


def confidence_interval_of_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95
) -> tuple[float, float]:
    """Welch's interval of mean(a) - mean(b), for trials of two settings.

    Args:
        a, b: a score of each trial; unequal counts and variances are allowed.
        level: probability that the interval covers the difference, between 0 and 1.
    Raises: ConfigError for fewer than 2 trials on a side or another level.
    """
    if min(len(a), len(b)) < 2:
        raise ConfigError(
            f"difference of {len(a)} and {len(b)} trials: at least 2 on each side are needed"
        )
    if not 0 < level < 1:
        raise ConfigError(f"level {level}: allowed is a number between 0 and 1, e.g. 0.95")
    if len(set(a)) == len(set(b)) == 1:  # no spread on either side: 0 / 0 in Welch's formula
        return a[0] - b[0], a[0] - b[0]
    from scipy import stats  # a second of every command's start otherwise

    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return float(interval.low), float(interval.high)


def write_report(results: dict, output_dir: str | os.PathLike) -> list[str]:
    """Write results.md, results.png and per_class.csv from the content of results.json
    (`detection.trials`), pr_curves.png and .csv from the curves in the trials' folders.

    Returns: the lines to show on a terminal.
    """
    output_dir = Path(output_dir)
    published = read_published()
    curves = write_curves_report(results, output_dir)
    write_text_atomic(output_dir / REPORT_FILE, report_text(results, published, curves))
    write_per_class_csv(results, output_dir)
    write_plot(results, published, output_dir / PLOT_FILE)
    score_line = ", ".join(f"{score} {_spread(results, score)}" for score in _SCORES)
    return [
        f"{_count(results)}: {score_line}",
        f"report: {output_dir / REPORT_FILE}, {output_dir / PLOT_FILE}",
    ]


def report_text(results: dict, published: dict, curves: str = "") -> str:
    """results.md: this run's mean and trials, what produced them, then the published rows.

    Args:
        curves: the words on precision-recall curves, see `write_curves_report`.
    """
    parts = [
        f"# Detection transfer on {results['dataset']}",
        _summary_table(results),
        coco_table(results),
        _trials_table(results),
        evaluations_table(results),
        _origin(results),
        _published_table(results, published),
        f"![the trials]({PLOT_FILE})",
        per_class_table(results),
        curves,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary_table(results: dict) -> str:
    cells = " | ".join(_spread(results, score) for score in _SCORES)
    second = results.get("detectron2_evaluator")
    row = ""
    if second:  # the same detections, scored again
        theirs = " | ".join(_spread(second, score) for score in _SCORES)
        row = f"\n| by Detectron2's own evaluator | {theirs} | |"
    return (
        f"{_count(results)}. Percent, mean ± standard deviation over trials (n - 1).\n\n"
        "| | AP50 | AP | AP75 | trials |\n|---|---|---|---|---|\n"
        f"| **this run** | {cells} | {results['num_finished']} |{row}"
    )


def _trials_table(results: dict) -> str:
    lines = ["| trial | seed | AP50 | AP | AP75 |", "|---|---|---|---|---|"]
    for k, trial in enumerate(results["trials"]):
        if trial["status"] == "finished":
            cells = " | ".join(_value(trial[score]) for score in _SCORES)
        else:
            what = "failed" if trial["status"] == "failed" else "not in the mean"
            cells = f"{what}: {trial['error'].replace('|', '/')} | | "
        lines.append(f"| {k} | {trial['seed']} | {cells} |")
    return "\n".join(lines)


def _origin(results: dict) -> str:
    weights = results["weights"]
    start = "random initialisation"
    if weights["path"]:
        start = f"`{weights['path']}` (sha256 {weights['sha256'][:16]})"
    lines = [
        f"- engine: {results['engine']} ({_versions(results['versions'])})",
        f"- metric: {results['metric']}",
        *_absent_classes(results),
        f"- weights: {start}",
        *_leak(results),
        f"- config digest: {results['config_digest']} (all keys in `config.yaml`)",
    ]
    lines += data_lines(results)
    others = {_versions(trial["versions"]) for trial in results["trials"]}
    others.discard(_versions(results["versions"]))
    if others:
        lines.append(f"- some trials ran with other versions: {'; '.join(sorted(others))}")
    return "\n".join(lines)


def _absent_classes(results: dict) -> list[str]:
    names = results.get("classes_without_test_objects")  # absent from results of before
    if not names:
        return []
    is_coco = results["metric"].startswith("COCO")
    year = 2007 if results["metric"].startswith("VOC 2007") else 2012
    meaning = meaning_of_absent_classes("coco" if is_coco else "voc", None if is_coco else year)
    return [f"- classes without an object in the test data: {', '.join(names)}; {meaning}"]


def _leak(results: dict) -> list[str]:
    leak = results.get("test_images_in_pretraining")  # results of before it have none
    return [f"- test images: {leak['words']}"] if leak else []


def _published_table(results: dict, published: dict) -> str:
    if results["metric"].startswith("COCO"):
        return (
            f"No published rows are shown: those at hand are of {published['comparable_dataset']} "
            "by VOC's metric, another one than COCO's."
        )
    std = published["expected_std"]
    heading = f"Published, {published['comparable_dataset']}, mean of the trials"
    if not is_comparable(results):
        heading = (
            f"Published, other data/hardware: {published['comparable_dataset']}, so not comparable "
            f"with {results['dataset']}"
        )
    lines = [
        f"{heading}. A published setting's standard deviation is about "
        f"{' / '.join(str(std[score]) for score in _SCORES)}.",
        "",
        "| published | epochs | ImageNet top-1 | AP50 | AP | AP75 | trials | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in published["rows"]:
        keys = ("name", "epochs", "top1", *_SCORES, "trials", "source")
        cells = ["-" if row[key] is None else str(row[key]) for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_plot(results: dict, published: dict, path: Path) -> None:
    """results.png: a panel a score with the trials as dots, their mean ± std, published means."""
    # Drawing directly on a figure needs no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    comparable = is_comparable(results)
    rows = [row for row in published["rows"] if row["name"] in _PLOTTED_ROWS] if comparable else []
    for axes, score in zip(figure.subplots(1, len(_SCORES)), _SCORES, strict=True):
        _draw_panel(axes, results, score, rows)
    if not comparable:
        note = f"published means left out: they are of {published['comparable_dataset']}"
    else:
        note = "dashed: published means of 5 trials"
    figure.suptitle(
        f"{results['dataset']}, {_count(results)} (dots: trials; diamond: mean ± std)\n{note}",
        fontsize=11,
    )
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _draw_panel(axes, results: dict, score: str, rows: Sequence[dict]) -> None:
    finished = [
        (k, trial[score])
        for k, trial in enumerate(results["trials"])
        if trial["status"] == "finished" and trial[score] is not None
    ]
    axes.set_title(f"{score}: {_spread(results, score)}")
    axes.set_xlim(-0.7, results["num_trials"] + 0.7)
    places = [k for k, _ in finished]
    axes.scatter(places, [value for _, value in finished], color="C0", zorder=3)
    mean, std = results["mean"][score], results["std"][score]
    if mean is not None:
        place = results["num_trials"]
        axes.errorbar(place, mean, yerr=std, fmt="D", color="C3", capsize=5, zorder=3)
    axes.set_xticks([*range(results["num_trials"]), results["num_trials"]])
    axes.set_xticklabels([*map(str, range(results["num_trials"])), "mean"])
    axes.set_xlabel("trial")
    axes.set_ylabel("percent")
    axes.grid(axis="y", alpha=0.2)
    _draw_published(axes, score, rows)


def _draw_published(axes, score: str, rows: Sequence[dict]) -> None:
    """Dashed lines, each named at the right edge; names of close lines are moved apart."""
    for row in rows:
        axes.axhline(row[score], linestyle="--", linewidth=0.9, color="0.45")
    low, high = axes.get_ylim()
    lowest_free = low
    for row in sorted(rows, key=lambda row: row[score]):
        y = max(row[score], lowest_free)
        lowest_free = y + 0.07 * (high - low)  # two lines of text
        epochs = f"{row['epochs']} epochs: " if row["epochs"] else ""
        axes.annotate(
            f"{row['name']}\n{epochs}{row[score]}",
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="0.3",
        )


def _spread(results: dict, score: str) -> str:
    mean, std = results["mean"][score], results["std"][score]
    if mean is None:
        return "none"
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _value(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _count(results: dict) -> str:
    text = f"{results['num_finished']} of {results['num_trials']} trials finished"
    failed = results["num_failed"]
    if failed:
        text += f", {failed} failed (not in the mean)"
    other = results.get("num_left_out", 0)
    return f"{text}, {other} of other data or settings (not in the mean)" if other else text


def _versions(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
