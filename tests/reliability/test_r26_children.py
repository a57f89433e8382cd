"""R26: a tool that is told to end, or killed, leaves no process behind; what trained is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import linear_runs
import pytest
import tiny
from PIL import Image
from pretrain_runs import make_images
from processes import SERVER
from scripts import ROOT, load_tool

from detection.data.shapes import make_shapes_dataset
from moco.training.checkpoint import latest_verified

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc"),
]
MARK = "MOCO_TEST_CHILDREN"  # environment variable of everything that a tool starts
STEPS = 160
DETECTION = """
MODEL:
  DEVICE: cpu
  RESNETS: {NORM: BN, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}
  BACKBONE: {FREEZE_AT: 0}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 10}
  ROI_HEADS: {NAME: Res5ROIHeadsExtraNorm, NUM_CLASSES: 1, BATCH_SIZE_PER_IMAGE: 8}
INPUT: {MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}
DATASETS: {VOC_CLASSES: [circle], TRAIN: [train], TEST: [test]}
DATALOADER: {NUM_WORKERS: 1}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 50, STEPS: [2], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 1000, PROGRESS_PERIOD: 1}
TEST: {PRECISE_BN: {ENABLED: False}}
"""
STUDY = """
TITLE: tiny temperatures
SOURCE: nowhere
CONFIG: base.yaml
RUNS:
- {NAME: warm, SET: {MOCO.TEMPERATURE: 0.1}}
- {NAME: cool, SET: {MOCO.TEMPERATURE: 0.2}}
"""


class Tool:
    """A command line in a process of its own.

    Args:
        main: called with `words`; a name of a tool, or a function.
        arms: called before it: broken guards.
    """

    def __init__(self, main, words, log: Path, arms=()):
        self.mark, self.log = uuid.uuid4().hex, log
        words = [str(word) for word in words]
        self.process = SERVER.Process(target=_tool, args=(main, words, log, self.mark, arms))
        self.process.start()

    def left(self) -> list[str]:
        """Command lines of the processes that it has started and that still run."""
        return [" ".join(command) for command in _marked(self.mark).values()]

    def wait_until(self, is_so, timeout_s: float = 100) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline and self.process.is_alive(), self.log.read_text()
            time.sleep(0.02)

    def told(self, number: int) -> int:
        """Signal this process alone; its exit code."""
        os.kill(self.process.pid, number)
        return self.join()

    def join(self) -> int:
        self.process.join(100)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode

    def end(self) -> None:
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        for pid in _marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _tool(main, words, log, mark, arms) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ[MARK] = mark
    os.environ["OMP_NUM_THREADS"] = "1"
    for arm in arms:
        arm()
    if main == "train_net":
        from detection import train_net

        main = train_net.main
    elif isinstance(main, str):
        main = load_tool(main).main
    try:
        main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _marked(mark: str) -> dict[int, list[str]]:
    """pid -> command line of all living processes with the mark in their environment."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                if command:  # a zombie has none
                    found[int(folder.name)] = command.split("\0")
    return found


def gone_within(tool: Tool, seconds: float) -> bool:
    """Whether nothing is left after a moment, in which a killed tool's processes save."""
    deadline = time.monotonic() + seconds
    while tool.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    return tool.left() == []


@pytest.fixture
def start(tmp_path):
    """start(main, *words): a Tool; all are ended with the test."""
    tools = []

    def start_(main, *words, arms=()):
        tools.append(Tool(main, words, tmp_path / "log", arms))
        return tools[-1]

    yield start_
    for tool in tools:
        tool.end()


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def pretraining(images: Path, folder: Path) -> list:
    changes = {"TRAIN__EPOCHS": STEPS // 4, "CHECKPOINT__PERIOD": 1000, "KNN__PERIOD": 0,
               "DATA__NUM_WORKERS": 1}  # fmt: skip
    return ["--config-file", ROOT / "configs/pretrain/moco_v2_200ep.yaml", "--data", images,
            "--output-dir", folder, "--device", "cpu", "--resume",
            *tiny.overrides(**changes)]  # fmt: skip


