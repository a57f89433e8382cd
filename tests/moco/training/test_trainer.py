"""The loop: exact resume from any step, refusals, observers that change nothing."""

import json
import multiprocessing
import signal

import pytest
import tiny
import torch

from moco.data.images import find_images
from moco.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from moco.training import checkpoint as ckpt
from moco.training.progress import JsonLog
from moco.training.trainer import Trainer

LAST = "checkpoint_0002.pth.tar"


def trainer(images, folder, *, resume=False, resume_from=None, said=None, **changes):
    say = said.append if said is not None else (lambda line: None)
    return Trainer(
        tiny.config(**changes), find_images(images), folder, tiny.alone(),
        resume=resume, resume_from=resume_from, say=say,
    )  # fmt: skip


def digest(folder, name=LAST):
    return tiny.state_digest(ckpt.read_torch_file(folder / name))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Images and the digest after all steps without a stop."""
    from PIL import Image

    base = tmp_path_factory.mktemp("trainer")
    for split, per_class in (("train", 16), ("test", 4)):
        for name, colour in (("a", (200, 20, 20)), ("b", (20, 20, 200))):
            (base / "images" / split / name).mkdir(parents=True)
            for i in range(per_class):
                image = Image.new("RGB", (24, 24), colour)
                image.paste((5 * i, 255 - 9 * i, 120), (i, i, i + 7, i + 5))
                image.save(base / "images" / split / name / f"{i:02d}.png")
    assert trainer(base / "images", base / "whole").train() == 0
    return base / "images", digest(base / "whole")


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7, 9, 10])
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, stop):
    images, expected = uninterrupted
    code = trainer(images, tmp_path).train([tiny.StopAfter(stop)])
    assert code == 128 + signal.SIGTERM
    path, manifest, _ = ckpt.latest_verified(tmp_path)
    assert manifest["step"] == stop + 1  # the signal is seen at the end of the next step
    resumed = trainer(images, tmp_path, resume=True, DATA__NUM_WORKERS=stop % 3)
    assert resumed.first_step == stop + 1
    assert resumed.train() == 0
    assert digest(tmp_path) == expected


def test_a_stop_at_an_epochs_end_writes_one_checkpoint(uninterrupted, tmp_path):
    assert trainer(uninterrupted[0], tmp_path).train([tiny.StopAfter(3)]) == 128 + signal.SIGTERM
    names = [path.name for path in ckpt.checkpoint_files(tmp_path)]
    assert names == ["checkpoint_0000.pth.tar"]


def test_a_killed_worker_is_one_line(uninterrupted, tmp_path):
    run = trainer(uninterrupted[0], tmp_path, DATA__NUM_WORKERS=1)
    others = set(multiprocessing.active_children())  # that earlier tests of the session left

    class Kill:
        def on_step(self, record):
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
                child.join()

        def on_epoch(self, record):
            pass

    with pytest.raises(DataError, match="worker process died .*DATA.NUM_WORKERS 0") as caught:
        run.train([Kill()])
    assert "\n" not in str(caught.value)


def test_resuming_from_an_epochs_end_equals_uninterrupted(uninterrupted, tmp_path):
    images, expected = uninterrupted
    trainer(images, tmp_path, CHECKPOINT__KEEP_LAST=3).train()
    for name in (LAST, "checkpoint_0001.pth.tar"):
        ckpt.remove_checkpoint(tmp_path / name)
    resumed = trainer(images, tmp_path, resume=True, DATA__NUM_WORKERS=2)
    assert resumed.first_step == tiny.STEPS_PER_EPOCH
    resumed.train()
    assert digest(tmp_path) == expected


def test_negative_control_another_seed_differs(uninterrupted, tmp_path):
    images, expected = uninterrupted
    trainer(images, tmp_path, SEED=1).train()
    assert digest(tmp_path) != expected


def test_a_lost_momentum_buffer_would_be_noticed(uninterrupted, tmp_path):
    """Negative control of the resume tests: they see what a resume forgets."""
    images, expected = uninterrupted
    trainer(images, tmp_path).train([tiny.StopAfter(5)])
    path, _, _ = ckpt.latest_verified(tmp_path)
    content = ckpt.read_torch_file(path)
    for moments in content["optimizer"]["state"].values():
        moments["momentum_buffer"].zero_()
    ckpt.save_checkpoint(path, content, step=content["extra"]["step"])
    trainer(images, tmp_path, resume=True).train()
    assert digest(tmp_path) != expected


def test_the_reference_layout_has_its_keys_and_resumes(uninterrupted, tmp_path):
    """A file with only the reference's four keys continues at its epoch."""
    images, expected = uninterrupted
    trainer(images, tmp_path / "a", CHECKPOINT__KEEP_LAST=3).train()
    content = ckpt.read_torch_file(tmp_path / "a" / "checkpoint_0000.pth.tar")
    assert set(content) == {"epoch", "arch", "state_dict", "optimizer", "extra"}
    assert content["epoch"] == 1 and content["arch"] == "resnet18"
    assert all(name.startswith("module.") for name in content["state_dict"])
    num_parameters = len(content["optimizer"]["param_groups"][0]["params"])
    assert num_parameters == len(list(trainer(images, tmp_path / "b").method.parameters()))
    del content["extra"]
    torch.save(content, tmp_path / "reference.pth.tar")
    resumed = trainer(images, tmp_path / "c", resume_from=tmp_path / "reference.pth.tar")
    assert resumed.first_step == tiny.STEPS_PER_EPOCH
    resumed.train()
    assert digest(tmp_path / "c") == expected


