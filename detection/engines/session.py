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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

from detection.engines.base import FINAL_MODEL, Run, TrainingStopped
from detection.engines.run_files import newest_state, periodic_path
from detection.weights import load_backbone_weights
from moco import distributed
from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError, NonFiniteError


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


def load_initial_weights(model: torch.nn.Module, cfg: CfgNode, *, eval_only: bool) -> str:
    """Load cfg.MODEL.WEIGHTS into a detector with Detectron2's names; returns what, in words.

    Raises: CheckpointError, see `load_backbone_weights`; ConfigError for "" with `eval_only`.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        if eval_only:
            raise ConfigError("MODEL.WEIGHTS is '', --eval-only needs a fine-tuned model's file")
        return "random initialisation (MODEL.WEIGHTS is '')"
    report = load_backbone_weights(model, path)
    if eval_only and report.missing:
        raise CheckpointError(
            f"{path}: lacks {len(report.missing)} tensors of the detector "
            f"({', '.join(sorted(report.missing)[:3])} ...); --eval-only needs a fine-tuned model, "
            f"e.g. {FINAL_MODEL} of a run"
        )
    return report.words()


def state_to_resume(run: Run) -> Path | None:
    """The newest verified checkpoint of the run, None where it has none; says which, and why."""
    path, refused = newest_state(run.output_dir)
    for reason in refused:
        say(run, f"refused: {reason}")
    if path is None:
        say(run, f"nothing to resume in {run.output_dir}: starting at iteration 0")
    elif path.name == FINAL_MODEL:
        say(run, f"{path} is complete: training is not repeated")
    return path


@dataclass
class StopFlag:
    requested: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """SIGTERM sets the flag instead of ending the process (in the main thread only)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def request(signum, frame) -> None:
        flag.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)


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
        raise TrainingStopped(
            f"stopped by SIGTERM after iteration {num_done} of {solver.MAX_ITER}, saved in "
            f"{path}; start the same command with --resume to continue there"
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


def gather_detections(detections: dict, process: ProcessInfo) -> dict:
    """All ranks' detections, in rank order, on every rank."""
    if process.world_size == 1:
        return detections
    parts = [None] * process.world_size
    dist.all_gather_object(parts, detections)
    return {image_id: found for part in parts for image_id, found in part.items()}
