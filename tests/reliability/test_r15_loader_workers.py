"""R15: a loader worker killed or hung, a reader with EIO: an error in seconds that names the image,
or, where it passes, the same run with its retries counted."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from pretrain_runs import LAST, final_digest, make_images
from processes import SERVER

from moco.data import reading, workers
from moco.data.images import ImageSource, find_images
from moco.errors import DataError, MocoError
from moco.training import trainer
from moco.training.progress import JsonLog

pytestmark = pytest.mark.faults
AT, NAME = 5, "05.png"  # the image at which it happens
TIMEOUT_S, DEADLINE_S = 2, 20
_pause_s = 0.0  # of the worker at image AT, in the processes where `come_late` set it
CHANGES = {"KNN__PERIOD": 0, "DATA__NUM_WORKERS": 2, "DATA__WORKER_TIMEOUT": TIMEOUT_S}


@dataclass(frozen=True)
class Trap(ImageSource):
    """A folder whose image AT is never read to its end, or only after some failures."""

    act: str = ""
    pid_file: str = ""

    def read_bytes(self, index: int) -> bytes:
        if self.act == "slow":
            time.sleep(1 / 8)
        if index != AT:
            return super().read_bytes(index)
        time.sleep(_pause_s)
        Path(self.pid_file).write_text(str(os.getpid()))
        if self.act.startswith("EIO"):
            return self._failing(index, 2 if self.act == "EIO twice" else 99)
        data = super().read_bytes(index)
        if self.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.act == "hang":
            time.sleep(3600)
        elif self.act == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.act == "spin":  # inside C code, where no other thread of the worker can run
            re.match(r"(a+)+$", "a" * 60 + "b")
        return data

    def _failing(self, index: int, num_failures: int) -> bytes:
        read_regular, left = reading._read_regular, [None] * num_failures

        def failing(path):
            if left:
                left.pop()
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return read_regular(path)

        reading._read_regular = failing
        try:
            return super().read_bytes(index)
        finally:
            reading._read_regular = read_regular


def run(folder: Path, act: str, arm=None, **changes) -> tuple[str, float]:
    """Train the tiny run in a process of its own.

    Returns: how it ended, "hangs" included, and the seconds from image AT to there.
    """
    folder.mkdir()
    images = folder / "images"
    images.mkdir()
    make_images(images)
    process = SERVER.Process(target=_train, args=(str(folder), act, arm, {**CHANGES, **changes}))
    process.start()
    deadline, trapped = time.monotonic() + 90, None
    while process.exitcode is None and time.monotonic() < deadline:
        process.join(0.05)
        if trapped is None and (folder / "pid").exists():
            trapped = time.monotonic()
            deadline = trapped + DEADLINE_S
    seconds = time.monotonic() - (trapped or deadline)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hangs", seconds
    return (folder / "outcome").read_text(), seconds


def _train(folder: str, act: str, arm, changes: dict) -> None:
    torch.set_num_threads(1)
    # Workers have what this process has; those of a fork server import everything anew.
    multiprocessing.set_start_method(changes.pop("start_method", "fork"), force=True)
    folder = Path(folder)
    (folder / "outcome").write_text("")
    if arm is not None:
        arm()
    found = find_images(folder / "images")
    source = Trap(found.root, found.paths, found.labels, found.class_names, act,
                  str(folder / "pid"))  # fmt: skip
    (folder / "run").mkdir()
    log = JsonLog(folder / "run" / "log.jsonl", 0)
    try:
        run = trainer.Trainer(tiny.config(**changes), source, folder / "run", tiny.alone(),
                              say=lambda line: None)  # fmt: skip
        outcome = f"exit {run.train([log])}"
    except MocoError as error:
        outcome = f"refused: {error}"
    except Exception as error:
        outcome = f"uncaught {type(error).__name__}: {error}"
    log.close()
    (folder / "outcome").write_text(outcome)


def is_gone(folder: Path) -> bool:
    """Whether the worker that met the trap is; it is ended if it is not."""
    pid = int((folder / "pid").read_text())
    with contextlib.suppress(ProcessLookupError):
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        os.kill(pid, signal.SIGKILL)
        return False
    return True


def names_the_image(folder: Path, act: str, arm=None, **changes) -> bool:
    """One line in seconds that names the image, and no worker is left."""
    outcome, seconds = run(folder, act, arm, **changes)
    print(outcome, seconds)
    gone = is_gone(folder)
    return (
        outcome.startswith("refused: ") and "\n" not in outcome and f"images/{NAME}" in outcome
        and seconds < DEADLINE_S and gone
    )  # fmt: skip


FATAL = ("kill", "hang", "stop", "spin", "EIO always")


@pytest.mark.parametrize("act", FATAL)
def test_the_image_is_named_in_seconds(act, tmp_path, observed):
    observed("R15", int(names_the_image(tmp_path / "run", act)), 1)


def come_late() -> None:
    """Ask for the first batch when a worker has it ready and is stuck in its next one, or dead.

    torch fetches a batch's tensors from the worker that made them, which then answers no more.
    """
    global _pause_s
    watched, _pause_s = workers.Board.watched, 0.5

    def late(board, start):
        def started():
            batches = start()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own report may come too late
            time.sleep(1.5)
            return batches

        return watched(board, started)

    workers.Board.watched = late


@pytest.mark.parametrize("act", ["spin", "stop", "kill"])
def test_a_finished_batch_of_a_stuck_worker_holds_nobody(act, tmp_path, observed):
    observed("R15", int(names_the_image(tmp_path / "run", act, come_late)), 1)


@pytest.mark.parametrize("seconds, error", [(0.3, RuntimeError), (60, ConnectionResetError)])
def test_a_cut_connection_is_the_death_of_a_worker(seconds, error, monkeypatch):
    """torch sees a worker alive that is about to be gone, and passes the connection's error on."""
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 2.0)
    process = SERVER.Process(target=time.sleep, args=(seconds,))

    def start():
        process.start()

        def batches():
            raise ConnectionResetError("reset")
            yield

        return batches()

    with pytest.raises(error) as caught:
        next(workers.Board(1, None, 0).watched(start))
    alive = error is ConnectionResetError
    assert alive or f"DataLoader worker (pid(s) {process.pid}) exited" in str(caught.value)
    assert process.is_alive() == alive
    process.kill()
    process.join()


