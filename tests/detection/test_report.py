import pytest
import yaml
from PIL import Image

from detection.report import (
    PLOT_FILE,
    PUBLISHED_FILE,
    REPORT_FILE,
    confidence_interval_of_difference,
    is_comparable,
    read_published,
    report_text,
    write_report,
)
from detection.trials import summarise
from moco.errors import ConfigError

VERSIONS = {"torch": "2.10.0", "device": "CPU"}


def trial(seed, ap50, ap, ap75, **changes):
    scores = {"AP50": ap50, "AP": ap, "AP75": ap75}
    base = {"seed": seed, "status": "finished", "error": None, "versions": VERSIONS}
    return {**base, **scores, **changes}


@pytest.fixture
def results():
    trials = [
        trial(0, 82.0, 57.0, 63.0),
        trial(1, 83.0, 57.4, 64.0),
        trial(2, None, None, None, status="failed", error="NonFiniteError: nan | lr 1"),
    ]
    return {
        "engine": "embedded",
        "versions": VERSIONS,
        "config_digest": "0123456789abcdef",
        "dataset": "voc_2007_test",
        "metric": "VOC 2007 (11-point), detections rounded",
        "weights": {"path": "moco_d2.pth", "sha256": "f" * 64},
        "num_trials": 3,
        **summarise(trials),
        "trials": trials,
    }


def test_scores_during_training_are_a_table_and_the_reported_ones_stay_the_last(results):
    assert "during training" not in report_text(results, read_published())
    first = results["trials"][0]
    last = {score: first[score] for score in ("AP50", "AP", "AP75")}
    early = {"iteration": 12000, "AP50": 90.0, "AP": 60.0, "AP75": 70.0}
    first["evaluations"] = [early, {"iteration": 24000, **last}]
    first["best"] = {"iteration": 12000, "AP": 60.0, "file": "model_best.pth"}
    text = report_text(results, read_published())
    assert "| 12000 | 90.00 | 60.00 | 70.00 | 1 |" in text
    assert "Best AP (`model_best.pth`): trial 0: 60.00 after 12000." in text
    assert "| **this run** | 82.50 ± 0.71 | 57.20 ± 0.28 |" in text


def test_text_holds_mean_spread_trials_and_origin(results):
    text = report_text(results, read_published())
    assert "| **this run** | 82.50 ± 0.71 | 57.20 ± 0.28 | 63.50 ± 0.71 | 2 |" in text
    assert "2 of 3 trials finished, 1 failed (not in the mean)" in text
    assert "| 1 | 1 | 83.00 | 57.40 | 64.00 |" in text
    assert "| 2 | 2 | failed: NonFiniteError: nan / lr 1 | |" in text
    assert "embedded (torch 2.10.0, device CPU)" in text
    assert "`moco_d2.pth` (sha256 ffffffffffffffff)" in text
    assert "0123456789abcdef" in text
    assert "| (d) MoCo v2 | 200 | 67.5 | 82.4 | 57.0 | 63.6 | 5 |" in text
    assert "other data/hardware" not in text
    assert "other versions" not in text


def test_other_data_is_not_compared(results):
    results["dataset"] = "shapes_test"
    assert not is_comparable(results)
    text = report_text(results, read_published())
    assert "Published, other data/hardware: voc_2007_test" in text


def test_coco_results_have_cocos_scores_and_no_published_rows(results):
    boxes = {"AP": 40.0, "AP50": 60.0, "AP75": 43.0, "APs": None, "APm": 44.0, "APl": 50.0}
    results["dataset"], results["metric"] = "coco_2017_val", "COCO, boxes"
    for trial, more in zip(results["trials"][:2], (0.0, 2.0), strict=True):
        masks = {name: value and value - 5 + more for name, value in boxes.items()}
        trial["coco"] = {"bbox": boxes, "segm": masks}
    text = report_text(results, read_published())
    assert "| | AP | AP50 | AP75 | APs | APm | APl |" in text
    assert "| boxes | 40.00 ± 0.00 | 60.00 ± 0.00 | 43.00 ± 0.00 | undefined |" in text
    assert "| masks | 36.00 ± 1.41 | 56.00 ± 1.41 |" in text
    assert "No published rows" in text and "| (d) MoCo v2 |" not in text
    for trial in results["trials"][:2]:
        del trial["coco"]["segm"]
    assert "| masks |" not in report_text(results, read_published())


