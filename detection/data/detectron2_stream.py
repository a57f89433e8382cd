"""Detectron2's own training stream, replayed (DATALOADER.STREAM "detectron2").

To reproduce a run of Detectron2's trainer, give `detection/train_net.py --engine embedded` its
YAML file, its SEED (0 or more), DATALOADER.NUM_WORKERS and number of GPUs, and

    DATALOADER.STREAM detectron2

The same images then come in the same order and batches, in the same sizes, flipped or not. In one
process on a CPU in fp32 the embedded engine leaves the same `model_final`, bit for bit; on GPUs the
stream is the same and the model differs by rounding, which training amplifies.

What decides about the stream there, for rank r of W with n loader workers and b images a batch:

- numpy and torch are seeded with SEED + r once, before the model is built.
- The sampler has a generator of its own, seeded with SEED on every rank: permutation after
  permutation, of which rank r takes every W-th image.
- Each worker walks that row by itself and takes every n-th chunk of b images. It draws size and
  flip from its own numpy, seeded with (s + worker) % 2^31 + worker, where s is one draw of torch's
  global generator when the loader starts. Without workers the main process's numpy draws.
- The workers deliver in turn, image by image, and wide and tall images are then batched apart;
  without grouping each worker makes its own batches, delivered in turn.
- Precise batch norm has a second loader, without workers: the order starts anew, sizes and flips
  go on with the main process's numpy, and torch's global generator is drawn from once more. With
  TEST.EVAL_PERIOD it goes on with that loader at each evaluation.
- An evaluation starts a loader too, which draws from torch's global generator; without workers the
  main process's numpy draws the (one) size of each test image.

Only the draws are replayed here, in the main process, all workers' numpys included. The images are
loaded by any number of processes, which draw nothing.

Source of the rules: Detectron2's main branch since December 2024 (engine/defaults.py, utils/env.py,
data/build.py, data/common.py, data/samplers/distributed_sampler.py, data/transforms). Before, its
release 0.6 of 2021 included, numpy drew the seed of the sampler, and until July 2023 workers took
single images in turn: runs of that age are not reproduced.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from detection.data.loader import (
    Augmentation,
    Draw,
    SampleDraw,
    batch_share,
    drawn_loader,
    global_batches,
    usable_records,
    wide_images,
)
from detection.data.sample_loader import Loader
from moco.cfgnode import CfgNode


class Detectron2Stream:
    """The stream of one rank from the first image to those of precise batch norm.

    Make it, then call `seed_torch` before the model is built, `training_draws` after; at each
    evaluation `precise_bn_draws` and `draw_evaluation`, and at the end the former; `load` loads
    draws.

    Args:
        records: the training records, in Detectron2's order.
        seed: SEED of the run, 0 or more.
        num_test_images: of this rank.
    Raises: ConfigError, DataError as `train_loader`.
    """

    def __init__(
        self,
        records: Sequence[dict],
        cfg: CfgNode,
        *,
        seed: int,
        rank: int,
        world_size: int,
        num_test_images: int = 0,
    ):
        self._share = batch_share(cfg, world_size)
        self._records = usable_records(records, cfg)
        self._is_wide = wide_images(self._records, cfg)
        self._augmentation = Augmentation.from_config(cfg)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._num_workers = cfg.DATALOADER.NUM_WORKERS
        self._num_iterations = cfg.SOLVER.MAX_ITER
        self._num_precise_bn = cfg.TEST.PRECISE_BN.NUM_ITER
        self._is_precise = cfg.TEST.PRECISE_BN.ENABLED
        self._precise_bn: Iterator[list[SampleDraw]] | None = None
        self._eval_period, self._num_test_images = cfg.TEST.EVAL_PERIOD, num_test_images
        self.main_numpy = np.random.RandomState(seed + rank)

    def seed_torch(self) -> None:
        """Seed torch's global generators."""
        torch.manual_seed(self._seed + self._rank)

    def training_draws(self, start_iteration: int) -> Iterator[list[SampleDraw]]:
        """The batches of iterations `start_iteration` to MAX_ITER - 1.

        Draws once from torch's global generator, as the loader of a fresh run does; the batches
        before are drawn again, without loading them.
        """
        base_seed = _draw_base_seed()
        randoms = worker_randoms(base_seed, self._num_workers) or [self.main_numpy]
        # The end keeps a loader that works ahead from draws that belong to precise batch norm.
        draws = itertools.islice(self._batches(randoms), self._num_iterations)
        for num_done in range(1, start_iteration + 1):
            next(draws)
            if self._evaluates_after(num_done):
                if self._is_precise:
                    deque(self.precise_bn_draws(), maxlen=0)
                if num_done < start_iteration:  # else the resumed run passes it
                    self.draw_evaluation()
        return draws

    def precise_bn_draws(self) -> Iterator[list[SampleDraw]]:
        """The next TEST.PRECISE_BN.NUM_ITER batches of precise batch norm.

        Draws from torch's global generator where they are the first.
        """
        if self._precise_bn is None:
            _draw_base_seed()
            self._precise_bn = self._batches([self.main_numpy])
        return itertools.islice(self._precise_bn, self._num_precise_bn)

    def draw_evaluation(self) -> None:
        """What an evaluation draws from torch's global generator and the main process's numpy."""
        _draw_base_seed()
        if self._num_workers == 0:
            for _ in range(self._num_test_images):
                self.main_numpy.choice((0, 0))

    def _evaluates_after(self, num_done: int) -> bool:
        is_inside = num_done < self._num_iterations
        return self._eval_period > 0 and is_inside and num_done % self._eval_period == 0

    def load(self, draws: Iterator[list[SampleDraw]], *, num_processes: int) -> Loader:
        """The samples of `draws`, loaded by any number of processes: it changes none."""
        return drawn_loader(self._records, self._augmentation, draws, num_workers=num_processes)

    def _batches(self, randoms: list[np.random.RandomState]) -> Iterator[list[SampleDraw]]:
        """The endless batches of one loader, whose workers draw from `randoms`."""
        workers = [
            self._worker(number, len(randoms), random) for number, random in enumerate(randoms)
        ]
        if self._is_wide is None:
            return in_turn([_batched(draws, self._share) for draws in workers])
        return global_batches(in_turn(workers), self._is_wide, self._share)

    def _worker(
        self, number: int, num_workers: int, random: np.random.RandomState
    ) -> Iterator[SampleDraw]:
        order = rank_order(len(self._records), self._seed, self._rank, self._world_size)
        for draw in worker_part(order, number, num_workers, self._share):
            yield SampleDraw(*draw, *draw_augmentation(random, self._augmentation))


