"""What a training session does in the same way with every engine.

Engines call these from their own loops: where to go on, when to save and stop, and how several
processes agree that a loss is not finite.
"""

from __future__ import annotations

import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

from detection.engines.base import FINAL_MODEL, Run, TrainingStopped
from detection.engines.progress import Progress
from detection.engines.run_files import iterations_done, newest_state, periodic_path
from detection.weights import LoadReport, class_dependent, load_backbone_weights
from moco import distributed
from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError, NonFiniteError
from moco.signals import caught_signals


def torch_versions() -> dict[str, str]:
    """Python's, torch's and torchvision's: each can change the numbers of any engine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def say(run: Run, line: str) -> None:
    if run.progress and run.process.is_main:
        print(line, flush=True)


def start_progress(run: Run, start: int, **options: object) -> Progress:
    """The progress of a session that begins at iteration `start`; `options` as of `Progress`."""
    return Progress(
        run.output_dir,
        start=start,
        end=run.cfg.SOLVER.MAX_ITER,
        period=run.cfg.SOLVER.PROGRESS_PERIOD,
        show=run.progress,
        tensorboard=run.cfg.LOG.TENSORBOARD,
        **options,
    )


def load_initial_weights(model: torch.nn.Module, cfg: CfgNode, *, eval_only: bool) -> str:
    """Load cfg.MODEL.WEIGHTS into a detector with Detectron2's names; returns what, in words.

    Raises: CheckpointError, see `load_backbone_weights`; ConfigError for "" with `eval_only`.
    """
    if not cfg.MODEL.WEIGHTS:
        if eval_only:
            raise ConfigError("MODEL.WEIGHTS is '', --eval-only needs a fine-tuned model's file")
        return "random initialisation (MODEL.WEIGHTS is '')"
    return load_weights_file(model, cfg, eval_only=eval_only).words()


def load_weights_file(model: torch.nn.Module, cfg: CfgNode, *, eval_only: bool) -> LoadReport:
    """Load the file of cfg.MODEL.WEIGHTS; in training it may be a detector of other classes."""
    path = cfg.MODEL.WEIGHTS
    when = "always" if cfg.MODEL.RESET_PREDICTORS else "other classes"
    report = load_backbone_weights(
        model,
        path,
        reset="never" if eval_only else when,
        class_dependent=class_dependent(cfg),
    )
    if eval_only and report.missing:
        raise CheckpointError(
            f"{path}: lacks {len(report.missing)} tensors of the detector "
            f"({', '.join(sorted(report.missing)[:3])} ...); --eval-only needs a fine-tuned model, "
            f"e.g. {FINAL_MODEL} of a run"
        )
    return report


def state_to_resume(run: Run) -> Path | None:
    """The newest verified checkpoint of the run, None where it has none; says which, and why."""
    num_iterations = run.cfg.SOLVER.MAX_ITER
    path, refused = newest_state(run.output_dir, num_iterations)
    for reason in refused:
        say(run, f"refused: {reason}")
    if path is None:
        say(run, f"nothing to resume in {run.output_dir}: starting at iteration 0")
    elif is_complete(run, path):
        say(run, f"{path} is complete: training is not repeated")
    return path


def is_complete(run: Run, path: Path) -> bool:
    """Whether `path` is the final model of all iterations; a finished run may be extended."""
    num_done = iterations_done(path)
    is_final = path.name == FINAL_MODEL
    return is_final and (num_done is None or num_done >= run.cfg.SOLVER.MAX_ITER)


@dataclass
class StopFlag:
    received: list[int] = field(default_factory=list)  # numbers of signals

    @property
    def requested(self) -> bool:
        return bool(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """SIGTERM and Ctrl-C set the flag instead of ending the process (in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
        return
    with caught_signals() as received:
        yield StopFlag(received)


def save_if_due(
    run: Run,
    iteration: int,
    stop: StopFlag,
    save: Callable[[Path], None],
    *,
    stopping: bool | None = None,
) -> None:
    """After an iteration, on every rank: save the state where it is time to.

    Args:
        save: writes the state to a path; called on every rank, all wait for its end.
        stopping: what `check_losses` gave; None asks all ranks here.
    Raises: TrainingStopped, after saving, where a rank was asked to stop.
    """
    solver, process = run.cfg.SOLVER, run.process
    if stopping is None or process.world_size == 1:
        stopping = distributed.any_rank(stop.requested, process.device)
    num_done = iteration + 1
    path = periodic_path(run.output_dir, iteration)
    # The last state is kept too: precise batch norm may be interrupted.
    if stopping or num_done % solver.CHECKPOINT_PERIOD == 0 or num_done == solver.MAX_ITER:
        save(path)
        distributed.barrier()
    if stopping:
        # Another rank may have received it.
        number = stop.received[0] if stop.requested else signal.SIGTERM
        raise TrainingStopped(
            f"stopped by {signal.Signals(number).name} after iteration {num_done} of "
            f"{solver.MAX_ITER}, saved in {path}; start the same command with --resume to "
            "continue there",
            number,
        )


def loss_problem(losses: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with losses that are not finite, in words."""
    # The one wait for the device in an iteration: nothing may be updated with such a loss.
    if torch.isfinite(sum(losses.values())):
        return None
    return ", ".join(f"{name}={loss.item():g}" for name, loss in losses.items())


def check_losses(
    losses: dict[str, torch.Tensor], num_wild: torch.Tensor, stop: StopFlag, process: ProcessInfo
) -> tuple[bool, bool]:
    """Whether on any rank a loss or a proposal is not finite, and whether one was asked to stop:
    one message, and the one wait for the device in an iteration, before anything is updated.

    Args:
        num_wild: proposals that are NaN or Inf.
    """
    total = sum(losses.values()).detach()
    bad = ~torch.isfinite(total) | (num_wild > 0)
    asked = torch.full((), stop.requested, dtype=torch.bool, device=total.device)
    flags = torch.stack([bad, asked]).to(torch.uint8)
    if process.world_size > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    is_bad, stopping = flags.tolist()
    return bool(is_bad), bool(stopping)


def stop_if_not_finite(
    problem: str | None,
    image_ids: Sequence[str | int],
    iteration: int,
    lr: float,
    process: ProcessInfo,
) -> None:
    """Raise NonFiniteError on every rank as soon as one has a problem."""
    if not distributed.any_rank(problem is not None, process.device):
        return
    own = problem and f"rank {process.rank}: {problem}; images {', '.join(map(str, image_ids))}"
    problems = [own]
    if process.world_size > 1:
        problems = [None] * process.world_size
        dist.all_gather_object(problems, own)
    raise NonFiniteError(
        f"iteration {iteration}: the loss is not finite ({' | '.join(p for p in problems if p)}; "
        f"lr {lr:g}). Nothing was updated with it; lower SOLVER.BASE_LR or check these images"
    )


def own_part(num_records: int, process: ProcessInfo) -> slice:
    """A contiguous part a rank, the first ones one longer, as Detectron2's InferenceSampler."""
    share, rest = divmod(num_records, process.world_size)
    start = process.rank * share + min(process.rank, rest)
    return slice(start, start + share + (process.rank < rest))


def gather_detections(detections: dict, process: ProcessInfo) -> dict:
    """All ranks' detections, in rank order, on every rank."""
    if process.world_size == 1:
        return detections
    parts = [None] * process.world_size
    dist.all_gather_object(parts, detections)
    return {image_id: found for part in parts for image_id, found in part.items()}
