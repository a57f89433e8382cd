"""What all ranks must hold alike, and the check that they do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moco.distributed import (
    check_equal_across_ranks,
    gather_objects,
    tensors_digest,
    world_size,
)
from moco.errors import DistributedError
from moco.methods import Method
from moco.training.identity import RunIdentity


def check_same_job(identity: RunIdentity) -> None:
    """Raise DistributedError on all ranks, before training, where they were not given the same."""
    if world_size() == 1:
        return
    own = {"configuration": identity.config_digest, "list of images": identity.data_digest}
    given = gather_objects(own)
    for what, digest in given[0].items():
        odd = [number for number, other in enumerate(given) if other[what] != digest]
        if odd:
            raise DistributedError(
                f"before training: the {what} of ranks {odd} is not that of rank 0; start the same "
                "command on every node, on the same images under the same names"
            )


def shared_weights(method: Method) -> dict[str, torch.Tensor]:
    """Parameters of all encoders, and the method's own buffers: queue, pointer, bank.

    Batch-norm statistics are left out: they are each rank's own, as in the reference.
    """
    return {**dict(method.named_parameters()), **dict(method.named_buffers(recurse=False))}


def check_ranks(
    method: Method, optimizer: torch.optim.Optimizer, step: int, device: torch.device
) -> None:
    """Raise DistributedError naming the ranks whose weights, queue or optimizer state differ."""
    shared = shared_weights(method)
    for name, parameter in method.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                shared[f"{key} of {name}"] = value
    check_equal_across_ranks(shared, f"step {step}", device)


def say_that_ranks_agree(method: Method, say: Callable[[str], None]) -> None:
    """After `check_ranks`: the digest of what all processes hold."""
    if world_size() > 1:
        digest = tensors_digest(shared_weights(method))[:16]
        say(f"all {world_size()} processes hold the same weights and queue (sha256 {digest})")
