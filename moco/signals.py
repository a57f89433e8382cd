"""Signals that ask a process to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

Given, Result = TypeVar("Given"), TypeVar("Result")
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


def cut_short(
    work: Callable[[Given], Result], given: Given, received: list[int]
) -> Result | None:
    """`work(given)`, or None where one of the signals has come or comes meanwhile.

    Args:
        work: may be left anywhere: what it changes must not matter, or be undone by `finally`.
        received: of `caught_signals`; a signal that comes meanwhile is added.
    """
    is_working = not received

    def handler(signum: int, frame: object) -> None:
        nonlocal is_working
        received.append(signum)
        if is_working:
            is_working = False  # once: what is undone by `finally` is not cut
            raise _CutShort

    if is_working:
        with suppress(_CutShort), _handled_by(handler):
            result = work(given)
            is_working = False
            return result
    return None


class _CutShort(BaseException):  # no Exception: nothing that catches errors shall catch it
    pass


@contextmanager
def _handled_by(
    handler: Callable[[int, object], None], numbers: Sequence[int] = TO_SAVE
) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
