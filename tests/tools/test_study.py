"""tools/study.py: what it plans, runs, resumes after a kill, and prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from scripts import ROOT, load_tool

from detection import train_net
from moco.errors import CheckpointError, ConfigError
from moco.studies import cost, plan, run, table
from moco.training.run_lock import RunLock

study_tool = load_tool("study")
STUDY = """
TITLE: tiny temperatures
SOURCE: nowhere
CONFIG: base.yaml
RUNS:
- {NAME: tau 0.1, SET: {MOCO.TEMPERATURE: 0.1}, PUBLISHED: {top-1: 60.7}}
- {NAME: "tau 0.2, twice", SET: {MOCO.TEMPERATURE: 0.2, TRAIN.EPOCHS: {times: 2}}}
"""


@pytest.fixture
def study_file(tmp_path):
    lines = ["METHOD: moco"]
    (tmp_path / "base.yaml").write_text("\n".join(lines))
    (tmp_path / "study.yaml").write_text(STUDY)
    return str(tmp_path / "study.yaml")


def words(**changes):
    return tiny.overrides(TRAIN__EPOCHS=1, KNN__PERIOD=0, **changes)


def command(study_file, data, out, *flags, **changes):
    where = ["--study", study_file, "--data", str(data), "--output-dir", str(out)]
    return [*where, "--device", "cpu", *flags, *words(**changes)]


def status(argv):
    with pytest.raises(SystemExit) as end:
        study_tool.main(argv)
    return end.value.code


def digests(out):
    files = sorted(out.glob("*/seed_*/pretrain/checkpoint_*.pth.tar"))
    from moco.training.checkpoint import read_torch_file

    return {str(f.relative_to(out)): tiny.state_digest(read_torch_file(f)) for f in files}


def test_runs_are_rows_times_seeds_with_the_keys_that_differ(study_file):
    study = plan.load_study(study_file)
    runs = plan.plan_runs(study, [0, 3], words())
    assert [(r.row, r.seed) for r in runs] == [
        ("tau 0.1", 0), ("tau 0.2, twice", 0), ("tau 0.1", 3), ("tau 0.2, twice", 3),
    ]  # fmt: skip
    assert [r.cfg.MOCO.TEMPERATURE for r in runs] == [0.1, 0.2] * 2
    assert [r.cfg.TRAIN.EPOCHS for r in runs] == [1, 2] * 2
    assert [r.cfg.SEED for r in runs] == [0, 0, 3, 3]
    assert runs[1].folder == "tau_0.2_twice/seed_0"
    assert len({r.digest for r in runs}) == 4


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("RUNS:", "RUN:", "unknown key 'RUN'"),
        ("NAME: tau 0.1,", "NAMES: tau 0.1,", "RUNS[0]: unknown key 'NAMES'"),
        ("{times: 2}", "{time: 2}", "allowed: a value, or {times: NUMBER}"),
        ("MOCO.TEMPERATURE: 0.1", "MOCO.TEMPERATUR: 0.1", "did you mean 'TEMPERATURE'?"),
        ("top-1: 60.7", "top-1: high", "numbers are needed"),
        ('"tau 0.2, twice"', "Tau 0.1", "two runs are named like"),
    ],
)
def test_a_mistake_in_the_file_is_named(study_file, tmp_path, old, new, message):
    text = (tmp_path / "study.yaml").read_text()
    assert old in text
    (tmp_path / "study.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        plan.plan_runs(plan.load_study(study_file), [0], words())
    assert message in str(error.value)


def test_a_key_that_the_study_varies_cannot_be_overridden(study_file):
    with pytest.raises(ConfigError, match=r"MOCO.TEMPERATURE is set by the study itself"):
        plan.plan_runs(plan.load_study(study_file), [0], words(MOCO__TEMPERATURE=0.5))


def test_the_projects_own_studies_are_valid():
    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        study = plan.load_study(str(path))
        runs = plan.plan_runs(study, [0], [])
        assert len(runs) == len(study.rows) >= 2, path


def stage_commands(study_file, tmp_path, *flags):
    """name of a stage -> its command line."""
    args = study_tool.parse_args(
        ["--study", study_file, "--data", "images", "--output-dir", str(tmp_path / "out"),
         "--linear", "linear.yaml", "--detection", "detection.yaml", *flags]
    )  # fmt: skip
    [first, _] = plan.plan_runs(plan.load_study(study_file), [0], words())
    stages = study_tool._stages(args, "base.yaml", first, tmp_path)
    return {stage.name: " ".join(stage.command) for stage in stages}


def test_every_stage_gets_the_device_and_the_processes(study_file, tmp_path, monkeypatch):
    commands = stage_commands(study_file, tmp_path, "--device", "cpu", "--processes", "2")
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 "
    for name in ("pretrain", "linear"):
        assert commands[name].startswith(f"{launch}{ROOT}/tools/")
        assert "--device cpu" in commands[name]
    assert "--device cpu --num-gpus 1 MODEL.WEIGHTS" in commands["detection"]
    assert "torch.distributed.run" not in commands["convert"] + commands["detection"]
    alone = stage_commands(study_file, tmp_path)
    assert not any("torch.distributed.run" in command for command in alone.values())
    assert "--device auto --num-gpus 1 MODEL.WEIGHTS" in alone["detection"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpus = stage_commands(study_file, tmp_path, "--device", "cuda", "--processes", "8")
    assert "--device cuda --num-gpus 8 MODEL.WEIGHTS" in on_gpus["detection"]
    assert "--device cuda" in on_gpus["linear"] and "--device cuda" in on_gpus["pretrain"]
    words_ = alone["detection"].split()[2:]
    parsed = train_net.parse_args(words_)
    assert (parsed.trials, parsed.device, parsed.overrides[0]) == (5, "auto", "MODEL.WEIGHTS")


def wait_for_the_lock(folder):
    deadline = time.monotonic() + 60
    while True:
        lock = RunLock(folder)
        try:
            return lock.acquire()
        except CheckpointError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            lock.release()


def test_a_study_killed_and_repeated_ends_as_one_that_was_not(study_file, image_folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert status(command(study_file, image_folder, whole)) == 0
    argv = command(study_file, image_folder, cut)
    script = [sys.executable, str(ROOT / "tools" / "study.py"), *argv]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, start_new_session=True)
    log = cut / "tau_0.2_twice" / "seed_0" / "pretrain" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_the_lock(log.parent)  # the run itself, in a session of its own, saves
    assert not (cut / "tau_0.2_twice" / "seed_0" / "result.json").exists()
    assert status(argv) == 0
    assert digests(cut) == digests(whole) and len(digests(whole)) == 2
    ours, other = (json.loads((d / "results.json").read_text()) for d in (cut, whole))
    for row, same in zip(ours["rows"], other["rows"], strict=True):
        assert row["figures"]["loss"]["values"] == same["figures"]["loss"]["values"]
        assert row["finished"] == row["planned"] == 1


def test_a_failed_run_stops_no_other_and_is_never_averaged(study_file, image_folder, tmp_path):
    out = tmp_path / "out"
    # A file in the way of the second run's folder.
    (out / "tau_0.2_twice" / "seed_0").mkdir(parents=True)
    (out / "tau_0.2_twice" / "seed_0" / "pretrain").write_text("in the way")
    assert status(command(study_file, image_folder, out)) == 1
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["finished"] for row in rows] == [1, 0]
    assert "pretrain ended with exit code" in rows[1]["errors"][0]
    text = (out / "results.md").read_text()
    assert "| tau 0.2, twice | 0 of 1, 1 failed | missing |" in text
    assert "| 60.70 |" in text and "Failed: tau 0.2, twice" in text
    # Mended, the same command runs only what failed.
    (out / "tau_0.2_twice" / "seed_0" / "pretrain").unlink()
    before = (out / "tau_0.1" / "seed_0" / "result.json").stat().st_mtime_ns
    assert status(command(study_file, image_folder, out)) == 0
    assert (out / "tau_0.1" / "seed_0" / "result.json").stat().st_mtime_ns == before


def test_missing_runs_are_shown_and_an_index_runs_one(study_file, image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert status(command(study_file, image_folder, out, "--seeds", "0", "1", "--index", "2")) == 0
    text = (out / "results.md").read_text()
    assert "| tau 0.1 | 1 of 2 |" in text and "| tau 0.2, twice | 0 of 2 |" in text
    assert status(command(study_file, image_folder, out, "--index", "9")) == 2
    assert "--index 9: allowed are 0 to 1" in capsys.readouterr().err


def test_a_result_of_another_configuration_is_refused(study_file, tmp_path):
    [first, _] = plan.plan_runs(plan.load_study(study_file), [0], words())
    (tmp_path / "result.json").write_text(json.dumps({"config_digest": "0", "stages": {}}))
    with pytest.raises(CheckpointError, match="result of another configuration"):
        run.finished_result(tmp_path, first, [])


def test_mean_and_std_by_hand(study_file, tmp_path):
    study = plan.load_study(study_file)
    runs = plan.plan_runs(study, [0, 1], words())
    for planned, accuracy in zip(runs, (30.0, 50.0, 34.0, None), strict=True):
        folder = tmp_path / "out" / planned.folder
        folder.mkdir(parents=True)
        if accuracy is not None:
            figures = {"knn_top1": accuracy, "loss": 1.0, "peak_rss_bytes": 2**30}
            content = {"config_digest": planned.digest, "stages": {"pretrain": figures}}
            (folder / "result.json").write_text(json.dumps(content))
    content = table.collect(study, runs, tmp_path / "out")
    knn = content["rows"][0]["figures"]["kNN top-1"]
    assert knn["mean"] == 32.0 and knn["std"] == pytest.approx(8**0.5)
    assert content["rows"][1]["figures"]["kNN top-1"]["std"] is None
    text = table.markdown(content, study.published_columns)
    assert "| tau 0.1 | 2 | 32.00 ± 2.83 | 1.00 ± 0.00 | 1.00 ± 0.00 | 60.70 |" in text
    assert "| tau 0.2, twice | 1 of 2 | 50.00 | 1.00 | 1.00 |  |" in text


def test_the_cost_of_rows_at_equal_batches(study_file, image_folder, tmp_path):
    out = tmp_path / "out"
    flags = ("--cost", "--batches", "8", "--steps", "2", "--memory-limit", "4")
    assert status(command(study_file, image_folder, out, *flags)) == 0
    content = json.loads((out / "costs.json").read_text())
    for row in content["rows"]:
        assert [c["batch"] for c in row["costs"]] == [8]
        assert all(c["seconds"] > 0 and c["gib"] > 0 for c in row["costs"])
    assert "| tau 0.1 |" in (out / "costs.md").read_text()
    assert status(command(study_file, image_folder, out, "--cost")) == 2


def test_where_memory_ends_by_hand():
    costs = [{"batch": 8, "gib": 1.0}, {"batch": 16, "gib": 2.0}, {"batch": 32, "error": "none"}]
    assert cost.last_batch(costs, 10.0) == 80  # an eighth of a GiB an image
    assert cost.last_batch(costs[:1], 10.0) is None
    assert cost.last_batch(costs, 0.01) == 0  # not even the weights
    row = {"name": "A", "published": {"GB": 5.0}, "last_batch": 80,
           "costs": [{"batch": 8, "seconds": 0.5, "gib": 1.0}]}  # fmt: skip
    other = {**row, "name": "B", "costs": [{"batch": 8, "seconds": 1.0, "gib": 1.5}]}
    text = cost.markdown({"title": "t", "source": "s", "device": "cpu", "num_steps": 2,
                          "memory_limit_gib": 10, "rows": [row, other]})  # fmt: skip
    assert "| A | 0.500 (1.00) | 1.00 (1.00) | 80 | 5.0 |" in text
    assert "| B | 1.000 (2.00) | 1.50 (1.50) | 80 | 5.0 |" in text


def test_a_study_with_linear_classification(study_file, image_folder, tmp_path):
    config = tmp_path / "linear.yaml"
    config.write_text("DATA: {SIZE: 16, NUM_WORKERS: 0}\nTRAIN: {EPOCHS: 1, BATCH_SIZE: 8}\n")
    out = tmp_path / "out"
    flags = ("--linear", str(config), "--index", "0")
    assert status(command(study_file, image_folder, out, *flags)) == 0
    row = json.loads((out / "results.json").read_text())["rows"][0]
    own = json.loads((out / "tau_0.1" / "seed_0" / "linear" / "results.json").read_text())
    assert row["figures"]["linear top-1"]["values"] == [own["top1"]]
    assert status(command(study_file, image_folder, out, *flags)) == 0  # nothing is left to do
