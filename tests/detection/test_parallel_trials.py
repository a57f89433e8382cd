"""The scheduler of trials side by side, with processes that train nothing."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection import train_net, trials
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import TrainingStopped
from detection.parallel_trials import progress_line, run_trials_side_by_side
from moco import slots
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError

CLASSES = ("circle", "square")
# A trial's process: argv is the trial's number, its folder, the result it would write, the plan.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
k, folder, result, plan = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
running = folder.parent / "running"
running.mkdir(exist_ok=True)
(running / str(k)).write_text("")
print("trial", k, os.environ["OMP_NUM_THREADS"], flush=True)

def wait_until(done):
    for _ in range(2000):
        if done():
            return
        time.sleep(0.01)
    sys.exit("waited for nothing")

if plan == "meet":  # the first two wait for each other: they do run side by side
    if k < 2:
        wait_until(lambda: {"0", "1"} <= {p.name for p in folder.parent.glob("met*/*")} | {
            p.name for p in running.iterdir()})
    result = json.loads(result)
    result["seen"] = len(list(running.iterdir()))
    met = folder.parent / "met"
    met.mkdir(exist_ok=True)
    (met / str(k)).write_text("")
    result = json.dumps(result)
if plan == "fail" and k == 0:
    sys.exit("error: boom")
if plan == "fail" and k == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "stop":
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    (running / f"ready{k}").write_text("")
    if k == 0:
        wait_until(lambda: (running / "ready1").exists())
        os.kill(os.getppid(), signal.SIGTERM)
    wait_until(lambda: stopped)
    (folder / "saved").write_text(str(len(stopped)))
    sys.exit(143)
(folder / "result.json").write_text(result)
(running / str(k)).unlink()
"""


