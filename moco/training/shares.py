"""That every process trains on the images of its share, and not on others.

Gradients are averaged, so a process that reads the wrong images gives all of them the same weights:
comparing weights does not show it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from moco.data.sampler import EpochStream
from moco.distributed import ProcessInfo, all_gather_cat, gather_objects
from moco.errors import DistributedError


class Shares:
    """The batches of a loader, compared with what this process's rank should get.

    Args:
        loader: of `build_pretrain_loader`; a batch's third entry are the numbers of its images.
        replaces: unreadable images are replaced by others, so that numbers may differ: they are not
            compared.
    """

    def __init__(self, loader: DataLoader, process: ProcessInfo, *, replaces: bool):
        self.loader, self.process, self.replaces = loader, process, replaces
        self.first_wrong = 0  # finished steps, with the first that had other images; 0: none had

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        given: EpochStream = self.loader.batch_sampler
        # Its own, by this process's rank: a loader that was given another's is noticed.
        wanted = EpochStream(
            num_images=given.num_images, global_batch=given.global_batch, seed=given.seed,
            rank=self.process.rank, world_size=self.process.world_size, order=given.order,
            first_step=given.first_step, last_step=given.last_step,
        )  # fmt: skip
        pairs = zip(self.loader, wanted, strict=True)
        for step, (batch, keys) in enumerate(pairs, start=given.first_step + 1):
            if not self.replaces and batch[2].tolist() != [index for _, index in keys]:
                self.first_wrong = self.first_wrong or step
            yield batch

    def check(self, step: int) -> None:
        """Raise DistributedError on all ranks, naming those that had other images."""
        own = torch.tensor([self.first_wrong], device=self.process.device)
        since = all_gather_cat(own).tolist()
        if not any(since):
            return
        hosts = gather_objects(socket.gethostname())
        named = ", ".join(
            f"rank {rank} (host {hosts[rank]}) since step {first}"
            for rank, first in enumerate(since)
            if first
        )
        raise DistributedError(
            f"step {step}: images that are not its share were read by {named}. Resume the job from "
            "its last checkpoint; if it is the same rank again, suspect its machine"
        )
