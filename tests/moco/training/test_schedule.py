"""Learning rates at hand-computed epochs."""

import math

import pytest

from moco.config import load_pretrain_config
from moco.training.schedule import (
    key_momentum,
    learning_rate,
    learning_rate_by_step,
    step_values,
)


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


def test_by_step_warms_up_linearly_and_falls_by_a_cosine():
    rates = [learning_rate_by_step(2.0, s, warmup_steps=4, total_steps=12) for s in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[8] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert learning_rate_by_step(2.0, 0, warmup_steps=0, total_steps=3) == 2.0


def test_momentum_rises_by_a_cosine_to_1():
    found = [key_momentum("cosine", 0.99, step, 100) for step in range(101)]
    assert found[0] == 0.99 and found[100] == 1.0
    assert found[50] == pytest.approx(0.995)
    assert found[25] == pytest.approx(1 - 0.01 * 0.5 * (1 + math.sqrt(0.5)))
    assert all(a < b for a, b in zip(found, found[1:], strict=False))
    assert {key_momentum("constant", 0.99, step, 100) for step in (0, 50, 99)} == {0.99}
    with pytest.raises(ValueError, match="unknown schedule"):
        key_momentum("linear", 0.99, 0, 1)


def test_values_of_a_step_come_from_the_configuration():
    by_epoch = load_pretrain_config(None, ["TRAIN.EPOCHS", "4"])
    rates = [step_values(by_epoch, step, 3) for step in range(12)]
    assert rates[3] == rates[5] == (learning_rate("cosine", 0.03, 1, 4, ()), 0.999)
    words = "TRAIN.EPOCHS 4 TRAIN.SCHEDULE cosine_by_step TRAIN.WARMUP_EPOCHS 1 TRAIN.LR 3.0 "
    words += "MOCO.MOMENTUM_SCHEDULE cosine MOCO.MOMENTUM 0.9"
    by_step = load_pretrain_config(None, words.split())
    assert step_values(by_step, 1, 3) == (2.0, key_momentum("cosine", 0.9, 1, 12))
    assert step_values(by_step, 7, 3)[0] == learning_rate_by_step(
        3.0, 7, warmup_steps=3, total_steps=12
    )
