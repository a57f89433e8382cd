"""Every tool that takes a run, on what tools/pretrain.py and train_net.py leave by default."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
import torchvision
from default_runs import CLASSES, as_before, pretrain, tool
from scripts import ROOT

from moco.training.checkpoint import latest_verified, read_torch_file
from moco.training.layouts import read_backbone


def newest(run) -> dict:
    return read_torch_file(latest_verified(run)[0])


def read(path) -> dict:
    return json.loads(path.read_text())


def test_the_run_is_as_a_user_has_it(default_runs):
    train = newest(default_runs.run)["extra"]["config"]["TRAIN"]
    assert (train["REFERENCE"], train["AMP"], train["CHANNELS_LAST"]) == (False, True, True)
    assert train["COMPILE"] == "kernels"


@pytest.mark.parametrize("encoder", ["query", "key"])
def test_export(default_runs, tmp_path, encoder):
    """A narrow network is for this project's class; its file holds the encoder's tensors."""
    wanted = read_backbone(newest(default_runs.run), encoder=encoder).state
    for form, suffix in (("torchvision", "pth"), ("safetensors", "safetensors")):
        out = tmp_path / f"w.{suffix}"
        tool("export", default_runs.run, out, "--format", form, "--encoder", encoder)
        load = torch.load if suffix == "pth" else safetensors.torch.load_file
        found = load(out)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_export_for_torchvision(default_runs, tmp_path):
    """Of full width, so torchvision's own network is what is checked and loaded."""
    run = pretrain(default_runs.images, tmp_path / "run", "MODEL.ARCH", "resnet18",
                   "TRAIN.EPOCHS", 1, "KNN.PERIOD", 0)  # fmt: skip
    for form in ("torchvision", "timm"):
        tool("export", run, tmp_path / f"{form}.pth", "--format", form)
        check = read(tmp_path / f"{form}.pth.export.json")["self_check"]
        assert check["bitwise_equal"] and check["file_network"].endswith(".resnet.ResNet")
    network = torchvision.models.resnet18()
    absent = network.load_state_dict(torch.load(tmp_path / "torchvision.pth"), strict=False)
    assert absent.missing_keys == ["fc.weight", "fc.bias"] and not absent.unexpected_keys


def test_an_older_runs_checkpoint_is_exported_too(default_runs, tmp_path):
    """Channels last in the file."""
    torch.save(as_before(newest(default_runs.run)), tmp_path / "old.pth.tar")
    tool("export", tmp_path / "old.pth.tar", tmp_path / "old.pth", "--format", "torchvision")
    tool("export", default_runs.run, tmp_path / "new.pth", "--format", "torchvision")
    assert (tmp_path / "old.pth").read_bytes() == (tmp_path / "new.pth").read_bytes()


def test_the_converter(default_runs, tmp_path):
    record = read(default_runs.converted.with_name("moco.pth.conversion.json"))
    assert record["num_mapped"] == 265 and record["self_check"]["max_relative_difference"] < 1e-5
    tool("convert_to_d2", default_runs.run, tmp_path / "w.pkl", "--encoder", "key")
    assert read(tmp_path / "w.pkl.conversion.json")["encoder"] == "key"


def test_nearest_neighbours(default_runs, tmp_path):
    tool("evaluate_knn", "--weights", default_runs.run, "--data", default_runs.images,
         "--output-dir", tmp_path, "--k", 3, "--num-workers", 0, "--device", "cpu")  # fmt: skip
    tool("evaluate_knn", "--weights", default_runs.run, "--data", default_runs.images,
         "--k", 3, "--features", "head", "--amp", "--channels-last", "--num-workers", 0,
         "--device", "cpu")  # fmt: skip
    assert read(tmp_path / "results.json")["num_train"] == 16


@pytest.mark.parametrize("flags", [(), ("--finetune",), ("--cached-features",)])
def test_linear_classification(default_runs, tmp_path, flags):
    tool(
        "evaluate_linear", "--config-file", ROOT / "configs/evaluation/imagenet_linear.yaml",
        "--weights", default_runs.run, "--data", default_runs.images, "--output-dir", tmp_path,
        "--device", "cpu", *flags, "DATA.SIZE", 32, "DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 1,
        "TRAIN.BATCH_SIZE", 8, "TRAIN.AMP", True, "TRAIN.CHANNELS_LAST", True,
    )  # fmt: skip
    assert read(tmp_path / "results.json")["status"] == "finished"


def test_svm(default_runs, tmp_path):
    pytest.importorskip("sklearn")
    tool(
        "evaluate_svm", "--weights", default_runs.run, "--voc-root", default_runs.voc,
        "--train-split", "train", "--classes", *CLASSES, "--output-dir", tmp_path, "--size", 64,
        "--num-workers", 0, "--num-jobs", 1, "--costs", 1, "--device", "cpu",
    )  # fmt: skip
    assert read(tmp_path / "results.json")["num_train"] == 12


def test_report(default_runs, tmp_path):
    tool("report", default_runs.run, default_runs.trials, "--data", default_runs.images / "train",
         "--output-dir", tmp_path)  # fmt: skip
    assert "Nearest neighbours" in (tmp_path / "report.html").read_text()


def test_prediction(default_runs, tmp_path):
    tool("predict", default_runs.trials / "trial_0", default_runs.voc / "JPEGImages",
         "--output-dir", tmp_path, "--threshold", 0, "--device", "cpu")  # fmt: skip
    assert len(read(tmp_path / "detections.json")["images"]) == 16


def test_comparison_of_trials(default_runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(default_runs.trials, other)
    tool("compare_trials", default_runs.trials, other, "--output", tmp_path / "c.json")
    assert read(tmp_path / "c.json")["method"] == "paired t"


def test_a_study(default_runs, tmp_path):
    """Its runs are the defaults', its kNN reads their checkpoints."""
    (tmp_path / "study.yaml").write_text(
        f"TITLE: two temperatures\nSOURCE: nowhere\n"
        f"CONFIG: {ROOT / 'configs/pretrain/moco_v2_200ep.yaml'}\n"
        "RUNS:\n- {NAME: tau, SET: {MOCO.TEMPERATURE: 0.1}, PUBLISHED: {top-1: 60.7}}\n"
    )
    tool(
        "study", "--study", tmp_path / "study.yaml", "--data", default_runs.images, "--output-dir",
        tmp_path / "out", "--device", "cpu", "MODEL.WIDTH", 0.5, "MODEL.BN_SPLITS", 2,
        "MOCO.QUEUE_SIZE", 16, "DATA.SIZE", 32, "DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 1,
        "TRAIN.BATCH_SIZE", 8, "KNN.K", 5,
    )  # fmt: skip
    assert (tmp_path / "out" / "tau" / "seed_0" / "result.json").is_file()
