"""What a process starts ends with it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from moco import child_processes
from moco.child_processes import bound_command, end_with_parent, run_processes, running

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Spawned processes would import torch first, for seconds."""
    start = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)


def exits(number: int, codes: list[int]) -> None:
    if codes[number] < 0:
        os.kill(os.getpid(), -codes[number])
    os._exit(codes[number])


@pytest.mark.parametrize(
    "codes, expected", [([0, 0], 0), ([0, 143], 143), ([-signal.SIGKILL, 0], 137)]
)
def test_the_first_failure_is_the_exit_status(codes, expected):
    assert run_processes(exits, 2, (codes,)) == expected


def fails_or_hangs(number: int, folder: str) -> None:
    if number == 1:
        while not os.path.exists(f"{folder}/hangs"):
            time.sleep(0.01)
        os._exit(2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective, where none is seen
    open(f"{folder}/hangs", "w").close()
    time.sleep(600)


def test_a_failed_process_ends_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(child_processes, "_CRASH_GRACE_SECONDS", 0.3)
    assert run_processes(fails_or_hangs, 2, (str(tmp_path),)) == 2


def tells_and_saves(number: int, folder: str) -> None:
    """Process 0 signals its parent, as one who stops the job; both save what reached them."""
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    open(f"{folder}/ready{number}", "w").close()
    while number == 0 and not os.path.exists(f"{folder}/ready1"):
        time.sleep(0.01)
    if number == 0:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: it is for the parent to tell
    while not received:
        time.sleep(0.01)
    time.sleep(0.3)
    with open(f"{folder}/saved{number}", "w") as file:
        file.write(str([int(number) for number in received]))
    os._exit(143)


def test_a_signal_reaches_each_process_once(tmp_path):
    assert run_processes(tells_and_saves, 2, (str(tmp_path),)) == 128 + signal.SIGINT
    saved = [(tmp_path / f"saved{number}").read_text() for number in range(2)]
    assert saved == ["[15]", "[15]"]


PARENT = """
import subprocess, sys, time
from moco.child_processes import bound_command
words = [sys.executable, "-S", "-c", "print('up', flush=True); import time; time.sleep(60)"]
child = subprocess.Popen(bound_command(words) if sys.argv[1] == "bound" else words)
print(child.pid, flush=True)
time.sleep(60)
"""


@LINUX
@pytest.mark.parametrize("kind, is_left", [("bound", False), ("control", True)])
def test_a_command_ends_when_its_parent_is_killed(kind, is_left):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE)
    lines = {parent.stdout.readline(), parent.stdout.readline()}
    [pid] = [int(line) for line in lines if line != b"up\n"]
    parent.kill()
    parent.wait()
    try:
        assert _ends_within(pid, 1.0 if is_left else 20.0) is not is_left
    finally:
        if is_left:
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@LINUX
def test_a_command_whose_parent_is_gone_before_it_begins_does_not_begin():
    command = bound_command([sys.executable, "-c", "print('began')"])
    command[command.index(str(os.getpid()))] = "1"  # not the process that starts it
    ended = subprocess.run(command, capture_output=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, b"")


def sleeps() -> None:
    end_with_parent()
    time.sleep(60)


def test_a_process_ends_with_a_block_that_fails_and_is_waited_for_otherwise():
    context = multiprocessing.get_context("fork")
    process = context.Process(target=sleeps)
    with pytest.raises(KeyError), running(process):
        raise KeyError
    assert process.exitcode == -signal.SIGKILL
    process = context.Process(target=exits, args=(0, [3]))
    with running(process):
        pass
    assert process.exitcode == 3
