"""Two sets of trials against each other: intervals by hand, what is refused and warned of."""

import copy
import json

import pytest
import yaml
from scipy import stats
from scripts import load_tool

from detection.comparison import choose_method, compare, paired_interval, read_run
from detection.comparison_text import comparison_text
from detection.trial_results import summarise
from moco.errors import CheckpointError, ConfigError

command_line = load_tool("compare_trials")
A, B = (50.0, 53.0, 51.0), (49.0, 51.5, 49.5)
PART = {"digest": "0" * 16, "images": 9, "boxes": 20}
DATA = {"train": PART, "test": PART}
CONFIG = {"SEED": 0, "OUTPUT_DIR": "x", "SOLVER": {"BASE_LR": 0.02}, "MODEL": {"WEIGHTS": "a"}}


def trial(seed, ap):
    scores = {"AP50": ap, "AP": ap / 2, "AP75": ap / 3}
    per_class = {name: {k: v + add for k, v in scores.items()} for name, add in CLASSES.items()}
    base = {"seed": seed, "status": "finished", "error": None, "num_processes": 1}
    return {**base, "versions": {"torch": "2.10"}, **scores, "per_class": per_class}


CLASSES = {"cat": 1.0, "dog": -1.0}
FAILED = {"seed": 9, "status": "failed", "error": "x", "AP50": None, "AP": None, "AP75": None}


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, scores, seeds, changes of results.json ...) -> folder"""

    def make(name, scores, seeds=(0, 1, 2), config=CONFIG, **changes):
        trials = [trial(seed, ap) for seed, ap in zip(seeds, scores, strict=True)]
        results = {
            "engine": "embedded", "versions": {"torch": "2.10"}, "config_digest": "0" * 16,
            "dataset": "voc_2007_test", "metric": "VOC 2007 (11-point), detections rounded",
            "weights": {"path": f"{name}.pth", "sha256": "f" * 64}, "num_trials": len(trials),
            "data": DATA,
            **summarise(trials), "trials": trials, **changes,
        }  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


def test_paired_interval_by_hand():
    # Differences 1, 1.5, 1.5: mean 4/3, variance 1/12, t(0.975, 2) = 4.302653.
    low, high = paired_interval([1.0, 1.5, 1.5], 0.95)
    margin = 4.302653 * (1 / 12 / 3) ** 0.5
    assert (low, high) == pytest.approx((4 / 3 - margin, 4 / 3 + margin), abs=1e-6)
    other = stats.ttest_rel(A, B).confidence_interval(0.95)
    assert (low, high) == pytest.approx((other.low, other.high))
    assert paired_interval([2.0, 2.0], 0.95) == (2.0, 2.0)


def test_equal_seeds_are_paired_in_any_order(make_run):
    a = read_run(make_run("a", A))
    b = read_run(make_run("b", [B[2], B[0], B[1]], seeds=(2, 0, 1)))
    comparison = compare(a, b)
    assert comparison["method"] == "paired t" and "same seeds (0, 1, 2)" in comparison["why"]
    entry = comparison["scores"]["AP50"]
    assert entry["difference"] == pytest.approx(4 / 3)
    assert (entry["low"], entry["high"]) == pytest.approx(paired_interval([1, 1.5, 1.5], 0.95))
    assert comparison["per_class"]["dog"]["AP75"]["difference"] == pytest.approx(4 / 9)
    assert comparison["warnings"] == []
    # Negative control: by Welch the interval is far wider, for the trials vary together.
    seven = compare(a, read_run(make_run("c", B, seeds=(7, 8, 9))))
    assert seven["method"] == "Welch" and "0, 1, 2 and 7, 8, 9" in seven["why"]
    width = seven["scores"]["AP50"]["high"] - seven["scores"]["AP50"]["low"]
    assert width > 4 * (entry["high"] - entry["low"])


@pytest.mark.parametrize("a, b, name", [
    ([0, 1], [1, 0], "paired t"),
    ([0, 1, 2], [0, 1], "Welch"),
    ([0, 0], [0, 0], "Welch"),  # which one belongs to which?
    ([0, 1], [0, 5], "Welch"),
])  # fmt: skip
def test_choice_of_the_method(a, b, name):
    assert choose_method(a, b).name == name


def test_a_failed_trial_is_left_out_and_said(make_run):
    a, b = make_run("a", A), make_run("b", B)
    results = json.loads((b / "results.json").read_text())
    results["trials"][1] = {**FAILED, "seed": 1}
    (b / "results.json").write_text(json.dumps(results))
    comparison = compare(read_run(a), read_run(b))
    assert comparison["method"] == "Welch" and comparison["b"]["num_finished"] == 2
    assert comparison["warnings"] == [f"{b}: 1 failed trials are left out"]


def test_differing_keys_are_listed_but_not_those_that_change_nothing(make_run):
    other = copy.deepcopy(CONFIG)
    other.update(SEED=7, OUTPUT_DIR="y", MODEL={"WEIGHTS": "b"})
    a = read_run(make_run("a", A))
    assert compare(a, read_run(make_run("b", B, config=other)))["warnings"] == []
    other["SOLVER"]["BASE_LR"] = 0.01
    other["TEST"] = {"ROUND_DETECTIONS": True}  # the default, which the other did not spell out
    warnings = compare(a, read_run(make_run("c", B, config=other)))["warnings"]
    assert warnings == ["SOLVER.BASE_LR differs: 0.02 | 0.01"]
    none = compare(a, read_run(make_run("d", B, config=None)))["warnings"]
    assert len(none) == 1 and "has no config.yaml" in none[0]


def test_between_engines_and_process_counts(make_run):
    a = read_run(make_run("a", A))
    b = read_run(make_run("b", B, engine="detectron2"))
    for one in b.results["trials"]:
        one["num_processes"] = 8
    comparison = compare(a, b)
    assert (comparison["a"]["engine"], comparison["b"]["engine"]) == ("embedded", "detectron2")
    assert comparison["warnings"] == ["number of processes differs: [1] | [8]"]
    assert "engine detectron2" in comparison_text(comparison)


def test_an_undefined_score_has_no_difference(make_run):
    a, b = read_run(make_run("a", A)), read_run(make_run("b", B))
    b.results["trials"][0]["per_class"]["cat"]["AP50"] = None
    comparison = compare(a, b)
    assert comparison["per_class"]["cat"]["AP50"]["difference"] is None
    assert "| cat | undefined | +0.67 [" in comparison_text(comparison)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dataset": "bccd_test", "data": None}, "have dataset 'voc_2007_test' and 'bccd_test'"),
        ({"metric": "COCO"}, "have metric"),
        ({"trials": [trial(0, 1.0), FAILED]}, "has 1 finished trials; at least 2"),
        ({"trials": [{**trial(k, 1.0), "per_class": {"cow": {}}} for k in (0, 1)]}, "have classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(make_run, changes, words):
    a, b = make_run("a", A), make_run("b", B, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        compare(read_run(a), read_run(b))
    assert "\n" not in str(caught.value)


def test_wrong_folders(make_run, tmp_path):
    a = make_run("a", A)
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(ConfigError, match="are one run"):
        compare(read_run(a), read_run(tmp_path / "link"))
    with pytest.raises(CheckpointError, match="results.json: does not exist; give the OUTPUT_DIR"):
        read_run(tmp_path)
    (a / "results.json").write_text('{"engine": "embedded"}')
    with pytest.raises(CheckpointError, match="lacks dataset, metric"):
        read_run(a)


def call(*words):
    with pytest.raises(SystemExit) as exit_:
        command_line.main([str(word) for word in words])
    return exit_.value.code


def test_command_line(make_run, tmp_path, capsys):
    a, b = make_run("a", A), make_run("b", B)
    outputs = ("--output", tmp_path / "x.md", "--output", tmp_path / "x.json")
    assert call(a, b, "--level", "0.9", *outputs) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {a} (A) and {b} (B) on voc_2007_test")
    assert "| A | 51.33 ± 1.53 |" in printed and "Interval: paired t, since" in printed
    assert "| A - B [90 % interval] | +1.33 [+0.85, +1.82] |" in printed
    assert (tmp_path / "x.md").read_text() in printed
    comparison = json.loads((tmp_path / "x.json").read_text())
    assert comparison["level"] == 0.9 and comparison["per_class"].keys() == CLASSES.keys()
    assert call(a, b, "--output", tmp_path / "x.txt") == 2
    assert call(a, b, "--level", "2") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "allowed suffixes: .md, .json" in errors[0]


def other(part, **changes):
    return {**DATA, part: {**PART, "digest": "1" * 16, **changes}}


def test_runs_are_compared_by_what_their_test_data_are_not_by_their_name(make_run):
    a = read_run(make_run("a", A))
    moved = read_run(make_run("b", B, dataset="copy_of_test"))
    assert compare(a, moved)["warnings"] == []
    edited = read_run(make_run("c", B, data=other("test", boxes=21)))
    with pytest.raises(ConfigError, match="9 images, 20 boxes .* 9 images, 21 boxes"):
        compare(a, edited)


def test_other_training_data_and_unknown_data_are_said(make_run):
    a = read_run(make_run("a", A))
    [line] = compare(a, read_run(make_run("b", B, data=other("train", images=8))))["warnings"]
    assert line == "training data differ: 9 images, 20 boxes | 8 images, 20 boxes"
    old = make_run("c", B)
    content = json.loads((old / "results.json").read_text())
    del content["data"]
    (old / "results.json").write_text(json.dumps(content))
    [line] = compare(a, read_run(old))["warnings"]
    assert "c: is older than fingerprints of data" in line
    content["dataset"] = "another"
    (old / "results.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="have dataset 'voc_2007_test' and 'another'"):
        compare(a, read_run(old))


def test_trials_left_out_are_said(make_run):
    trials = [{**trial(0, 50.0), "status": "left out"}, trial(1, 51.0), trial(2, 52.0)]
    a = read_run(make_run("a", A, trials=trials, **summarise(trials)))
    comparison = compare(a, read_run(make_run("b", B)))
    assert "1 trials of other data or settings are left out" in comparison["warnings"][0]
    assert comparison["a"]["seeds"] == [1, 2]
