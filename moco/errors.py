"""Errors that a user can cause, and how a command line reports them.

Every message is one line that says where, what was given, what is allowed and what to do.
`assert` is kept for invariants of the code itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

EXIT_USER_ERROR = 2
_LONGEST = 4000  # characters of a message


class MocoError(ValueError):
    """Base of all errors caused by what the user gave: files, keys, flags, machine.

    Names and values in a message come from files of strangers: line ends and what steers a
    terminal are escaped, and a message longer than 4000 characters loses its middle.
    """

    def __init__(self, message: str = ""):
        super().__init__(_one_line(message))


class ConfigError(MocoError):
    """A configuration key or value is unknown, of the wrong type or out of range."""


class DataError(MocoError):
    """Images or annotations are missing, unreadable or inconsistent."""


class CheckpointError(MocoError):
    """A checkpoint or weights file is missing, damaged or of another model."""


class DistributedError(MocoError):
    """The process group cannot be set up or its ranks disagree."""


class DeviceMemoryError(MocoError):
    """The device's memory does not hold what was asked of it."""


class NonFiniteError(MocoError):
    """Training produced NaN or Inf; nothing was updated with it."""


class Stopped(MocoError):
    """A signal asked the work to stop; what was done is saved, and the message says how to go on.

    Attributes:
        exit_code: 128 + the signal's number, what a shell reports for a process ended by it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def _one_line(message: str) -> str:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST - 1000]} ... {message[-900:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


@contextlib.contextmanager
def dead_worker_as_data_error(
    setting: str, doing: Callable[[list[int]], str] = lambda pids: ""
) -> Iterator[None]:
    """Turn torch's report of a dead loader worker into a DataError.

    torch raises it from a signal handler: wherever the main thread is, not only in next(). So the
    whole training loop belongs inside.

    Args:
        setting: the config key of the number of workers, for the remedy.
        doing: what the processes with these numbers were at, in words.
    """
    try:
        yield
    except RuntimeError as error:
        # "DataLoader worker (pid 7) is killed ...", "(pid(s) 7, 8) exited ..."; an exception that
        # was raised in a worker, "Caught X in DataLoader worker process 0", is no death.
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if found is None:
            raise
        pids = [int(number) for number in found.group(1).split(",")]
        raise dead_worker_error(error, setting, doing(pids)) from error


def dead_worker_error(error: Exception, setting: str, doing: str = "") -> DataError:
    """The one line about a loader worker that died, torch's reason included."""
    reason = " ".join(str(error).split()) or type(error).__name__
    doing = f"{doing}; " if doing else ""
    return DataError(
        f"training data: a worker process died ({reason}); {doing}give more memory or shared "
        f"memory (docker: --shm-size), or set {setting} 0"
    )


def exit_on_error(main: Callable[..., int | None]) -> Callable[..., None]:
    """Decorator of a command line's `main`: a `MocoError` becomes one line on stderr and exit 2.

    Set `MOCO_TRACEBACK=1` to see the traceback of such an error.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            code = main(*args, **kwargs)
        except (MocoError, KeyboardInterrupt) as error:
            if os.environ.get("MOCO_TRACEBACK") == "1":
                raise
            code = report(error)
        sys.exit(code or 0)

    return wrapper


def report(error: BaseException) -> int:
    """Print what ends a command line. Returns: its exit status."""
    if isinstance(error, Stopped):
        print(error, flush=True)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, MocoError) and os.environ.get("MOCO_TRACEBACK") != "1":
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return 1
