"""Whether training loses time between its parts: the whole loop beside data and step alone.

The loop is `Trainer`'s own, on JPEG files. It cannot be faster than the slower of its loader alone
and its step alone, which are measured in turns with it. Further: the seconds from the start of a
process to its first step, and what checkpoints and log records take of the time of a step.

On a CPU, loader workers and the step share the cores. `threads` leaves room for the workers; the
step alone gets the same number.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moco import distributed
from moco.benchmarks.pictures import natural_jpeg
from moco.benchmarks.record import alternate, write_results
from moco.cfgnode import CfgNode
from moco.child_processes import end_with_parent, running
from moco.config import load_pretrain_config
from moco.data.images import ImageSource, find_images
from moco.data.subset import SubsetSource
from moco.distributed import ProcessInfo
from moco.errors import ConfigError
from moco.methods import build_method
from moco.training.acceleration import accelerate_, resolve
from moco.training.batch import build_loader
from moco.training.optimizer import build_optimizer
from moco.training.prefetch import ahead_on_device
from moco.training.progress import ConsoleProgress, EpochRecord, JsonLog, StepRecord, TensorBoardLog
from moco.training.step import train_step
from moco.training.trainer import Trainer

DEFAULT_WORDS = ("DATA.SIZE", "112", "TRAIN.BATCH_SIZE", "16")
_IMAGE_SIZE = (500, 400)


@dataclass(frozen=True)
class Options:
    """What is measured.

    overrides: KEY VALUE pairs. workers: numbers of loader workers, one loop each. num_steps: of a
    round, the last of which is logged (20 is the default of LOG.PERIOD); the loop does as many
    before, unmeasured. epoch_images: of the epoch over which a checkpoint's cost is spread.
    threads: of the step on a CPU; None for the cores that the workers leave, at least one.
    """

    overrides: Sequence[str] = DEFAULT_WORDS
    workers: Sequence[int] = (1, 2)
    num_steps: int = 20
    num_rounds: int = 5
    device: str = "cpu"
    threads: int | None = None
    epoch_images: int = 50_000


def run(options: Options, *, folder: str | None, output: Path) -> None:
    """Measure, print, write JSON.

    Args:
        folder: of images; None generates JPEG files.
    Raises: ConfigError for fewer than 3 rounds, no workers, or too few images.
    """
    if options.num_rounds < 3:
        raise ConfigError(f"--rounds {options.num_rounds}: at least 3 are needed for quartiles")
    if not options.workers or min(options.workers) < 1:
        raise ConfigError(f"--workers {list(options.workers)}: allowed are numbers of 1 or more")
    process = distributed.setup_process(options.device)
    threads = options.threads or max(1, (os.cpu_count() or 1) - max(options.workers))
    torch.set_num_threads(threads)
    print(f"the step has {threads} thread(s)", flush=True)
    words = [*options.overrides, "KNN.PERIOD", "0"]
    resolved = resolve(load_pretrain_config(None, words), process.device)
    print(resolved.text, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = _images(folder, Path(scratch) / "images", resolved.cfg, options.num_steps)
        bench = _Bench(resolved.cfg, source, process, options.num_steps, Path(scratch))
        loops = {}
        for num_workers in options.workers:
            loops[num_workers] = row = bench.compare_loop(num_workers, options.num_rounds)
            print(_loop_in_words(num_workers, row), flush=True)
        costs = bench.costs(options.num_rounds, options.epoch_images)
        print(_costs_in_words(costs, options.epoch_images), flush=True)
        startup = seconds_to_first_step(words, str(source.root), options.device, threads)
    print(
        f"first step {startup['total_s']:.1f} s after the start of the process: imports "
        f"{startup['imports_s']:.1f}, building {startup['building_s']:.1f}, first batch and step "
        f"{startup['first_step_s']:.1f}"
    )
    content = {
        "words": list(options.overrides), "device": options.device, "threads": threads,
        "step": resolved.text, "loops": loops, "costs": costs, "startup": startup,
    }  # fmt: skip
    write_results(output, content)
    print(f"written: {output}")


class _Bench:
    """One configuration with its network, its images and a place for its runs."""

    def __init__(
        self, cfg: CfgNode, source: ImageSource, process: ProcessInfo, num_steps: int, place: Path
    ):
        self.cfg, self.source, self.process = cfg, source, process
        self.num_steps, self.place, self.num_runs = num_steps, place, 0
        self.saves: list[float] = []
        self.logs: list[float] = []
        method = build_method(cfg, len(source)).to(process.device).train()
        accelerate_(method, cfg)
        optimizer = build_optimizer(cfg, method)
        shape = (2, cfg.TRAIN.BATCH_SIZE, 3, cfg.DATA.SIZE, cfg.DATA.SIZE)
        views = torch.randint(0, 256, shape, dtype=torch.uint8)
        if cfg.AUGMENT.BACKEND == "device":
            [batch] = itertools.islice(self._batches(0), 1)
        else:
            batch = [views[0], views[1], torch.arange(cfg.TRAIN.BATCH_SIZE)]

        def step(measure: bool) -> None:
            train_step(
                method, method, optimizer, batch, step=0, lr=cfg.TRAIN.LR,
                momentum=cfg.MOCO.MOMENTUM, cfg=cfg, process=process, measure=measure,
            )  # fmt: skip

        self._step = step
        step(measure=True)

    def compare_loop(self, num_workers: int, num_rounds: int) -> dict:
        """Seconds of a step's batch, of a step, and of a step of the loop, in turns."""
        own: dict[str, list[float]] = {"data": [], "step": [], "loop": []}
        jobs = {
            "data": lambda _: own["data"].append(self._data_alone(num_workers)),
            "step": lambda _: own["step"].append(self._step_alone()),
            "loop": lambda _: own["loop"].append(self._loop(num_workers)),
        }
        alternate(jobs, num_rounds)
        ratios = [
            loop / max(data, step)
            for data, step, loop in zip(own["data"], own["step"], own["loop"], strict=True)
        ]
        return {
            **{f"{name}_s": statistics.median(seconds) for name, seconds in own.items()},
            "loop_over_slower": statistics.median(ratios),
            "quartiles": [round(q, 4) for q in np.percentile(ratios, [25, 75])],
            "images_per_s": self.cfg.TRAIN.BATCH_SIZE / statistics.median(own["loop"]),
            "rounds": num_rounds,
        }

    def costs(self, num_rounds: int, epoch_images: int) -> dict:
        """Of checkpoints and log records, at the default periods, as shares of the time of steps.

        A checkpoint includes the checks before it and the removal of old ones; a log record the
        figures computed for it and what observers write.
        """
        jobs = {"plain": lambda _: self._timed(False), "measured": lambda _: self._timed(True)}
        seconds = alternate(jobs, 2 * num_rounds)
        step_s = statistics.median(seconds["plain"])
        more = [b - a for a, b in zip(seconds["plain"], seconds["measured"], strict=True)]
        figures_s, writing_s = statistics.median(more), statistics.median(self.logs)
        save_s = statistics.median(self.saves)
        steps_an_epoch = epoch_images // self.cfg.TRAIN.BATCH_SIZE
        default = load_pretrain_config(None)
        between_saves = default.CHECKPOINT.PERIOD * steps_an_epoch * step_s
        return {
            "step_s": step_s, "checkpoint_s": save_s, "checkpoint_share": save_s / between_saves,
            "figures_s": figures_s, "writing_s": writing_s,
            "logging_share": (max(0.0, figures_s) + writing_s) / (default.LOG.PERIOD * step_s),
        }  # fmt: skip

    def _batches(self, num_workers: int) -> Iterator[Sequence[torch.Tensor]]:
        cfg = _changed(self.cfg, DATA__NUM_WORKERS=num_workers)
        last_step = len(self.source) // cfg.TRAIN.BATCH_SIZE
        loader = build_loader(cfg, self.source, self.process, first_step=0, last_step=last_step)
        return iter(ahead_on_device(loader, self.process.device))

    def _data_alone(self, num_workers: int) -> float:
        """Seconds a batch takes, after those that were made while nobody took them."""
        batches = self._batches(num_workers)
        for _ in range(self.num_steps):
            next(batches)
        started = time.perf_counter()
        for _ in range(self.num_steps):
            next(batches)
        return (time.perf_counter() - started) / self.num_steps

    def _step_alone(self) -> float:
        started = time.perf_counter()
        for _ in range(self.num_steps):
            self._step(measure=False)
        _wait(self.process.device)
        return (time.perf_counter() - started) / self.num_steps

    def _timed(self, measure: bool) -> None:
        self._step(measure=measure)
        _wait(self.process.device)

    def _loop(self, num_workers: int) -> float:
        """Seconds a step of the trainer takes, between its first and second record."""
        self.num_runs += 1
        place = self.place / f"run_{self.num_runs}"
        cfg = _changed(
            self.cfg, DATA__NUM_WORKERS=num_workers, TRAIN__EPOCHS=1, LOG__PERIOD=self.num_steps
        )
        trainer = _TimedTrainer(cfg, self.source, place, self.process, say=lambda line: None)
        with open(os.devnull, "w") as nowhere, _observers(place, trainer, nowhere) as observers:
            trainer.train([observers])
        self.saves += trainer.save_seconds
        self.logs += observers.seconds
        first, second = observers.stamps[:2]
        return (second - first) / self.num_steps


