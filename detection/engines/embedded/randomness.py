"""Where the random draws of a run come from: its first weights, its batches, its steps.

`StatelessRandomness` is the default. `Detectron2Randomness` (DATALOADER.STREAM "detectron2")
draws as Detectron2's trainer does, whose generators are seeded once and then go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from detection.data.detectron2_stream import Detectron2Stream
from detection.data.loader import SampleDraw, train_loader
from detection.data.sample_loader import Loader
from detection.engines.base import Run
from detection.engines.session import own_part
from moco.errors import CheckpointError
from moco.seeding import derive_seed


class Randomness(Protocol):
    """The calls of the engine, in this order; `states` and `restore` are for its checkpoints."""

    def seed_model(self) -> None:
        """Before the model is built."""

    def training_batches(self, start_iteration: int) -> Loader:
        """The batches of this rank."""

    def seed_step(self, iteration: int) -> None:
        """Before each iteration: RPN and ROI heads sample with torch's global generator."""

    def precise_bn_batches(self) -> Loader:
        """The batches of precise batch norm; what its forward passes draw is seeded too. It comes
        before each evaluation during training, and at the end."""

    def pass_evaluation(self) -> None:
        """Before an evaluation during training, also where a resumed run has done it already."""

    def states(self) -> list[dict] | None:
        """What a resumed run needs, of every rank (call it on all); None: nothing."""

    def restore(self, states: list[dict] | None, where: Path) -> None:
        """Go on from `states`, which the file `where` holds, once the batches are asked for.

        Raises: CheckpointError where they are not those of this run's ranks.
        """


def build_randomness(run: Run) -> Randomness:
    """By DATALOADER.STREAM."""
    if run.cfg.DATALOADER.STREAM == "detectron2":
        return Detectron2Randomness(run)
    return StatelessRandomness(run)


class StatelessRandomness:
    """Every draw is a function of (seed, purpose, iteration, rank)."""

    def __init__(self, run: Run):
        self._run = run

    def seed_model(self) -> None:
        torch.manual_seed(derive_seed(self._run.seed, "detection-init"))

    def training_batches(self, start_iteration: int) -> Loader:
        return self._loader(self._run.seed, start_iteration)

    def seed_step(self, iteration: int) -> None:
        self._seed_step(self._run.seed, iteration)

    def precise_bn_batches(self) -> Loader:
        seed = derive_seed(self._run.seed, "precise-bn")
        self._seed_step(seed, 0)
        return self._loader(seed, 0)

    def pass_evaluation(self) -> None:
        pass

    def states(self) -> None:
        return None

    def restore(self, states: list[dict] | None, where: Path) -> None:
        pass

    def _seed_step(self, seed: int, iteration: int) -> None:
        rank = self._run.process.rank
        torch.manual_seed(derive_seed(seed, "detection-step", iteration, rank))

    def _loader(self, seed: int, start_iteration: int) -> Loader:
        run = self._run
        return train_loader(
            run.data.train_records,
            run.cfg,
            seed=seed,
            start_iteration=start_iteration,
            rank=run.process.rank,
            world_size=run.process.world_size,
            num_workers=run.cfg.DATALOADER.NUM_WORKERS,
        )


class Detectron2Randomness:
    """Torch is seeded once; `Detectron2Stream` has numpy's part.

    A resumed run replays all draws of the stream up to its iteration, and gets torch's
    generators from its checkpoint.
    """

    def __init__(self, run: Run):
        process = run.process
        self._process, self._num_processes = process, run.cfg.DATALOADER.NUM_WORKERS
        self._num_iterations = run.cfg.SOLVER.MAX_ITER
        self._saved: dict | None = None
        self._started = False
        own_images = own_part(len(run.data.test_records), process)
        self._stream = Detectron2Stream(
            run.data.train_records,
            run.cfg,
            seed=run.seed,
            rank=process.rank,
            world_size=process.world_size,
            num_test_images=own_images.stop - own_images.start,
        )

    def seed_model(self) -> None:
        self._stream.seed_torch()

    def training_batches(self, start_iteration: int) -> Loader:
        draws = self._training_draws(start_iteration)
        return self._stream.load(draws, num_processes=self._num_processes)

    def seed_step(self, iteration: int) -> None:
        pass

    def precise_bn_batches(self) -> Loader:
        if not self._started:  # a resumed run that had only this left
            self._training_draws(self._num_iterations)
        draws = self._stream.precise_bn_draws()
        return self._stream.load(draws, num_processes=self._num_processes)

    def pass_evaluation(self) -> None:
        self._stream.draw_evaluation()

    def states(self) -> list[dict]:
        own = _torch_states(self._process.device)
        if self._process.world_size == 1:
            return [own]
        states = [None] * self._process.world_size
        dist.all_gather_object(states, own)
        return states

    def restore(self, states: list[dict] | None, where: Path) -> None:
        found = [", ".join(state) for state in states or ()]
        wanted = [", ".join(_torch_states(self._process.device))] * self._process.world_size
        if found != wanted:
            raise CheckpointError(
                f"{where}: holds the random generators of {found}, this run needs {wanted}; "
                "DATALOADER.STREAM detectron2 goes on with as many processes as it began with, on "
                "the same kind of device"
            )
        self._saved = states[self._process.rank]

    def _training_draws(self, start_iteration: int) -> Iterator[list[SampleDraw]]:
        draws = self._stream.training_draws(start_iteration)
        self._started = True
        if self._saved is not None:
            _set_torch_states(self._saved, self._process.device)
        return draws


def _torch_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_torch_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
