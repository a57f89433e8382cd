"""Scores by class and precision-recall curves over trials."""

import csv

import numpy as np
import pytest
from PIL import Image

from detection.evaluation.pr_curves import RECALLS, PrCurves, write_curves
from detection.report import write_report
from detection.report_classes import mean_and_std, per_class_table, per_class_values
from detection.report_curves import MEAN_NAME, read_trial_curves, write_curves_plot
from detection.trial_results import summarise
from moco.errors import CheckpointError

NAMES = ("cat", "dog", "absent")


def trial(seed, **ap50):
    per_class = {name: {"AP50": ap50[name], "AP": 1.0, "AP75": seed} for name in NAMES}
    return {
        "seed": seed, "status": "finished", "error": None, "versions": {"torch": "2.10"},
        "AP50": 50.0, "AP": 30.0, "AP75": 20.0, "per_class": per_class,
    }  # fmt: skip


@pytest.fixture
def results():
    failed = {"seed": 1, "status": "failed", "error": "x", "versions": {"torch": "2.10"}}
    failed |= {"AP50": None, "AP": None, "AP75": None, "per_class": {}}
    trials = [trial(0, cat=40.0, dog=10.0, absent=None), failed]
    trials.append(trial(2, cat=44.0, dog=10.0, absent=None))
    return {
        "engine": "embedded", "versions": {"torch": "2.10"}, "config_digest": "0" * 16,
        "dataset": "shapes_test", "metric": "VOC 2012 (area)",
        "weights": {"path": "", "sha256": None}, "num_trials": 3, **summarise(trials),
        "trials": trials,
    }  # fmt: skip


def constant_curves(value, names=NAMES):
    """Precision `value` up to a recall of 0.5; the last class has no ground truth."""
    precision = np.zeros((2, len(names), len(RECALLS)))
    precision[0, :, :51], precision[1, :, :51] = value, value / 2
    precision[:, -1] = np.nan
    return PrCurves(tuple(names), precision)


def test_table_by_hand(results):
    assert per_class_values(results)["cat"]["AP50"] == [40.0, 44.0]
    table = per_class_table(results)
    assert "| cat | 42.00 ± 2.83 | 1.00 ± 0.00 | 1.00 ± 1.41 |" in table
    assert "| dog | 10.00 ± 0.00 |" in table and "| absent | undefined | 1.00" in table
    assert mean_and_std([3.0]) == (3.0, None) and mean_and_std([]) == (None, None)
    assert per_class_table({"trials": []}) == ""


def test_csv_of_the_classes(results, tmp_path):
    write_report(results, tmp_path)
    with open(tmp_path / "per_class.csv", newline="", encoding="utf-8") as file:
        cat, dog, absent = csv.DictReader(file)
    assert (cat["class"], cat["AP50_mean"], cat["AP50_trial_0"]) == ("cat", "42.0", "40.0")
    assert float(cat["AP50_std"]) == pytest.approx(8**0.5)
    assert "AP50_trial_1" not in cat and absent["AP50_mean"] == absent["AP50_trial_2"] == ""


def test_report_with_curves(results, tmp_path):
    for k, value in ((0, 0.8), (2, 0.6)):
        write_curves(constant_curves(value), tmp_path / f"trial_{k}")
    write_report(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| cat | 42.00 ± 2.83 |" in text and "![the curves](pr_curves.png)" in text
    assert "Trials without" not in text
    with Image.open(tmp_path / "pr_curves.png") as image:
        assert image.width > 900  # four panels in a row
    with open(tmp_path / "pr_curves.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {MEAN_NAME, "cat", "dog"}  # absent has no curve
    assert len(rows) == 3 * 2 * 101
    chosen = [r for r in rows if (r["class"], r["iou"], r["recall"]) == ("cat", "0.5", "0.50")]
    assert float(chosen[0]["precision_mean"]) == pytest.approx(0.7)
    assert float(chosen[0]["precision_std"]) == pytest.approx(0.02**0.5, abs=1e-6)
    assert chosen[0]["num_trials"] == "2"


def test_trials_without_curves_are_named(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "Trials without pr_curves.npz, which an older version scored: 0, 2." in text
    assert not (tmp_path / "pr_curves.png").exists()
    write_curves(constant_curves(0.5), tmp_path / "trial_2")
    write_report(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "scored: 0." in text and (tmp_path / "pr_curves.png").is_file()


def test_failed_trials_have_no_curves_and_damaged_files_are_errors(results, tmp_path):
    write_curves(constant_curves(0.5), tmp_path / "trial_1")  # of the failed one
    assert read_trial_curves(results, tmp_path) == {}
    (tmp_path / "trial_0").mkdir()
    (tmp_path / "trial_0" / "pr_curves.npz").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="trial_0.pr_curves.npz: holds no curves"):
        write_report(results, tmp_path)


@pytest.mark.parametrize("num_classes, num_panels", [(3, 4), (20, 21), (21, 1), (80, 1)])
def test_a_panel_a_class_up_to_twenty(results, tmp_path, monkeypatch, num_classes, num_panels):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    names = tuple(f"class {k}" for k in range(num_classes))
    stacked = np.stack([constant_curves(v, names).precision for v in (0.8, 0.6)])
    write_curves_plot(results, names, stacked, tmp_path / "x.png")
    assert len(titles) == num_panels and titles[0] == f"{MEAN_NAME}\nAP50 50.0, AP75 20.0"
    if num_panels > 1:
        assert titles[-1] == f"{names[-1]}\nno ground truth"
