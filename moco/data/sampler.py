"""The order of the images: a pure function of (seed, global step), whatever the world size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moco.errors import ConfigError
from moco.seeding import torch_generator


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of one epoch: a permutation [num_images]."""
    return torch.randperm(num_images, generator=torch_generator(seed, "epoch-order", epoch))


class EpochStream:
    """Batch sampler over global steps `first_step` .. `last_step` - 1.

    For each step it yields this rank's list of (epoch, index) keys. A global batch is
    `global_batch` consecutive images of its epoch's order, cut into equal runs by rank: position p
    belongs to rank p // (global_batch / world_size). So no global batch depends on the world size,
    and starting in the middle gives the tail of the full stream. The last, incomplete batch of an
    epoch is dropped, as the reference does.

    Raises: ConfigError where the global batch cannot be cut evenly or exceeds the images.
    """

    def __init__(
        self,
        *,
        num_images: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        last_step: int,
    ):
        if global_batch < 1 or global_batch % world_size or num_images < global_batch:
            raise ConfigError(
                f"global batch {global_batch} with {num_images} images on {world_size} processes: "
                f"allowed is a multiple of {world_size} from {world_size} to {num_images}; change "
                "the batch size, the number of processes or the images"
            )
        assert 0 <= rank < world_size and 0 <= first_step <= last_step
        self.num_images = num_images
        self.global_batch = global_batch
        self.per_rank = global_batch // world_size
        self.rank = rank
        self.seed = seed
        self.first_step = first_step
        self.last_step = last_step

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.num_images, self.seed, epoch)
            start = batch * self.global_batch + self.rank * self.per_rank
            yield [(epoch, index) for index in order[start : start + self.per_rank].tolist()]
