"""The sections of detection trials for the HTML report, from the files of their folder."""

from __future__ import annotations

from pathlib import Path

from detection.report import PLOT_FILE, is_comparable, read_published, write_report
from detection.report_classes import per_class_values, spread_in_words
from detection.report_curves import CURVES_PLOT, CURVES_TABLE
from detection.report_data import data_lines
from moco.reporting.page import Image, Section, Table
from moco.training.checkpoint import read_json

_SCORES = ("AP50", "AP", "AP75")


def is_detection_result(content: object) -> bool:
    return isinstance(content, dict) and "trials" in content and "num_finished" in content


def detection_sections(folder: Path, name: str) -> list[Section]:
    """AP by trial against the published means, curves, classes, and pictures with ground truth.

    Args:
        folder: holds results.json of `--trials`; its plots are drawn anew there.
        name: begins the names of the figures' files.
    """
    results = read_json(folder / "results.json")
    write_report(results, folder)
    scores = Section(
        f"Detection: {results['dataset']}",
        [
            f"{results['num_finished']} of {results['num_trials']} trials finished; engine "
            f"{results['engine']}; configuration digest {results['config_digest']}.",
            *(line.removeprefix("- ") for line in data_lines(results)),
            *_leak(results),
            _trials(results),
            _picture(folder / PLOT_FILE, f"{name}_trials", "AP of the trials"),
        ],
    )
    sections = [scores, _published(results)]
    if (folder / CURVES_PLOT).is_file():
        caption = f"precision against recall; numbers in {CURVES_TABLE}"
        curves = _picture(folder / CURVES_PLOT, f"{name}_pr_curves", caption)
        sections.append(Section("Precision and recall", [curves]))
    sections.append(_classes(results))
    sheet = folder / "trial_0" / "pictures" / "contact_sheet.png"
    if sheet.is_file():
        caption = "test images of trial 0: ground truth green, detections orange"
        sections.append(Section("Detections", [_picture(sheet, f"{name}_detections", caption)]))
    return sections


def _leak(results: dict) -> list[str]:
    leak = results.get("test_images_in_pretraining")  # results of before it have none
    return [f"Test images: {leak['words']}."] if leak else []


def _trials(results: dict) -> Table:
    rows = []
    for k, trial in enumerate(results["trials"]):
        if trial["status"] == "finished":
            cells = [_number(trial[score]) for score in _SCORES]
        else:
            what = "failed" if trial["status"] == "failed" else "not in the mean"
            cells = [f"{what}: {trial['error']}", "", ""]
        rows.append([str(k), str(trial["seed"]), *cells])
    means = [
        _number(results["mean"][score])
        + ("" if results["std"][score] is None else f" ± {results['std'][score]:.2f}")
        for score in _SCORES
    ]
    rows.append(["mean ± std", "", *means])
    return Table(("trial", "seed", *_SCORES), rows)


def _published(results: dict) -> Section:
    published = read_published()
    dataset = published["comparable_dataset"]
    if results["metric"].startswith("COCO"):
        return Section("Published", [f"The published rows are of {dataset}, by another metric."])
    words = f"On {dataset}, mean of the trials."
    if not is_comparable(results):
        words += f" Other data than {results['dataset']}: shown for orientation, not comparable."
    keys = ("name", "epochs", "top1", *_SCORES, "source")
    rows = [
        ["" if row[key] is None else str(row[key]) for key in keys] for row in published["rows"]
    ]
    header = ("published", "epochs", "ImageNet top-1", *_SCORES, "source")
    return Section("Published", [words, Table(header, rows)])


def _classes(results: dict) -> Section:
    values = per_class_values(results)
    rows = [
        [name, *(spread_in_words(scores[score]) for score in _SCORES)]
        for name, scores in values.items()
    ]
    return Section("By class", [Table(("class", *_SCORES), rows)])


def _picture(path: Path, name: str, caption: str) -> Image:
    return Image(name, path.read_bytes(), caption)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
