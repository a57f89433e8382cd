"""Signals are collected, and the handlers before come back."""

from __future__ import annotations

import signal

from moco.signals import caught_signals


def test_signals_are_collected_in_order():
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before
