"""Checkpoint files: atomic, verified, never executed."""

import os
import pickle
import resource

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


def test_the_hash_of_writing_is_that_of_the_file(tmp_path):
    path = save(tmp_path, "checkpoint_0000.pth.tar", 3)
    assert ckpt.verify_manifest(path)["sha256"] == ckpt.sha256_of(path)


def test_saving_reads_nothing_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "sha256_of", lambda path: pytest.fail("read again"))
    save(tmp_path, "checkpoint_0000.pth.tar", 3)


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_names_bytes_and_leaves_the_old(tmp_path, small_files):
    good = save(tmp_path, "checkpoint_0000.pth.tar", 1)
    before = good.read_bytes()
    for name in ("checkpoint_0001.pth.tar", good.name):  # a new file, and one that is replaced
        with pytest.raises(CheckpointError) as error:
            ckpt.save_checkpoint(tmp_path / name, {"x": torch.zeros(1 << 15)}, step=2)
        message = str(error.value)
        assert (
            f"{tmp_path / name}: cannot be written (File too large; about 131072 bytes" in message
        )
        assert "are free there" in message and "\n" not in message
    assert good.read_bytes() == before and ckpt.verify_manifest(good)["step"] == 1
    assert len(os.listdir(tmp_path)) == 2


def test_a_failure_of_torch_itself_is_no_full_disk(tmp_path, monkeypatch):
    def fail(content, file):
        raise RuntimeError("of torch")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="of torch"):
        save(tmp_path, "checkpoint_0000.pth.tar", 1)
    assert os.listdir(tmp_path) == []


def test_free_bytes_of_a_folder_that_is_still_to_be_made(tmp_path):
    assert ckpt.free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": "x"}', '{"step": null}', "{", "\xff"])
def test_a_damaged_manifest_is_refused_whatever_it_holds(tmp_path, text):
    good = save(tmp_path, "checkpoint_0000.pth.tar", 1)
    bad = save(tmp_path, "checkpoint_0001.pth.tar", 2)
    ckpt.manifest_path(bad).write_bytes(text.encode("latin-1"))
    path, _, refused = ckpt.latest_verified(tmp_path)
    assert path == good and [p for p, _ in refused] == [bad]
