"""The command line with Detectron2 as the engine: trials, both scores, engines kept apart."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detection import train_net  # noqa: E402
from detection.data.shapes import make_shapes_dataset  # noqa: E402
from moco.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.detectron2

TINY = """
MODEL:
  DEVICE: cpu
  RESNETS: {{NORM: BN, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  BACKBONE: {{FREEZE_AT: 0}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TRAIN: 30, POST_NMS_TOPK_TEST: 100}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm, NUM_CLASSES: 1, BATCH_SIZE_PER_IMAGE: 32,
              SCORE_THRESH_TEST: 0.0}}
INPUT: {{MIN_SIZE_TRAIN: [69], MIN_SIZE_TEST: 69}}
DATASETS: {{VOC_ROOT: "{root}", VOC_CLASSES: [circle], TRAIN: [train], TEST: [test]}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1, BASE_LR: 0.01}}
TEST: {{PRECISE_BN: {{ENABLED: True, NUM_ITER: 1}}}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    root = make_shapes_dataset(
        folder / "shapes", num_train=4, num_test=4, num_unlabelled=0, size=64, seed=0,
        class_names=("circle",),
    )  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(root=root))
    return path


def call(config, *words):
    with pytest.raises(SystemExit) as exit_:
        train_net.main(["--config-file", str(config), *map(str, words)])
    return exit_.value.code


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trials(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials")
    with pytest.MonkeyPatch.context() as patch:
        # Scores of so short a training tie, and Detectron2 sorts ties as numpy happens to.
        patch.setattr(np, "argsort", partial(np.argsort, kind="stable"))
        assert call(config, "--trials", "2", "--engine", "detectron2", "OUTPUT_DIR", folder) == 0
    return folder


def test_two_trials_with_both_scores(trials):
    results = read(trials / "results.json")
    assert results["engine"] == "detectron2" and results["num_finished"] == 2
    assert "detectron2" in results["versions"]
    for k, trial in enumerate(results["trials"]):
        assert trial["seed"] == k and trial == read(trials / f"trial_{k}" / "result.json")
        ours = {score: trial[score] for score in ("AP", "AP50", "AP75")}
        assert trial["detectron2_evaluator"] == pytest.approx(ours, abs=1e-9)
    assert results["mean"]["AP50"] > 0
    for part in ("mean", "std"):
        assert results["detectron2_evaluator"][part] == pytest.approx(results[part], abs=1e-9)
    text = (trials / "results.md").read_text()
    assert "| by Detectron2's own evaluator | " in text and "engine: detectron2" in text


def test_auto_is_detectron2_and_finished_trials_are_kept(config, trials, capsys):
    assert call(config, "--trials", "2", "OUTPUT_DIR", trials) == 0
    out = capsys.readouterr().out
    assert "engine: detectron2 (auto: Detectron2 works here" in out
    assert out.count("finished already") == 2


def test_auto_leaves_bfloat16_on_the_cpu_to_the_embedded_engine(config, tmp_path, capsys):
    words = ("SOLVER.AMP.ENABLED", "True", "OUTPUT_DIR", tmp_path, "DATASETS.TRAIN", "('none',)")
    assert call(config, *words) == 2  # the data check ends it
    assert call(config, "--engine", "detectron2", *words) == 2
    captured = capsys.readouterr()
    assert "none.txt" in captured.err and "SOLVER.AMP.ENABLED is True" in captured.err


def test_results_of_two_engines_are_not_averaged(config, trials, tmp_path, capsys):
    folder = shutil.copytree(trials, tmp_path / "trials")
    assert call(config, "--trials", "3", "--engine", "embedded", "OUTPUT_DIR", folder) == 2
    error = capsys.readouterr().err
    assert "engine detectron2 there, embedded now" in error and error.count("\n") == 1
    assert read(folder / "results.json")["num_trials"] == 2
    (folder / "trial_1" / "model_final.pth").unlink()
    with pytest.raises(ConfigError, match="are not averaged"):
        collect_with_the_engine_of_trial_0_changed(read(folder / "results.json"))


def collect_with_the_engine_of_trial_0_changed(results):
    from types import SimpleNamespace

    from detection.trials import collect

    results["trials"][0]["engine"] = "embedded"
    job = SimpleNamespace(
        engine=SimpleNamespace(name="detectron2"), config_digest=results["config_digest"]
    )
    collect(job, results["trials"])


def test_its_model_scores_the_same_by_either_engine(config, trials, tmp_path):
    weights = trials / "trial_0" / "model_final.pth"
    wanted = read(trials / "trial_0" / "result.json")
    for engine in ("embedded", "detectron2"):
        folder = tmp_path / engine
        words = ("--engine", engine, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", folder)
        assert call(config, "--eval-only", *words) == 0
        scored = read(folder / "eval_only.json")
        assert scored["engine"] == engine
        assert {s: scored[s] for s in ("AP", "AP50", "AP75")} == {
            s: wanted[s] for s in ("AP", "AP50", "AP75")
        }


def test_an_embedded_model_scores_the_same_by_either_engine(config, tmp_path):
    assert call(config, "--engine", "embedded", "OUTPUT_DIR", tmp_path / "run") == 0
    wanted = read(tmp_path / "run" / "result.json")
    assert "detectron2_evaluator" not in wanted
    weights = tmp_path / "run" / "model_final.pth"
    words = ("--engine", "detectron2", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "eval")
    assert call(config, "--eval-only", *words) == 0
    scored = read(tmp_path / "eval" / "eval_only.json")
    assert wanted["AP50"] > 0 and scored["AP50"] == wanted["AP50"] and scored["AP"] == wanted["AP"]
