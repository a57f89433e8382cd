"""Training with Detectron2's trainer under this project's rules; Detectron2 is not imported here.

`trainer` is Detectron2's DefaultTrainer as `detection.engines.d2` makes it, with the attributes
`losses` (`CheckedLosses`), `precise_bn` (Detectron2's hook, or None), `predict` (the detections of
all test images by the model as it is) and, of the session, `stop`, `progress` and `evaluation`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from detection.data.sample_loader import WORKERS_KEY
from detection.engines.base import FINAL_MODEL, Run
from detection.engines.evaluations import PeriodicEvaluation
from detection.engines.progress import WINDOW
from detection.engines.run_files import read_state, write_state
from detection.engines.session import (
    loss_problem,
    save_if_due,
    say,
    start_progress,
    stop_if_not_finite,
    stop_on_signal,
)
from moco import distributed
from moco.data.rgb import raise_pillows_limit
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, DataError, NonFiniteError, dead_worker_as_data_error

ENGINE = "detectron2"
LOG_FILE = "detectron2_log.txt"
# Detectron2's, what torch says about it, and Python's warnings.
_LOGGERS = ("detectron2", "fvcore", "iopath", "torch.fx", "py.warnings")
_XYXY_ABS = 0  # Detectron2's BoxMode of our records
_ERROR_PREFIX = f"{DataError.__module__}.{DataError.__name__}: "


class CheckedLosses:
    """What Detectron2's trainer calls as its model: no update is made with losses that are not
    finite, and all ranks stop together. Detectron2 itself raises on one rank only.

    Args:
        trainer: Detectron2's DefaultTrainer, whose model is called.
    """

    def __init__(self, run: Run, trainer):
        self._run, self._trainer = run, weakref.proxy(trainer)
        self._model = trainer._trainer.model
        self.last: dict[str, torch.Tensor] = {}

    @property
    def training(self) -> bool:
        return self._model.training

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Raises: NonFiniteError."""
        losses = {}
        try:
            losses = self._model(batch)
            problem = loss_problem(losses)
        except FloatingPointError as error:  # of the region proposals
            problem = str(error)
        lr = self._trainer.optimizer.param_groups[0]["lr"]
        images = [sample["image_id"] for sample in batch]
        stop_if_not_finite(problem, images, self._trainer.iter, lr, self._run.process)
        self.last = losses
        return losses


class CheckedMapper:
    """A Detectron2 DatasetMapper whose errors name the file in one line.

    A loader worker that it runs in ignores Ctrl-C and the first SIGTERM: one that is sent to all
    processes of a run lets the main process save. The next one, of torch's or Python's, ends the
    worker.

    Args:
        max_pixels: INPUT.MAX_IMAGE_PIXELS.
    """

    def __init__(self, mapper: Callable[[dict], dict], max_pixels: int):
        self._mapper, self._max_pixels = mapper, max_pixels
        self._is_guarded = False

    def __call__(self, record: dict) -> dict:
        """Raises: DataError."""
        if not self._is_guarded and torch.utils.data.get_worker_info() is not None:
            signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._is_guarded = True
        raise_pillows_limit(self._max_pixels)
        try:
            return self._mapper(record)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow and Detectron2 raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{record['file_name']}: Detectron2 cannot use this image ({reason}); correct or "
                "remove it"
            ) from error


def with_box_modes(records: Sequence[dict]) -> list[dict]:
    """The records with the field "bbox_mode" in each annotation, as Detectron2 wants it."""
    return [
        {**record, "annotations": [{**a, "bbox_mode": _XYXY_ABS} for a in record["annotations"]]}
        for record in records
    ]


@contextlib.contextmanager
def loader_errors_in_one_line() -> Iterator[None]:
    """A dead worker is a DataError, and torch adds the traceback of a worker to one's message."""
    try:
        with dead_worker_as_data_error(WORKERS_KEY):
            yield
    except DataError as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        raise DataError(lines[-1].removeprefix(_ERROR_PREFIX)) from error


@contextlib.contextmanager
def logs_to_file(run: Run | None) -> Iterator[None]:
    """Send Detectron2's lines and warnings to a file of the run's folder (None: nowhere)."""
    handler: logging.Handler = logging.NullHandler()
    if run is not None:
        rank = run.process.rank
        run.output_dir.mkdir(parents=True, exist_ok=True)
        path = run.output_dir / f"{LOG_FILE}{f'.rank{rank}' if rank else ''}"
        handler = logging.FileHandler(path, delay=True, encoding="utf-8")
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)
        handler.close()


def processes_per_machine(process: ProcessInfo) -> int:
    """Call it on every rank; machines have equal numbers of processes."""
    local_ranks = [None] * process.world_size
    dist.all_gather_object(local_ranks, process.local_rank)
    return max(local_ranks) + 1


