"""R3: kill -9 at each operation of the writing of a checkpoint.

Whatever the point, a verified checkpoint exists, and the next start sweeps what was left.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from faults import WRITE_POINTS, Stop, die
from pretrain_runs import arguments, make_images, pretrain

from moco.training import checkpoint as ckpt
from moco.training.retention import Retention

pytestmark = pytest.mark.faults
# Everything that the writing of a checkpoint asks of the system.
OPERATIONS = (
    (tempfile, "mkstemp"), (os, "fdopen"), (os, "fsync"), (os, "chmod"), (os, "replace"),
    (os, "open"), (os, "close"), (pathlib.Path, "unlink"), (ckpt._Sink, "write"),
    (ckpt._Sink, "flush"),
)  # fmt: skip


def content(step: int) -> dict:
    return {"state_dict": {"w": torch.full((40_000,), float(step))}, "step": step}


def write(folder: Path, step: int) -> None:
    """As a run does at the end of an epoch of four steps; two checkpoints are kept."""
    path = folder / f"checkpoint_{step // 4 - 1:04d}.pth.tar"
    ckpt.save_checkpoint(path, content(step), step=step)
    Retention(folder, keep_last=2, milestone=0).prune(written=path)


def before_and_after_each_operation(act) -> None:
    """Call `act(moment)` around each operation, moments counted from 1."""
    moment = 0

    def watched(function):
        def call(*args, **kwargs):
            nonlocal moment
            moment += 1
            act(moment)
            result = function(*args, **kwargs)
            moment += 1
            act(moment)
            return result

        return call

    for where, name in OPERATIONS:
        setattr(where, name, watched(getattr(where, name)))


def in_child(work) -> int:
    """Run `work()` in a forked process; how it ended, as of subprocess."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_moments(folder: Path) -> int:
    """How many moments the writing has."""
    receive, send = os.pipe()

    def work() -> None:
        count = []
        before_and_after_each_operation(count.append)
        write(folder, 16)
        os.write(send, str(len(count)).encode())

    assert in_child(work) == 0
    os.close(send)
    with os.fdopen(receive) as pipe:
        return int(pipe.read())


def killed_at(moment: int, folder: Path, break_guard=lambda: None) -> None:
    def work() -> None:
        break_guard()
        before_and_after_each_operation(lambda now: die() if now == moment else None)
        write(folder, 16)

    assert in_child(work) == -signal.SIGKILL, moment


def is_whole(folder: Path) -> bool:
    """A checkpoint verifies and holds what it says; the next start leaves nothing else behind."""
    path, manifest, _ = ckpt.latest_verified(folder)
    if path is None or manifest["step"] not in (12, 16):
        return False
    try:
        found = ckpt.read_torch_file(path)
    except ckpt.CheckpointError:
        return False
    if found["step"] != manifest["step"] or (found["state_dict"]["w"] != found["step"]).any():
        return False
    Retention(folder, keep_last=2, milestone=0).sweep()
    write(folder, 16)
    names = {f"checkpoint_000{n}.pth.tar" for n in (2, 3)}
    return set(os.listdir(folder)) == names | {f"{n}{ckpt.MANIFEST_SUFFIX}" for n in names}


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of steps 8 and 12."""
    folder = tmp_path / "run"
    for step in (4, 8, 12):
        write(folder, step)
    return folder


def test_killed_at_every_operation_a_verified_checkpoint_exists(run, tmp_path, observed):
    moments = count_moments(shutil.copytree(run, tmp_path / "counted"))
    whole = 0
    for moment in range(1, moments + 1):
        folder = shutil.copytree(run, tmp_path / "killed")
        killed_at(moment, folder)
        whole += is_whole(folder)
        shutil.rmtree(folder)
    assert moments > 50, moments
    observed("R3", whole, moments)


def write_in_place() -> None:
    """A broken guard: no temporary file, the checkpoint goes where the newest one is."""

    def save(path, content, **fields):
        path = path.with_name("checkpoint_0002.pth.tar")
        with open(path, "wb") as file:
            torch.save(content, ckpt._Sink(file))
        ckpt.write_manifest(path, **fields)

    ckpt.save_checkpoint = save
    Retention._verifies = lambda self, path: True


def remove_first() -> None:
    """A broken guard: the old ones go before the new one is written."""
    save = ckpt.save_checkpoint

    def save_checkpoint(path, content, **fields):
        for old in ckpt.checkpoint_files(path.parent):
            ckpt.remove_checkpoint(old)
        save(path, content, **fields)

    ckpt.save_checkpoint = save_checkpoint


def manifest_first() -> None:
    """A broken guard: the manifest is there before what it vouches for."""
    save = ckpt.save_checkpoint

    def save_checkpoint(path, content, **fields):
        path.write_bytes(b"half")
        ckpt.write_manifest(path, **fields)
        save(path, content, **fields)

    ckpt.save_checkpoint = save_checkpoint


@pytest.mark.parametrize("broken", [remove_first, manifest_first, write_in_place])
def test_control_without_its_order_some_kill_loses_the_checkpoint(run, tmp_path, broken, observed):
    lost = 0
    for moment in range(1, 21):
        folder = shutil.copytree(run, tmp_path / "killed")
        killed_at(moment, folder, broken)
        lost += not is_whole(folder)
        shutil.rmtree(folder)
    observed("R3", int(lost > 0), 1, control=True)


def test_control_without_the_sweep_leftovers_stay(run, tmp_path, monkeypatch, observed):
    monkeypatch.setattr(Retention, "sweep", lambda self: [])
    dirty = 0
    for moment in range(1, 21):
        folder = shutil.copytree(run, tmp_path / "killed")
        killed_at(moment, folder)
        dirty += not is_whole(folder)
        shutil.rmtree(folder)
    observed("R3", int(dirty > 0), 1, control=True)


def test_a_run_killed_at_each_named_write_point_is_swept_and_ends(tmp_path, observed):
    images = tmp_path / "images"
    images.mkdir()
    make_images(images)
    assert pretrain(arguments(images, tmp_path / "whole"), tmp_path / "log") == [0]
    names, good = sorted(os.listdir(tmp_path / "whole")), 0
    for point in WRITE_POINTS:
        folder = tmp_path / point
        words = arguments(images, folder, "--resume")
        assert pretrain(words, tmp_path / "log", 1, Stop(point, 8)) == [-9]
        path, manifest, _ = ckpt.latest_verified(folder)
        # The killed write is not the one to continue from, but for the prune that follows it.
        expected = 8 if point == "inside prune" else 4
        left = set(os.listdir(folder)) - set(names)
        assert left, f"{point}: nothing was left to sweep, so nothing is shown"
        assert pretrain(words, tmp_path / "log") == [0]
        swept = sorted(os.listdir(folder)) == names
        good += path is not None and manifest["step"] == expected and swept
    observed("R3", good, len(WRITE_POINTS))