def test_other_versions_among_the_trials_are_named(results):
    results["trials"][1]["versions"] = {"torch": "2.9.9", "device": "CPU"}
    assert "other versions: torch 2.9.9, device CPU" in report_text(results, read_published())


def test_one_trial_has_no_spread_and_none_has_no_mean(results):
    for trials, shown in ((results["trials"][:1], "| 82.00 |"), ([], "| none |")):
        results.update(trials=trials, num_trials=len(trials), **summarise(trials))
        text = report_text(results, read_published())
        assert shown in text and "±" not in text.split("**this run**")[1].splitlines()[0]


@pytest.mark.parametrize("dataset", ["voc_2007_test", "shapes_test"])
def test_files_are_written(results, tmp_path, dataset):
    results["dataset"] = dataset
    lines = write_report(results, tmp_path)
    assert "AP50 82.50 ± 0.71" in lines[0]
    text = (tmp_path / REPORT_FILE).read_text()
    assert text.startswith(report_text(results, read_published()))
    with Image.open(tmp_path / PLOT_FILE) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn


def test_plot_of_published_lines_only_where_comparable(results, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **_: drawn.append(y))
    results["dataset"] = "shapes_test"
    write_report(results, tmp_path)
    assert drawn == []
    results["dataset"] = "voc_2007_test"
    write_report(results, tmp_path)
    assert {81.3, 57.4, 64.0} <= set(drawn)


def test_published_rows():
    published = yaml.safe_load(PUBLISHED_FILE.read_text())
    rows = {row["name"]: (row["AP50"], row["AP"], row["AP75"]) for row in published["rows"]}
    assert rows["supervised ImageNet"] == (81.3, 53.5, 58.8)
    assert rows["(e) MoCo v2"] == (82.5, 57.4, 64.0)
    assert rows["random initialisation"] == (59.0, 32.8, 31.6)
    assert rows["memory bank"] == (80.6, 54.9, 60.6)
    assert len(rows) == len(published["rows"]) == 10
    assert all(row["source"] for row in published["rows"])


def test_welch_interval_by_hand():
    # Equal counts and variances: df = 8, t(0.975, 8) = 2.306004, standard error = sqrt(2.5 * 2/5).
    low, high = confidence_interval_of_difference([2, 3, 4, 5, 6], [1, 2, 3, 4, 5])
    assert (low, high) == pytest.approx((1 - 2.306004, 1 + 2.306004), abs=1e-5)
    narrower = confidence_interval_of_difference([2, 3, 4, 5, 6], [1, 2, 3, 4, 5], level=0.5)
    assert low < narrower[0] < narrower[1] < high


def test_welch_uses_both_variances():
    # a: mean 3, variance 2.5, n 5; b: mean 10, variance 200, n 2. By Welch-Satterthwaite df is
    # (0.5 + 100)^2 / (0.5^2 / 4 + 100^2 / 1) = 1.010019, a pooled test would have 5.
    low, high = confidence_interval_of_difference([1, 2, 3, 4, 5], [0, 20])
    assert (low + high) / 2 == pytest.approx(-7)
    assert high - low > 2 * 12 * 100.5**0.5  # t(0.975, 1.01) is 12.4; t(0.975, 5) is 2.57


def test_welch_without_any_spread_is_a_point():
    assert confidence_interval_of_difference([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize("a, b, level", [([1], [1, 2], 0.95), ([1, 2], [1, 2], 1.0)])
def test_welch_refuses(a, b, level):
    with pytest.raises(ConfigError):
        confidence_interval_of_difference(a, b, level)
