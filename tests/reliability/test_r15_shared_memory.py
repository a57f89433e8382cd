"""R15: a /dev/shm of 2 MB: an error in seconds that says how much is needed and what is free."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from pretrain_runs import make_images
from processes import SERVER

from moco.data import loader, workers
from moco.data.images import ImageSource, find_images
from moco.errors import DataError, MocoError
from moco.training.trainer import Trainer

pytestmark = pytest.mark.faults
LIMIT = 2 << 20
BATCH_BYTES = 2 * 3 * 320 * 320 * 8  # each of its two views has more than the limit
DEADLINE_S = 60
NOT_ALLOWED = "no mount namespace"
_NEWNS, _NEWUSER, _RECURSIVE, _PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000  # sched.h, mount.h


def mount_small() -> bool:
    """Give this process, and no other, a /dev/shm of 2 MB; False where it may not."""
    libc, before = ctypes.CDLL(None), os.readlink("/proc/self/ns/mnt")
    root, user = os.geteuid() == 0, os.getuid()
    with contextlib.suppress(OSError):
        if libc.unshare(_NEWNS if root else _NEWNS | _NEWUSER) != 0:
            return False
        if os.readlink("/proc/self/ns/mnt") == before:
            return False  # what is mounted would be everyone's
        if not root:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        if libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None) != 0:
            return False
        if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=2m") != 0:
            return False
        return shutil.disk_usage("/dev/shm").total == LIMIT
    return False


def limit_files() -> bool:
    """No file of this process can have more than 2 MB, in shared memory or elsewhere."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    return True


def read_nothing() -> None:
    def read_bytes(self, index):
        raise AssertionError("an image was read")

    ImageSource.read_bytes = read_bytes


def no_check() -> None:
    loader.check_shared_memory = lambda *args: None


def no_words() -> None:
    loader.full_shared_memory_as_error = contextlib.nullcontext


def _train(folder: str, make_small, guards) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    outcome = NOT_ALLOWED
    if make_small():
        for change in guards:
            change()
        cfg = tiny.config(DATA__SIZE=320, DATA__NUM_WORKERS=1, KNN__PERIOD=0, TRAIN__EPOCHS=1)
        source = find_images(f"{folder}/images")
        try:
            run = Trainer(cfg, source, Path(folder, "run"), tiny.alone(), say=lambda line: None)
            outcome = f"exit {run.train()}"
        except MocoError as error:
            outcome = f"refused: {error}"
        except Exception as error:
            outcome = f"uncaught {type(error).__name__}"
    Path(folder, "outcome").write_text(outcome)


def train(folder: Path, make_small, *guards) -> str:
    """How a run of 8 images of 320 pixels ends in a process of its own."""
    (folder / "images").mkdir()
    make_images(folder / "images", 8)
    process = SERVER.Process(target=_train, args=(str(folder), make_small, guards))
    process.start()
    process.join(DEADLINE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hangs"
    outcome = (folder / "outcome").read_text()
    print(outcome)
    if outcome == NOT_ALLOWED:
        pytest.skip("this machine allows no mount namespace")
    return outcome


def says_what_is_missing(outcome: str) -> bool:
    return outcome.startswith("refused: /dev/shm: ") and "are free; give more" in outcome


def test_refused_before_an_image_is_read(tmp_path, observed):
    outcome = train(tmp_path, mount_small, read_nothing)
    words = f"up to 3 batches of {BATCH_BYTES} bytes, {3 * BATCH_BYTES} bytes; "
    observed("R15", int(says_what_is_missing(outcome) and words in outcome), 1)


def test_a_worker_that_gets_none_says_so(tmp_path, observed):
    """Another program may have filled it since the check."""
    observed("R15", int(says_what_is_missing(train(tmp_path, mount_small, no_check))), 1)


def test_a_worker_that_gets_none_says_so_on_any_machine(tmp_path, observed):
    """Without any rights, but only the second of the two guards: much is free."""
    observed("R15", int(says_what_is_missing(train(tmp_path, limit_files))), 1)


def test_control_without_both_guards_nothing_says_what_is_missing(tmp_path, observed):
    outcome = train(tmp_path, limit_files, no_check, no_words)
    observed("R15", int(not says_what_is_missing(outcome)), 1, control=True)


def test_the_check_counts_what_can_wait_at_a_time(tmp_path, monkeypatch):
    free = [LIMIT]
    monkeypatch.setattr(workers.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(
        workers.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free[0])
    )
    one = LIMIT // 5  # 2 workers, 2 batches each, and the one in use
    workers.check_shared_memory(one, 2 * loader._PREFETCH_BATCHES + 1, 2)
    workers.check_shared_memory(one << 20, 1, 0)  # no worker, no shared memory
    free[0] = 5 * one - 1
    with pytest.raises(DataError, match=f"2 workers .* {5 * one} bytes; {free[0]} bytes are free"):
        workers.check_shared_memory(one, 2 * loader._PREFETCH_BATCHES + 1, 2)
