"""Whether contrastive training is healthy: figures beside the loss, and one-line warnings.

The figures are computed in the steps that are logged, and cost nothing in the others. Those of a
step's own features and gradient come from the step; here they are set against what they should be.
docs/TRAINING.md says what to make of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moco.methods import Method

_COLLAPSED_STD = 0.02  # untrained ResNets have 0.3 to 0.5
_AT_CHANCE = 0.99  # of log(K + 1)


def queue_age(step: int, *, queue_size: int, keys_per_step: int) -> dict[str, float]:
    """How old the negatives of a step are, in steps; a key of the step before has age 1.

    Args:
        step: from 0; so many times keys were enqueued before it.
    Returns: queue_age_mean and queue_age_max of the keys (0 where there are none yet), and
        queue_random: the share of the queue that still holds its initial noise.
    """
    num_keys = min(queue_size, step * keys_per_step)
    whole, rest = divmod(num_keys, keys_per_step)
    total = keys_per_step * whole * (whole + 1) / 2 + rest * (whole + 1)
    return {
        "queue_age_mean": total / num_keys if num_keys else 0.0,
        "queue_age_max": float(whole + (rest > 0)),
        "queue_random": 1.0 - num_keys / queue_size,
    }


class Health:
    """Completes a step's figures, and warns once of each ailment.

    Args:
        global_batch: images of a step. steps_per_epoch: before so many steps no method without a
            queue is expected to have learned anything.
    """

    def __init__(self, method: Method, *, global_batch: int, steps_per_epoch: int):
        self.chance = method.chance_loss(global_batch)
        self.queue = None
        self.warm_steps = steps_per_epoch
        if hasattr(method, "queue"):
            self.queue = {
                "queue_size": method.queue.shape[1],
                "keys_per_step": method.views_enqueued * global_batch,
            }
            filled = math.ceil(self.queue["queue_size"] / self.queue["keys_per_step"])
            self.warm_steps = max(filled, steps_per_epoch)
        self._warned: set[str] = set()

    def figures(self, step: int, loss: float, measured: Mapping[str, float]) -> dict[str, float]:
        """`measured` of step `step`, from 0, with loss_over_chance and the queue's age."""
        age = queue_age(step, **self.queue) if self.queue else {}
        return {**measured, "loss_over_chance": loss / self.chance, **age}

    def warnings(self, step: int, figures: Mapping[str, float]) -> tuple[str, ...]:
        """Lines about what is wrong in this step and was right, or not looked at, before."""
        found = {}
        if figures.get("feature_std", 1.0) < _COLLAPSED_STD:
            found["collapse"] = (
                f"all features are nearly one vector (feature_std {figures['feature_std']:.2g}, "
                f"below {_COLLAPSED_STD:g}; healthy is near 1): collapse. Lower TRAIN.LR; see that "
                "images differ and batch norm is in the network"
            )
        if step >= self.warm_steps and figures["loss_over_chance"] > _AT_CHANCE:
            found["chance"] = (
                f"the loss is {figures['loss_over_chance']:.3f} times that of equal similarities "
                f"({self.chance:.3f}): nothing is learned. Raise TRAIN.LR, or look at the views"
            )
        if figures["gradient_norm"] == 0:
            found["gradient"] = (
                "the gradient is 0: no weight moves but by decay. Look at the images, and at what "
                "is frozen"
            )
        new = tuple(line for ailment, line in found.items() if ailment not in self._warned)
        self._warned |= found.keys()
        return new
