"""One job at a time: refused by name while the other lives, taken over once it is gone."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pretrain_runs import arguments, make_images, pretrain

from moco.errors import CheckpointError
from moco.training.run_lock import LOCK_FILE, RunLock

ROOT = Path(__file__).parents[3]
HOLD = """
import os, sys, time
sys.path.insert(0, {root!r})
from moco.training.run_lock import RunLock
lock = RunLock({folder!r})
{lock}
child = os.fork()  # as a loader worker, which outlives a killed parent
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


class Holder:
    """Another process that holds the folder, with a forked child."""

    def __init__(self, folder, lock="lock.acquire()"):
        code = HOLD.format(root=str(ROOT), folder=str(folder), lock=lock)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        self.child = int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdout.close()
        os.kill(self.child, 9)


@pytest.fixture
def holder(tmp_path):
    other = Holder(tmp_path)
    yield other
    other.close()


def test_a_second_job_is_refused_by_host_and_process(holder, tmp_path):
    with pytest.raises(CheckpointError) as error:
        RunLock(tmp_path).acquire()
    expected = f"is in use by process {holder.process.pid} on {socket.gethostname()};"
    assert expected in str(error.value) and "--output-dir" in str(error.value)


def test_the_lock_of_a_killed_job_is_taken_over_though_its_worker_lives(holder, tmp_path):
    holder.kill()
    os.kill(holder.child, 0)  # it does live
    lock = RunLock(tmp_path)
    lock.acquire()
    assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    lock.release()


def test_control_a_lock_that_workers_inherit_would_outlive_the_job(tmp_path):
    flock = "import fcntl; lock._file = open(lock.path, 'a'); fcntl.flock(lock._file, 2)"
    other = Holder(tmp_path, flock)
    try:
        other.kill()
        with open(tmp_path / LOCK_FILE) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        other.close()


def test_a_released_folder_is_free(tmp_path):
    first = RunLock(tmp_path / "run")
    first.acquire()
    first.release()
    first.release()
    other = Holder(tmp_path / "run")
    other.close()


def test_the_refused_job_does_not_break_the_lock(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is in use"):
            RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    said = []
    RunLock(tmp_path, said.append).acquire()
    assert "has no locks (No locks available)" in said[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="run.lock: cannot be written"):
        RunLock(tmp_path / "file").acquire()


@pytest.mark.parametrize("num", [1, 2])
def test_the_command_refuses_a_folder_in_use_on_all_ranks(tmp_path, num):
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images")
    other = Holder(tmp_path / "run")
    try:
        words = arguments(tmp_path / "images", tmp_path / "run", "--resume")
        assert pretrain(words, tmp_path / "log", num) == [2] * num
        said = (tmp_path / "log.0").read_text().splitlines()[-1]
        assert f"error: {tmp_path / 'run'}: is in use by process {other.process.pid} on" in said
        assert os.listdir(tmp_path / "run") == [LOCK_FILE]
    finally:
        other.close()
    assert pretrain(words, tmp_path / "log", num) == [0] * num
