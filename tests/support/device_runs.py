"""What the project does on a GPU, done on the pretend one: tiny runs, and the waits of one step.

Every run sees the code a user runs: loader, prefetch, step with its guard; the loops of the
evaluations and of the detector. A step is measured once the run is warm, and not where it logs.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import linear_runs
import numpy as np
import tiny
import torch
from PIL import Image

from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.evaluation import knn_evaluation, knn_search
from moco.evaluation.linear import LinearTrainer, evaluate_linear
from moco.methods import build_method
from moco.training import trainer as trainer_module
from moco.training.acceleration import accelerate_, resolve
from moco.training.batch import build_loader
from moco.training.guard import StepGuard, skips_updates
from moco.training.nonfinite import NonFiniteReport
from moco.training.optimizer import build_optimizer
from moco.training.prefetch import ahead_on_device
from moco.training.step import train_step
from support.pretend_cuda import DEVICE, MixedDevices, Record, is_on_device, pretend_cuda

PROCESS = ProcessInfo(0, 1, 0, DEVICE)
# Of a step: what its loader gives, how precise it is.
BACKENDS = {
    "opencv": {},
    "device": {"AUGMENT__BACKEND": "device"},
    "resident": {"AUGMENT__BACKEND": "device", "AUGMENT__RESIDENT": True},
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"TRAIN__AMP": True, "TRAIN__CHANNELS_LAST": True},
}
_WARM = 2  # steps: the second still makes momentum, constants, the guard's first event


@dataclass
class Outcome:
    """Of one run: waits of a step by (kind, place), and the message where devices were mixed."""

    name: str
    unit: str = "step"
    waits: dict[tuple[str, str], float] = field(default_factory=dict)
    mixed: str = ""

    @property
    def num_waits(self) -> float:
        return sum(self.waits.values())


def make_images(root: Path) -> Path:
    """Class folders train/{a,b} with 24 images of 20 pixels and val/{a,b} with 8."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 12), ("val", 4)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def measure(name: str, work: Callable[[Record, Outcome], None], unit: str = "step") -> Outcome:
    """Run `work` on the pretend device; it fills the outcome's waits."""
    outcome = Outcome(name, unit)
    with pretend_cuda() as record:
        try:
            work(record, outcome)
        except MixedDevices as error:
            outcome.mixed = str(error)
    return outcome


def pretraining_step(
    images: Path, variant: str, backend: str = "opencv", precision: str = "fp32", **changes: object
) -> Outcome:
    """A warm step of a method, from its loader to its update."""
    keys = {**BACKENDS[backend], **PRECISIONS[precision], **changes}
    if "ViT" in variant:
        keys["TRAIN__CHANNELS_LAST"] = False
    cfg = tiny.method_config(variant, **{"TRAIN__BATCH_SIZE": 4, "MOCO__QUEUE_SIZE": 8, **keys})

    def work(record: Record, outcome: Outcome) -> None:
        resolved, source = resolve(cfg, DEVICE).cfg, find_images(str(images / "train"))
        torch.manual_seed(0)
        method = build_method(resolved, len(source)).to(DEVICE).train()
        accelerate_(method, resolved)
        optimizer = build_optimizer(resolved, method)
        delayed = skips_updates(optimizer, PROCESS)
        guard = StepGuard(PROCESS, NonFiniteReport(method, PROCESS), delayed=delayed)
        loader = build_loader(
            resolved, source, PROCESS, first_step=0, last_step=_WARM + 2
        )
        for step, batch in enumerate(ahead_on_device(loader, DEVICE)):
            if step == _WARM:
                record.clear()
            if step == _WARM + 1:
                outcome.waits = dict(record.waits)
                break
            result = train_step(
                method, method, optimizer, batch, step=step, lr=0.1, momentum=0.9, cfg=resolved,
                process=PROCESS, guard=guard, measure=False,
            )  # fmt: skip
        guard.settle()
        state = {"loss": result.loss, **method.state_dict()}
        assert not [name for name, tensor in state.items() if not is_on_device(tensor)]

    words = [variant, backend, precision, *(f"{k.split('__')[-1]} {v}" for k, v in changes.items())]
    return measure(", ".join(words), work)