class _TimedTrainer(Trainer):
    """A trainer that keeps how long its checkpoints took."""

    def __init__(self, *args, **options):
        self.save_seconds: list[float] = []
        super().__init__(*args, **options)

    def _save(self, *, milestone: bool) -> None:
        started = time.perf_counter()
        super()._save(milestone=milestone)
        self.save_seconds.append(time.perf_counter() - started)


class _TimedObservers:
    """Observers as one, with the seconds they took and when each record came."""

    def __init__(self, observers):
        self.observers = observers
        self.stamps: list[float] = []
        self.seconds: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        self.stamps.append(time.perf_counter())
        for observer in self.observers:
            observer.on_step(record)
        self.seconds.append(time.perf_counter() - self.stamps[-1])

    def on_epoch(self, record: EpochRecord) -> None:
        for observer in self.observers:
            observer.on_epoch(record)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()


@contextmanager
def _observers(place: Path, trainer: Trainer, nowhere) -> Iterator[_TimedObservers]:
    """Those of tools/pretrain.py."""
    place.mkdir(parents=True, exist_ok=True)
    made = [ConsoleProgress(trainer.total_steps, 0, nowhere), JsonLog(place / "log.jsonl", 0)]
    if trainer.cfg.LOG.TENSORBOARD:
        made.append(TensorBoardLog(place / "tensorboard", 0))
    observers = _TimedObservers(made)
    try:
        yield observers
    finally:
        observers.close()


