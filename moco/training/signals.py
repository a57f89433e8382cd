"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them, so that a step is never cut."""
    received: list[int] = []

    def handler(signum: int, frame: object) -> None:
        received.append(signum)

    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
