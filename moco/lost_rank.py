"""When a collective fails: which rank is gone or stopped, said in one line.

gloo reports a closed connection or a timeout, without a rank, in the process that waited. NCCL
reports to its watchdog, which ends the process; there only what is raised in Python passes here.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from moco.distributed import gather_objects, rank, world_size
from moco.errors import DistributedError
from moco.process_group import notes

_PATIENCE_SECONDS = 2.0  # a dying process closes its connections a little before it is gone
_GONE = {"Z": "gone", "X": "gone", None: "gone", "T": "stopped"}


@contextmanager
def lost_rank_as_error(where: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective into a DistributedError that names the lost ranks.

    Ranks on this machine are looked up; those on others report their own neighbours. A rank that
    was stopped (SIGSTOP) is told to go on: it then finds its connections closed and ends too,
    while the launcher's SIGTERM alone would not reach it. Entered by all ranks together.

    Args:
        where: the position the message begins with, for example "step 12"; called on failure.
    """
    if world_size() == 1:
        yield
        return
    peers = gather_objects((_machine(), os.getpid()))
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        lost = _lost_ranks(peers)
        stopped = [number for number, state in lost.items() if state == "stopped"]
        for number in stopped:
            with suppress(OSError):
                os.kill(peers[number][1], signal.SIGCONT)
        reason = " ".join(str(error).split())[:160]
        odd = "" if stopped else _odd_ones(where(), _place(error))
        raise DistributedError(
            f"{where()}: {odd}; start the same command with --resume ({reason})"
            if odd
            else f"{where()}: rank {rank()} lost contact with {_in_words(lost, peers)}; see what "
            f"that process printed, then start the same command with --resume ({reason})"
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _machine() -> str:
    """What two processes share that see each other's process numbers."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _lost_ranks(peers: list[tuple[str, int]]) -> dict[int, str]:
    """rank -> "gone" or "stopped", of the ranks on this machine."""
    neighbours = {n: pid for n, (machine, pid) in enumerate(peers) if machine == _machine()}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        states = {number: _GONE.get(_state(pid)) for number, pid in neighbours.items()}
        lost = {number: state for number, state in states.items() if state}
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.05)


def _state(pid: int) -> str | None:
    """The letter of a process's state; None where there is no such process, "?" if unknown."""
    if not Path("/proc/self/stat").exists():
        return "?"
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[0]


def _place(error: BaseException) -> str:
    """The function of this project that called the collective, "name (file:line)"."""
    package = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(package)
        and Path(frame.filename).name not in ("distributed.py", "lost_rank.py")
    ]
    if not frames:
        return "outside of the training"
    return f"{frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def _odd_ones(step: str, place: str) -> str:
    """Which ranks failed at another collective than most: "" where they cannot be told.

    A collective that one rank skips pairs its next one with another of the others. Each rank leaves
    where it failed; the last to fail, which is when the others closed their connections, reads all.
    """
    store, places = notes(), {}
    if store is None:
        return ""
    with suppress(RuntimeError):  # the store went with its host
        store.set(str(rank()), f"{step}, {place}")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while len(places) < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            for number in range(world_size()):
                if number not in places and store.check([str(number)]):
                    places[number] = store.get(str(number)).decode()
    common, votes = Counter(places.values()).most_common(1)[0] if places else ("", 0)
    odd = {number: where for number, where in places.items() if where != common}
    if len(places) < world_size() or not odd or votes <= len(odd):
        return ""
    listed = ", ".join(f"rank {number} at {where}" for number, where in sorted(odd.items()))
    return f"ranks are not at the same collective: {listed}, the {votes} others at {common}"


def _in_words(lost: dict[int, str], peers: list[tuple[str, int]]) -> str:
    if not lost:
        return "another rank (none on this machine is gone or stopped: see the other machines)"
    return ", ".join(f"rank {n} (process {peers[n][1]} is {s})" for n, s in lost.items())
