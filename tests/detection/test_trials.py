"""Trials with an engine that trains nothing: what is skipped, resumed, refused and averaged."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from detection import trials
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import TrainingStopped
from detection.run_folder import run_digest
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError, DataError, MocoError, NonFiniteError
from moco.training.checkpoint import save_checkpoint

PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))
CLASSES = ("circle", "square")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(
        root, num_train=2, num_test=3, num_unlabelled=0, size=64, seed=0, class_names=CLASSES
    )


class FakeEngine:
    """Finds `quality[seed]` of the test images' objects; raises `errors[seed]` in training."""

    name = "fake"

    def __init__(self):
        self.trained, self.errors, self.dropped = [], {}, {}

    def versions(self):
        return {"fake": "1"}

    def unavailable_reason(self):
        return None

    def check(self, cfg, *, eval_only):
        return "nothing loaded"

    def train(self, run):
        self.trained.append((run.seed, run.output_dir.name, run.resume))
        error = self.errors.pop(run.seed, None)
        if error:
            raise error
        identity = {"engine": self.name, "config_digest": run.config_digest, "seed": run.seed}
        save_checkpoint(run.output_dir / "model_final.pth", {}, **identity)

    def predict(self, run, records):
        return {
            record["image_id"]: (
                np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4),
                np.ones(len(record["annotations"]), np.float32),
                np.array([a["category_id"] for a in record["annotations"]], np.int64),
            )
            for record in records[self.dropped.get(run.seed, 0) :]
        }


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def make_job(shapes, tmp_path, engine):
    def make(*overrides, root=shapes):
        keys = {
            "DATASETS.VOC_ROOT": str(root),
            "DATASETS.VOC_CLASSES": str(CLASSES),
            "DATASETS.TRAIN": "('train',)",
            "DATASETS.TEST": "('test',)",
            "MODEL.ROI_HEADS.NUM_CLASSES": "2",
            "OUTPUT_DIR": str(tmp_path / "out"),
            **dict(zip(overrides[::2], overrides[1::2], strict=True)),
        }
        cfg = load_detection_config(None, [word for pair in keys.items() for word in pair])
        return trials.prepare(cfg, engine, "test", PROCESS)

    return make


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def scored(status="finished", ap50=None, ap=None, ap75=None):
    return {"status": status, "AP50": ap50, "AP": ap, "AP75": ap75}


def test_summary_by_hand():
    results = [scored("finished", 1.0, 10.0, 0.0), scored("finished", 4.0, 10.0, 0.0)]
    results += [scored("failed"), scored("finished", 7.0, 10.0, 3.0)]
    summary = trials.summarise(results)
    assert (summary["num_finished"], summary["num_failed"]) == (3, 1)
    assert summary["mean"] == {"AP50": 4.0, "AP": 10.0, "AP75": 1.0}
    # n - 1: sqrt((9 + 0 + 9) / 2) = 3, sqrt((1 + 1 + 4) / 2) = sqrt(3)
    assert summary["std"] == pytest.approx({"AP50": 3.0, "AP": 0.0, "AP75": 3**0.5})


def test_summary_of_one_none_and_an_undefined_score():
    one = trials.summarise([scored("finished", 1.0, 2.0, 3.0), scored("failed")])
    assert one["mean"]["AP"] == 2.0 and one["std"]["AP"] is None
    none = trials.summarise([scored("failed")])
    assert none["mean"]["AP"] is None and none["num_finished"] == 0
    undefined = trials.summarise([scored("finished", 1.0, None, 3.0)] * 2)
    assert undefined["mean"] == {"AP50": 1.0, "AP": None, "AP75": 3.0}


def test_trials_have_their_own_seed_folder_and_result(make_job, engine, tmp_path, capsys):
    engine.dropped = {8: 2}
    results = trials.run_trials(make_job("SEED", "7"), 2)
    assert engine.trained == [(7, "trial_0", True), (8, "trial_1", True)]
    out = tmp_path / "out"
    assert read(out / "results.json") == results
    first, second = (read(out / f"trial_{k}" / "result.json") for k in range(2))
    assert first["AP50"] == pytest.approx(100) and second["AP50"] < 90
    assert results["mean"]["AP50"] == pytest.approx((first["AP50"] + second["AP50"]) / 2)
    assert results["std"]["AP50"] == pytest.approx(abs(first["AP50"] - second["AP50"]) / 2**0.5)
    fields = {"engine", "versions", "config_digest", "dataset", "metric", "seed", "status", "error"}
    fields |= {"AP", "AP50", "AP75", "per_class", "seconds", "weights", "num_processes"}
    fields |= {"data", "changes"}
    assert first.keys() == fields and first["per_class"].keys() == set(CLASSES)
    assert (out / "trial_0" / "pictures" / "contact_sheet.png").is_file()
    assert not (out / "trial_1" / "pictures").exists()
    assert "SEED: 8" in (out / "trial_1" / "config.yaml").read_text()
    assert (out / "config.yaml").is_file() and (out / "results.md").is_file()
    printed = capsys.readouterr().out
    assert "engine: fake (test)" in printed and "2 training images" in printed


