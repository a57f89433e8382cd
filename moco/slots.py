"""Commands side by side: each in a slot of the machine, ended when this process is told to end.

A job is a chain of commands, each started when the one before has ended. Studies, parallel trials
and the demo are run by it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from moco.child_processes import GRACE_SECONDS, bound_command
from moco.signals import caught_signals, to_end

_POLL_SECONDS = 0.1
_READER_SECONDS = 10.0  # for what an ended command has printed to arrive


@dataclass(frozen=True)
class Command:
    """What to run; output: a file that the command line and what it prints are added to, or what
    receives each line that it prints. It has no standard input."""

    words: Sequence[str]
    output: Path | Callable[[str], None]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit status, or the negative number of the signal that ended it.
        peak_bytes: the most memory it held.
        stopping: whether it was told to end, as all are.
    """

    code: int
    peak_bytes: int
    stopping: bool


Job = Generator[Command, Ended, None]


def run_jobs(
    jobs: Sequence[Callable[[int], Job]],
    num_slots: int,
    *,
    watch: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
    grace_s: float = GRACE_SECONDS,
) -> int | None:
    """Run jobs, in order, up to `num_slots` at once. Called in the main thread.

    SIGTERM, SIGINT or SIGHUP is passed on as SIGTERM, once, to each running command, and nothing
    new begins. Each has a session of its own, so that Ctrl-C in a terminal reaches it by this
    process alone: a second signal might cut its saving short. Those that have not ended after
    `grace_s` seconds are killed. An exception of a job ends the others in the same way. When this
    process is killed, Linux sends them SIGTERM.

    Args:
        jobs: slot -> the job. A generator that yields commands and is sent how each ended.
        watch: called some times a second.
        say: receives a line where commands are told to end or are killed.
    Returns: the number of the signal, None where all jobs came to their end.
    """
    waiting, running = deque(jobs), _Running(say, grace_s)
    with caught_signals(to_end()) as received:
        try:
            while running.jobs or (waiting and not received):
                for slot in range(num_slots):
                    if waiting and not received and slot not in running.jobs:
                        running.go_on(slot, waiting.popleft()(slot), None)
                time.sleep(_POLL_SECONDS)
                if received:
                    running.stop(received[0])
                for slot, job, code, peak_bytes in running.ended():
                    running.go_on(slot, job, Ended(code, peak_bytes, bool(received)))
                watch()
        finally:
            running.close()
    return received[0] if received else None


def slot_environments(
    num_slots: int, num_gpus: int, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """The environment of the commands of each slot.

    With GPUs a command sees one of the visible ones only, slot s the s-th; without, it gets its
    share of the cores, unless OMP_NUM_THREADS is set already.
    """
    if num_gpus:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(n) for n in range(num_gpus)]
        return [
            {**environment, "CUDA_VISIBLE_DEVICES": gpus[s % len(gpus)]} for s in range(num_slots)
        ]
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = max(1, num_cores // num_slots)
    return [{"OMP_NUM_THREADS": str(threads), **environment} for _ in range(num_slots)]


class _Running:
    """Jobs by slot, and the process of each one's present command."""

    def __init__(self, say: Callable[[str], None], grace_s: float):
        self.jobs: dict[int, tuple[Job, _Child]] = {}
        self._say, self._grace_s = say, grace_s
        self._deadline: float | None = None  # once all were told to end

    def go_on(self, slot: int, job: Job, ended: Ended | None) -> None:
        """Start the job's next command, if it has one."""
        self.jobs.pop(slot, None)
        with suppress(StopIteration):
            command = job.send(ended)
            if self._deadline is not None:
                job.close()
            else:
                self.jobs[slot] = (job, _Child(command))

    def ended(self) -> list[tuple[int, Job, int, int]]:
        """(slot, job, exit code, peak bytes) of each whose command has ended."""
        polled = [(slot, job, child.poll()) for slot, (job, child) in self.jobs.items()]
        return [(slot, job, *end) for slot, job, end in polled if end is not None]

    def stop(self, number: int) -> None:
        """Tell all commands to end; later, kill those that have not."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
            for _, child in self.jobs.values():
                child.tell()
            if self.jobs:
                self._say(
                    f"{signal.Signals(number).name}: {len(self.jobs)} process(es) were told to "
                    f"save and end, in at most {self._grace_s:g} s"
                )
        elif time.monotonic() > self._deadline:
            for _, child in self.jobs.values():
                self._say(f"killed, as it has not ended: {shlex.join(child.words)}")
                child.kill()
            self._deadline = time.monotonic() + self._grace_s

    def close(self) -> None:
        """End whatever still runs, as after an exception."""
        while self.jobs:
            self.stop(signal.SIGTERM)
            for slot, job, *_ in self.ended():
                del self.jobs[slot]
                job.close()
            time.sleep(_POLL_SECONDS)


class _Child:
    def __init__(self, command: Command):
        self.words, self._reader = command.words, None
        with ExitStack() as stack:
            if callable(command.output):
                stdout = subprocess.PIPE
            else:
                stdout = stack.enter_context(open(command.output, "a", encoding="utf-8"))
                stdout.write(f"$ {shlex.join(command.words)}\n")
                stdout.flush()
            self.process = subprocess.Popen(
                bound_command(command.words),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                env=dict(command.environment),
                start_new_session=True,
                text=True,
                errors="replace",
            )
        if callable(command.output):
            args = (self.process.stdout, command.output)
            self._reader = threading.Thread(target=_read, args=args, daemon=True)
            self._reader.start()

    def poll(self) -> tuple[int, int] | None:
        """Exit code and peak bytes, None while it runs."""
        # wait4 instead of Popen.wait: it alone tells the child's memory.
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self._reader is not None:
            self._reader.join(_READER_SECONDS)
        return self.process.returncode, usage.ru_maxrss * 1024

    def tell(self) -> None:
        # Not Popen.terminate, which would reap a child that has just ended, before `poll` does.
        os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """The command and what it has started, which is in the same session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _read(lines, receive: Callable[[str], None]) -> None:
    with lines:
        for line in lines:
            receive(line)