def is_saved(folder: Path) -> bool:
    """Whether a step in the middle is."""
    path, manifest, _ = latest_verified(folder)
    return path is not None and 0 < manifest["step"] < STEPS


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return make_images(tmp_path / "images")


@pytest.fixture
def voc(tmp_path):
    return make_shapes_dataset(
        tmp_path / "voc", num_train=6, num_test=4, num_unlabelled=0, size=64, seed=0,
        class_names=("circle",),
    )  # fmt: skip


@pytest.fixture
def detection(voc, tmp_path):
    """Words of a detection run that trains for some seconds."""
    (tmp_path / "detection.yaml").write_text(DETECTION)
    return ["--config-file", tmp_path / "detection.yaml", "--engine", "embedded", "--device", "cpu",
            "DATASETS.VOC_ROOT", voc, "OUTPUT_DIR", tmp_path / "out"]  # fmt: skip


def demo_run(words: list[str]) -> None:
    """Two pretraining runs side by side, as the demo runs its two sets of trials."""
    from moco.errors import exit_on_error

    middle = len(words) // 2
    steps = [["tools/pretrain.py", *half] for half in (words[:middle], words[middle:])]
    exit_on_error(load_tool("demo").run)(*steps)


def test_the_demo(start, images, tmp_path, observed):
    runs = [tmp_path / "first", tmp_path / "second"]
    words = [word for run in runs for word in pretraining(images, run)]
    tool = start(demo_run, *words)
    tool.wait_until(lambda: all(lines(run / "log.jsonl") > 3 for run in runs))
    assert len(tool.left()) >= 2
    code = tool.told(signal.SIGTERM)
    good = [code == 143, tool.left() == [], *map(is_saved, runs)]
    assert "demo: stopped by SIGTERM; start the demo again" in tool.log.read_text()
    good.append(start(demo_run, *words).join() == 0)
    observed("R26", sum(good), len(good))


