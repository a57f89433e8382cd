"""Signals are collected; an evaluation is left at once when one comes."""

from __future__ import annotations

import signal
import time

import pytest

from moco.signals import caught_signals, cut_short


def stop_at(steps):
    """Work of which only `steps` parts are done before a signal comes."""

    def work(done):
        try:
            for number in range(10):
                if number == steps:
                    signal.raise_signal(signal.SIGTERM)
                    time.sleep(0)
                done.append(number)
        except Exception:  # what catches errors does not catch the signal
            done.append("swallowed")
        finally:
            done.append("undone")
        return "result"

    return work


def test_a_signal_leaves_the_work_at_once_and_runs_what_undoes_it():
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals() as received:
        collecting, done = signal.getsignal(signal.SIGTERM), []
        assert cut_short(stop_at(3), done, received) is None
        assert (done, received) == ([0, 1, 2, "undone"], [signal.SIGTERM])
        assert signal.getsignal(signal.SIGTERM) is collecting
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_signal_the_work_is_done_and_after_one_it_is_not_begun():
    with caught_signals() as received:
        assert cut_short(stop_at(None), [], received) == "result"
        signal.raise_signal(signal.SIGINT)
        done = []
        assert cut_short(stop_at(None), done, received) is None
        assert (done, received) == ([], [signal.SIGINT])


def test_an_error_of_the_work_passes_and_further_signals_are_only_collected():
    def fail(given):
        raise RuntimeError(given)

    def twice(given):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            given.append("undone")

    with caught_signals() as received:
        with pytest.raises(RuntimeError, match="broken"):
            cut_short(fail, "broken", received)
        done = []
        assert cut_short(twice, done, received) is None
        assert done == ["undone"] and received == [signal.SIGTERM] * 2
