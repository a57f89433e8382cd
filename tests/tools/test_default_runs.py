"""Every tool that takes a run, on what tools/pretrain.py and train_net.py leave by default."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
import torchvision
from default_runs import CLASSES, as_before, ended, pretrain, tool
from scripts import ROOT, load_tool

from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from moco.models.backbone import build_backbone
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


def features_of_the_detector(trial, image: torch.Tensor) -> torch.Tensor:
    """Of its backbone and res5, before the extra norm, averaged over the image."""
    model = build_model(load_detection_config(str(trial / "config.yaml"), ["MODEL.WEIGHTS", ""]))
    model.load_state_dict(read_torch_file(trial / "model_final.pth")["model"])
    model.eval()
    with torch.no_grad():
        x = image
        for child in (model.backbone, *model.roi_heads.res5.children()):
            if child is not model.roi_heads.res5.norm:
                x = child(x)
                x = x["res4"] if isinstance(x, dict) else x
        after_norm = model.roi_heads.res5.norm(x)
    assert not torch.allclose(after_norm, x)  # else the next line would prove nothing
    return x.mean((2, 3))


@pytest.mark.parametrize("kind", ["trial", "file"])
def test_a_detector_is_exported_with_its_own_features(default_runs, tmp_path, kind, capsys):
    trial = default_runs.trials / "trial_0"
    source = trial if kind == "trial" else trial / "model_final.pth"
    tool("export", source, tmp_path / "w.pth", "--format", "torchvision")
    printed = capsys.readouterr().out
    assert "(detectron2 layout, query encoder, resnet50)" in printed and "mapped: 265" in printed
    assert "norm after res5, which features do not pass" in printed
    record = read(tmp_path / "w.pth.export.json")
    assert record["pixels"]["std"] == pytest.approx([0.229, 0.224, 0.225], abs=1e-4)
    network = build_backbone("resnet50", num_classes=1, width=0.5).eval()
    network.load_state_dict({**network.state_dict(), **torch.load(tmp_path / "w.pth")})
    image = torch.randn(1, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = network.forward_features(image)
    wanted = features_of_the_detector(trial, image)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_converted_weights_and_detectors_are_sources_of_all_tools(default_runs, tmp_path):
    trial = default_runs.trials / "trial_0"
    tool("convert_to_d2", default_runs.converted, tmp_path / "again.pth")
    before, after = (read_torch_file(p)["model"] for p in (default_runs.converted,
                                                           tmp_path / "again.pth"))  # fmt: skip
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    tool("convert_to_d2", trial, tmp_path / "tuned.pth")
    tuned = read_torch_file(trial / "model_final.pth")["model"]
    given = read_torch_file(tmp_path / "tuned.pth")["model"]
    assert torch.equal(given["res5.2.conv3.weight"], tuned["roi_heads.res5.2.conv3.weight"])
    assert torch.equal(given["stem.conv1.weight"], tuned["backbone.stem.conv1.weight"])
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in "\n".join(
        read(tmp_path / "tuned.pth.conversion.json")["yaml"]
    )
    for weights in (default_runs.converted, trial):
        out = tmp_path / weights.name
        tool("evaluate_knn", "--weights", weights, "--data", default_runs.images, "--k", 3,
             "--output-dir", out, "--size", 32, "--num-workers", 0, "--device", "cpu")  # fmt: skip
        assert read(out / "results.json")["weights"]["layout"] == "detectron2"


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("MODEL.RESNETS.STRIDE_IN_1X1", "True", "the stride is in another convolution"),
        ("MODEL.RESNETS.RES5_DILATION", "2", "res5 is dilated"),
        ("INPUT.FORMAT", "BGR", "its images are BGR"),
    ],
)
def test_detectors_of_another_network_are_refused(default_runs, tmp_path, key, value, why, capsys):
    trial = tmp_path / "trial"
    shutil.copytree(default_runs.trials / "trial_0", trial)
    text, name = (trial / "config.yaml").read_text(), key.rpartition(".")[2]
    changed = re.sub(rf"\b{name}: \S+", f"{name}: {value}", text)
    assert changed != text
    (trial / "config.yaml").write_text(changed)
    words = (trial, tmp_path / "w.pth", "--format", "torchvision")
    assert ended(load_tool("export").main, *words) == 2
    error = capsys.readouterr().err
    assert f"config.yaml says {key}" in error and why in error and error.count("\n") == 1
    (trial / "config.yaml").unlink()
    tool("export", *words)
    assert "there is no config.yaml beside model_final.pth" in capsys.readouterr().out


def test_left_over_tensors_are_dropped_by_every_tool(default_runs, tmp_path, capsys):
    content = newest(default_runs.run)
    content["state_dict"]["module.ema.decay"] = torch.zeros(1)
    torch.save(content, tmp_path / "c.pth.tar")
    knn = ("--weights", tmp_path / "c.pth.tar", "--data", default_runs.images, "--k", 3,
           "--num-workers", 0, "--device", "cpu")  # fmt: skip
    export = (tmp_path / "c.pth.tar", tmp_path / "w.pth", "--format", "torchvision")
    convert = (tmp_path / "c.pth.tar", tmp_path / "d.pth")
    for name, words in (("evaluate_knn", knn), ("export", export), ("convert_to_d2", convert)):
        assert ended(load_tool(name).main, *words) == 2
        assert "add --drop ema" in capsys.readouterr().err
        tool(name, *words, "--drop", "ema")
    assert read(tmp_path / "w.pth.export.json")["dropped"]["--drop ema"] == ["module.ema.decay"]


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