def rank_order(num_images: int, seed: int, rank: int, world_size: int) -> Iterator[Draw]:
    """The endless (position, record index) of one rank."""
    generator = torch.Generator().manual_seed(seed)

    def everyones() -> Iterator[int]:
        while True:
            yield from torch.randperm(num_images, generator=generator).tolist()

    return enumerate(itertools.islice(everyones(), rank, None, world_size))


def worker_part(order: Iterator[Draw], worker: int, num_workers: int, chunk: int) -> Iterator[Draw]:
    """What one worker takes of its rank's order: every `num_workers`-th chunk."""
    return (draw for draw in order if draw[0] // chunk % num_workers == worker)


def worker_randoms(base_seed: int, num_workers: int) -> list[np.random.RandomState]:
    """The numpy generator of each worker process, as Detectron2 seeds it."""
    seeds = [(base_seed + worker) % 2**31 + worker for worker in range(num_workers)]
    return [np.random.RandomState(seed) for seed in seeds]


def draw_augmentation(
    random: np.random.RandomState, augmentation: Augmentation
) -> tuple[int, bool]:
    """(short edge in pixels, whether to flip), drawn as ResizeShortestEdge and RandomFlip do."""
    if augmentation.sampling == "range":
        low, high = augmentation.short_edges
        short_edge = random.randint(low, high + 1)
    else:
        short_edge = random.choice(augmentation.short_edges)
    # Without flips nothing is drawn for them.
    flip = augmentation.flip == "horizontal" and random.uniform() < 0.5
    return int(short_edge), flip


def in_turn(streams: list[Iterator]) -> Iterator:
    """One item of each endless stream after another."""
    return itertools.chain.from_iterable(zip(*streams, strict=True))


def _batched(draws: Iterator[SampleDraw], size: int) -> Iterator[list[SampleDraw]]:
    while True:
        yield list(itertools.islice(draws, size))


def _draw_base_seed() -> int:
    """What torch's DataLoader draws from the global generator when its iterator is made."""
    return torch.empty((), dtype=torch.int64).random_().item()
