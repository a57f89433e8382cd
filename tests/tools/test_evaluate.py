"""The command lines of the evaluations: results, kills and stops, flags, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import linear_runs as runs
import pytest
from scripts import ROOT, load_tool

from detection.data.shapes import make_shapes_dataset
from moco.evaluation.config import load_linear_config

CONFIGS = ROOT / "configs" / "evaluation"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def call(tool, *arguments):
    """Exit code of a command line's main."""
    with pytest.raises(SystemExit) as ended:
        load_tool(tool).main([str(argument) for argument in arguments])
    return ended.value.code


def linear_arguments(images, weights, folder, *flags, **changes):
    return ["--config-file", CONFIGS / "imagenet_linear.yaml", "--weights", weights, "--data",
            images, "--output-dir", folder, "--device", "cpu", *flags,
            *runs.overrides(**changes)]  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    return runs.write_weights(tmp_path)


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_linear_classification(image_folder, weights, tmp_path, capsys):
    assert call("evaluate_linear", *linear_arguments(image_folder, weights, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "step 9/9 epoch 3/3 loss" in out and "img/s ETA" in out
    assert "top-1 100.00" in out and "backbone unchanged, 120 tensors bitwise" in out
    assert read(tmp_path / "run")["top1"] == 100
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 10))
    assert all(r["images_per_s"] > 0 for r in records if r["kind"] == "step")
    config = load_linear_config(str(tmp_path / "run" / "linear_config.yaml"))
    assert config == runs.config()
    again = call("evaluate_linear", *linear_arguments(image_folder, weights, tmp_path / "run"))
    assert again == 2 and "add --resume" in capsys.readouterr().err


def test_fine_tuning_with_few_labels_by_flags(image_folder, weights, tmp_path):
    arguments = linear_arguments(
        image_folder, weights, tmp_path / "run", "--finetune", "--labels-fraction", "0.75"
    )
    assert call("evaluate_linear", *arguments) == 0
    results = read(tmp_path / "run")
    assert results["engine"] == "fine-tuning" and results["num_train"] == 24
    names = tmp_path / "names.txt"
    names.write_text("a/00.png 0\nb/01.png 1\n")
    semi = [*linear_arguments(image_folder, weights, tmp_path / "list", "--labels-list", names)]
    semi[1] = CONFIGS / "imagenet_semi_1percent.yaml"  # whose fraction the list replaces
    assert call("evaluate_linear", *semi, "TRAIN.BATCH_SIZE", "2") == 0
    assert read(tmp_path / "list")["num_train"] == 2


