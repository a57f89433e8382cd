"""Errors that a user can cause, and how a command line reports them.

Every message is one line that says where, what was given, what is allowed and what to do.
`assert` is kept for invariants of the code itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

EXIT_USER_ERROR = 2


class MocoError(ValueError):
    """Base of all errors caused by what the user gave: files, keys, flags, machine."""


class ConfigError(MocoError):
    """A configuration key or value is unknown, of the wrong type or out of range."""


class DataError(MocoError):
    """Images or annotations are missing, unreadable or inconsistent."""


class CheckpointError(MocoError):
    """A checkpoint or weights file is missing, damaged or of another model."""


class DistributedError(MocoError):
    """The process group cannot be set up or its ranks disagree."""


class NonFiniteError(MocoError):
    """Training produced NaN or Inf; nothing was updated with it."""


@contextlib.contextmanager
def dead_worker_as_data_error(setting: str) -> Iterator[None]:
    """Turn torch's report of a dead loader worker into a DataError.

    torch raises it from a signal handler: wherever the main thread is, not only in next(). So the
    whole training loop belongs inside.

    Args:
        setting: the config key of the number of workers, for the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise dead_worker_error(error, setting) from error


def dead_worker_error(error: Exception, setting: str) -> DataError:
    """The one line about a loader worker that died, torch's reason included."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"training data: a worker process died ({reason}); give more memory or shared memory "
        f"(docker: --shm-size), or set {setting} 0"
    )


def exit_on_error(main: Callable[..., int | None]) -> Callable[..., None]:
    """Decorator of a command line's `main`: a `MocoError` becomes one line on stderr and exit 2.

    Set `MOCO_TRACEBACK=1` to see the traceback of such an error.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            code = main(*args, **kwargs)
        except MocoError as error:
            if os.environ.get("MOCO_TRACEBACK") == "1":
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = EXIT_USER_ERROR
        sys.exit(code or 0)

    return wrapper