def study(images: Path, tmp_path: Path) -> list:
    (tmp_path / "base.yaml").write_text("METHOD: moco\n")
    (tmp_path / "study.yaml").write_text(STUDY)
    return ["--study", tmp_path / "study.yaml", "--data", images, "--output-dir",
            tmp_path / "study", "--device", "cpu", "--parallel", 2, *tiny.overrides(
                TRAIN__EPOCHS=STEPS // 4, CHECKPOINT__PERIOD=1000, KNN__PERIOD=0)]  # fmt: skip


def test_a_study_killed(start, images, tmp_path, observed):
    runs = [tmp_path / "study" / name / "seed_0" / "pretrain" for name in ("warm", "cool")]
    tool = start("study", *study(images, tmp_path))
    tool.wait_until(lambda: all(lines(run / "log.jsonl") > 3 for run in runs))
    good = [tool.told(signal.SIGKILL) == -9, gone_within(tool, 30), *map(is_saved, runs)]
    observed("R26", sum(good), len(good))


def test_parallel_trials(start, detection, tmp_path, observed):
    words = ["--trials", 2, "--trials-parallel", "--num-gpus", 2, *detection]
    trials = [tmp_path / "out" / f"trial_{k}" for k in range(2)]
    tool = start("train_net", *words)
    tool.wait_until(lambda: all(lines(trial / "metrics.json") > 1 for trial in trials))
    good = [tool.told(signal.SIGTERM) == 143, tool.left() == []]
    good += [len(list(trial.glob("model_*.pth"))) == 1 for trial in trials]
    good.append(start("train_net", *words).join() == 0)
    observed("R26", sum(good), len(good))


def test_processes_of_one_training(start, detection, tmp_path, observed):
    tool = start("train_net", "--num-gpus", 2, "--resume", *detection)
    tool.wait_until(lambda: lines(tmp_path / "out" / "metrics.json") > 1)
    good = [tool.told(signal.SIGINT) == 130, tool.left() == []]
    good.append(len(list((tmp_path / "out").glob("model_*.pth"))) == 1)
    assert "saved in" in tool.log.read_text()
    observed("R26", sum(good), len(good))


def svm(voc: Path, tmp_path: Path) -> list:
    costs = [0.001 * number for number in range(1, 20_000)]
    return ["--weights", linear_runs.write_weights(tmp_path), "--voc-root", voc, "--train-split",
            "train", "--classes", "circle", "--size", 32, "--num-workers", 0, "--num-jobs", 2,
            "--device", "cpu", "--costs", *costs]  # fmt: skip


def workers_of(tool: Tool, kind: str, num: int = 2) -> bool:
    return sum(kind in command for command in tool.left()) >= num


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_svms(start, voc, tmp_path, number, observed):
    pytest.importorskip("sklearn")
    tool = start("evaluate_svm", *svm(voc, tmp_path))
    tool.wait_until(lambda: workers_of(tool, "LokyProcess"))
    time.sleep(1)  # they compute
    code = tool.told(number)
    good = [code == (143 if number == signal.SIGTERM else -9), gone_within(tool, 5)]
    observed("R26", sum(good), len(good))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_packing(start, tmp_path, number, observed):
    folder = tmp_path / "large"
    folder.mkdir()
    Image.effect_noise((1200, 1200), 60).convert("RGB").save(folder / "0.png")
    for i in range(1, 200):
        os.link(folder / "0.png", folder / f"{i}.png")
    tool = start("pack_images", folder, tmp_path / "pack", "--workers", 2, "--resize", 600)
    tool.wait_until(lambda: workers_of(tool, "spawn_main"))
    code = tool.told(number)
    good = [code == (143 if number == signal.SIGTERM else -9), gone_within(tool, 5)]
    good.append((tmp_path / "pack.partial").exists() == (number == signal.SIGKILL))
    observed("R26", sum(good), len(good))


def test_a_benchmark(start, tmp_path, observed):
    words = ["--output", tmp_path / "out.json", "--processes", 2, "--arch", "resnet18", "--width",
             0.125, "--image-size", 32, "--queue", 64, "--steps", 100_000]  # fmt: skip
    tool = start("benchmark", "communication", *words)
    tool.wait_until(lambda: workers_of(tool, "spawn_main"))
    good = [tool.told(signal.SIGTERM) == 143, gone_within(tool, 5)]
    observed("R26", sum(good), len(good))


# Broken guards.


def default_signals() -> None:
    """A signal ends the tool itself, as it does by default; children are not bound to it."""
    from moco import child_processes, signals, slots
    from moco.evaluation import svm as svm_

    slots.caught_signals = lambda numbers: contextlib.nullcontext([])
    slots.bound_command = list
    signals.exit_on_signals = contextlib.nullcontext
    child_processes.end_with_parent = svm_.end_with_parent = lambda **given: None
    svm_._in_worker = unbound


def unbound(parent, *args):
    from moco.evaluation.svm import _cross_validate

    return _cross_validate(*args)


def sleepers(words: list[str]) -> None:
    from moco import slots

    def job(slot: int):
        sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
        yield slots.Command(sleeper, print, os.environ)

    slots.run_jobs([job, job], 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_control_without_the_guards_commands_are_left(start, number, observed):
    left = []
    for arms in ([], [default_signals]):
        tool = start(sleepers, arms=arms)
        tool.wait_until(partial(workers_of, tool, "time.sleep"))
        tool.told(number)
        left.append(0 if gone_within(tool, 5) else len(tool.left()))
    observed("R26", int(left == [0, 2]), 1, control=True)


def test_control_without_the_guards_svms_are_left(start, voc, tmp_path, observed):
    pytest.importorskip("sklearn")
    tool = start("evaluate_svm", *svm(voc, tmp_path), arms=[default_signals])
    tool.wait_until(lambda: workers_of(tool, "LokyProcess"))
    time.sleep(1)
    tool.told(signal.SIGTERM)
    observed("R26", int(not gone_within(tool, 5)), 1, control=True)
