"""Learning rates at hand-computed epochs."""

import math

import pytest

from moco.training.schedule import learning_rate


def test_cosine_falls_per_epoch_from_the_base_rate():
    rates = [learning_rate("cosine", 0.03, e, 200, ()) for e in range(200)]
    assert rates[0] == 0.03
    assert rates[100] == pytest.approx(0.015)
    assert rates[50] == pytest.approx(0.03 * 0.5 * (1 + math.sqrt(0.5)))
    assert rates[199] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 199 / 200)))
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


@pytest.mark.parametrize(
    "epoch, factor", [(0, 1), (119, 1), (120, 0.1), (159, 0.1), (160, 0.01), (199, 0.01)]
)
def test_step_falls_tenfold_at_each_milestone(epoch, factor):
    assert learning_rate("step", 0.03, epoch, 200, (120, 160)) == pytest.approx(0.03 * factor)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule"):
        learning_rate("poly", 0.1, 0, 1, ())