def test_a_report_of_the_death_does_not_replace_that_it_was_stuck():
    """torch's handler of SIGCHLD raises wherever the main thread is, here while it waits."""
    process, reported = SERVER.Process(target=time.sleep, args=(60,)), []
    board = workers.Board(1, None, 0.2)
    assert workers.doing([-1]) == ""

    def join(seconds):
        reported.append(seconds)
        raise RuntimeError(f"DataLoader worker (pid {process.pid}) is killed by signal: Killed.")

    def start():
        process.start()

        def batches():
            while process.is_alive():
                time.sleep(0.01)
            process.join = join
            raise ConnectionResetError("reset")
            yield

        return batches()

    with pytest.raises(DataError, match="no loader worker got any further for 0.2 s"):
        next(board.watched(start))
    assert reported
    # Raised elsewhere in the loop, it becomes another error, which names all of them too.
    assert workers.doing([-1]).startswith("worker 0 ")


def test_the_watching_thread_is_gone_when_the_batches_are(monkeypatch):
    """It holds the files of the processes."""
    process = SERVER.Process(target=time.sleep, args=(60,))

    def slow(self, processes, ended):
        ended.wait()
        time.sleep(0.5)

    def start():
        process.start()
        return iter([1, 2])

    monkeypatch.setattr(workers.Board, "_watch", slow)
    before = threading.active_count()
    batches = workers.Board(1, None, 60).watched(start)
    assert next(batches) == 1 and threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    process.kill()
    process.join()


def test_it_is_named_too_where_workers_import_everything_anew(tmp_path):
    """As Python does from 3.14 on."""
    assert names_the_image(tmp_path / "run", "kill", start_method="forkserver")


def forget_what_workers_do() -> None:
    trainer.workers.doing = lambda pids: ""


def test_control_without_notes_the_image_is_not_named(tmp_path, observed):
    named = names_the_image(tmp_path / "run", "kill", forget_what_workers_do)
    observed("R15", int(not named), 1, control=True)


def test_control_without_a_timeout_it_hangs(tmp_path, monkeypatch, observed):
    monkeypatch.setitem(globals(), "DEADLINE_S", 4 * TIMEOUT_S)
    named = names_the_image(tmp_path / "run", "hang", DATA__WORKER_TIMEOUT=0)
    ended = (tmp_path / "run/outcome").read_text()
    observed("R15", int(not named and not ended), 1, control=True)


def test_workers_that_are_slow_are_not_stuck(tmp_path):
    """A batch takes as long as the timeout, each of its images an eighth."""
    changes = {"TRAIN__EPOCHS": 1, "DATA__NUM_WORKERS": 1, "DATA__WORKER_TIMEOUT": 1}
    outcome, _ = run(tmp_path / "run", "slow", **changes)
    assert outcome == "exit 0"


def ends_the_same_and_counts(tmp_path: Path, arm=None, num_workers: int = 2) -> bool:
    """After two EIO in each epoch: the bits of an undisturbed run, and 6 retries in the log."""
    clean, _ = run(tmp_path / "clean", "")
    outcome, _ = run(tmp_path / "run", "EIO twice", arm, DATA__NUM_WORKERS=num_workers)
    assert clean == "exit 0"
    if outcome != "exit 0" or not (tmp_path / "run/run" / LAST).exists():
        return False
    lines = (tmp_path / "run/run/log.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    undisturbed = (tmp_path / "clean/run/log.jsonl").read_text()
    return (
        final_digest(tmp_path / "run/run") == final_digest(tmp_path / "clean/run")
        and steps[-1]["metrics"].get("read_retries") == 2 * 3
        and "read_retries" not in undisturbed
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_passing_errors_change_nothing_and_are_counted(tmp_path, num_workers, observed):
    observed("R15", int(ends_the_same_and_counts(tmp_path, num_workers=num_workers)), 1)


def no_new_try() -> None:
    reading._DELAYS = ()


def do_not_count() -> None:
    reading.note_retry = lambda: None


@pytest.mark.parametrize("arm", [no_new_try, do_not_count])
def test_control_without_retries_or_their_count(tmp_path, arm, observed):
    observed("R15", int(not ends_the_same_and_counts(tmp_path, arm)), 1, control=True)


def test_the_tries_and_their_pauses_are_few():
    assert len(reading._DELAYS) == 3 and sum(reading._DELAYS) < 5
    assert list(reading._DELAYS) == sorted(reading._DELAYS)
    assert workers._LOOKS >= 2
