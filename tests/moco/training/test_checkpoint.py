"""Checkpoint files: atomic, verified, never executed."""

import json
import os
import pickle

import pytest
import torch

from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt


def save(folder, name, step):
    path = folder / name
    ckpt.save_checkpoint(path, {"x": torch.full((50,), float(step))}, step=step)
    return path


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "f"
    ckpt.write_text_atomic(path, "old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left.*What was there before is untouched"):
        ckpt.write_atomic(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_manifest_is_written_last_and_verifies(tmp_path):
    path = save(tmp_path, "checkpoint_0000.pth.tar", 3)
    manifest = ckpt.verify_manifest(path)
    assert (manifest["step"], manifest["bytes"]) == (3, path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no manifest", "bad manifest"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_taken(tmp_path, damage):
    good = save(tmp_path, "checkpoint_0000.pth.tar", 1)
    bad = save(tmp_path, "checkpoint_0001.pth.tar", 2)
    content = bytearray(bad.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    elif damage == "cut":
        bad.write_bytes(content[:-1])
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "no manifest":
        ckpt.manifest_path(bad).unlink()
    else:
        ckpt.manifest_path(bad).write_text("{")
    path, manifest, refused = ckpt.latest_verified(tmp_path)
    assert path == good and manifest["step"] == 1
    assert [p for p, _ in refused] == [bad]
    assert bad.name in refused[0][1]


def test_no_checkpoint_at_all(tmp_path):
    assert ckpt.latest_verified(tmp_path / "none") == (None, None, [])


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02}q."])
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pth: is not a readable checkpoint") as error:
        ckpt.read_torch_file(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        ckpt.read_torch_file(tmp_path / "none.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        ckpt.read_torch_file(path)
    assert not (tmp_path / "ran").exists()
    with open(tmp_path / "control.pkl", "wb") as file:  # negative control: the bomb works
        pickle.dump(Bomb(), file)
    pickle.loads((tmp_path / "control.pkl").read_bytes())
    assert (tmp_path / "ran").exists()


def test_prune_keeps_the_newest_the_milestones_and_no_older_stop(tmp_path):
    for epoch in range(6):
        save(tmp_path, f"checkpoint_{epoch:04d}.pth.tar", (epoch + 1) * 10)
    save(tmp_path, "checkpoint_step_25.pth.tar", 25)
    ckpt.prune(tmp_path, keep_last=2, milestone=20)
    left = sorted(p.name for p in ckpt.checkpoint_files(tmp_path))
    assert left == [f"checkpoint_{e:04d}.pth.tar" for e in (1, 3, 4, 5)]
    assert all(ckpt.manifest_path(tmp_path / name).exists() for name in left)


def test_prune_never_removes_the_only_verified_one(tmp_path):
    good = save(tmp_path, "checkpoint_0000.pth.tar", 10)
    bad = save(tmp_path, "checkpoint_0001.pth.tar", 20)
    bad.write_bytes(b"cut")
    ckpt.prune(tmp_path, keep_last=1, milestone=0)
    assert good.exists()
    assert json.loads(ckpt.manifest_path(good).read_text())["step"] == 10