def load_model(run: Run, path: Path, model: torch.nn.Module) -> dict:
    """Load a checkpoint of this run into the model, strictly; returns its whole content.

    Raises: CheckpointError where it does not fit.
    """
    content = read_state(run, path, engine=ENGINE, keys=("model", "trainer"))
    _load_strictly(path, model, content["model"])
    return content


def resume(run: Run, trainer, path: Path) -> None:
    """Go on from the state in `path`. Raises: CheckpointError where it does not fit."""
    content = load_model(run, path, trainer.checkpointer.model)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in _groups(trainer)]
    _load_strictly(path, trainer, content["trainer"])
    if run.changes.new:
        _keep_settings(trainer, settings)
    trainer.start_iter = content["iteration"] + 1
    say(
        run,
        f"resuming from {path} at iteration {trainer.start_iter}; Detectron2 draws images and "
        "random numbers anew, so the result will not equal an uninterrupted run's",
    )


def _groups(trainer) -> list[dict]:
    return trainer.optimizer.param_groups


def _keep_settings(trainer, settings: Sequence[dict]) -> None:
    """The configuration's rates, decay and momentum, not the checkpoint's, as they were changed."""
    trainer.scheduler.base_lrs = [group["initial_lr"] for group in settings]
    rates = trainer.scheduler.get_lr()
    for group, own, rate in zip(_groups(trainer), settings, rates, strict=True):
        group.update({**own, "lr": rate})


def train(run: Run, trainer) -> None:
    """All iterations from `trainer.start_iter` on, precise batch norm, then the final model.

    Raises: TrainingStopped, NonFiniteError.
    """
    state = trainer.checkpointer.model.state_dict()
    distributed.check_equal_across_ranks(state, "model at start", run.process.device)
    if trainer.start_iter < run.cfg.SOLVER.MAX_ITER:
        # Not a cycle: the loader's workers must end with the trainer.
        figures = partial(_figures, weakref.proxy(trainer))
        trainer.progress = start_progress(run, trainer.start_iter, figures=figures)
        trainer.evaluation = PeriodicEvaluation(run, trainer.progress, trainer.start_iter)
        with stop_on_signal() as trainer.stop, contextlib.closing(trainer.progress):
            if trainer.evaluation.due(trainer.start_iter - 1):  # the session before ended there
                _evaluate(run, trainer, trainer.start_iter - 1)
            trainer.train()
    # Not within the loop: the state before it is saved, so SIGTERM need not wait for it.
    _update_statistics(run, trainer)
    trainer.iter = run.cfg.SOLVER.MAX_ITER - 1  # the loop has left it one beyond
    _save(run, trainer, run.output_dir / FINAL_MODEL)


def _load_strictly(path: Path, target, state: dict) -> None:
    try:
        target.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit: {' '.join(str(error).split())}") from error


def after_step(run: Run, trainer) -> None:
    """What is told and saved after an iteration; it comes after Detectron2's hooks."""
    iteration = trainer.iter
    lr, _ = trainer.storage.latest()["lr"]  # the iteration's, the optimizer has the next one's
    trainer.progress.report(iteration, trainer.losses.last, lr)
    if trainer.evaluation.due(iteration):
        _update_statistics(run, trainer)
    save_if_due(run, iteration, trainer.stop, partial(_save, run, trainer))
    if trainer.evaluation.due(iteration):
        _evaluate(run, trainer, iteration)


def _figures(trainer) -> dict[str, float]:
    """What Detectron2's writers write of the last iteration, from its storage of events."""
    smoothed = trainer.storage.latest_with_smoothing_hint(WINDOW)
    return {name: value for name, (value, _) in smoothed.items()}


def _evaluate(run: Run, trainer, iteration: int) -> None:
    trainer.evaluation.run(iteration, trainer.predict, partial(_save, run, trainer))


def _save(run: Run, trainer, path: Path, **fields: object) -> None:
    if run.process.is_main:
        model = trainer.checkpointer.model.state_dict()
        content = {"model": model, "trainer": trainer.state_dict()}
        write_state(run, path, content, iteration=trainer.iter, engine=ENGINE, **fields)


def _update_statistics(run: Run, trainer) -> None:
    if trainer.precise_bn is None:
        return
    say(run, f"precise batch norm: {run.cfg.TEST.PRECISE_BN.NUM_ITER} batches")
    try:
        trainer.precise_bn.update_stats()
    except FloatingPointError as error:
        raise NonFiniteError(
            f"precise batch norm: {error}; training has diverged: lower SOLVER.BASE_LR"
        ) from error
