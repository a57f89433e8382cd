"""Cached features: extracted once, in parts; the sweep is torch's SGD of each setting."""

from __future__ import annotations

import json

import linear_runs as runs
import pytest
import tiny
import torch
import torch.nn.functional as F

from moco.data.images import find_images
from moco.data.sampler import epoch_order
from moco.errors import CheckpointError, ConfigError
from moco.evaluation import cached
from moco.evaluation.cached import Setting, evaluate_cached, train_classifiers
from moco.evaluation.classifier import new_classifier
from moco.evaluation.feature_store import FeatureStore
from moco.evaluation.linear import learning_rate

SETTINGS = [Setting(0.5, 0.0), Setting(3.0, 0.0), Setting(0.5, 0.01), Setting(1e30, 0.0)]
CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path):
    return runs.write_weights(tmp_path)


def features(num, seed):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(num, 6, generator=draws), torch.randint(0, 3, (num,), generator=draws)


def one_by_torch(cfg, train, test, setting):
    """The same classifier by torch.optim.SGD, alone."""
    fc = new_classifier(6, 3, cfg.TRAIN.INIT_STD, cfg.SEED)
    optimizer = torch.optim.SGD(
        fc.parameters(), setting.lr, momentum=cfg.TRAIN.SGD_MOMENTUM,
        weight_decay=setting.weight_decay,
    )  # fmt: skip
    for epoch in range(cfg.TRAIN.EPOCHS):
        optimizer.param_groups[0]["lr"] = learning_rate(setting.lr, epoch, cfg.TRAIN)
        for index in epoch_order(len(train[0]), cfg.SEED, epoch).split(cfg.TRAIN.BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(fc(train[0][index]), train[1][index]).backward()
            optimizer.step()
    logits = fc(test[0])
    return F.cross_entropy(logits, test[1]).item(), (logits.argmax(1) == test[1]).float().mean()


@pytest.mark.parametrize("unit", [False, True])
def test_each_setting_is_torchs_sgd(unit):
    cfg = runs.config(CACHED__NORMALIZE=unit)
    train, test = features(41, 0), features(30, 1)
    found = train_classifiers(
        train, test, SETTINGS, cfg, num_classes=3, device=CPU, say=lambda line: None
    )
    if unit:
        train, test = ((F.normalize(x, dim=1), y) for x, y in (train, test))
    losses = []
    for setting, scores in zip(SETTINGS[:3], found, strict=False):
        loss, top1 = one_by_torch(cfg, train, test, setting)
        assert scores.loss == pytest.approx(loss, rel=1e-4)
        assert scores.top1 == pytest.approx(100 * top1.item())
        assert scores.num_images == 30
        losses.append(loss)
    assert len(set(losses)) == 3  # a negative control: the settings do differ


def test_a_setting_that_diverges_leaves_the_others_alone():
    cfg, train, test = runs.config(), features(41, 0), features(30, 1)
    with_it, without_it = (
        train_classifiers(
            train, test, settings, cfg, num_classes=3, device=CPU, say=lambda line: None
        )
        for settings in ([SETTINGS[0], Setting(1e38, 0.0)], SETTINGS[:1])
    )
    assert with_it[1] is None
    assert with_it[0].loss == pytest.approx(without_it[0].loss, rel=1e-5)


def evaluate(images, weights, folder, said=None, **changes):
    return evaluate_cached(
        runs.config(CACHED__LRS="(0.003, 0.0003)", TRAIN__EPOCHS=12, **changes), weights,
        str(images), folder,
        tiny.alone(), say=(said if said is not None else []).append,
    )  # fmt: skip


def test_the_results_say_what_they_are(image_folder, weights, tmp_path):
    results = evaluate(
        image_folder, weights, tmp_path / "run", CACHED__WEIGHT_DECAYS="(0.0, 0.1)"
    )
    assert "cached features, no augmentation" in results["protocol"]
    assert [(row["lr"], row["weight_decay"]) for row in results["sweep"]] == [
        (0.003, 0.0), (0.003, 0.1), (0.0003, 0.0), (0.0003, 0.1)]  # fmt: skip
    assert results["best"]["top1"] == results["top1"] > 80
    assert "best on the test images" in results["metric"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert "not comparable" in (tmp_path / "run" / "results.md").read_text()


def test_features_are_extracted_once(image_folder, weights, tmp_path, monkeypatch):
    first = evaluate(image_folder, weights, tmp_path / "run")
    monkeypatch.setattr("moco.evaluation.feature_store.iterate_features", None)
    again = evaluate(image_folder, weights, tmp_path / "run")
    assert again["sweep"] == first["sweep"]
    with pytest.raises(CheckpointError, match="features of other weights, images or settings"):
        evaluate(image_folder, weights, tmp_path / "run", DATA__SIZE=15)


def test_half_precision_features_take_half_the_bytes(image_folder, weights, tmp_path):
    sizes = {}
    for dtype in ("float32", "float16"):
        results = evaluate(image_folder, weights, tmp_path / dtype, CACHED__DTYPE=dtype)
        content = torch.load(tmp_path / dtype / "features" / "train_00000.pt", weights_only=True)
        sizes[dtype] = content["features"].nbytes
        assert results["feature_dtype"] == dtype and results["top1"] > 80
    assert sizes["float16"] * 2 == sizes["float32"]


def test_fine_tuning_is_refused(image_folder, weights, tmp_path):
    with pytest.raises(ConfigError, match="cannot be fine-tuned"):
        evaluate(image_folder, weights, tmp_path / "run", FINETUNE__ENABLED=True)


def encode(images):
    return images.flatten(1)[:, :7]


def filled(folder, source, **changes):
    store = FeatureStore(folder, "train", source, "id", part=10)
    store.fill(
        changes.pop("encode", encode), tiny.alone(), size=16, resize=None, batch_size=4,
        num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3, say=lambda line: None,
    )  # fmt: skip
    return store


def test_a_stopped_extraction_goes_on_with_the_missing_parts(image_folder, tmp_path):
    source = find_images(image_folder)
    whole = filled(tmp_path / "whole", source)
    assert whole.num_parts == 4 and whole.missing() == []
    calls = []

    def stopping(images):
        calls.append(len(images))
        if sum(calls) > 20:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cut", source, encode=stopping)
    cut = FeatureStore(tmp_path / "cut", "train", source, "id", part=10)
    assert cut.missing() == [2, 3]
    with open(cut.path(0), "r+b") as file:
        file.truncate(100)  # as by a full disk
    assert cut.missing() == [0, 2, 3]
    cut = filled(tmp_path / "cut", source)
    for a, b in zip(cut.load(), whole.load(), strict=True):
        assert torch.equal(a, b)
    features, labels = whole.load()
    assert features.shape == (32, 7) and labels.tolist() == list(source.labels)


def test_the_protocol_is_in_one_place():
    assert cached.PROTOCOL == "linear classification on cached features, no augmentation"
