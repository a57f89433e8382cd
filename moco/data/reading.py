"""Bytes of files: regular files only, of bounded size, and again after a passing error."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from moco.data.workers import note_retry, num_worker_retries
from moco.errors import DataError

MAX_FILE_BYTES = 1 << 30  # of one image; what is larger is no photograph
# A disk's read error, a network file system's handle of before its server restarted, its server's
# silence, and a read interrupted by memory pressure: the same read often succeeds a moment later.
# What stays so (ENOENT, EACCES, ELOOP, ...) is said at once.
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
_DELAYS = (0.1, 0.5, 2.0)  # seconds before the second, third and fourth try

_T = TypeVar("_T")
_num_retries = 0


class UnreadableImage(DataError):
    """One image is unreadable, today and tomorrow: its file, not the disk, is at fault.

    Attributes:
        name: of the image, its path.
        reason: why, without the name.
    """

    def __init__(self, message: str, name: str = "", reason: str = ""):
        super().__init__(message)
        self.name, self.reason = name, reason or message


def unreadable(name: str | os.PathLike, reason: str) -> UnreadableImage:
    """The one line about an image that cannot be read."""
    reason = " ".join(reason.split())
    return UnreadableImage(
        f"{name}: cannot be read as an image ({reason}); replace or remove it", str(name), reason
    )


def read_file(path: str | os.PathLike) -> bytes:
    """All bytes of a regular file, in the words of an image.

    A pipe, a socket or a device is refused, never waited for.

    Raises: UnreadableImage with the path and the reason; DataError where the disk failed.
    """
    try:
        return retried(os.fspath(path), lambda: _read_regular(path))
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error


def retried(name: str, read: Callable[[], _T]) -> _T:
    """`read()`, tried again with growing pauses after EIO, ESTALE and their like.

    Each new try is counted and said on stderr.

    Args:
        name: of what is read, for the messages.
    Raises: DataError after the last try; any other OSError of `read` as it is.
    """
    global _num_retries
    for delay in (*_DELAYS, None):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if delay is None:
                raise DataError(
                    f"{name}: cannot be read ({error.strerror}, in each of {len(_DELAYS) + 1} "
                    f"tries, {_num_retries} retries in this process); check the disk or the "
                    "network it is on"
                ) from error
            _num_retries += 1
            note_retry()
            print(
                f"warning: {name}: {error.strerror}; trying again in {delay:g} s "
                f"(retry {_num_retries} of process {os.getpid()})",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def num_retries() -> int:
    """How many reads this process and its loader workers have had to try again."""
    return _num_retries + num_worker_retries()


def open_regular(path: str | os.PathLike, *, follow_links: bool = True) -> int:
    """Descriptor of a regular file, for reading. Raises: OSError."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a link, which may lead anywhere", path) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file"
    raise OSError(errno.EINVAL, kind, os.fspath(path))


def _read_regular(path: str | os.PathLike) -> bytes:
    with open(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise unreadable(path, f"it has {size} bytes; at most {MAX_FILE_BYTES} are allowed")
        return file.readall()
