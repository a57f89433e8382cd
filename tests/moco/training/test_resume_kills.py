"""The command itself, ended at any point in one process: the same command ends in the same bits."""

import os
import shutil

import pytest
import tiny
from faults import STOPS, WRITE_POINTS, Stop
from pretrain_runs import (
    LAST,
    arguments,
    final_digest,
    make_images,
    pretrain,
    stop_and_continue,
    undisturbed,
)

from moco.data.images import find_images
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """Digest of the last checkpoint, and what the run folder holds."""
    return undisturbed(images, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop} at {stop.step}")
def test_any_stop_continues_to_the_same_bits_and_leaves_nothing(
    stop, images, uninterrupted, tmp_path
):
    words = arguments(images, tmp_path / "run", "--resume")
    found = stop_and_continue(words, tmp_path / "run", 1, stop)
    assert found["ended"] == [143 if stop.how == "SIGTERM" else -9]
    if stop.how in WRITE_POINTS:  # the killed write is not the one that is continued from
        done = stop.how == "inside prune"
        assert found["from_step"] == (stop.step if done else (stop.step - 1) // 4 * 4)
    assert (found["digest"], found["names"]) == uninterrupted


def test_a_killed_write_really_leaves_something(images, tmp_path):
    """Control of the sweep: it has work to do."""
    words = arguments(images, tmp_path / "run", "--resume")
    for point, leftover in (("half written", ".checkpoint_0001.pth.tar."),
                            ("inside prune", "checkpoint_0000.pth.tar.manifest.json")):  # fmt: skip
        pretrain(words, tmp_path / "log", 1, Stop(point, 8))
        assert any(name.startswith(leftover) for name in os.listdir(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")


def test_negative_control_a_moved_queue_pointer_changes_the_digest(images, uninterrupted, tmp_path):
    words = arguments(images, tmp_path / "run", "--resume")
    pretrain(words, tmp_path / "log", 1, Stop("kill -9", 5))
    path, _, _ = ckpt.latest_verified(tmp_path / "run")
    content = ckpt.read_torch_file(path)
    content["state_dict"]["module.queue_ptr"].add_(1)
    ckpt.save_checkpoint(path, content, step=content["extra"]["step"])
    assert pretrain(words, tmp_path / "log") == [0]
    assert final_digest(tmp_path / "run") != uninterrupted[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_loader_workers_continues_to_the_same_bits(images, uninterrupted, tmp_path):
    words = arguments(images, tmp_path / "run", "--resume")
    pretrain(words, tmp_path / "log", 1, Stop("kill -9", 5))
    for workers in (0, 1, 2, 4):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"workers_{workers}")
        Trainer(
            tiny.config(DATA__NUM_WORKERS=workers, KNN__PERIOD=0), find_images(images), folder,
            tiny.alone(), resume=True, say=lambda line: None,
        ).train()  # fmt: skip
        assert tiny.state_digest(ckpt.read_torch_file(folder / LAST)) == uninterrupted[0], workers
