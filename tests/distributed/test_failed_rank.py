"""A rank that fails ends at once, and the job with it, though leaving the group would wait."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pretrain_runs import Ranks, arguments
from processes import SERVER

from detection.engines.base import TrainingStopped
from moco import child_processes, distributed, process_group
from moco.errors import DataError
from moco.process_group import leaving_group


def destroy_waits(rank: int = 0) -> None:
    """As NCCL's, which waits for the other ranks."""
    dist.destroy_process_group = lambda *args: time.sleep(600)


def fail_in_step(number: int, note: str, rank: int) -> None:
    """Rank 1 meets an error of its own; the others go on into the gradients' all-reduce."""
    from moco.training import trainer

    step = trainer.train_step

    def failing(*args, **kwargs):
        if rank == 1 and kwargs["step"] == number:
            Path(note).touch()
            raise DataError("images/7.png: cannot be read")
        return step(*args, **kwargs)

    trainer.train_step = failing


@contextlib.contextmanager
def left_in_finally():
    """The old order."""
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave_in_finally(rank: int) -> None:
    process_group.leaving_group = left_in_finally


@pytest.fixture
def start(image_folder, tmp_path):
    """Starts two ranks of which rank 1 fails in step 3, and waits for that."""
    started = []

    def start_(*arms) -> Ranks:
        note = tmp_path / f"failed.{len(started)}"
        words = arguments(image_folder, tmp_path / f"run.{len(started)}")
        fault = functools.partial(fail_in_step, 3, str(note))
        ranks = Ranks(words, tmp_path / f"log.{len(started)}", 2,
                      arms=[destroy_waits, fault, *arms])  # fmt: skip
        started.append(ranks)
        ranks.wait_for(note)
        return ranks

    yield start_
    for ranks in started:
        ranks.kill()


def test_the_error_of_one_rank_is_said_and_ends_the_job(start):
    ranks = start()
    assert ranks.join() == [2, 2]
    assert ranks.output(1).splitlines()[-1] == "error: images/7.png: cannot be read"
    assert "rank 0 lost contact with rank 1" in ranks.output(0)


def test_control_the_old_order_hangs_without_a_word(start):
    ranks = start(leave_in_finally)
    time.sleep(4)  # rank 0 looks for lost ranks for 2 s
    assert ranks.codes() == [None, None]
    assert "error:" not in ranks.output(0) + ranks.output(1)


def in_group(folder: str, error: BaseException | None) -> None:
    with open(f"{folder}/log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=time.sleep, args=(600,), daemon=True)  # as a loader's worker
    child.start()
    Path(folder, "child").write_text(str(child.pid))
    dist.destroy_process_group = (
        (lambda: print("destroyed", flush=True)) if error is None else lambda: time.sleep(600)
    )
    with leaving_group():
        print("no line end, not flushed", end="")
        if error is not None:
            raise error


@pytest.mark.parametrize(
    "error, code, said",
    [
        (None, 0, "destroyed"),
        (DataError("a wrong file"), 2, "error: a wrong file"),
        (RuntimeError("a bug"), 1, "Traceback"),
        (SystemExit(3), 3, ""),
        (SystemExit("words"), 1, "words"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (TrainingStopped("not caught"), 1, "not caught"),
    ],
)
def test_each_way_out_of_the_block(tmp_path, error, code, said):
    process = SERVER.Process(target=in_group, args=(str(tmp_path), error))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == code
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert said in text and "no line end, not flushed" in text
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while not _is_ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def rank_in_collective(folder: str) -> None:
    """Rank 0 is where no signal reaches it; rank 1 fails, and its group's end would wait."""
    process = distributed.setup_process("cpu")
    destroy_waits()
    with leaving_group():
        if process.rank == 1:
            while not Path(folder, "waits").exists():
                time.sleep(0.01)
            raise DataError("a wrong file")
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(folder, "waits").touch()
        time.sleep(600)


def test_the_launcher_ends_a_rank_that_waits_in_a_collective(tmp_path, monkeypatch, capfd):
    start = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
    monkeypatch.setattr(child_processes, "_CRASH_GRACE_SECONDS", 0.3)
    # What the fixture of this process's own tests has set up is not used by the children.
    assert distributed.launch(_in_child, 2, args=(str(tmp_path),)) == 2


def _in_child(folder: str) -> None:
    from moco.errors import exit_on_error

    exit_on_error(rank_in_collective)(folder)
