"""Linear classification: what is trained, exact resume, the results, fine-tuning, refusals."""

from __future__ import annotations

import json
import signal

import linear_runs as runs
import pytest
import tiny
import torch
import torch.nn.functional as F

from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD
from moco.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from moco.evaluation import linear
from moco.evaluation.classifier import new_classifier
from moco.evaluation.config import load_linear_config
from moco.evaluation.linear import EvaluationStopped, evaluate_linear, learning_rate
from moco.training import checkpoint as ckpt

BACKBONE = ("conv1.weight", "layer4.1.bn2.running_mean", "layer2.0.bn1.num_batches_tracked")


@pytest.fixture
def weights(tmp_path):
    return runs.write_weights(tmp_path)


def evaluate(images, weights, folder, resume=False, said=None, **changes):
    return evaluate_linear(
        runs.config(**changes), weights, str(images), folder, tiny.alone(), resume=resume,
        say=(said if said is not None else []).append,
    )  # fmt: skip


def test_the_result_is_the_last_epoch_with_the_best_apart(image_folder, weights, tmp_path):
    results = evaluate(image_folder, weights, tmp_path / "run")
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    curve = results["curve"]
    assert [record["epoch"] for record in curve] == [1, 2, 3]
    assert [record["lr"] for record in curve] == pytest.approx([0.003, 0.003, 0.0003])
    assert results["top1"] == curve[-1]["top1"] and results["epoch"] == 3
    assert results["best"]["top1"] == max(record["top1"] for record in curve)
    assert results["top1"] > 80 and results["top5"] == 100  # red against blue noise
    assert results["num_train"] == 32 and results["num_test"] == 8 and results["num_classes"] == 2
    assert results["weights"]["arch"] == "resnet18" and len(results["weights"]["sha256"]) == 64
    assert results["backbone_unchanged"]["tensors"] == 120
    text = (tmp_path / "run" / "results.md").read_text()
    assert "last epoch" in text and "best epoch, by the test images" in text
    assert "120 of 120 tensors are bit for bit" in text


def test_the_curve_is_the_networks_accuracy(image_folder, weights, tmp_path):
    """Recomputed from the checkpoint by plain torch calls."""
    trainer = runs.trainer(image_folder, weights, tmp_path / "run")
    trainer.train()
    encoder = trainer.classifier.encoder
    logits, labels = [], []
    for images, label, _ in trainer._test_loader():
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
        logits.append(encoder((images / 255 - mean) / std).detach())
        labels.append(label)
    logits, labels = torch.cat(logits), torch.cat(labels)
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    last = trainer.progress.curve[-1]
    assert last["top1"] == pytest.approx(top1)
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_only_the_classifier_moves(image_folder, weights, tmp_path):
    trainer = runs.trainer(image_folder, weights, tmp_path / "run")
    before = {n: t.clone() for n, t in trainer.classifier.encoder.state_dict().items()}
    trainer.train()
    after = trainer.classifier.encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ["fc.weight", "fc.bias"]
    assert trainer.check_backbone()["tensors"] == len(before) - 2
    group = trainer.optimizer.param_groups[0]["params"]
    assert [p.shape for p in group] == [(2, 64), (2,)]


def test_the_classifiers_start():
    fc = new_classifier(512, 1000, 0.01, seed=0)
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert fc.weight.mean().abs().item() < 1e-4 and not fc.bias.any()
    assert torch.equal(fc.weight, new_classifier(512, 1000, 0.01, seed=0).weight)
    assert not torch.equal(fc.weight, new_classifier(512, 1000, 0.01, seed=1).weight)


