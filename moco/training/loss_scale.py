"""The factor on the loss that keeps float16's gradients from vanishing (arXiv 1710.03740, 3.2).

The rule is torch.amp.GradScaler's, with its numbers. What differs: nothing is read from the device,
the optimizer's own `found_inf` is shared with `StepGuard`, and a gradient that is not finite at a
factor of 1, which no scaling explains, is an error instead of one more step left out.
"""

from __future__ import annotations

import math

import torch

from moco.errors import CheckpointError

_FIRST, _GROWTH, _BACKOFF, _PATIENCE = 2.0**16, 2.0, 0.5, 2000
_LEAST, _MOST = 1.0, 2.0**24


class LossScale:
    """The factor, a scalar on the device, and how many steps in a row went well with it.

    After 2000 of them it is doubled; after one whose gradient is not finite it is halved, down to
    1, and that step's update is left out.
    """

    def __init__(self, device: torch.device):
        self.factor = torch.full((), _FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, gradients: list[torch.Tensor]) -> None:
        torch._foreach_mul_(gradients, 1.0 / self.factor)

    def overflows(self, norm: torch.Tensor) -> torch.Tensor:
        """Whether the gradient of this norm is not finite, which a smaller factor may mend."""
        return ~torch.isfinite(norm) & (self.factor > _LEAST)

    def update_(self, overflow: torch.Tensor) -> None:
        """After a step; `overflow` as of `overflows`."""
        good_steps = self.good_steps + 1
        grows = good_steps >= _PATIENCE
        factor = torch.where(grows, self.factor * _GROWTH, self.factor)
        factor = torch.where(overflow, self.factor * _BACKOFF, factor)
        self.factor.copy_(factor.clamp(_LEAST, _MOST))
        self.good_steps.copy_(torch.where(overflow | grows, 0, good_steps))

    def state(self) -> dict[str, float | int]:
        """What a checkpoint holds. It waits for the device."""
        return {"factor": self.factor.item(), "good_steps": self.good_steps.item()}

    def load(self, state: object, where: object) -> None:
        """Raises: CheckpointError where `state` is not what `state()` gave."""
        given = state if isinstance(state, dict) else {}
        factor, good_steps = given.get("factor"), given.get("good_steps")
        ok = type(factor) is float and math.isfinite(factor) and _LEAST <= factor <= _MOST
        if not (ok and type(good_steps) is int and 0 <= good_steps < _PATIENCE):
            raise CheckpointError(
                f"{where}: its 'loss_scale' is {str(state)[:80]}; TRAIN.AMP_DTYPE float16 needs "
                f"the factor, {_LEAST:g} to {_MOST:g}, and the good steps of the run it continues"
            )
        self.factor.fill_(factor)
        self.good_steps.fill_(good_steps)