def test_negative_seed_is_zero_and_said(make_job, engine, capsys):
    trials.run_trials(make_job(), 1)
    assert engine.trained[0][0] == 0
    assert "SEED is -1; negative means 0" in capsys.readouterr().out


def test_finished_is_skipped_and_more_can_be_added(make_job, engine):
    trials.run_trials(make_job(), 1)
    engine.trained.clear()
    results = trials.run_trials(make_job(), 3)
    assert [name for _, name, _ in engine.trained] == ["trial_1", "trial_2"]
    assert results["num_finished"] == 3


def test_failed_is_listed_not_averaged_and_tried_again(make_job, engine, tmp_path):
    engine.errors = {1: NonFiniteError("iteration 3: nan")}
    results = trials.run_trials(make_job(), 3)
    assert (results["num_finished"], results["num_failed"]) == (2, 1)
    failed = read(tmp_path / "out" / "trial_1" / "result.json")
    assert failed["status"] == "failed" and failed["error"] == "NonFiniteError: iteration 3: nan"
    assert failed["AP"] is None
    assert results["mean"]["AP50"] == pytest.approx(100)
    engine.trained.clear()
    again = trials.run_trials(make_job(), 3)
    assert [name for _, name, _ in engine.trained] == ["trial_1"]
    assert again["num_finished"] == 3 and again["num_failed"] == 0


def test_error_of_the_program_is_recorded_with_its_traceback(make_job, engine, capsys):
    engine.errors = {0: RuntimeError("out of memory")}
    results = trials.run_trials(make_job(), 2)
    assert results["trials"][0]["error"] == "RuntimeError: out of memory"
    assert "Traceback" in capsys.readouterr().err


def test_with_several_processes_only_agreed_failures_go_on():
    two = ProcessInfo(0, 2, 0, torch.device("cpu"))
    assert trials._others_can_go_on(NonFiniteError(""), two)
    assert not trials._others_can_go_on(RuntimeError(""), two)
    assert trials._others_can_go_on(RuntimeError(""), PROCESS)


def test_stop_leaves_no_result(make_job, engine, tmp_path):
    engine.errors = {1: TrainingStopped("stopped")}
    with pytest.raises(TrainingStopped):
        trials.run_trials(make_job(), 3)
    assert not (tmp_path / "out" / "trial_1" / "result.json").exists()
    assert not (tmp_path / "out" / "results.json").exists()
    assert trials.run_trials(make_job(), 3)["num_finished"] == 3
    assert TrainingStopped("").exit_code == 128 + signal.SIGTERM
    assert TrainingStopped("", signal.SIGINT).exit_code == 128 + signal.SIGINT


def test_other_settings_are_not_mixed(make_job, engine):
    trials.run_trials(make_job(), 1)
    engine.trained.clear()
    with pytest.raises(CheckpointError, match="SOLVER.BASE_LR 0.001 there, 0.5 now"):
        trials.run_trials(make_job("SOLVER.BASE_LR", "0.5"), 2)
    with pytest.raises(CheckpointError, match="seed 0 there, 5 now"):
        trials.run_trials(make_job("SEED", "5"), 2)
    engine.name = "other"
    with pytest.raises(CheckpointError, match="engine fake there, other now"):
        trials.run_trials(make_job(), 2)
    assert engine.trained == []


def test_unfinished_run_of_other_settings_is_not_continued(make_job, tmp_path):
    path = tmp_path / "out" / "trial_0" / "model_0000001.pth"
    save_checkpoint(path, {}, engine="fake", config_digest="other", seed=0)
    with pytest.raises(CheckpointError, match="model_0000001.*belongs to another run"):
        trials.run_trials(make_job(), 1)


def test_results_of_other_engines_are_never_averaged(make_job):
    job = make_job()
    good = trials.run_trials(job, 1)["trials"][0]
    with pytest.raises(ConfigError, match="not averaged"):
        trials.collect(job, [good, {**good, "engine": "other"}])


