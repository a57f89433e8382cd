"""The command line, started as users start it, on tiny models and generated images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from detection import train_net
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.engines.progress import Progress

REPOSITORY = Path(train_net.__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "detection" / "pascal_voc_R_50_C4_24k_moco.yaml"
TINY = """
_BASE_: "{base}"
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TRAIN: 30, PRE_NMS_TOPK_TEST: 100}}
  ROI_HEADS: {{NUM_CLASSES: 2, BATCH_SIZE_PER_IMAGE: 16}}
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
DATASETS:
  VOC_ROOT: "{root}"
  VOC_CLASSES: [circle, square]
  TRAIN: [train]
  TEST: [test]
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1, BASE_LR: 0.01}}
TEST: {{PRECISE_BN: {{NUM_ITER: 1}}}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    root = make_shapes_dataset(
        folder / "shapes", num_train=4, num_test=2, num_unlabelled=0, size=64, seed=0,
        class_names=("circle", "square"),
    )
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(base=CONFIG, root=root))
    return path


def run_by_path(config, *words):
    """From another folder: nothing but the script may be needed to find the packages."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = REPOSITORY / "detection" / "train_net.py"
    flags = ["--config-file", config, "--device", "cpu", "--engine", "embedded"]
    command = [sys.executable, script, *flags, *words]
    return subprocess.run(
        [str(word) for word in command],
        cwd=config.parent,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def call(config, *words):
    """In this process, by the embedded engine; returns the exit status."""
    flags = ["--config-file", config, "--device", "cpu", "--engine", "embedded", *words]
    with pytest.raises(SystemExit) as exit_:
        train_net.main([str(word) for word in flags])
    return exit_.value.code


def test_two_trials_by_path(config, tmp_path):
    done = run_by_path(config, "--trials", "2", "OUTPUT_DIR", tmp_path, "SEED", "5")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "engine: embedded (asked for" in out and "2 of 2 trials finished" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [trial["seed"] for trial in results["trials"]] == [5, 6]
    assert results["num_finished"] == 2 and results["std"]["AP"] is not None
    assert (tmp_path / "results.png").is_file()
    assert len(out.splitlines()) < 40


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_finishes(
    config, tmp_path, monkeypatch, capsys, number, status
):
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "report", lambda *_: os.kill(os.getpid(), number))
        words = ("OUTPUT_DIR", tmp_path, "SOLVER.PROGRESS_PERIOD", "1")
        assert call(config, *words) == status
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after iteration 1 of 3" in out and "--resume" in out
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    assert not (tmp_path / "result.json").exists()
    assert call(config, *words) == 2  # without --resume it is refused
    assert call(config, "--resume", *words) == 0
    assert "at iteration 1" in capsys.readouterr().out


def test_single_run_then_eval_only(config, tmp_path, capsys):
    assert call(config, "OUTPUT_DIR", tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished"
    assert call(config, "OUTPUT_DIR", tmp_path) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert call(config, "--resume", "OUTPUT_DIR", tmp_path) == 0
    assert "finished already" in capsys.readouterr().out
    weights = tmp_path / "model_final.pth"
    out = tmp_path / "eval"
    assert call(config, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", out) == 0
    again = json.loads((out / "eval_only.json").read_text())
    assert [again[score] for score in ("AP", "AP50")] == [result[s] for s in ("AP", "AP50")]
    assert again["weights"]["sha256"] and not (out / "result.json").exists()


def test_a_finished_run_is_extended_by_allow_change(config, tmp_path, capsys):
    words = ("OUTPUT_DIR", tmp_path)
    assert call(config, *words) == 0
    longer = (*words, "SOLVER.MAX_ITER", "4")
    assert call(config, "--resume", *longer) == 2
    assert "SOLVER.MAX_ITER 3 there, 4 now" in capsys.readouterr().err
    assert call(config, "--resume", "--allow-change", "SOLVER.MAX_ITER", *longer) == 0
    assert "SOLVER.MAX_ITER 3 -> 4 from iteration 3 on" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["changes"][0]["step"] == 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--allow-change", "SOLVER.MAX_ITR"], "did you mean 'SOLVER.MAX_ITER'"),
        (["--eval-only", "--allow-change", "data"], "no run is continued"),
    ],
)
def test_allow_change_that_means_nothing_is_refused(config, tmp_path, capsys, flags, words):
    assert call(config, *flags, "OUTPUT_DIR", tmp_path) == 2
    assert words in capsys.readouterr().err


def test_a_process_of_parallel_trials_is_told_what_may_change():
    flags = ["--config-file", "x", "--allow-change", "data", "--allow-change", "SOLVER.MAX_ITER"]
    args = train_net.parse_args([*flags, "SOLVER.MAX_ITER", "9"])
    command = train_net._command_of_trial(args, "embedded", "cpu", 1)
    again = train_net.parse_args(command[2:])
    assert again.allow_change == ["data", "SOLVER.MAX_ITER"] and again.only_trial == 1
    assert again.overrides == ["SOLVER.MAX_ITER", "9"]


def test_failed_trial_gives_status_1(config, tmp_path, capsys):
    words = ("SOLVER.BASE_LR", "1e18", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", tmp_path)
    assert call(config, "--trials", "1", *words) == train_net.EXIT_FAILED_TRIAL
    assert "trial 0 failed: NonFiniteError: iteration" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--trials", "1", "--eval-only"], "give one of them"),
        (["--eval-only", "--resume"], "give one of them"),
        (["--eval-only"], "MODEL.WEIGHTS is ''"),
        (["--num-gpus", "-1"], "--num-gpus -1"),
        (["--machine-rank", "1"], "--machine-rank 1"),
        (["SOLVER.BASE_LRR", "1"], "did you mean 'BASE_LR'"),
        (["SOLVER.BASE_LR"], "KEY VALUE pairs"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], "NUM_CLASSES"),
        (["MODEL.WEIGHTS", "absent.pth"], "absent.pth"),
        (["DATASETS.TEST", "('absent',)"], "absent.txt"),
        (["OUTPUT_DIR", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(config, tmp_path, capsys, words, message):
    assert call(config, *words, *([] if "OUTPUT_DIR" in words else ["OUTPUT_DIR", tmp_path])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_engine_that_is_absent_is_one_line_and_auto_takes_the_other(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert call(config, "--engine", "detectron2", "OUTPUT_DIR", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --engine detectron2: Detectron2 is not installed")
    assert error.count("\n") == 1
    assert call(config, "--engine", "auto", "OUTPUT_DIR", tmp_path) == 0
    assert "engine: embedded (auto: Detectron2 is not installed" in capsys.readouterr().out


def test_status_of_a_child_process_is_passed_on(config, monkeypatch):
    def launch(worker, num_processes, **options):
        assert num_processes == 2
        return 137

    monkeypatch.setattr(train_net.distributed, "launch", launch)
    assert call(config, "--num-gpus", "2") == 137


def test_torchrun_decides_the_number_of_processes(config, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_net.distributed, "launch", lambda *_, **__: pytest.fail("launched"))
    assert call(config, "--num-gpus", "8", "OUTPUT_DIR", tmp_path) == 0


@pytest.mark.parametrize("name", ["pascal_voc_R_50_C4_24k.yaml", CONFIG.name])
def test_shipped_configs(name):
    path = CONFIG.parent / name
    cfg = load_detection_config(str(path))
    assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (6000, 1000)
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (0, "naiveSyncBN")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert (cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)) == (24000, (18000, 22000))
    assert cfg.SOLVER.WARMUP_ITERS == 100 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == tuple(range(480, 801, 32))
    assert cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER == 200
    is_moco = name == CONFIG.name
    assert cfg.INPUT.FORMAT == ("RGB" if is_moco else "BGR")
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 != is_moco
    assert cfg.MODEL.PIXEL_STD == ([58.395, 57.12, 57.375] if is_moco else [1.0, 1.0, 1.0])


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["pascal_voc_R_50_C4_24k.yaml", CONFIG.name])
def test_shipped_configs_are_detectron2_yaml(name):
    config = pytest.importorskip("detectron2.config")
    cfg = config.get_cfg()
    cfg.merge_from_file(str(CONFIG.parent / name))
    ours = load_detection_config(str(CONFIG.parent / name))
    assert cfg.SOLVER.STEPS == tuple(ours.SOLVER.STEPS)
    with pytest.raises(AssertionError, match="Non-existent"):
        cfg.merge_from_list(["TEST.ROUND_DETECTIONS", True])  # a key of ours only
