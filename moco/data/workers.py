"""What loader workers are doing, so that a dead or stuck one, and its image, can be named.

A worker notes in shared memory which image it is at. The main process reads it when torch reports
a death, or when no batch comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from moco.errors import DataError

_SHARED_MEMORY = "/dev/shm"
_LOOKS = 4  # in a timeout; a job that was stopped and goes on has not been waiting all the time
_PATIENCE_SECONDS = 2.0  # for a killed process to be gone
_IDLE = -1


class _Row(ctypes.Structure):
    """Of one worker. index: of the image it is at; num_changes: what it has noted so far."""

    _fields_ = [(name, ctypes.c_int64) for name in ("pid", "index", "num_changes", "num_retries")]


_own_row: _Row | None = None  # in a worker process
_boards: weakref.WeakSet[Board] = weakref.WeakSet()  # in the process that started the workers
_num_past_retries = 0  # of workers whose loader is gone


def note_image(index: int) -> None:
    """This process begins with image `index` of its source; in no worker nothing happens."""
    _note(index)


def note_idle() -> None:
    """This process has done all it was asked for."""
    _note(_IDLE)


def note_retry() -> None:
    """A read failed and is tried again, which counts as being at work."""
    if _own_row is not None:
        _own_row.num_retries += 1
        _own_row.num_changes += 1


def _note(index: int) -> None:
    if _own_row is not None:
        _own_row.index = index
        _own_row.num_changes += 1


def num_worker_retries() -> int:
    """How many reads the workers of this process have had to try again, those that ended too."""
    return _num_past_retries + sum(row.num_retries for board in _boards for row in board.rows)


def doing(pids: Sequence[int]) -> str:
    """What the worker processes with these numbers were at, in words; "" where it is not known.

    Of stuck workers, which were killed together, what all of them were at.
    """
    return ", ".join(
        words
        for board in list(_boards)
        for row, words in board.in_words()
        if row.pid in pids or board.is_stuck
    )


class Board:
    """The rows of one loader's workers.

    Args:
        path_of: the name of an image, for messages.
        timeout_s: without any progress, after which workers count as stuck; 0: they never do.
    """

    def __init__(self, num_workers: int, path_of: Callable[[int], str] | None, timeout_s: float):
        self.rows = multiprocessing.RawArray(_Row, num_workers)
        self.path_of, self.timeout_s = path_of, timeout_s
        self._waits_for: int | None = None  # the number of a batch
        self._stuck = ""  # what to say of it
        _boards.add(self)
        weakref.finalize(self, _keep_retries, self.rows).atexit = False

    @property
    def is_stuck(self) -> bool:
        return bool(self._stuck)

    def in_words(self) -> Iterator[tuple[_Row, str]]:
        for number, row in enumerate(self.rows):
            if row.index == _IDLE:
                at = "had nothing to do"
            else:
                at = self.path_of(row.index) if self.path_of else f"image {row.index}"
                at = f"was at {at}"
            yield row, f"worker {number} (process {row.pid}) {at}"

    def watched(self, start: Callable[[], Iterator]) -> Iterator:
        """The batches of the iterator that `start` returns once it has started the workers.

        Raises: DataError where for `timeout_s` seconds no batch came and no worker got anywhere.
            All of them are killed, since they may never end by themselves.
        """
        before = multiprocessing.active_children()
        batches = start()
        processes = [one for one in multiprocessing.active_children() if one not in before]
        ended = threading.Event()
        # A timeout of torch's own does not do. A batch's tensors are fetched from the worker that
        # made them, and one stuck in C code, or stopped, answers nobody: next() itself then hangs.
        watch = threading.Thread(target=self._watch, args=(processes, ended), daemon=True)
        if processes and self.timeout_s:
            watch.start()
        try:
            for number in itertools.count():
                self._waits_for = number
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except Exception as error:  # torch's of a death, or one of a cut connection
                    if self.is_stuck:
                        for process in processes:
                            # Where a cut connection came first, torch reports the death only now.
                            with contextlib.suppress(RuntimeError):
                                process.join(_PATIENCE_SECONDS)
                        raise DataError(self._stuck) from None
                    if not isinstance(error, (OSError, EOFError)):
                        raise
                    sentinels = [process.sentinel for process in processes]
                    dead = multiprocessing.connection.wait(sentinels, _PATIENCE_SECONDS)
                    pids = [str(one.pid) for one in processes if one.sentinel in dead]
                    if not pids:
                        raise
                    raise RuntimeError(  # in torch's words
                        f"DataLoader worker (pid(s) {', '.join(pids)}) exited while a batch of it "
                        "was fetched"
                    ) from error
                finally:
                    self._waits_for = None
                yield batch
        finally:
            ended.set()
            # It holds the processes' files. Whoever drops this generator may be that thread, and at
            # Python's own exit it never ends.
            if watch.is_alive() and watch is not threading.current_thread():
                watch.join(0 if sys.is_finalizing() else _PATIENCE_SECONDS)

    def _watch(self, processes: list[multiprocessing.Process], ended: threading.Event) -> None:
        """Kill the workers once they are stuck, which wakes whoever waits for them."""
        seen, num_looks = None, 0
        while not ended.wait(self.timeout_s / _LOOKS):
            now = [self._waits_for, *(row.num_changes for row in self.rows)]
            num_looks = num_looks + 1 if now == seen and self._waits_for is not None else 0
            seen = now
            if num_looks == _LOOKS:
                words = "; ".join(words for _, words in self.in_words())
                self._stuck = (
                    f"training data: no loader worker got any further for {self.timeout_s:g} s: "
                    f"{words}; check the disk or network that the images are on, or raise "
                    "DATA.WORKER_TIMEOUT (seconds; 0 waits for ever)"
                )
                for process in processes:
                    process.kill()
                return


def join_board(rows: ctypes.Array, number: int) -> None:
    """In a worker process: notes go to row `number` from here on."""
    global _own_row
    _own_row = rows[number]
    _own_row.pid, _own_row.index = os.getpid(), _IDLE


def _keep_retries(rows: ctypes.Array) -> None:
    global _num_past_retries
    _num_past_retries += sum(row.num_retries for row in rows)


def check_shared_memory(batch_bytes: int, num_batches: int, num_workers: int) -> None:
    """Raises: DataError where the batches that wait at a time do not fit into shared memory."""
    if not num_workers or not os.path.isdir(_SHARED_MEMORY):
        return
    free, needed = shutil.disk_usage(_SHARED_MEMORY).free, batch_bytes * num_batches
    if needed > free:
        raise _too_little(f"{num_workers} workers hand over up to {num_batches} batches of "
                          f"{batch_bytes} bytes, {needed} bytes", free)  # fmt: skip


@contextlib.contextmanager
def full_shared_memory_as_error() -> Iterator[None]:
    """Turn torch's report that it got no shared memory into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if "</torch_" not in str(error):
            raise
        free = shutil.disk_usage(_SHARED_MEMORY).free
        reason = " ".join(str(error).split())
        raise _too_little(f"a batch does not fit ({reason})", free) from error


def _too_little(what: str, free: int) -> DataError:
    return DataError(
        f"{_SHARED_MEMORY}: {what}; {free} bytes are free; give more shared memory (docker: "
        "--shm-size), or fewer DATA.NUM_WORKERS, 0 of which need none"
    )
