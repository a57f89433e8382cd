"""What is kept of a run folder, what is swept, and whether the checkpoints to come fit."""

import os

import pytest
import tiny
import torch
from PIL import Image

from moco.data.images import find_images
from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt
from moco.training import retention as retention_module
from moco.training.retention import Retention
from moco.training.trainer import Trainer


def save(folder, name, step):
    path = folder / name
    ckpt.save_checkpoint(path, {"x": torch.full((50,), float(step))}, step=step)
    return path


def save_epochs(folder, *epochs):
    """Epoch e of 10 steps, numbered from 0."""
    return {e: save(folder, f"checkpoint_{e:04d}.pth.tar", (e + 1) * 10) for e in epochs}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def left(folder):
    return sorted(p.name for p in ckpt.checkpoint_files(folder))


def names(*epochs):
    return [f"checkpoint_{e:04d}.pth.tar" for e in epochs]


def test_prune_keeps_the_newest_the_milestones_and_no_older_stop(tmp_path):
    save_epochs(tmp_path, *range(6))
    save(tmp_path, "checkpoint_step_25.pth.tar", 25)
    Retention(tmp_path, keep_last=2, milestone=20).prune()
    assert left(tmp_path) == names(1, 3, 4, 5)
    assert all(ckpt.manifest_path(tmp_path / name).exists() for name in left(tmp_path))


def test_a_corrupt_newest_is_not_counted(tmp_path):
    paths = save_epochs(tmp_path, *range(6))
    damage(paths[5])
    Retention(tmp_path, keep_last=3, milestone=0).prune()
    assert left(tmp_path) == names(2, 3, 4, 5)  # three that verify, and the corrupt one
    assert ckpt.latest_verified(tmp_path)[0] == paths[4]


def test_corrupt_ones_in_between_are_not_counted_and_go_with_their_age(tmp_path):
    paths = save_epochs(tmp_path, *range(7))
    damage(paths[4])
    damage(paths[0])
    Retention(tmp_path, keep_last=3, milestone=0).prune()
    assert left(tmp_path) == names(3, 4, 5, 6)


@pytest.mark.parametrize("corrupt", [(1,), (1, 2), (1, 2, 3)])
def test_the_only_verified_one_is_never_removed(tmp_path, corrupt):
    paths = save_epochs(tmp_path, *range(4))
    for epoch in corrupt:
        damage(paths[epoch])
    Retention(tmp_path, keep_last=1, milestone=0).prune()
    newest = max(set(range(4)) - set(corrupt))
    assert ckpt.latest_verified(tmp_path)[0] == paths[newest]


def test_nothing_goes_where_nothing_verifies(tmp_path):
    for path in save_epochs(tmp_path, *range(4)).values():
        damage(path)
    Retention(tmp_path, keep_last=1, milestone=0).prune()
    assert left(tmp_path) == names(*range(4))


def test_a_corrupt_newer_stop_does_not_hide_the_verified_epoch(tmp_path):
    save_epochs(tmp_path, 0, 1)
    damage(save(tmp_path, "checkpoint_step_25.pth.tar", 25))
    Retention(tmp_path, keep_last=1, milestone=0).prune()
    assert left(tmp_path) == [*names(1), "checkpoint_step_25.pth.tar"]


def test_a_stop_that_was_cut_goes_once_a_newer_one_verifies(tmp_path):
    cut = save(tmp_path, "checkpoint_step_15.pth.tar", 15)
    ckpt.manifest_path(cut).unlink()
    save_epochs(tmp_path, 0)
    kept = Retention(tmp_path, keep_last=1, milestone=0)
    kept.prune()
    assert cut.exists()
    save_epochs(tmp_path, 1)
    kept.prune()
    assert left(tmp_path) == names(1)


def test_a_damaged_manifest_does_not_stop_the_pruning(tmp_path):
    paths = save_epochs(tmp_path, *range(4))
    ckpt.manifest_path(paths[1]).write_text("{")
    ckpt.manifest_path(paths[2]).write_text('{"step": 30}')
    Retention(tmp_path, keep_last=1, milestone=0).prune()
    assert left(tmp_path) == names(1, 3)  # of epoch 1 nobody knows what it is


def test_a_file_is_hashed_once_unless_it_was_touched(tmp_path, monkeypatch):
    hashed = []
    sha256_of = ckpt.sha256_of
    monkeypatch.setattr(ckpt, "sha256_of", lambda p: (hashed.append(p.name), sha256_of(p))[1])
    kept = Retention(tmp_path, keep_last=3, milestone=0)
    for epoch in range(6):
        kept.prune(written=save_epochs(tmp_path, epoch)[epoch])
    assert hashed == [] and left(tmp_path) == names(3, 4, 5)
    damage(tmp_path / names(4)[0])
    kept.prune(written=save_epochs(tmp_path, 6)[6])
    assert hashed == names(4) and left(tmp_path) == names(3, 4, 5, 6)
    hashed.clear()  # another process knows nothing
    Retention(tmp_path, keep_last=2, milestone=0).prune(written=tmp_path / names(6)[0])
    assert hashed == names(5) and left(tmp_path) == names(5, 6)


