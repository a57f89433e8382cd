"""R19: the trials' driver killed, started twice, and with a trial that always fails."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import SERVER

from detection.data.shapes import make_shapes_dataset
from moco.distributed import tensors_digest
from moco.training.checkpoint import read_torch_file

pytestmark = pytest.mark.faults
CONFIG = """
MODEL:
  DEVICE: cpu
  RESNETS: {{NORM: BN, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  BACKBONE: {{FREEZE_AT: 0}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 10}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm, NUM_CLASSES: 1, BATCH_SIZE_PER_IMAGE: 8}}
INPUT: {{MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}}
DATASETS: {{VOC_ROOT: "{root}", VOC_CLASSES: [circle], TRAIN: [train], TEST: [test]}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1,
          CHECKPOINT_PERIOD: 1, PROGRESS_PERIOD: 1}}
TEST: {{PRECISE_BN: {{ENABLED: True, NUM_ITER: 1}}}}
"""
TRIALS, ITERATIONS = 2, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    root = make_shapes_dataset(
        folder / "shapes", num_train=4, num_test=2, num_unlabelled=0, size=64, seed=0,
        class_names=("circle",),
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(CONFIG.format(root=root))
    return str(folder / "tiny.yaml")


def drive(config: str, out: Path, arm=None, *arguments) -> int:
    """`detection/train_net.py --trials 2` in a process of its own; its exit code."""
    process = SERVER.Process(target=_driver, args=(config, str(out), arm, arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the driver hangs"
    return process.exitcode


def _driver(config, out, arm, arguments) -> None:
    from detection import train_net

    os.makedirs(out, exist_ok=True)
    with open(f"{out}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if arm:
        arm(*arguments)
    words = ["--config-file", config, "--engine", "embedded", "--trials", str(TRIALS)]
    train_net.main([*words, "OUTPUT_DIR", out])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_rename(number: int, before: bool) -> None:
    """kill -9 just before or after the n-th file of the run gets its name."""
    replace, count = os.replace, [0]

    def counting(*paths, **options):
        count[0] += 1
        if count[0] == number and before:
            die()
        replace(*paths, **options)
        if count[0] == number:
            die()

    os.replace = counting


def die_at_iteration(number: int) -> None:
    from detection.engines.progress import Progress

    report, count = Progress.report, [0]

    def counting(self, *args):
        report(self, *args)
        count[0] += 1
        if count[0] == number:
            die()

    Progress.report = counting


def count_renames(path: str) -> None:
    replace = os.replace

    def counting(*paths, **options):
        with open(path, "a") as file:
            file.write(".")
        replace(*paths, **options)

    os.replace = counting


def outcome(out: Path) -> dict:
    """What results.json says, but the seconds, and the digests of the trained models."""
    content = json.loads((out / "results.json").read_text())
    for k, trial in enumerate(content["trials"]):
        trial.pop("seconds")
        own = json.loads((out / f"trial_{k}" / "result.json").read_text())
        own.pop("seconds")
        assert own == trial
    assert [trial["seed"] for trial in content["trials"]] == list(range(TRIALS))
    models = [read_torch_file(out / f"trial_{k}" / "model_final.pth") for k in range(TRIALS)]
    return {**content, "models": [tensors_digest(model["model"]) for model in models]}


def test_killed_at_20_points_the_driver_ends_with_the_same_mean(
    config, tmp_path, observed, long
):
    assert drive(config, tmp_path / "whole", count_renames, str(tmp_path / "count")) == 0
    wanted = outcome(tmp_path / "whole")
    num_renames = len((tmp_path / "count").read_text())
    assert num_renames >= 14
    rng = random.Random(0)
    points = [(die_at_iteration, n) for n in range(1, TRIALS * ITERATIONS + 1)]
    num_points = 60 if long else 20
    while len(points) < num_points:
        points.append((die_at_rename, rng.randint(1, num_renames), rng.random() < 0.5))
    equal = 0
    for number, point in enumerate(points):
        out = tmp_path / f"out_{number}"
        assert drive(config, out, *point) == -signal.SIGKILL, point
        assert drive(config, out) == 0, (point, Path(f"{out}.log").read_text()[-2000:])
        equal += outcome(out) == wanted
    observed("R19", equal, len(points))


def fail_always(seed: int) -> None:
    from detection.engines.embedded.engine import EmbeddedEngine

    train = EmbeddedEngine.train

    def failing(self, run):
        if run.seed == seed:
            raise RuntimeError("this trial always fails")
        return train(self, run)

    EmbeddedEngine.train = failing


def test_a_trial_that_always_fails_is_listed_and_never_averaged(config, tmp_path, observed):
    for _ in range(2):
        assert drive(config, tmp_path / "out", fail_always, 1) != 0
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        assert (content["num_finished"], content["num_failed"]) == (1, 1)
        assert content["mean"]["AP"] == content["trials"][0]["AP"] and content["std"]["AP"] is None
        assert "always fails" in content["trials"][1]["error"]
    assert drive(config, tmp_path / "out") == 0
    assert outcome(tmp_path / "out")["num_finished"] == TRIALS
    observed("R19", 1, 1)


def slow_down() -> None:
    from detection.engines.progress import Progress

    report = Progress.report

    def slow(self, *args):
        report(self, *args)
        time.sleep(0.5)

    Progress.report = slow


def test_of_two_drivers_at_once_the_second_refuses(config, tmp_path, observed):
    out = tmp_path / "out"
    first = SERVER.Process(target=_driver, args=(config, str(out), slow_down, ()))
    first.start()
    deadline = time.monotonic() + 60
    while not (out / "trial_0").is_dir():
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    assert drive(config, out) == 2
    log = Path(f"{out}.log").read_text()
    assert f"in use by process {first.pid} on" in log
    first.join(120)
    assert first.exitcode == 0
    outcome(out)
    observed("R19", 1, 1)


def forget_momentum() -> None:
    """A broken guard: a trial goes on from its checkpoint without the optimizer's state."""
    from detection.engines.embedded import run_state

    read_state = run_state.read_state

    def forgetting(*args, **options):
        content = read_state(*args, **options)
        content["optimizer"]["state"] = {}
        return content

    run_state.read_state = forgetting


def test_control_a_trial_that_goes_on_without_its_momentum_is_noticed(config, tmp_path, observed):
    assert drive(config, tmp_path / "whole") == 0
    assert drive(config, tmp_path / "out", die_at_iteration, 2) == -signal.SIGKILL
    assert drive(config, tmp_path / "out", forget_momentum) == 0
    differs = outcome(tmp_path / "out") != outcome(tmp_path / "whole")
    observed("R19", int(differs), 1, control=True)
