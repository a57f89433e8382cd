"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

Given, Result = TypeVar("Given"), TypeVar("Result")


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them, so that a step is never cut."""
    received: list[int] = []
    with _handled_by(lambda signum, frame: received.append(signum)):
        yield received


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
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