def test_rates_of_the_reference_and_of_a_cosine():
    train = load_linear_config(None).TRAIN
    rates = [learning_rate(train.LR, epoch, train) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    train = load_linear_config(None, ["TRAIN.SCHEDULE", "cosine", "TRAIN.EPOCHS", "4"]).TRAIN
    rates = [learning_rate(2.0, epoch, train) for epoch in range(4)]
    assert rates == pytest.approx([2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5])


# Exact resume.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    import numpy as np
    from PIL import Image

    base, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    for split, per_class in (("train", 16), ("val", 4)):
        for name in ("a", "b"):
            (base / "images" / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / "images" / split / name / f"{i}.png")
    weights = runs.write_weights(base)
    expected = {}
    for finetune in (False, True):
        folder = base / f"whole {finetune}"
        trainer = runs.trainer(base / "images", weights, folder, FINETUNE__ENABLED=finetune)
        assert trainer.train() is None
        last = ckpt.latest_verified(folder)[0].name
        expected[finetune] = (last, runs.digest(folder, last))
    return base / "images", weights, expected


@pytest.mark.parametrize("finetune", [False, True], ids=["linear", "fine-tuning"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, stop, finetune):
    images, weights, expected = uninterrupted
    last, digest = expected[finetune]
    first = runs.trainer(images, weights, tmp_path, FINETUNE__ENABLED=finetune)
    assert first.train([tiny.StopAfter(stop)]) == signal.SIGTERM
    _, manifest, _ = ckpt.latest_verified(tmp_path)
    assert manifest["step"] == stop + 1  # the signal is seen at the end of the next step
    resumed = runs.trainer(
        images, weights, tmp_path, resume=True, FINETUNE__ENABLED=finetune,
        DATA__NUM_WORKERS=stop % 2,
    )  # fmt: skip
    assert resumed.progress.step == stop + 1 and resumed.train() is None
    assert runs.digest(tmp_path, last) == digest


def test_killed_and_resumed_from_an_epochs_end_equals_uninterrupted(uninterrupted, tmp_path):
    images, weights, expected = uninterrupted

    class Kill:
        def on_step(self, record):
            if record.step == 5:
                raise KeyboardInterrupt

        def on_epoch(self, record):
            pass

    with pytest.raises(KeyboardInterrupt):
        runs.trainer(images, weights, tmp_path).train([Kill()])
    resumed = runs.trainer(images, weights, tmp_path, resume=True)
    assert resumed.progress.step == 3 and len(resumed.progress.curve) == 1
    resumed.train()
    assert runs.digest(tmp_path) == expected[False][1]


def test_a_lost_momentum_buffer_would_be_noticed(uninterrupted, tmp_path):
    """Negative control of the resume tests."""
    images, weights, expected = uninterrupted
    runs.trainer(images, weights, tmp_path).train([tiny.StopAfter(4)])
    path, _, _ = ckpt.latest_verified(tmp_path)
    content = ckpt.read_torch_file(path)
    content["optimizer"]["state"] = {}
    ckpt.save_checkpoint(path, content, step=content["extra"]["step"])
    runs.trainer(images, weights, tmp_path, resume=True).train()
    assert runs.digest(tmp_path) != expected[False][1]


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    images, weights, expected = uninterrupted
    runs.trainer(images, weights, tmp_path, SEED=1).train()
    assert runs.digest(tmp_path) != expected[False][1]


def test_a_finished_run_is_not_done_again(uninterrupted, tmp_path, monkeypatch):
    images, weights, _ = uninterrupted
    results = evaluate(images, weights, tmp_path)
    monkeypatch.setattr(linear, "classify_step", None)
    said = []
    assert evaluate(images, weights, tmp_path, resume=True, said=said) == results
    assert "this run is finished" in said[-1]
    # Killed between the last checkpoint and the results.
    (tmp_path / "results.json").unlink()
    again = evaluate(images, weights, tmp_path, resume=True)
    assert (again["curve"], again["top1"]) == (results["curve"], results["top1"])


def test_a_stop_names_the_remedy(uninterrupted, tmp_path, monkeypatch):
    images, weights, expected = uninterrupted
    monkeypatch.setattr(linear, "JsonLog", lambda *a: Closing(tiny.StopAfter(4)))
    with pytest.raises(EvaluationStopped, match="stopped at step 5/9.*--resume") as caught:
        evaluate(images, weights, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    evaluate(images, weights, tmp_path, resume=True)
    assert runs.digest(tmp_path) == expected[False][1]


class Closing:
    def __init__(self, observer):
        self.on_step, self.on_epoch = observer.on_step, observer.on_epoch

    def close(self):
        pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TRAIN__LR": 1.0}, r"another configuration \(TRAIN.LR 0.003 -> 1.0\)"),
        ({"DATA__LABELS_FRACTION": 0.5}, "another configuration .*LABELS_FRACTION"),
    ],
)
def test_another_run_is_not_continued(uninterrupted, tmp_path, changes, message):
    images, weights, _ = uninterrupted
    runs.trainer(images, weights, tmp_path).train([tiny.StopAfter(1)])
    with pytest.raises(CheckpointError, match="add --resume"):
        runs.trainer(images, weights, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        runs.trainer(images, weights, tmp_path, resume=True, **changes)


def test_other_weights_or_images_are_not_continued(uninterrupted, tmp_path):
    images, weights, _ = uninterrupted
    runs.trainer(images, weights, tmp_path / "run").train([tiny.StopAfter(1)])
    content = ckpt.read_torch_file(weights)
    content["state_dict"]["module.encoder_q.bn1.bias"] += 1
    torch.save(content, tmp_path / "other.pth.tar")
    with pytest.raises(CheckpointError, match="other pretrained weights"):
        runs.trainer(images, str(tmp_path / "other.pth.tar"), tmp_path / "run", resume=True)
    first = next((images / "val" / "a").iterdir())
    first.rename(first.with_name("new.png"))
    try:
        with pytest.raises(CheckpointError, match="other images"):
            runs.trainer(images, weights, tmp_path / "run", resume=True)
    finally:
        first.with_name("new.png").rename(first)


def test_a_pretraining_folder_is_not_continued(image_folder, weights, tmp_path):
    from moco.data.images import find_images
    from moco.training.trainer import Trainer

    folder = tmp_path / "run"
    Trainer(
        tiny.config(TRAIN__EPOCHS=1), find_images(image_folder), folder, tiny.alone(),
        say=lambda line: None,
    ).train()  # fmt: skip
    with pytest.raises(CheckpointError, match="no checkpoint of tools/evaluate_linear.py"):
        runs.trainer(image_folder, weights, folder, resume=True)
    assert (folder / "checkpoint_0000.pth.tar").is_file()


# Options.


def test_bfloat16_and_channels_last_change_features_only_slightly(image_folder, weights, tmp_path):
    plain = evaluate(image_folder, weights, tmp_path / "plain")
    for name, changes in {
        "channels_last": {"TRAIN__CHANNELS_LAST": True},
        "opencv": {"DATA__BACKEND": "opencv"},
        "bfloat16": {"TRAIN__AMP": True, "TRAIN__CHANNELS_LAST": True},
    }.items():
        fast = evaluate(image_folder, weights, tmp_path / name, **changes)
        assert fast["test_loss"] == pytest.approx(plain["test_loss"], rel=0.1)
        assert fast["backbone_unchanged"] == plain["backbone_unchanged"]
    assert fast["test_loss"] != plain["test_loss"]
    content = ckpt.read_torch_file(tmp_path / "bfloat16" / runs.LAST)
    assert content["state_dict"]["module.fc.weight"].dtype == torch.float32


def test_a_share_of_the_labels(image_folder, weights, tmp_path):
    results = evaluate(image_folder, weights, tmp_path / "run", DATA__LABELS_FRACTION=0.25)
    assert results["num_train"] == 8 and results["num_test"] == 8
    assert "25 % of the labels (seed 0)" in results["protocol"]
    names = tmp_path / "names.txt"
    names.write_text("a/00.png\nb/03.png\n")
    results = evaluate(image_folder, weights, tmp_path / "list", DATA__LABELS_LIST=names)
    assert results["num_train"] == 2 and str(names) in results["protocol"]


def test_fine_tuning_trains_the_backbone_at_its_own_rate(image_folder, weights, tmp_path):
    results = evaluate(
        image_folder, weights, tmp_path / "run", FINETUNE__ENABLED=True,
        FINETUNE__BACKBONE_LR=0.002, TRAIN__WEIGHT_DECAY=1e-4,
    )  # fmt: skip
    assert results["engine"] == "fine-tuning" and results["backbone_unchanged"] is None
    content = ckpt.read_torch_file(tmp_path / "run" / "checkpoint_0002.pth.tar")
    before = ckpt.read_torch_file(weights)["state_dict"]
    for name in BACKBONE:
        moved = content["state_dict"][f"module.{name}"]
        assert not torch.equal(moved, before[f"module.encoder_q.{name}"]), name
    rates = [group["lr"] for group in content["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.0002, 0.0003])  # of the last epoch
    assert content["extra"]["step"] == 2 * 3  # 32 images: two whole batches of 12


def test_evaluations_every_second_epoch_and_the_last(image_folder, weights, tmp_path):
    results = evaluate(image_folder, weights, tmp_path / "run", EVAL__PERIOD=2)
    assert [record["epoch"] for record in results["curve"]] == [2, 3]


def test_only_the_last_checkpoints_are_kept(image_folder, weights, tmp_path):
    evaluate(image_folder, weights, tmp_path / "run", CHECKPOINT__KEEP_LAST=2)
    names = {path.name for path in ckpt.checkpoint_files(tmp_path / "run")}
    assert names == {"checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar"}


def test_the_evaluated_network_is_a_weights_file_too(image_folder, weights, tmp_path):
    evaluate(image_folder, weights, tmp_path / "run")
    again = evaluate(image_folder, str(tmp_path / "run"), tmp_path / "again")
    assert again["weights"]["layout"] == "torchvision"
    assert again["curve"] == json.loads((tmp_path / "run/results.json").read_text())["curve"]


# Refusals.


def test_a_loss_that_is_not_finite_stops_before_the_update(image_folder, weights, tmp_path):
    trainer = runs.trainer(image_folder, weights, tmp_path / "run", TRAIN__LR=1e38)
    with pytest.raises(NonFiniteError, match=r"step \d: the loss is not finite .*Lower TRAIN.LR"):
        trainer.train()
    assert torch.isfinite(trainer.classifier.encoder.fc.weight).all()


def test_wrong_data_is_refused(image_folder, weights, tmp_path):
    with pytest.raises(DataError, match="has no folder val or test"):
        evaluate(image_folder / "train" / "a", weights, tmp_path / "run")
    (image_folder / "test" / "b").rename(image_folder / "test" / "c")
    found = r"class folders differ .*\(missing in test: b; only in test: c\)"
    with pytest.raises(DataError, match=found):
        evaluate(image_folder, weights, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


@pytest.mark.parametrize(
    "words, message",
    [
        (["TRAIN.LR", "0.0"], "TRAIN.LR is 0.0"),
        (["TRAIN.SCHEDULE", "linear"], "allowed: step, cosine"),
        (["DATA.RESIZE", "100"], r"DATA.RESIZE is 100; allowed: 0, or DATA.SIZE \(224\) or more"),
        (["CACHED.LRS", "(1.0, -1.0)"], "CACHED.LRS"),
        (["DATA.LABELS_LIST", "x", "DATA.LABELS_FRACTION", "0.5"], "together with"),
        (["DATA.MEAN", "(0.5, 0.5)"], r"a number for each channel, or \(\)"),
        (["TRAIN.EPOCH", "3"], "did you mean 'EPOCHS'"),
    ],
)
def test_wrong_configurations_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_linear_config(None, words)


def test_the_defaults_are_the_references_protocol():
    cfg = load_linear_config(None)
    train = cfg.TRAIN
    assert (train.LR, train.BATCH_SIZE, train.EPOCHS, tuple(train.MILESTONES)) == (
        30.0, 256, 100, (60, 80))  # fmt: skip
    assert (train.DECAY, train.SGD_MOMENTUM, train.WEIGHT_DECAY, train.INIT_STD) == (
        0.1, 0.9, 0.0, 0.01)  # fmt: skip
    assert (cfg.DATA.SIZE, tuple(cfg.DATA.CROP_SCALE), cfg.DATA.FLIP_PROBABILITY) == (
        224, (0.08, 1.0), 0.5)  # fmt: skip
    assert not (train.AMP or train.CHANNELS_LAST or cfg.FINETUNE.ENABLED)
