"""R5: the disk fills up in training, or has no room for the run before it starts."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from pretrain_runs import arguments, final_digest, pretrain, stopped_and_whole

from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt
from moco.training.retention import Retention

pytestmark = pytest.mark.faults
OLD = ("checkpoint_0000.pth.tar", "checkpoint_step_6.pth.tar")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """images/; run/, stopped after 6 of 12 steps; the digest of the run that was not stopped."""
    folder = tmp_path_factory.mktemp("disk")
    digest = stopped_and_whole(folder, 6)
    assert sorted(path.name for path in ckpt.checkpoint_files(folder / "run")) == list(OLD)
    return folder, digest


@contextmanager
def largest_file(num_bytes: int):
    """No file of this process grows beyond that, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space_at(module, name: str, call: int):
    """The call of that number, from 1, of a function of the system finds no space left."""
    function, count = getattr(module, name), 0

    def failing(*args, **options):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **options)

    setattr(module, name, failing)
    try:
        yield
    finally:
        setattr(module, name, function)


# What happens in the writing of a checkpoint: name -> the fault, given a checkpoint's bytes.
FULL = {
    "one byte": lambda size: largest_file(1),
    "one block": lambda size: largest_file(4096),
    "half": lambda size: largest_file(size // 2),
    "all but a byte": lambda size: largest_file(size - 1),
    "no file can be made": lambda size: no_space_at(tempfile, "mkstemp", 1),
    "found out by fsync": lambda size: no_space_at(os, "fsync", 1),
    "found out by rename": lambda size: no_space_at(os, "replace", 1),
    "no manifest can be made": lambda size: no_space_at(tempfile, "mkstemp", 2),
    "no room for the manifest": lambda size: no_space_at(os, "fsync", 3),  # 2: of the folder
}


def holds(base: Path, digest: str, folder: Path, fault: str, step: int) -> bool:
    """One line with path, needed and free bytes; the old ones intact; later, the same end."""
    shutil.copytree(base / "run", folder)
    size = (folder / OLD[1]).stat().st_size
    save = ckpt.save_checkpoint

    def full(path, content, **fields):
        if fields["step"] != step:
            return save(path, content, **fields)
        nonlocal before
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with FULL[fault](size):
            save(path, content, **fields)

    before: dict[str, bytes] = {}
    ckpt.save_checkpoint = full
    try:
        tiny.trainer(base / "images", folder, [], CHECKPOINT__KEEP_LAST=3).train()
        return False
    except CheckpointError as error:
        text = str(error)
    except OSError:
        return False
    finally:
        ckpt.save_checkpoint = save
    reason = r"(No space left on device|File too large); about (\d+) bytes are needed, \d+ are free"
    where = re.escape(str(folder))
    found = re.match(rf"{where}/checkpoint_\S+: cannot be written \({reason} there\); ", text)
    if not found or "\n" in text:
        return False
    needed = int(found.group(2))
    right = 0 < needed < 2000 if "manifest" in fault else 0.8 * size < needed <= size
    intact = all((folder / name).read_bytes() == content for name, content in before.items())
    swept = not [path for path in folder.iterdir() if path.name.startswith(".")]
    newest = ckpt.latest_verified(folder)[1]["step"] == (6 if step == 8 else 8)
    again = tiny.trainer(base / "images", folder, [], CHECKPOINT__KEEP_LAST=3)
    ends = again.train() == 0 and final_digest(folder) == digest
    return right and intact and swept and newest and ends


def test_a_disk_that_fills_up_is_named_and_leaves_the_old_checkpoints(base, tmp_path, observed):
    points = [(fault, step) for fault in FULL for step in (8, 12)]
    found = [holds(*base, tmp_path / f"{n}", *point) for n, point in enumerate(points)]
    assert all(found), [point for point, good in zip(points, found, strict=True) if not good]
    observed("R5", sum(found), len(points))


def write_in_place(path, write, *, num_bytes=None) -> None:
    with open(path, "wb") as file:
        write(file)


def test_control_a_file_written_in_place_is_left_cut(base, tmp_path, monkeypatch, observed):
    monkeypatch.setattr(ckpt, "write_atomic", write_in_place)
    points = [(fault, 8) for fault in ("one block", "half", "all but a byte")]
    found = [holds(*base, tmp_path / f"{n}", *point) for n, point in enumerate(points)]
    observed("R5", found.count(False), len(points), control=True)


def is_refused_at_once(base: Path, folder: Path, free: int, monkeypatch) -> bool:
    """Whether a run that needs more than `free` bytes ends before an image is read."""
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))
    said: list[str] = []
    read = []
    try:
        run = tiny.trainer(base / "images", folder, said)
        monkeypatch.setattr(type(run.source), "open", lambda *args: read.append(args) or 1 / 0)
        run.train()
    except CheckpointError as error:
        text = str(error)
        needed = r"the checkpoints to come need about (\d+) bytes"
        where = re.escape(str(folder))
        found = re.match(rf"{where}: {needed} \(.*\), {free} are free there; ", text)
        return bool(found) and int(found.group(1)) > free and "\n" not in text and not read
    except ZeroDivisionError:
        return False
    return False


@pytest.fixture
def sizes(base):
    """Bytes of a checkpoint, and of what a new run of three needs: two, as one is kept."""
    folder, _ = base
    one = tiny.trainer(folder / "images", folder / "none", [])
    one_size = ckpt.tensor_bytes(one.method.state_dict())
    return one_size, 2 * one_size


def test_too_little_room_is_refused_before_training(base, tmp_path, monkeypatch, sizes, observed):
    folder, _ = base
    frees = [0, 1, sizes[0], sizes[1]]  # the moments come on top
    found = [is_refused_at_once(folder, tmp_path / str(n), free, monkeypatch)
             for n, free in enumerate(frees)]  # fmt: skip
    assert not is_refused_at_once(folder, tmp_path / "fits", 1 << 30, monkeypatch)
    observed("R5", sum(found), len(frees))


def test_control_without_the_check_images_are_read(base, tmp_path, monkeypatch, sizes, observed):
    monkeypatch.setattr(Retention, "check_space", lambda self, **given: None)
    observed("R5", int(not is_refused_at_once(base[0], tmp_path / "run", 0, monkeypatch)), 1,
             control=True)  # fmt: skip


def limit_files(rank: int) -> None:
    """Armed in each process of the command: the second checkpoint of a run is cut off."""
    save = ckpt.save_checkpoint

    def full(path, content, **fields):
        if fields["step"] == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        save(path, content, **fields)

    ckpt.save_checkpoint = full


def test_the_command_ends_with_one_line_on_both_ranks_and_goes_on_later(base, tmp_path, observed):
    words = arguments(base[0] / "images", tmp_path / "run", "--resume")
    assert pretrain(words, tmp_path / "log", 2, arms=[limit_files]) == [2, 2]
    for rank in range(2):
        last = (tmp_path / f"log.{rank}").read_text().splitlines()[-1]
        assert last.startswith(f"error: {tmp_path / 'run'}/checkpoint_0001.pth.tar: cannot be")
        assert "bytes are needed" in last and "are free there" in last
    assert ckpt.latest_verified(tmp_path / "run")[1]["step"] == 4
    assert pretrain(words, tmp_path / "log", 2) == [0, 0]
    observed("R5", 1, 1)