def test_digest_ignores_what_changes_no_number(make_job, tmp_path):
    base = make_job().config_digest
    same = ("SEED", "9", "DATALOADER.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "7")
    same += ("SOLVER.PROGRESS_PERIOD", "3", "OUTPUT_DIR", str(tmp_path / "other"))
    assert make_job(*same).config_digest == base
    assert make_job("SOLVER.BASE_LR", "0.5").config_digest != base
    cfg = make_job().cfg
    assert run_digest(cfg, "aa", "embedded") != run_digest(cfg, "bb", "embedded")


def test_single_run_needs_resume_to_go_on(make_job, engine, tmp_path):
    result = trials.run_single(make_job(), resume=False)
    assert result == read(tmp_path / "out" / "result.json")
    assert engine.trained == [(0, "out", False)]
    with pytest.raises(ConfigError, match="--resume"):
        trials.run_single(make_job(), resume=False)
    assert trials.run_single(make_job(), resume=True) == result
    assert len(engine.trained) == 1  # finished: nothing is trained again


def test_single_run_that_fails_is_recorded_and_raised(make_job, engine, tmp_path):
    engine.errors = {0: NonFiniteError("iteration 0: nan")}
    with pytest.raises(NonFiniteError):
        trials.run_single(make_job(), resume=False)
    assert read(tmp_path / "out" / "result.json")["status"] == "failed"


@pytest.mark.parametrize(
    "overrides, error, words",
    [
        (("MODEL.ROI_HEADS.NUM_CLASSES", "3"), MocoError, "NUM_CLASSES"),
        (("DATASETS.TEST", "('absent',)"), DataError, "absent.txt"),
        (("SOLVER.BASE_LRR", "1"), ConfigError, "did you mean 'BASE_LR'"),
        (("MODEL.MASK_ON", "True"), ConfigError, "none of the .* objects of DATASETS.TRAIN"),
    ],
)
def test_wrong_input_is_one_line_before_training(make_job, engine, overrides, error, words):
    with pytest.raises(error, match=words) as caught:
        make_job(*overrides)
    assert "\n" not in str(caught.value) and engine.trained == []


def test_split_naming_a_missing_image(make_job, tmp_path):
    root = make_shapes_dataset(
        tmp_path / "own", num_train=2, num_test=2, num_unlabelled=0, size=64, seed=1,
        class_names=CLASSES,
    )
    split = root / "ImageSets" / "Main" / "test.txt"
    split.write_text(split.read_text() + "ghost\n")
    with pytest.raises(DataError, match="ghost"):
        make_job(root=root)


def test_a_class_without_a_test_object_is_named_in_the_check_and_in_results(
    make_job, tmp_path, capsys
):
    root = make_shapes_dataset(
        tmp_path / "own", num_train=2, num_test=2, num_unlabelled=0, size=64, seed=1,
        class_names=CLASSES,
    )
    results = trials.run_trials(make_job(root=root), 1)
    capsys.readouterr()
    assert results["classes_without_test_objects"] == []  # control
    assert "without an object" not in (tmp_path / "out/results.md").read_text()
    classes = "('unseen', 'circle', 'square')"
    job = make_job(
        "DATASETS.VOC_CLASSES", classes, "MODEL.ROI_HEADS.NUM_CLASSES", "3",
        "OUTPUT_DIR", str(tmp_path / "three"), root=root,
    )  # fmt: skip
    words = "classes without an object in the test data: "
    meaning = "; each counts as AP 0 in the mean of VOC's 2007 metric, as in Detectron2"
    assert f"  warning: {words}(unseen){meaning}" in capsys.readouterr().out
    results = trials.run_trials(job, 1)
    assert results["classes_without_test_objects"] == ["unseen"]
    report = (tmp_path / "three/results.md").read_text()
    assert f"- {words}unseen{meaning}" in report


def test_nothing_to_train_on_stops_before_the_first_trial(make_job, engine, tmp_path):
    root = make_shapes_dataset(
        tmp_path / "own", num_train=2, num_test=2, num_unlabelled=0, size=64, seed=1,
        class_names=CLASSES,
    )
    for image_id in (root / "ImageSets/Main/train.txt").read_text().split():
        (root / f"Annotations/{image_id}.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match="training data: 2 images, 0 boxes read: no image is tr"):
        make_job(root=root)
    assert engine.trained == [] and not (tmp_path / "out").exists()


def test_no_trials(make_job):
    with pytest.raises(ConfigError, match="--trials 0: at least 1"):
        trials.run_trials(make_job(), 0)
