"""Processes that this one starts end with it: when it is told to end, and when it is killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from moco.signals import caught_signals, to_end

GRACE_SECONDS = 300.0  # for those that were told to end, to save what they have
_CRASH_GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h; kept through exec
# Run by a Python that imports nothing, a few hundredths of a second, in place of `preexec_fn`,
# which is not safe in a process with threads.
_BOUND = (
    "import ctypes, os, signal, sys\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]):\n"
    "    os.kill(os.getpid(), signal.SIGTERM)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def bound_command(command: Sequence[str]) -> list[str]:
    """The command as one that the system sends SIGTERM when this process is gone, killed too.

    On Linux; elsewhere the command itself. The thread that starts it must live as long as the
    command may: Linux means that thread by the parent.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]


def end_with_parent(
    number: int = signal.SIGKILL, parent: multiprocessing.process.BaseProcess | int | None = None
) -> None:
    """Called in a process of `multiprocessing`: have the system send it the signal when the parent
    is gone (Linux; nothing happens elsewhere).

    Args:
        number: of the signal; SIGTERM for one that then saves.
        parent: process number, where `multiprocessing` does not know it.
    """
    if sys.platform != "linux":
        return
    parent = parent or multiprocessing.parent_process().pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it went before that
        os.kill(os.getpid(), number)


@contextmanager
def running(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """Start the process, and wait for its end; where the block fails, end it."""
    process.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()


def run_processes(function: Callable[..., None], num_processes: int, args: tuple = ()) -> int:
    """Run `function(i, *args)` in spawned processes, i from 0, until all have ended.

    SIGTERM, SIGINT and SIGHUP are passed on as SIGTERM, once; the processes themselves ignore
    Ctrl-C, which a terminal sends to all. Once one has failed the others have 5 s to end, and 5 s
    from SIGTERM to SIGKILL.

    Returns: 0; 128 + the signal's number where it was told to end; else the exit status of the
        first that failed, 128 + the number of a signal that ended it.
    Raises: torch's ProcessRaisedException with the traceback of what a process raised.
    """
    import torch  # not at the top: workers that need no torch import this module too

    with caught_signals(to_end()) as received:
        context = torch.multiprocessing.spawn(
            _child, (function, args), nprocs=num_processes, join=False
        )
        code, deadline = 0, None
        try:
            while not context.join(_POLL_SECONDS, GRACE_SECONDS if received else
                                   _CRASH_GRACE_SECONDS):  # fmt: skip
                if received and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
                    for process in context.processes:
                        process.terminate()
                if deadline is not None and time.monotonic() > deadline:
                    for process in context.processes:
                        process.kill()
        except torch.multiprocessing.ProcessExitedException as error:
            code = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    return 128 + received[0] if received else code


def _child(number: int, function: Callable[..., None], args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on
    end_with_parent(signal.SIGTERM)
    function(number, *args)