def test_observers_and_evaluation_change_nothing(uninterrupted, tmp_path):
    images, expected = uninterrupted
    from moco.evaluation.monitor import build_knn_monitor

    source = find_images(images)
    evaluate = build_knn_monitor(tiny.config(), images, source, tiny.alone(), print)
    log = JsonLog(tmp_path / "log.jsonl", 0)
    trainer(images, tmp_path).train([log], evaluate)
    log.close()
    assert digest(tmp_path) == expected
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "step"] == list(range(1, 13))
    accuracies = [r["metrics"]["knn_top1"] for r in lines if r["kind"] == "epoch"]
    assert len(accuracies) == 4 and all(0 <= a <= 100 for a in accuracies)


def test_the_log_of_a_resumed_run_has_each_step_once(uninterrupted, tmp_path):
    images, _ = uninterrupted
    log = JsonLog(tmp_path / "log.jsonl", 0)
    trainer(images, tmp_path).train([log, tiny.StopAfter(6)])
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:  # a killed process went on, and was cut
        file.write('{"kind": "step", "step": 9}\n{"kind": "st')
    resumed = trainer(images, tmp_path, resume=True)
    log = JsonLog(tmp_path / "log.jsonl", resumed.first_step)
    resumed.train([log])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "step"] == list(range(1, 13))


def test_a_folder_with_a_run_is_refused_without_resume(uninterrupted, tmp_path):
    images, _ = uninterrupted
    trainer(images, tmp_path).train([tiny.StopAfter(1)])
    with pytest.raises(CheckpointError, match="already holds 1 checkpoints.*add --resume"):
        trainer(images, tmp_path)


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(uninterrupted, tmp_path):
    said = []
    assert trainer(uninterrupted[0], tmp_path, resume=True, said=said).first_step == 0
    assert "holds no verified checkpoint, starting afresh" in " ".join(said)


def test_a_named_checkpoint_that_is_missing_is_an_error(uninterrupted, tmp_path):
    with pytest.raises(CheckpointError, match="none.pth.tar: there is no such file"):
        trainer(uninterrupted[0], tmp_path, resume_from="none.pth.tar")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TRAIN__LR": "0.1"}, r"another configuration \(TRAIN.LR 0.03 -> 0.1\)"),
        ({"MODEL__ARCH": "resnet34"}, "MODEL.ARCH 'resnet18' -> 'resnet34'"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(uninterrupted, tmp_path, changes, message):
    images, _ = uninterrupted
    trainer(images, tmp_path).train([tiny.StopAfter(1)])
    with pytest.raises(CheckpointError, match=message):
        trainer(images, tmp_path, resume=True, **changes)


def test_changed_images_are_refused(uninterrupted, image_folder, tmp_path):
    trainer(uninterrupted[0], tmp_path / "run").train([tiny.StopAfter(1)])
    (image_folder / "train" / "a" / "00.png").rename(image_folder / "train" / "a" / "zz.png")
    with pytest.raises(CheckpointError, match="another set of images"):
        trainer(image_folder, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TRAIN__BATCH_SIZE": 40, "MOCO__QUEUE_SIZE": 40}, "32 images do not fill one batch"),
        ({"MODEL__BN_SPLITS": 3}, "BN_SPLITS 3 does not divide the 8 images"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_training(uninterrupted, tmp_path, changes,
                                                              message):  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        trainer(uninterrupted[0], tmp_path, **changes)


def test_a_loss_that_is_not_finite_stops_before_the_update(uninterrupted, tmp_path):
    run = trainer(uninterrupted[0], tmp_path)
    with torch.no_grad():
        run.method.encoder_q.fc[2].bias.fill_(float("nan"))
    before = {n: t.clone() for n, t in run.method.state_dict().items() if n.startswith("queue")}
    weight = run.method.encoder_q.conv1.weight.clone()
    with pytest.raises(NonFiniteError, match="step 0: the loss is not finite"):
        run.train()
    assert torch.equal(run.method.encoder_q.conv1.weight, weight)
    assert all(torch.equal(run.method.state_dict()[n], t) for n, t in before.items())
    assert ckpt.checkpoint_files(tmp_path) == []