def seconds_to_first_step(
    words: Sequence[str], folder: str, device: str, threads: int
) -> dict[str, float]:
    """Of a new process that trains on `folder`: imports, building all of it, the first step."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    started = time.time()
    child = context.Process(target=_first_step, args=(send, [*words], folder, device, threads))
    with running(child):
        send.close()
        try:
            imported, built, stepped = receive.recv()
        except EOFError:
            raise ConfigError("the process that times its start failed; see its message") from None
    return {
        "total_s": stepped - started,
        "imports_s": imported - started,
        "building_s": built - imported,
        "first_step_s": stepped - built,
    }


class _StopAtFirst(Exception):
    pass


def _first_step(send, words: list[str], folder: str, device: str, threads: int) -> None:
    imported = time.time()
    end_with_parent()
    torch.set_num_threads(threads)

    class Stop:
        def on_step(self, record: StepRecord) -> None:
            raise _StopAtFirst

        def on_epoch(self, record: EpochRecord) -> None:
            pass

    process = distributed.setup_process(device)
    with tempfile.TemporaryDirectory() as place:
        cfg = load_pretrain_config(None, [*words, "LOG.PERIOD", "1"])
        source = find_images(folder)
        trainer = Trainer(cfg, source, Path(place), process, say=lambda line: None)
        built = time.time()
        try:
            trainer.train([Stop()])
        except _StopAtFirst:
            send.send((imported, built, time.time()))


def _images(folder: str | None, scratch: Path, cfg: CfgNode, num_steps: int) -> ImageSource:
    """As many images as twice `num_steps` steps take."""
    needed = 2 * num_steps * cfg.TRAIN.BATCH_SIZE
    if folder is None:
        scratch.mkdir()
        kinds = min(needed, 64)  # decoding does not care that files repeat
        files = [natural_jpeg(seed, *_IMAGE_SIZE) for seed in range(kinds)]
        for number in range(needed):
            (scratch / f"{number:06d}.jpg").write_bytes(files[number % kinds])
        return find_images(scratch)
    source = find_images(folder)
    if len(source) < needed:
        raise ConfigError(
            f"{folder}: {len(source)} images; {needed} are needed for twice --steps {num_steps} "
            f"steps of {cfg.TRAIN.BATCH_SIZE}"
        )
    return SubsetSource(source, range(needed))


def _changed(cfg: CfgNode, **changes: object) -> CfgNode:
    out = cfg.clone()
    out.defrost()
    out.merge_from_list([w for k, v in changes.items() for w in (k.replace("__", "."), v)])
    out.freeze()
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loop_in_words(num_workers: int, row: dict) -> str:
    low, high = row["quartiles"]
    return (
        f"{num_workers} worker(s), seconds a step: data alone {row['data_s']:.4f}, step alone "
        f"{row['step_s']:.4f}, loop {row['loop_s']:.4f} ({row['images_per_s']:.1f} images/s): "
        f"{row['loop_over_slower']:.3f} times the slower ({low:.3f} to {high:.3f}, "
        f"{row['rounds']} rounds)"
    )


def _costs_in_words(costs: dict, epoch_images: int) -> str:
    return (
        f"a checkpoint takes {costs['checkpoint_s']:.2f} s, {costs['checkpoint_share']:.2%} of an "
        f"epoch of {epoch_images} images; a log record {costs['figures_s'] * 1e3:.1f} ms to "
        f"compute and {costs['writing_s'] * 1e3:.1f} ms to write, {costs['logging_share']:.2%} of "
        "the time of steps"
    )