LEFTOVERS = [
    ".checkpoint_0003.pth.tar.abcd_123",
    ".checkpoint_step_17.pth.tar.abcdefgh",
    ".checkpoint_0003.pth.tar.manifest.json.abcd1234",
    ".config.yaml.q1w2e3r4",
    ".log.jsonl.q1w2e3r4",
    "checkpoint_0001.pth.tar.manifest.json",
    "checkpoint_step_9.pth.tar.manifest.json",
]
OTHERS = [
    ".checkpoint_0003.pth.tar.backup",
    ".model_final.pth.abcd1234",
    "checkpoint_0002.pth.tar",  # perhaps the reference's, put there by hand
    "checkpoint_best.pth.tar.manifest.json",
    ".nfs000000000123",
    "notes.txt",
    "config.yaml",
]


def test_the_sweep_removes_leftovers_and_nothing_else(tmp_path):
    good = save_epochs(tmp_path, 5)[5]
    for name in (*LEFTOVERS, *OTHERS):
        (tmp_path / name).write_text("x")
    kept = Retention(tmp_path, keep_last=1, milestone=0)
    assert kept.sweep() == sorted(LEFTOVERS)
    expected = {*OTHERS, good.name, ckpt.manifest_path(good).name}
    assert set(os.listdir(tmp_path)) == expected
    assert kept.sweep() == []


def test_the_sweep_matches_what_a_killed_writer_leaves(tmp_path, monkeypatch):
    def die(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    monkeypatch.setattr(os, "unlink", lambda path: None)  # kill -9 runs no clean-up
    for name in (
        "checkpoint_0003.pth.tar",
        "checkpoint_step_7.pth.tar",
        "config.yaml",
        "log.jsonl",
    ):
        with pytest.raises(KeyboardInterrupt):
            ckpt.write_text_atomic(tmp_path / name, "x")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 4
    Retention(tmp_path, keep_last=1, milestone=0).sweep()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist_is_swept_and_has_space(tmp_path):
    kept = Retention(tmp_path / "none", keep_last=1, milestone=0)
    assert kept.sweep() == []
    kept.check_space(checkpoint_bytes=1, steps=[1])


@pytest.mark.parametrize(
    "present, steps, milestone, count",
    [
        ((), (10, 20, 30, 40, 50), 0, 4),  # three kept, and the newest before the oldest goes
        ((), (10, 20, 30, 40, 50), 20, 5),  # all five, where two of them stay for good
        ((), (10, 20), 0, 2),
        ((0, 1, 2), (40, 50), 0, 1),
        ((0, 1, 2), (40, 50, 60), 30, 3),
        ((0, 1, 2), (), 0, 0),
    ],
)  # fmt: skip
def test_space_is_checked_for_what_is_still_to_come(
    tmp_path, monkeypatch, present, steps, milestone, count
):
    save_epochs(tmp_path, *present)
    kept = Retention(tmp_path, keep_last=3, milestone=milestone)
    monkeypatch.setattr(retention_module.ckpt, "free_bytes", lambda folder: count * 1000)
    kept.check_space(checkpoint_bytes=1000, steps=steps)
    if count:
        monkeypatch.setattr(retention_module.ckpt, "free_bytes", lambda folder: count * 1000 - 1)
        with pytest.raises(CheckpointError, match=f"need about {count}000 bytes.*{count * 1000 - 1}"
                                                  " are free") as error:  # fmt: skip
            kept.check_space(checkpoint_bytes=1000, steps=steps)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_estimate_is_the_size_of_a_checkpoint(tmp_path, monkeypatch, optimizer):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i, 9, 200)).save(tmp_path / "images" / f"{i}.png")
    asked = []
    monkeypatch.setattr(Retention, "check_space", lambda self, **given: asked.append(given))
    changes = {"MODEL__WIDTH": 0.5, "TRAIN__OPTIMIZER": optimizer, "TRAIN__EPOCHS": 3,
               "CHECKPOINT__PERIOD": 2}  # fmt: skip
    Trainer(
        tiny.config(**changes), find_images(tmp_path / "images"), tmp_path / "run", tiny.alone(),
        say=lambda line: None,
    ).train()  # fmt: skip
    size = (tmp_path / "run" / "checkpoint_0002.pth.tar").stat().st_size
    assert asked[0]["checkpoint_bytes"] == pytest.approx(size, rel=0.05)
    assert asked[0]["steps"] == [2, 3]


def test_too_little_space_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i, 9, 200)).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setattr(retention_module.ckpt, "free_bytes", lambda folder: 4096)
    with pytest.raises(CheckpointError, match="checkpoints to come need about .* 4096 are free"):
        Trainer(tiny.config(), find_images(tmp_path / "images"), tmp_path / "run", tiny.alone())
