"""Seconds per training iteration and per test image of both engines, side by side.

Images are loaded before the clock starts, so the figures are of the networks: forward, losses,
backward and update, or the detection of one image. Both engines get the same images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.loader import load_test_sample
from detection.engines import d2
from detection.engines.base import Run
from detection.engines.d2_session import logs_to_file
from detection.engines.embedded.acceleration import accelerate_
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.randomness import build_randomness
from detection.engines.embedded.solver import build_optimizer, set_lr
from detection.engines.session import load_initial_weights
from moco.benchmarks.record import alternate, compare, table, write_results
from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.errors import ConfigError

_FAST = {
    "MODEL.CHANNELS_LAST": True,
    "SOLVER.AMP.ENABLED": True,
    "TEST.AMP.ENABLED": True,
}
_KERNELS = {"MODEL.CHANNELS_LAST": True, "MODEL.COMPILE": "kernels"}
# The sides of this project, and what each sets; the kernels are for CPUs.
_SIDES = {
    "cuda": {"embedded fp32": {}, "embedded fast": _FAST},
    "cpu": {
        "embedded fp32": {},
        "embedded fp32, kernels": _KERNELS,
        "embedded fast, eager": _FAST,
        "embedded fast": {**_FAST, **_KERNELS},
    },
}
# Detectron2's own stream in both, in the main process.
_STREAM = ("DATALOADER.STREAM", "detectron2", "DATALOADER.NUM_WORKERS", "0", "SEED", "0")
_WARM_UP = 2


class Side(Protocol):
    """One engine's network and its inputs, ready to be timed."""

    def train(self, number: int) -> None:
        """One whole iteration on batch `number`: forward, losses, backward, update."""

    def predict(self, number: int) -> None:
        """The detections of test image `number`."""


class EmbeddedSide:
    """See `Side`."""

    def __init__(self, run: Run, count: int):
        self._cfg, self._device = run.cfg, run.process.device
        randomness = build_randomness(run)
        randomness.seed_model()
        self._model = build_model(run.cfg)
        load_initial_weights(self._model, run.cfg, eval_only=False)
        self._model.to(self._device)
        accelerate_(self._model, run.cfg, self._device)
        self._optimizer = build_optimizer(run.cfg, self._model)
        set_lr(self._optimizer, run.cfg, 0)
        self.batches = list(itertools.islice(randomness.training_batches(0), count))
        self._samples = [load_test_sample(record, run.cfg) for record in _test_records(run, count)]

    def train(self, number: int) -> None:
        self._model.train()
        with self._autocast(self._cfg.SOLVER.AMP.ENABLED):
            losses = self._model(self.batches[number])
        _update(losses, self._optimizer)

    @torch.no_grad()
    def predict(self, number: int) -> None:
        self._model.eval()
        with self._autocast(self._cfg.TEST.AMP.ENABLED):
            self._model.inference([self._samples[number]])

    def _autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)


class Detectron2Side:
    """See `Side`."""

    def __init__(self, run: Run, count: int):
        with logs_to_file(None):
            parts = d2.trainer_parts(run)
            self._model, self._optimizer, batches, mapper, self._storage = parts
            self.batches = list(itertools.islice(batches, count))
            self._samples = [mapper(record) for record in _test_records(run, count)]

    def train(self, number: int) -> None:
        self._model.train()
        with self._storage:
            losses = self._model(self.batches[number])
        _update(losses, self._optimizer)

    @torch.no_grad()
    def predict(self, number: int) -> None:
        self._model.eval()
        self._model([self._samples[number]])


def run(
    config_file: str, overrides: Sequence[str], *, num_rounds: int, device: str, output: Path
) -> None:
    """Measure, print tables and write JSON; without Detectron2 only this project is measured.

    Args:
        num_rounds: iterations (and test images) of each side, after `_WARM_UP` more.
        device: "cpu" or "cuda".
    Raises: ConfigError for fewer than 3 rounds, and what reading configuration and data raises.
    """
    if num_rounds < 3:
        raise ConfigError(f"--rounds {num_rounds}: at least 3 are needed for quartiles")
    place, count = torch.device(device), num_rounds + _WARM_UP
    settings = _SIDES[place.type]
    ours = {
        name: EmbeddedSide(_run(_config(config_file, overrides, keys), place), count)
        for name, keys in settings.items()
    }
    batches = ours["embedded fp32"].batches
    sides: dict[str, Side] = dict(ours)
    engine = d2.Detectron2Engine()
    missing = engine.unavailable_reason()
    if missing:
        print(f"Detectron2 is left out: {missing}")
    else:
        theirs = Detectron2Side(_run(_config(config_file, overrides, {}), place), count)
        _check_same_images(batches, theirs.batches)
        sides = {"detectron2 fp32": theirs, **sides}
    baseline = next(iter(sides))
    content = {"settings": settings, "images_per_batch": len(batches[0])}
    for what, method in (("training iteration", "train"), ("test image", "predict")):
        jobs = {name: _timed(getattr(side, method), place) for name, side in sides.items()}
        for job, number in itertools.product(jobs.values(), range(num_rounds, count)):
            job(number)
        content[what] = compare(alternate(jobs, num_rounds), baseline)
        print(f"\n**{what}**, {device}, {torch.get_num_threads()} thread(s)\n")
        print(table(content[what], baseline))
    write_results(output, content, {} if missing else engine.versions())
    print(f"\nwritten: {output}")


def _config(config_file: str, overrides: Sequence[str], keys: dict) -> CfgNode:
    keys = {**dict.fromkeys(_FAST, False), "MODEL.COMPILE": "eager", **keys}
    switches = [str(word) for pair in keys.items() for word in pair]
    return load_detection_config(config_file, [*overrides, *_STREAM, *switches])


def _run(cfg: CfgNode, device: torch.device) -> Run:
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=Path(cfg.OUTPUT_DIR),
        seed=0,
        process=ProcessInfo(0, 1, 0, device),
        config_digest="benchmark",
    )


def _test_records(run: Run, count: int) -> list[dict]:
    return list(itertools.islice(itertools.cycle(run.data.test_records), count))


def _update(losses: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def _check_same_images(ours: Sequence[list[dict]], theirs: Sequence[list[dict]]) -> None:
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        same = len(own) == len(other) and all(
            torch.equal(a["image"], b["image"]) for a, b in zip(own, other, strict=True)
        )
        assert same, f"batch {number} is not the same for both engines"


def _timed(work, device: torch.device):
    if device.type != "cuda":
        return work

    def and_wait(number: int) -> None:
        work(number)
        torch.cuda.synchronize()

    return and_wait
