"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

TO_SAVE = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def caught_signals(numbers: Sequence[int] = TO_SAVE) -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them, so that a step is never cut."""
    received: list[int] = []
    with _handled_by(lambda signum, frame: received.append(signum), numbers):
        yield received


def to_end() -> list[int]:
    """What asks a process to end: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is closed),
    the last not where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [*TO_SAVE] if ignored else [*TO_SAVE, signal.SIGHUP]


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes a signal leave the block as SystemExit with 128 + its number.

    `finally` and `with` then end the processes that the block started, where the default action
    would leave them behind. Only for a process that no other rank waits for: one that waits in a
    collective would not see the signal.
    """
    is_leaving = False

    def leave(signum: int, frame: object) -> None:
        nonlocal is_leaving
        if not is_leaving:  # once: what is undone by `finally` is not cut
            is_leaving = True
            raise SystemExit(128 + signum)

    with _handled_by(leave, to_end()):
        yield


@contextmanager
def _handled_by(
    handler: Callable[[int, object], None], numbers: Sequence[int]
) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
