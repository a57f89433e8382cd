"""kNN of a data set: the accuracy of extracted features, its view, files and refusals."""

from __future__ import annotations

import json

import linear_runs as runs
import pytest
import tiny
import torch

from moco.data.images import find_images
from moco.data.loader import build_eval_loader
from moco.errors import CheckpointError, ConfigError
from moco.evaluation.features import extract_features
from moco.evaluation.knn import knn_accuracy
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn
from moco.evaluation.monitor import build_knn_monitor
from moco.evaluation.weights import read_pretrained
from moco.training.trainer import Trainer


def settings(**changes):
    return KnnSettings(**{"ks": (5, 1, 32), "temperatures": (0.1, 0.5), "size": 16, **changes})


def evaluate(images, weights, folder=None, said=None, **changes):
    return evaluate_knn(
        settings(**changes), weights, str(images), folder, tiny.alone(), batch_size=5,
        num_workers=0, say=(said if said is not None else []).append,
    )  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    return runs.write_weights(tmp_path)


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
    from PIL import Image

    base = tmp_path_factory.mktemp("knn")
    draws = torch.Generator().manual_seed(0)
    for split, per_class in (("train", 16), ("test", 10)):
        for name in ("a", "b"):
            (base / "images" / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.randint(0, 256, (20, 20, 3), generator=draws, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(base / "images" / split / name / f"{i}.png")
    cfg = tiny.config(TRAIN__EPOCHS=1)
    trainer = Trainer(
        cfg, find_images(base / "images"), base / "run", tiny.alone(), say=lambda line: None
    )
    trainer.train()
    return base / "images", str(base / "run"), cfg, trainer


@pytest.mark.parametrize("features", ["backbone", "head"])
def test_it_is_knn_on_the_extracted_features(pretrained_run, features):
    images, run, cfg, trainer = pretrained_run
    results = evaluate(images, run, features=features, size=None)
    encoder = trainer.method.transfer_encoder().eval()
    encode = encoder if features == "head" else encoder.forward_features
    sets = [
        extract_features(
            encode, build_eval_loader(find_images(images / split), 16, 7, 0, resize=16), "cpu",
            cfg.DATA.MEAN, cfg.DATA.STD,
        )
        for split in ("train", "test")
    ]  # fmt: skip
    for row in results["sweep"]:
        expected = knn_accuracy(
            *sets[0], *sets[1], k=row["k"], temperature=row["temperature"], num_classes=2
        )
        assert row["top1"] == expected
    assert results["features"] == features
    assert results["num_features"] == {"backbone": 64, "head": 8}[features]
    assert (results["k"], results["temperature"]) == (5, 0.1)
    assert results["top1"] == results["sweep"][0]["top1"]
    assert results["best"]["top1"] == max(row["top1"] for row in results["sweep"])


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_it_is_the_trainings_monitor(pretrained_run, backend):
    images, run, cfg, trainer = pretrained_run
    cfg = tiny.config(AUGMENT__BACKEND=backend)
    monitor = build_knn_monitor(
        cfg, str(images), find_images(images), tiny.alone(), lambda line: None
    )
    expected = monitor(trainer.method.transfer_encoder())["knn_top1"]
    results = evaluate(
        images, run, ks=(cfg.KNN.K,), temperatures=(cfg.KNN.TEMPERATURE,), size=None,
        backend=backend,
    )  # fmt: skip
    assert results["top1"] == expected


def test_files_and_lines(image_folder, weights, tmp_path):
    said = []
    results = evaluate(image_folder, weights, tmp_path / "out", said=said)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert results["top1"] == 100  # red against blue
    text = (tmp_path / "out" / "results.md").read_text()
    assert "on **backbone** features (64 of them)" in text and "| 32 | " in text
    assert any("memory beside the network" in line and "at once" in line for line in said)
    memory = results["memory"]
    assert memory["peak_rss_bytes"] > 2**20 and memory["peak_gpu_bytes"] is None
    assert memory["computed_bytes"]["neighbours"] == 8 * 32 * 12


def test_reduced_precision_keeps_the_result(image_folder, weights):
    for changes in (
        {"dtype": "float16"}, {"amp": True, "channels_last": True}, {"backend": "opencv"},
    ):  # fmt: skip
        assert evaluate(image_folder, weights, **changes)["top1"] == 100


def test_the_batch_size_changes_nothing(pretrained_run):
    images, run, *_ = pretrained_run
    one = evaluate(images, run)
    other = evaluate_knn(
        settings(), run, str(images), None, tiny.alone(), batch_size=64, num_workers=1,
        say=lambda line: None,
    )  # fmt: skip
    assert one["sweep"] == other["sweep"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ks": (33,)}, "k is 33; allowed: 1 to 32"),
        ({"ks": ()}, "at least one k"),
        ({"temperatures": (0.1, 0.0)}, "temperature is 0.0"),
        ({"features": "neck"}, "features is 'neck'; allowed: backbone, head"),
    ],
)
def test_wrong_settings_are_refused(image_folder, weights, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(image_folder, weights, **changes)


def test_a_file_without_head_has_no_head_features(image_folder, tmp_path):
    path = runs.write_weights(tmp_path)
    content = torch.load(path, weights_only=True)
    kept = {n: t for n, t in content["state_dict"].items() if ".fc." not in n}
    torch.save({**content, "state_dict": kept}, path)
    assert read_pretrained(path).head == {}
    with pytest.raises(CheckpointError, match="holds no projection head"):
        evaluate(image_folder, path, features="head")