def test_cached_features(image_folder, weights, tmp_path, capsys):
    arguments = linear_arguments(
        image_folder, weights, tmp_path / "run", "--cached-features", CACHED__LRS="(0.003, 0.03)"
    )
    assert call("evaluate_linear", *arguments) == 0
    assert "cached features, no augmentation: best of 2 settings" in capsys.readouterr().out
    assert "cached features, no augmentation" in read(tmp_path / "run")["protocol"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_stopped_in_the_middle_and_restarted_is_bit_identical(
    image_folder, weights, tmp_path, signum
):
    epochs = {"TRAIN__EPOCHS": 16, "EVAL__PERIOD": 8, "CHECKPOINT__KEEP_LAST": 2}
    last = "checkpoint_0015.pth.tar"
    whole = linear_arguments(image_folder, weights, tmp_path / "whole", **epochs)
    assert call("evaluate_linear", *whole) == 0
    cut = tmp_path / "cut"
    arguments = linear_arguments(
        image_folder, weights, cut, "--resume", DATA__NUM_WORKERS=1, **epochs
    )
    line = [sys.executable, str(ROOT / "tools/evaluate_linear.py"), *map(str, arguments)]
    process = subprocess.Popen(line, env=ENV, cwd="/", stdout=subprocess.PIPE, text=True)
    log = cut / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 10,' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + 15), output
    assert not (cut / last).exists()
    if signum == signal.SIGTERM:
        assert "checkpoint saved; continue with the same command and --resume" in output
    done = subprocess.run(line, env=ENV, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert runs.digest(cut, last) == runs.digest(tmp_path / "whole", last)
    assert read(cut)["curve"] == read(tmp_path / "whole")["curve"]


def test_torchrun_with_two_processes(image_folder, weights, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(ROOT / "tools/evaluate_linear.py"),
         *map(str, linear_arguments(image_folder, weights, tmp_path / "run"))],
        env=ENV, cwd="/", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert read(tmp_path / "run")["num_processes"] == 2


def test_knn(image_folder, weights, tmp_path, capsys):
    code = call(
        "evaluate_knn", "--weights", weights, "--data", image_folder, "--output-dir", tmp_path,
        "--k", "5", "1", "--temperature", "0.1", "0.5", "--features", "head", "--size", "16",
        "--num-workers", "0", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "kNN on head features" in out and "memory beside the network" in out
    assert out.count("  top-1 ") == 4
    assert len(read(tmp_path)["sweep"]) == 4 and read(tmp_path)["features"] == "head"


def test_svm(weights, tmp_path, capsys):
    pytest.importorskip("sklearn")
    make_shapes_dataset(
        tmp_path / "voc", num_train=24, num_test=12, num_unlabelled=0, size=48, seed=0
    )
    arguments = ["--weights", weights, "--voc-root", tmp_path / "voc", "--train-split", "train",
                 "--output-dir", tmp_path / "out", "--size", "32", "--num-workers", "0",
                 "--num-jobs", "1", "--costs", "0.1", "1", "--device", "cpu"]  # fmt: skip
    classes = ["--classes", "circle", "square", "triangle", "cross"]
    assert call("evaluate_svm", *arguments, *classes) == 0
    results = read(tmp_path / "out")
    assert results["num_train"] == 24 and results["num_features"] == 4 * 64
    aps = [c["ap"] for c in results["per_class"]]
    assert results["mAP"] == pytest.approx(sum(aps) / 4) and min(aps) > 0
    assert "scikit-learn" in results["versions"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| triangle | " in text and "11 points of VOC 2007" in text
    capsys.readouterr()
    assert call("evaluate_svm", *arguments, "--classes", "circle") == 2
    assert "allowed: circle" in capsys.readouterr().err
    assert call("evaluate_svm", *arguments, *classes, "--grid", "9") == 2
    assert "--grid 9: the last feature map has 4 x 4" in capsys.readouterr().err


def test_voc_labels_of_difficult_objects(tmp_path):
    """1 where an object counts, -1 where all of them are difficult, else 0."""
    make_shapes_dataset(
        tmp_path / "voc", num_train=12, num_test=2, num_unlabelled=0, size=48, seed=0
    )
    classes = ("circle", "square", "triangle", "cross")
    tool = load_tool("evaluate_svm")
    source, before = tool.read_split(str(tmp_path / "voc"), "train", classes)
    assert len(source) == 12 and set(before.flatten().tolist()) == {0, 1}
    for row, path in zip(before, source.paths, strict=True):
        xml = tmp_path / "voc" / "Annotations" / (path.rpartition(".")[0] + ".xml")
        text = xml.read_text()
        assert [int(f"<name>{name}</name>" in text) for name in classes] == row.tolist()
        xml.write_text(text.replace("<difficult>0<", "<difficult>1<"))
    _, after = tool.read_split(str(tmp_path / "voc"), "train", classes)
    assert (after == -before).all()


@pytest.mark.parametrize(
    "tool, arguments, message",
    [
        ("evaluate_linear", ["--config-file", CONFIGS / "imagenet_linear.yaml", "--weights",
                             "none.pth", "--data", ".", "--output-dir", "x"], "no such file"),
        ("evaluate_linear", ["--config-file", "none.yaml", "--weights", "x", "--data", ".",
                             "--output-dir", "x"], "none.yaml"),
        ("evaluate_knn", ["--weights", "none.pth", "--data", "."], "no such file"),
        ("evaluate_svm", ["--weights", "none.pth", "--voc-root", "none"], "folder is missing"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_line(tool, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(tool, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_file_loads_and_heads_with_its_command(path):
    load_linear_config(str(path))
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("tools/evaluate_linear.py" in line for line in comment)
    assert any(path.name in line for line in comment)
    assert any("ublished" in line or "eported" in line for line in comment)
