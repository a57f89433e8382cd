"""After which epochs the encoder is evaluated, what it may cost, and what a signal does to it."""

from __future__ import annotations

import pytest
import torch.nn as nn

from moco.training import evaluations
from moco.training.evaluations import Evaluations

ENCODER = nn.Identity()


class Clock:
    """Stands for the time: epochs and evaluations take what the test says."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(evaluations, "time", clock)
    return clock


def run(clock, *, num_epochs, epoch_s, evaluation_s, period=1, max_share=0.25, first_epoch=0):
    """Epochs that were evaluated, and what was said."""
    evaluated, said = [], []

    def evaluate(encoder, stop):
        clock.now += evaluation_s
        return {"knn_top1": 1.0}

    job = Evaluations(
        evaluate, period=period, max_share=max_share, steps_per_epoch=10, say=said.append
    )
    for epoch in range(first_epoch, num_epochs + 1):
        if epoch > first_epoch:
            clock.now += epoch_s
        if job.after_epoch(ENCODER, 10 * epoch, [], last=epoch == num_epochs):
            evaluated.append(epoch)
        job.resumed(10 * epoch)
    return evaluated, said


def test_a_cheap_evaluation_comes_after_every_epoch(clock):
    assert run(clock, num_epochs=4, epoch_s=100, evaluation_s=25) == ([0, 1, 2, 3, 4], [])
    assert run(clock, num_epochs=5, epoch_s=100, evaluation_s=1, period=2) == ([0, 2, 4, 5], [])


def test_one_that_takes_long_comes_less_often_and_that_is_said(clock):
    evaluated, said = run(clock, num_epochs=7, epoch_s=100, evaluation_s=70)
    assert evaluated == [0, 3, 6, 7]  # 70 s of 3 x 100 s are below a quarter
    assert said == [
        "kNN monitor: an evaluation takes 70 s, an epoch 100 s; from now on after every 3 epochs "
        "(KNN.MAX_SHARE 0.25)"
    ]
    assert run(clock, num_epochs=3, epoch_s=1, evaluation_s=70, max_share=0)[0] == [0, 1, 2, 3]
    assert run(clock, num_epochs=9, epoch_s=100, evaluation_s=40, period=2)[0] == [0, 4, 8, 9]
    assert run(clock, num_epochs=3, epoch_s=1, evaluation_s=9)[0] == [0, 1, 2, 3]  # seconds


def test_after_a_resume_the_first_evaluation_decides(clock):
    evaluated, said = run(clock, num_epochs=9, epoch_s=100, evaluation_s=70, first_epoch=3)
    assert evaluated == [3, 6, 9] and len(said) == 1


def test_a_signal_cuts_all_but_the_last(clock):
    said = []

    def evaluate(encoder, stop):
        return None if stop() else {"knn_top1": 1.0}

    job = Evaluations(evaluate, period=1, max_share=0.25, steps_per_epoch=10, say=said.append)
    assert job.after_epoch(ENCODER, 10, [15], last=False) == {}
    assert said == ["kNN evaluation after epoch 1: cut short by a signal"]
    assert job.after_epoch(ENCODER, 20, [15], last=True) == {"knn_top1": 1.0}


def test_without_a_monitor_or_a_period_nothing_is_evaluated():
    for evaluate, period in ((None, 1), (pytest.fail, 0)):
        job = Evaluations(evaluate, period=period, max_share=0.25, steps_per_epoch=10, say=print)
        assert job.after_epoch(ENCODER, 10, [], last=True) == {}
