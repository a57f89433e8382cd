"""The slot runner, with commands that do next to nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from moco import slots
from moco.slots import Command, run_jobs, slot_environments

SLEEPS = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready', flush=True); time.sleep(60)"
)
# Saves for half a second once it is told; a second signal within that time would end it.
SAVES = """
import signal, sys, time
def save(number, frame):
    signal.signal(number, signal.SIG_DFL)
    time.sleep(0.5)
    open(sys.argv[1], "a").write(f"saved {number}")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(slots, "_POLL_SECONDS", 0.01)


def python(code, *words, output=print, environment=os.environ):
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, words)]
    return Command(command, output, environment)


def one(command, ends):
    """A job of one command; how it ended is added to `ends`."""

    def job(slot):
        ends.append((yield command))

    return job


def signal_when(condition, *numbers):
    """Sends this process signals as soon as the condition holds."""

    def send():
        while not condition():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_a_job_is_a_chain_and_is_told_how_each_command_ended(tmp_path):
    lines, ends = [], []

    def job(slot):
        for code in ("print('a'); print('b')", "import sys; sys.exit(3)", "1 / 0"):
            ends.append((yield python(code, output=lines.append)))
        ends.append((yield python("print('logged')", output=tmp_path / "log")))

    assert run_jobs([job], 1) is None
    assert [ended.code for ended in ends] == [0, 3, 1, 0]
    assert all(ended.peak_bytes > 2**20 and not ended.stopping for ended in ends)
    assert lines[:2] == ["a\n", "b\n"] and "ZeroDivisionError" in lines[-1]
    command, printed = (tmp_path / "log").read_text().splitlines()
    assert command.startswith(f"$ {sys.executable} -I") and printed == "logged"


def test_no_more_at_once_than_slots_and_each_in_its_own():
    taken, most, order = set(), [], []

    def job_of(number):
        def job(slot):
            assert slot not in taken
            taken.add(slot)
            most.append(len(taken))
            order.append(number)
            yield python("import time; time.sleep(0.1)")
            taken.remove(slot)

        return job

    assert run_jobs([job_of(number) for number in range(5)], 2) is None
    assert max(most) == 2 and order == list(range(5)) and not taken


@pytest.fixture
def with_a_terminal():
    """SIGHUP as in a shell, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("with_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_saves_are_waited_for(tmp_path, number):
    ready, ends, begun, said = [], [], [], []
    before = signal.getsignal(number)
    jobs = [one(python(SAVES, tmp_path / name, output=ready.append), ends) for name in "ab"]
    jobs.append(lambda slot: begun.append(slot))  # waits for a slot
    signal_when(lambda: len(ready) == 2, number, number, signal.SIGTERM)
    assert run_jobs(jobs, 2, say=said.append) == number
    assert [(tmp_path / name).read_text() for name in "ab"] == ["saved 15"] * 2
    assert [(ended.code, ended.stopping) for ended in ends] == [(143, True)] * 2
    assert begun == [] and signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert said == [f"{name}: 2 process(es) were told to save and end, in at most 300 s"]


def test_control_a_command_in_the_terminals_group_is_told_twice_and_loses_its_save(
    tmp_path, monkeypatch
):
    popen = slots.subprocess.Popen

    def in_this_group(*args, start_new_session, **options):
        return popen(*args, **options)

    monkeypatch.setattr(slots.subprocess, "Popen", in_this_group)
    ready, ends, children = [], [], []
    signal_when(lambda: ready and children, signal.SIGINT)

    def job(slot):
        ends.append((yield python(SAVES, tmp_path / "a", output=ready.append)))

    def watch():  # what a terminal does beside it
        if ready and not children:
            children.extend(int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children")
                            .read().split())  # fmt: skip
            for pid in children:
                os.kill(pid, signal.SIGTERM)

    if sys.platform == "linux":
        run_jobs([job], 1, watch=watch, say=lambda line: None)
        assert not (tmp_path / "a").exists() and ends[0].code == -signal.SIGTERM


def test_a_job_does_not_go_on_after_a_signal():
    seen, ready = [], []

    def job(slot):
        seen.append((yield python("print('ready', flush=True)\n" + SLEEPS, output=ready.append)))
        seen.append((yield python("print('must not be')")))

    signal_when(lambda: ready, signal.SIGTERM)
    assert run_jobs([job], 1, say=lambda line: None) == signal.SIGTERM
    assert [ended.code for ended in seen] == [-signal.SIGTERM]


def test_what_does_not_end_is_killed():
    ready, ends, said = [], [], []
    signal_when(lambda: ready, signal.SIGTERM)
    command = python(STUBBORN, output=ready.append)
    assert run_jobs([one(command, ends)], 1, say=said.append, grace_s=0.2) == signal.SIGTERM
    assert [ended.code for ended in ends] == [-signal.SIGKILL]
    assert said[-1].startswith("killed, as it has not ended: ") and "SIG_IGN" in said[-1]


def test_an_error_of_a_job_ends_the_others(tmp_path):
    ready = []

    def failing(slot):
        yield python("pass")
        while not ready:
            time.sleep(0.01)
        raise RuntimeError("boom")

    saving = one(python(SAVES, tmp_path / "saved", output=ready.append), [])
    with pytest.raises(RuntimeError, match="boom"):
        run_jobs([saving, failing], 2, say=lambda line: None)
    assert (tmp_path / "saved").read_text() == "saved 15"


def test_nohup_stays_as_it_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ends, ready = [], []
        signal_when(lambda: ready, signal.SIGHUP)
        command = python("print(1, flush=True); import time; time.sleep(0.3)", output=ready.append)
        assert run_jobs([one(command, ends)], 1) is None
        assert [ended.code for ended in ends] == [0]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_each_slot_has_one_gpu_or_its_share_of_the_cores():
    gpus = [e["CUDA_VISIBLE_DEVICES"] for e in slot_environments(3, 4, {"A": "1"})]
    assert gpus == ["0", "1", "2"]
    environment = {"CUDA_VISIBLE_DEVICES": "4,7", "A": "1"}
    slots_ = slot_environments(3, 2, environment)
    assert slots_ == [{"CUDA_VISIBLE_DEVICES": n, "A": "1"} for n in ("4", "7", "4")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert slot_environments(2, 0, {})[1] == {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert slot_environments(1000, 0, {})[0] == {"OMP_NUM_THREADS": "1"}
    assert slot_environments(2, 0, {"OMP_NUM_THREADS": "9"})[0] == {"OMP_NUM_THREADS": "9"}
