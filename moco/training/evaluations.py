"""When the encoder is evaluated between epochs, so that it costs a bounded share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch.nn as nn

from moco import distributed

_CHEAP_SECONDS = 10.0  # an evaluation that takes no longer is never left out

# Evaluates the transfer encoder, on all processes together; must not change it. Its second argument
# says whether the run is to stop; it then returns None.
Evaluate = Callable[[nn.Module, Callable[[], bool]], dict[str, float] | None]


class Evaluations:
    """Calls `evaluate` after every `period` epochs, or less often where that takes too long.

    Args:
        period: epochs; 0: never. max_share: of an epoch's time that an evaluation of more than
            10 s may take, else only every n-th of these epochs is evaluated; 0: no limit.
    """

    def __init__(
        self,
        evaluate: Evaluate | None,
        *,
        period: int,
        max_share: float,
        steps_per_epoch: int,
        say: Callable[[str], None],
    ):
        self.evaluate = evaluate if period else None
        self.period, self.max_share, self.say = period, max_share, say
        self.steps_per_epoch = steps_per_epoch
        self.every = 1
        self.seconds: float | None = None  # of the last evaluation
        self.resumed(0)

    def resumed(self, step: int) -> None:
        """Training goes on after so many finished steps."""
        self._step, self._started = step, time.monotonic()

    def after_epoch(
        self, encoder: nn.Module, step: int, received: list[int], *, last: bool
    ) -> dict[str, float]:
        """Figures after `step` steps, a whole number of epochs; empty where none are due.

        A signal cuts an evaluation short, but not the last: no resume would make up for it.

        Args:
            received: signals that came to this process, see `caught_signals`.
        """
        if self.evaluate is None:
            return {}
        epoch = step // self.steps_per_epoch
        self._choose_period(step)
        if last:
            return self._run(encoder, epoch, None)
        is_due = epoch % (self.period * self.every) == 0
        return self._run(encoder, epoch, received) if is_due else {}

    def _choose_period(self, step: int) -> None:
        if self.seconds is None or step == self._step or not self.max_share:
            return
        # Clocks differ: all processes go by rank 0's.
        steps_per_s = (step - self._step) / (time.monotonic() - self._started)
        epoch_s, own_s = distributed.gather_objects(
            (self.steps_per_epoch / steps_per_s, self.seconds)
        )[0]
        every = math.ceil(own_s / (epoch_s * self.max_share))
        if every > self.every and own_s > _CHEAP_SECONDS:
            self.every = every
            limit = f"KNN.MAX_SHARE {self.max_share:g}"
            self.say(
                f"kNN monitor: an evaluation takes {own_s:.0f} s, an epoch {epoch_s:.0f} s; from "
                f"now on after every {every * self.period} epochs ({limit})"
            )

    def _run(self, encoder: nn.Module, epoch: int, received: list[int] | None) -> dict[str, float]:
        started = time.monotonic()
        figures = self.evaluate(encoder, lambda: bool(received))
        if figures is None:
            self.say(f"kNN evaluation after epoch {epoch}: cut short by a signal")
            return {}
        self.seconds = time.monotonic() - started
        return figures
