"""A run goes on with its own configuration, classes and data, or as --allow-change permits."""

import json
import shutil

import pytest
import yaml
from quick_trials import (
    NUM_ITERATIONS,
    QuickEngine,
    draw_nothing,
    edit,
    halve_training_split,
    make_data,
    make_job,
)

from detection import trials
from detection.engines.base import TrainingStopped
from detection.run_folder import changed_keys, run_digest
from detection.run_identity import check_allowed_changes
from moco.errors import CheckpointError, ConfigError
from moco.training.checkpoint import read_torch_file

LONGER = ("SOLVER.MAX_ITER", "12")


@pytest.fixture(autouse=True)
def without_drawing(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def engine():
    return QuickEngine()


def read(path):
    return json.loads(path.read_text())


def test_checkpoint_manifest_and_results_hold_the_data_and_the_classes(root, engine, tmp_path):
    out = tmp_path / "out"
    results = trials.run_trials(make_job(root, out, engine), 1)
    manifest = read(out / "trial_0" / "model_final.pth.manifest.json")
    content = read_torch_file(out / "trial_0" / "model_final.pth")
    data = results["data"]
    assert data["train"]["images"] == 8 and data["test"]["images"] == 6
    assert len(data["train"]["digest"]) == 16 and data["train"] != data["test"]
    assert data == results["trials"][0]["data"] == manifest["data"] == content["data"]
    assert manifest["class_names"] == content["class_names"] == ["circle", "square"]
    assert manifest["config"]["SOLVER"]["MAX_ITER"] == NUM_ITERATIONS
    assert f"8 images, {data['train']['boxes']} boxes" in (out / "results.md").read_text()


def test_a_finished_trial_of_other_data_is_refused_then_left_out_of_the_mean(
    root, engine, tmp_path, capsys
):
    out = tmp_path / "out"
    first = trials.run_trials(make_job(root, out, engine), 1)["trials"][0]
    edit(root, "test_00002", r"<xmin>\d+", "<xmin>2")
    with pytest.raises(CheckpointError, match="on other data .*image 'test_00002': boxes changed"):
        trials.run_trials(make_job(root, out, engine), 2)
    assert not (out / "trial_1").exists() and read(out / "results.json")["num_trials"] == 1
    capsys.readouterr()
    results = trials.run_trials(make_job(root, out, engine, allow_change=["data"]), 2)
    assert "trial 0 is not in the mean: it was finished before" in capsys.readouterr().out
    old, new = results["trials"]
    assert (old["status"], new["status"]) == ("left out", "finished")
    assert old["AP50"] == first["AP50"] != new["AP50"]
    assert results["mean"]["AP50"] == new["AP50"] and results["std"]["AP50"] is None
    counts = {name: results[f"num_{name}"] for name in ("finished", "failed", "left_out")}
    assert counts == {"finished": 1, "failed": 0, "left_out": 1}
    text = (out / "results.md").read_text()
    assert "1 of 2 trials finished, 1 of other data or settings (not in the mean)" in text
    assert read(out / "trial_0" / "result.json") == first


def test_a_stopped_run_goes_on_with_other_data_only_where_allowed(root, engine, tmp_path, capsys):
    out, engine.stop_after = tmp_path / "out", 3
    with pytest.raises(TrainingStopped):
        trials.run_single(make_job(root, out, engine), resume=False)
    engine.stop_after = None
    halve_training_split(root)
    with pytest.raises(CheckpointError, match="training data: 8 images.*then, 4 images.*now"):
        trials.run_single(make_job(root, out, engine), resume=True)
    job = make_job(root, out, engine, allow_change=["data"])
    result = trials.run_single(job, resume=True)
    [change] = result["changes"]
    assert (change["name"], change["step"]) == ("data", 3)
    assert change["now"] == result["data"] and change["before"]["train"]["images"] == 8
    content = read_torch_file(out / "model_final.pth")
    assert content["model"]["seen"] == [8] * 3 + [4] * 5 and content["changes"] == [change]
    assert "--allow-change: data {" in capsys.readouterr().out
    # The same command again: nothing differs any more, which is said.
    assert trials.run_single(job, resume=True) == result
    assert "--allow-change: data did not change at this start" in capsys.readouterr().out


def test_trials_whose_data_changed_are_averaged_with_their_like_only(root, engine, tmp_path):
    out, engine.stop_after = tmp_path / "out", 3
    with pytest.raises(TrainingStopped):
        trials.run_trials(make_job(root, out, engine), 2)
    engine.stop_after = None
    halve_training_split(root)
    job = make_job(root, out, engine, allow_change=["data"])
    one = trials.run_trials(job, 1)
    assert one["num_finished"] == 1  # alike among themselves
    assert "WARNING: trial 0: data changed from" in (out / "results.md").read_text()
    two = trials.run_trials(job, 2)
    assert [t["status"] for t in two["trials"]] == ["left out", "finished"]
    assert two["trials"][0]["error"] == "its data changed at iteration 3, others' did not"
    assert two["mean"]["AP"] == two["trials"][1]["AP"]


def test_a_moved_folder_does_not_matter(root, engine, tmp_path):
    out, engine.stop_after = tmp_path / "out", 3
    with pytest.raises(TrainingStopped):
        trials.run_trials(make_job(root, out, engine), 2)
    engine.stop_after = None
    moved = tmp_path / "moved" / "elsewhere"
    shutil.copytree(root, moved)
    shutil.rmtree(root)
    job = make_job(moved, out, engine)
    results = trials.run_trials(job, 2)
    assert results["num_finished"] == 2 and results["trials"][0]["changes"] == []
    assert len({trial["config_digest"] for trial in results["trials"]}) == 1


def test_a_finished_run_is_extended(root, engine, tmp_path, capsys):
    out = tmp_path / "out"
    first = trials.run_single(make_job(root, out, engine), resume=False)
    with pytest.raises(CheckpointError, match="SOLVER.MAX_ITER 8 there, 12 now.*--allow-change"):
        trials.run_single(make_job(root, out, engine, *LONGER), resume=True)
    job = make_job(root, out, engine, *LONGER, allow_change=["SOLVER.MAX_ITER"])
    result = trials.run_single(job, resume=True)
    assert result["changes"] == [
        {"name": "SOLVER.MAX_ITER", "before": 8, "now": 12, "step": 8}
    ]
    assert "--allow-change: SOLVER.MAX_ITER 8 -> 12 from iteration 8 on" in capsys.readouterr().out
    assert read_torch_file(out / "model_final.pth")["iteration"] == 11
    assert read(out / "result_before_change_1.json") == first
    assert trials.run_single(job, resume=True) == result
    with pytest.raises(CheckpointError, match="has done 12 iterations, SOLVER.MAX_ITER is 8"):
        trials.run_single(
            make_job(root, out, engine, allow_change=["SOLVER.MAX_ITER"]), resume=True
        )


def test_an_extension_that_is_stopped_goes_on_from_its_own_newest_state(root, engine, tmp_path):
    """The final model of fewer iterations is still there; another change is refused by name."""
    out = tmp_path / "out"
    trials.run_single(make_job(root, out, engine), resume=False)
    engine.stop_after = 10
    longer = make_job(root, out, engine, *LONGER, allow_change=["SOLVER.MAX_ITER"])
    with pytest.raises(TrainingStopped):
        trials.run_single(longer, resume=True)
    engine.stop_after = None
    assert not (out / "result.json").exists()
    other = make_job(root, out, engine, *LONGER, "SOLVER.BASE_LR", "0.5")
    with pytest.raises(CheckpointError, match="model_0000009.*SOLVER.BASE_LR 0.001 there, 0.5 now"):
        trials.run_single(other, resume=True)
    result = trials.run_single(make_job(root, out, engine, *LONGER), resume=True)
    assert [c["step"] for c in result["changes"]] == [8]
    assert len(read_torch_file(out / "model_final.pth")["model"]["seen"]) == 12


def test_a_finished_trial_of_other_settings_is_not_averaged_with_new_ones(root, engine, tmp_path):
    out = tmp_path / "out"
    trials.run_trials(make_job(root, out, engine), 1)
    job = make_job(root, out, engine, "SOLVER.BASE_LR", "0.5", allow_change=["SOLVER.BASE_LR"])
    results = trials.run_trials(job, 2)
    assert [t["status"] for t in results["trials"]] == ["left out", "finished"]
    assert results["trials"][0]["error"].endswith("this change of SOLVER.BASE_LR")


def test_only_what_is_named_may_differ(root, engine, tmp_path):
    out = tmp_path / "out"
    trials.run_trials(make_job(root, out, engine), 1)
    words = ("SOLVER.BASE_LR", "0.5", *LONGER)
    with pytest.raises(CheckpointError, match=r"\(SOLVER.BASE_LR 0.001 there, 0.5 now\)"):
        trials.run_trials(make_job(root, out, engine, *words, allow_change=[LONGER[0]]), 1)
    halve_training_split(root)
    with pytest.raises(CheckpointError, match="on other data"):
        trials.run_trials(make_job(root, out, engine, *LONGER, allow_change=[LONGER[0]]), 1)


@pytest.mark.parametrize("names", ["('square', 'circle')", "('circle', 'cross')"])
def test_other_classes_are_refused_whatever_is_allowed(root, engine, tmp_path, names):
    out = tmp_path / "out"
    trials.run_trials(make_job(root, out, engine), 1)
    if "cross" in names:
        for xml in (root / "Annotations").iterdir():
            xml.write_text(xml.read_text().replace("square", "cross"))
    job = make_job(root, out, engine, "DATASETS.VOC_CLASSES", names, allow_change=["data"])
    listed = names.replace("'", "").replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CheckpointError, match=rf"classes \(circle, square\); .* are {listed}"):
        trials.run_trials(job, 1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("SOLVER.MAX_ITR", r"unknown name .* \(did you mean 'SOLVER.MAX_ITER'\?\)"),
        ("SOLVER", "unknown name 'SOLVER'"),
        ("DATASETS.VOC_ROOT", "may always differ"),
        ("SOLVER.CHECKPOINT_PERIOD", "may always differ"),
        ("SEED", "another OUTPUT_DIR"),
        ("MODEL.WEIGHTS", "goes on from its checkpoint"),
        ("DATASETS.VOC_CLASSES", "start a run of its own"),
    ],
)
def test_a_name_that_cannot_be_allowed_is_refused(name, message):
    with pytest.raises(ConfigError, match=f"--allow-change: .*{message}"):
        check_allowed_changes([name])


