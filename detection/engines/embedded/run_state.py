"""What the embedded engine's checkpoints hold; `detection.engines.run_files` writes and finds them.

The layout is near Detectron2's (fvcore/common/checkpoint.py): {"model", "optimizer", "iteration",
...}.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from detection.engines.base import Run
from detection.engines.embedded.randomness import Randomness
from detection.engines.run_files import load_optimizer, read_state, write_state
from moco.errors import CheckpointError
from moco.training.optimizer import plain_state

ENGINE = "embedded"


def save_state(
    run: Run,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    random_states: list[dict] | None = None,
    recent_losses: list[list[float]] | None = None,
    **fields: object,
) -> None:
    """Write one checkpoint and remove older ones; call it on rank 0 only.

    Args:
        random_states: `Randomness.states()`, of all ranks.
        recent_losses: of `Progress`.
        fields: more of the manifest.
    """
    content = {"model": model.state_dict(), "optimizer": plain_state(optimizer)}
    if random_states is not None:
        content["random_states"] = random_states
    if recent_losses is not None:
        content["recent_losses"] = recent_losses
    write_state(run, path, content, iteration=iteration, engine=ENGINE, **fields)


def load_state(
    run: Run,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    randomness: Randomness | None = None,
) -> dict:
    """Copy a checkpoint into what is given; returns its whole content.

    Raises: CheckpointError where it belongs to another configuration, seed or model.
    """
    content = read_state(run, path, engine=ENGINE, keys=("model", "optimizer"))
    try:
        model.load_state_dict(content["model"])
        if optimizer is not None:
            load_optimizer(optimizer, content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit: {' '.join(str(error).split())}") from error
    if randomness is not None:
        randomness.restore(content.get("random_states"), path)
    return content
