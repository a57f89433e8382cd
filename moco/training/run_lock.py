"""One job at a time writes to a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from moco.errors import CheckpointError

LOCK_FILE = "run.lock"


class RunLock:
    """Holds `run.lock` in a run folder until `release`, or until this process is gone.

    The system drops the lock of a process that died, however it died, so a stale one is taken over
    without asking whether its process lives. It is a POSIX record lock: across machines where the
    file system offers that (NFS does), and not inherited by forked loader workers, which may
    outlive a killed parent by seconds.

    Args:
        say: receives one line where the file system knows no locks, and the run goes on without.
        setting: the flag or key that names the folder, for the remedy.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        say: Callable[[str], None] = print,
        setting: str = "--output-dir",
    ):
        self.path = Path(run_dir) / LOCK_FILE
        self.say, self.setting = say, setting
        self._file = None

    def acquire(self) -> None:
        """Raises: CheckpointError naming host and process of the job that holds the folder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")  # closed by release()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); give another {self.setting}"
            ) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.say(
                    f"warning: {self.path}: this file system has no locks ({error.strerror}); "
                    f"make sure that no second job uses this {self.setting}"
                )
                return
            raise CheckpointError(
                f"{self.path.parent}: is in use by {self._holder()}; wait for it or stop it, or "
                f"give another {self.setting}"
            ) from error
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Give the folder back. The file stays: removing it could remove another job's."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another job, which has not written its name yet"
        finally:
            self.release()