def test_names_that_can_be_allowed():
    check_allowed_changes(["data", "SOLVER.MAX_ITER", "SOLVER.STEPS", "DATALOADER.NUM_WORKERS"])


@pytest.fixture
def old_run(root, engine, tmp_path):
    """A trial as it was written before runs knew their data."""
    out = tmp_path / "out"
    job = make_job(root, out, engine)
    trials.run_trials(job, 1)
    folder, cfg = out / "trial_0", job.cfg
    places = {"DATASETS.VOC_ROOT": str(root), "DATASETS.COCO_FILES": []}
    before = {"config_digest": run_digest(cfg, None, "quick", places)}
    assert before["config_digest"] != job.config_digest
    for path in (folder / "result.json", folder / "model_final.pth.manifest.json"):
        content = {**read(path), **before}
        for name in ("data", "changes", "class_names", "config", "weights_sha256"):
            content.pop(name, None)
        path.write_text(json.dumps(content))
    (folder / "data_digests.npz").unlink()
    return out


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_run_of_before_fingerprints_goes_on_and_says_so(
    old_run, root, engine, tmp_path, capsys, is_moved
):
    if is_moved:
        root = root.rename(tmp_path / "moved")
    capsys.readouterr()
    results = trials.run_trials(make_job(root, old_run, engine), 2)
    assert "whether it was on these data is unknown" in capsys.readouterr().out
    assert results["num_finished"] == 2
    assert "the data of trial 0 are unknown" in (old_run / "results.md").read_text()
    with pytest.raises(CheckpointError, match="SOLVER.BASE_LR 0.001 there, 0.5 now"):
        trials.run_trials(make_job(root, old_run, engine, "SOLVER.BASE_LR", "0.5"), 2)


def test_a_key_younger_than_a_run_is_no_difference_at_its_default():
    config = yaml.safe_load("{SOLVER: {BASE_LR: 0.1}, MODEL: {DEVICE: cpu}}")
    younger = yaml.safe_load(
        "{SOLVER: {BASE_LR: 0.1}, MODEL: {DEVICE: cpu, RESET_PREDICTORS: false}}"
    )
    assert changed_keys(config, younger) == {}
    younger["MODEL"]["RESET_PREDICTORS"] = True
    assert changed_keys(config, younger) == {"MODEL.RESET_PREDICTORS": (False, True)}