class FakeEngine:
    name = "fake"

    def versions(self):
        return {"fake": "1"}

    def check(self, cfg, *, eval_only):
        return "nothing loaded"

    def train(self, run):
        raise AssertionError("the parent trains nothing")

    def predict(self, run, records):
        return {
            record["image_id"]: (np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
            for record in records
        }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(
        root, num_train=2, num_test=2, num_unlabelled=0, size=64, seed=0, class_names=CLASSES
    )


@pytest.fixture
def job(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "_POLL_SECONDS", 0.02)
    keys = {
        "DATASETS.VOC_ROOT": shapes, "DATASETS.VOC_CLASSES": CLASSES, "DATASETS.TRAIN": ("train",),
        "DATASETS.TEST": ("test",), "MODEL.ROI_HEADS.NUM_CLASSES": 2, "SEED": 5,
        "OUTPUT_DIR": tmp_path / "out",
    }  # fmt: skip
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    process = ProcessInfo(0, 1, 0, torch.device("cpu"))
    return trials.prepare(cfg, FakeEngine(), "test", process)


def command_of(job, plan):
    def command(k):
        result = {
            "engine": "fake", "versions": {"fake": "1"}, "config_digest": job.config_digest,
            "seed": job.base_seed + k, "status": "finished", "error": None, "AP": 10.0 + k,
            "AP50": 20.0 + k, "AP75": 5.0, "per_class": {}, "num_processes": 1,
        }  # fmt: skip
        folder = job.trial(k).output_dir
        return [sys.executable, "-c", CHILD, str(k), str(folder), json.dumps(result), plan]

    return command


def test_as_many_at_once_as_there_are_slots(job, capsys):
    results = run_trials_side_by_side(job, 4, command_of(job, "meet"), num_slots=2)
    seen = [trial["seen"] for trial in results["trials"]]
    assert max(seen) == 2  # and never more
    assert results["num_finished"] == 4 and results["mean"]["AP50"] == 21.5
    assert [trial["seed"] for trial in results["trials"]] == [5, 6, 7, 8]
    assert json.loads((job.output_dir / "results.json").read_text()) == results
    assert (job.output_dir / "results.md").is_file()
    log = (job.output_dir / "trial_3" / "log.txt").read_text()
    assert log.startswith(f"$ {sys.executable}") and "\ntrial 3" in log
    printed = capsys.readouterr().out
    assert "4 trial(s) to do, 2 side by side" in printed
    for k in range(4):
        assert f"trial {k}: AP50 {20 + k}.00, AP {10 + k}.00, AP75 5.00" in printed


def test_a_failed_trial_stops_no_other_and_is_done_again(job, capsys):
    results = run_trials_side_by_side(job, 3, command_of(job, "fail"), num_slots=2)
    assert (results["num_finished"], results["num_failed"]) == (1, 2)
    first, second, third = results["trials"]
    assert "ended with status 1: boom" in first["error"] and "trial_0" in first["error"]
    assert "was ended by SIGKILL" in second["error"] and second["AP"] is None
    assert third["status"] == "finished"
    written = json.loads((job.output_dir / "trial_1" / "result.json").read_text())
    assert written == second
    assert "trial 1 failed: TrialProcessError: its process was" in capsys.readouterr().out
    before = (job.output_dir / "trial_2" / "result.json").stat().st_mtime_ns
    results = run_trials_side_by_side(job, 3, command_of(job, "meet"), num_slots=2)
    assert results["num_finished"] == 3
    assert (job.output_dir / "trial_2" / "result.json").stat().st_mtime_ns == before


def test_sigterm_is_passed_on_once_and_the_rest_not_started(job):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM.*start the same") as caught:
        run_trials_side_by_side(job, 3, command_of(job, "stop"), num_slots=2)
    assert caught.value.exit_code == 143
    for k in range(2):
        assert (job.output_dir / f"trial_{k}" / "saved").read_text() == "1"
        assert not (job.output_dir / f"trial_{k}" / "result.json").exists()
    assert not (job.output_dir / "trial_2").exists()
    assert not (job.output_dir / "results.json").exists()
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert after == before
    assert run_trials_side_by_side(job, 3, command_of(job, "meet"), 2)["num_finished"] == 3


def test_another_run_is_refused_before_anything_starts(job):
    folder = job.output_dir / "trial_1"
    folder.mkdir()
    (folder / "result.json").write_text('{"engine": "fake", "config_digest": "other", "seed": 6}')
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run_trials_side_by_side(job, 2, lambda k: pytest.fail("started"), 2)


def test_progress_line_by_hand(tmp_path):
    folders = {k: tmp_path / str(k) for k in (1, 2)}
    for folder in folders.values():
        folder.mkdir()
    assert progress_line(1, 5, folders, 2, 100) == "1/5 trials done; trial 1 0/100, trial 2 0/100"
    record = json.dumps({"iteration": 39, "time": 2.0})
    (folders[1] / "metrics.json").write_text(record + "\n" + '{"iteration": 59, "ti')  # half a line
    # 2 s an iteration: 60 + 100 + 2 * 100 are left, two at a time.
    line = progress_line(1, 5, folders, 2, 100)
    assert line.endswith("trial 1 40/100, trial 2 0/100; ETA of training 0:06:00")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-gpus", "2"], "needs --trials N"),
        (["--trials", "2"], "with --num-gpus 1 one trial runs at a time"),
        (["--trials", "2", "--num-gpus", "2", "--num-machines", "2"], "runs on one machine"),
        (["--trials", "2", "--num-gpus", "2", "--eval-only"], "give one of them"),
    ],
)
def test_flags_that_contradict_are_one_line(capsys, words, message):
    config = Path(train_net.__file__).parents[1] / "configs/detection/pascal_voc_R_50_C4_24k.yaml"
    flags = ["--config-file", str(config), "--device", "cpu", "--trials-parallel"]
    with pytest.raises(SystemExit) as exit_:
        train_net.main([*flags, *words])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and error.count("\n") == 1 and message in error
