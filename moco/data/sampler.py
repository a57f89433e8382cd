"""The order of the images: a pure function of (seed, global step), whatever the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moco.errors import ConfigError
from moco.seeding import torch_generator

# (number of images, seed, epoch) -> the order of that epoch: a permutation, int64 [num_images].
Order = Callable[[int, int, int], torch.Tensor]


def epoch_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of one epoch: a permutation [num_images], all equally likely."""
    return torch.randperm(num_images, generator=torch_generator(seed, "epoch-order", epoch))


@dataclass(frozen=True)
class BlockOrder:
    """An order that reads packed images block by block, a few blocks at a time.

    A block is a run of `block_size` images in storage. Each epoch puts the blocks into a random
    order and gives every image of the block at place b the key b + blocks_in_flight * u, with u
    uniform in [0, 1); the order is that of the keys, round a circle of as many places as there are
    blocks. So at any moment the next images come from `blocks_in_flight` blocks, evenly, and a
    block is used up and another begun every `block_size` images. With all blocks in flight the
    order is uniform.

    Attributes:
        storage_order: int64 [N], the numbers of the images as they lie in storage.
    """

    storage_order: torch.Tensor
    block_size: int
    blocks_in_flight: int

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.blocks_in_flight < 1:
            raise ConfigError(
                f"block size is {self.block_size}, blocks in flight {self.blocks_in_flight}; "
                "allowed: 1 or more"
            )

    def __call__(self, num_images: int, seed: int, epoch: int) -> torch.Tensor:
        assert num_images == len(self.storage_order)
        num_blocks = -(-num_images // self.block_size)
        in_flight = min(self.blocks_in_flight, num_blocks)
        generator = torch_generator(seed, "block-order", epoch)
        place_of_block = torch.randperm(num_blocks, generator=generator)
        # Float64: with float32, millions of images would share keys, in the order of storage.
        share = torch.rand(num_images, generator=generator, dtype=torch.float64)
        block = torch.arange(num_images) // self.block_size
        key = (place_of_block[block] + in_flight * share) % num_blocks
        return self.storage_order[torch.argsort(key, stable=True)]


class EpochStream:
    """Batch sampler over global steps `first_step` .. `last_step` - 1.

    For each step it yields this rank's list of (epoch, index) keys. A global batch is
    `global_batch` consecutive images of its epoch's order, cut into equal runs by rank: position p
    belongs to rank p // (global_batch / world_size). So no global batch depends on the world size,
    and starting in the middle gives the tail of the full stream. The last, incomplete batch of an
    epoch is dropped, as the reference does.

    Args:
        order: of the images of an epoch, a pure function.
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
        order: Order = epoch_order,
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
        self.order = order

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
                order_epoch, order = epoch, self.order(self.num_images, self.seed, epoch)
            start = batch * self.global_batch + self.rank * self.per_rank
            yield [(epoch, index) for index in order[start : start + self.per_rank].tolist()]