@contextlib.contextmanager
def _between_calls(
    owner: object, name: str, record: Record, waits: list[collections.Counter]
) -> Iterator[None]:
    """Append what happened from one call of `owner.name` to the next."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def counting(*args, **kwargs):
        waits.append(collections.Counter(record.waits))
        record.clear()
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counting):
        yield


def pretraining_run(images: Path, folder: Path, **changes: object) -> Outcome:
    """A step of a whole run by `Trainer`, with its checkpoints, and its continuation."""
    keys = {"LOG__PERIOD": 1000, "TRAIN__EPOCHS": 2, "TRAIN__RANK_CHECK_PERIOD": 0, **changes}

    def work(record: Record, outcome: Outcome) -> None:
        cfg, source, waits = tiny.config(**keys), find_images(str(images / "train")), []
        one = trainer_module.Trainer(cfg, source, folder, PROCESS, say=lambda line: None)
        with _between_calls(trainer_module, "train_step", record, waits):
            assert one.train() == 0
        # Three steps an epoch: from the second step to the third of the first.
        outcome.waits = dict(waits[2])
        again = trainer_module.Trainer(
            tiny.config(**{**keys, "TRAIN__EPOCHS": 3}), source, folder, PROCESS, resume=True,
            allow_change=["TRAIN.EPOCHS"], say=lambda line: None,
        )  # fmt: skip
        assert again.train() == 0

    words = ", ".join(f"{k.split('__')[-1]} {v}" for k, v in changes.items())
    return measure(f"whole run, continued{', ' + words if words else ''}", work)


def linear_step(images: Path, weights: str, folder: Path, **changes: object) -> Outcome:
    """A step of linear classification or fine-tuning that does not log."""

    def work(record: Record, outcome: Outcome) -> None:
        waits: list[collections.Counter] = []
        keys = {"LOG__PERIOD": 1000, "TRAIN__BATCH_SIZE": 6, **changes}
        with _between_calls(LinearTrainer, "_step", record, waits):
            evaluate_linear(
                linear_runs.config(**keys), weights, str(images), folder, PROCESS,
                say=lambda line: None,
            )  # fmt: skip
        outcome.waits = dict(waits[2])

    words = ", ".join(f"{k.split('__')[-1]} {v}" for k, v in changes.items()) or "frozen"
    return measure(f"linear, {words}", work)


def linear_test_batch(images: Path, weights: str, folder: Path) -> Outcome:
    """A batch of test images: what two more of them cost."""

    def total(record: Record, batch_size: int) -> collections.Counter:
        record.clear()
        keys = {"TRAIN__EPOCHS": 1, "LOG__PERIOD": 1000, "EVAL__BATCH_SIZE": batch_size}
        evaluate_linear(
            linear_runs.config(**keys), weights, str(images), folder / str(batch_size), PROCESS,
            say=lambda line: None,
        )  # fmt: skip
        return collections.Counter(record.waits)

    def work(record: Record, outcome: Outcome) -> None:
        outcome.waits = _difference(total(record, 1), total(record, 4), 8 - 2)

    return measure("linear, test images", work, unit="batch")


def _difference(more: collections.Counter, less: collections.Counter, num: int) -> dict:
    return {key: n / num for key, n in (more - less).items()}


def knn_block(images: Path, weights: str, features: str = "backbone") -> Outcome:
    """A block of training features of kNN, and the batches in it: what more of them cost."""

    def total(record: Record, block: int) -> collections.Counter:
        record.clear()
        with mock.patch.object(knn_search, "BLOCK", block):
            knn_evaluation.evaluate_knn(
                knn_evaluation.KnnSettings((5,), features=features, size=16), weights, str(images),
                None, PROCESS, batch_size=block, num_workers=0, say=lambda line: None,
            )  # fmt: skip
        return collections.Counter(record.waits)

    def work(record: Record, outcome: Outcome) -> None:
        total(record, 12)  # makes the constants that are kept
        outcome.waits = _difference(total(record, 4), total(record, 12), 24 // 4 - 24 // 12)

    return measure(f"kNN, {features}", work, unit="block")


def all_runs(folder: Path) -> Iterator[Outcome]:
    """Every run of the table, in its order."""
    images = make_images(folder / "images")
    weights = linear_runs.write_weights(folder)
    for variant in tiny.VARIANTS:
        for backend in BACKENDS:
            for precision in PRECISIONS:
                yield pretraining_step(images, variant, backend, precision)
    for variant in ("moco", "moco_symmetric", "memory_bank", "moco_v3"):
        yield pretraining_step(images, variant, TRAIN__ACCUMULATION_STEPS=2, MODEL__BN_SPLITS=1)
    yield pretraining_run(images, folder / "run")
    yield pretraining_run(images, folder / "device", **BACKENDS["device"])
    yield linear_step(images, weights, folder / "frozen")
    yield linear_step(images, weights, folder / "bf16", TRAIN__AMP=True, TRAIN__CHANNELS_LAST=True)
    yield linear_step(images, weights, folder / "tuned", FINETUNE__ENABLED=True)
    yield linear_test_batch(images, weights, folder / "test")
    yield knn_block(images, weights)
    from support import detector_runs

    yield from detector_runs.all_runs(folder)
