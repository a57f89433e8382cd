"""The embedded engine: Faster R-CNN R50-C4 trained and run with torch and torchvision alone.

`EmbeddedEngine.train` is the whole loop. Every draw is a function of (seed, purpose, iteration,
rank), so a run that was interrupted and resumed equals one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import platform
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn

from detection.data.loader import WORKERS_KEY, test_samples, train_loader
from detection.engines.base import FINAL_MODEL, Detections, Run, TrainingStopped
from detection.engines.embedded.faster_rcnn import GeneralizedRCNN, build_model
from detection.engines.embedded.precise_bn import update_bn_statistics
from detection.engines.embedded.run_state import (
    load_state,
    newest_state,
    periodic_path,
    save_state,
)
from detection.engines.embedded.solver import build_optimizer, lr_at, set_lr
from detection.engines.progress import Progress
from detection.weights import load_backbone_weights
from moco import distributed
from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    dead_worker_as_data_error,
)
from moco.seeding import derive_seed
from moco.training.checkpoint import verify_manifest


class EmbeddedEngine:
    """See `detection.engines.base.Engine`."""

    name = "embedded"

    def versions(self) -> dict[str, str]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }

    def unavailable_reason(self) -> str | None:
        return None  # what it is made of is installed with the project

    def check(self, cfg: CfgNode, *, eval_only: bool) -> str:
        model = build_model(cfg)
        lr_at(cfg, 0)  # a schedule that cannot be built is an error here, not after the data check
        return _load_weights(model, cfg, eval_only=eval_only)

    def train(self, run: Run) -> None:
        cfg, process = run.cfg, run.process
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        torch.manual_seed(derive_seed(run.seed, "detection-init"))
        model = build_model(cfg)
        _load_weights(model, cfg, eval_only=False)
        model.to(process.device).train()
        optimizer = build_optimizer(cfg, model)
        start = _resume(run, model, optimizer) if run.resume else 0
        if start is None:  # the final model is there
            return
        distributed.broadcast_state(model)
        distributed.check_equal_across_ranks(model.state_dict(), "model at start", process.device)
        if note := amp_note(cfg, process.device):
            _say(run, note)
        if start < cfg.SOLVER.MAX_ITER:
            with _stop_on_sigterm() as stop, dead_worker_as_data_error(WORKERS_KEY):
                _train_iterations(run, model, optimizer, start, stop)
        # Detectron2's hook order: precise statistics first, then the final checkpoint.
        if cfg.TEST.PRECISE_BN.ENABLED:
            _say(run, f"precise batch norm: {cfg.TEST.PRECISE_BN.NUM_ITER} batches")
            _update_statistics(run, model)
        if process.is_main:
            save_state(run, run.output_dir / FINAL_MODEL, model, optimizer, cfg.SOLVER.MAX_ITER - 1)
        distributed.barrier()

    @torch.no_grad()
    def predict(self, run: Run, records: Sequence[dict]) -> Detections:
        model = build_model(run.cfg)
        if run.eval_only:
            _load_weights(model, run.cfg, eval_only=True)
        else:
            verify_manifest(run.output_dir / FINAL_MODEL)
            load_state(run, run.output_dir / FINAL_MODEL, model)
        model.to(run.process.device).eval()
        detections = {}
        own = records[_own_part(len(records), run.process)]
        for number, sample in enumerate(test_samples(own, run.cfg), start=1):
            with _autocast(run.process, enabled=run.cfg.TEST.AMP.ENABLED):
                found = model.inference([sample])[0]
            detections[sample["image_id"]] = tuple(
                found[key].cpu().numpy() for key in ("boxes", "scores", "classes")
            )
            if number % 500 == 0 or number == len(own):
                _say(run, f"predicted {number}/{len(own)} images of rank 0")
        return _gather(detections, run.process)


def _train_iterations(
    run: Run, model: GeneralizedRCNN, optimizer: torch.optim.Optimizer, start: int, stop: _StopFlag
) -> None:
    """Iterations `start` to MAX_ITER - 1. Raises: TrainingStopped, NonFiniteError."""
    cfg, process, solver = run.cfg, run.process, run.cfg.SOLVER
    progress = Progress(
        run.output_dir,
        start=start,
        end=solver.MAX_ITER,
        period=solver.PROGRESS_PERIOD,
        show=run.progress,
    )
    forward = model if process.world_size == 1 else distributed.data_parallel(model, process)
    batches = train_loader(
        run.data.train_records,
        cfg,
        seed=run.seed,
        start_iteration=start,
        rank=process.rank,
        world_size=process.world_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    for iteration in range(start, solver.MAX_ITER):
        batch = next(batches)
        set_lr(optimizer, cfg, iteration)
        # RPN and ROI heads sample with torch's global generator.
        torch.manual_seed(derive_seed(run.seed, "detection-step", iteration, process.rank))
        with _autocast(process, enabled=solver.AMP.ENABLED):
            losses, problem = _losses(forward, batch)
        _stop_if_not_finite(problem, batch, iteration, lr_at(cfg, iteration), process)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

        if progress.due(iteration):
            progress.report(iteration, losses, lr_at(cfg, iteration))
        stopping = distributed.any_rank(stop.requested, process.device)
        num_done = iteration + 1
        # The last state is kept too: precise batch norm may be interrupted.
        if stopping or num_done % solver.CHECKPOINT_PERIOD == 0 or num_done == solver.MAX_ITER:
            path = periodic_path(run.output_dir, iteration)
            if process.is_main:
                save_state(run, path, model, optimizer, iteration)
            distributed.barrier()
        if stopping:
            raise TrainingStopped(
                f"stopped by SIGTERM after iteration {num_done} of {solver.MAX_ITER}, saved in "
                f"{path}; start the same command with --resume to continue there"
            )
    batches.close()


def _autocast(process: ProcessInfo, *, enabled: bool) -> torch.autocast:
    return torch.autocast(process.device.type, dtype=torch.bfloat16, enabled=enabled)


def _losses(forward: nn.Module, batch: list[dict]) -> tuple[dict[str, torch.Tensor], str | None]:
    """The losses and, where they are not finite, what is wrong."""
    try:
        losses = forward(batch)
    except NonFiniteError as error:
        return {}, str(error)
    # The one wait for the device in an iteration: nothing may be updated with such a loss.
    if torch.isfinite(sum(losses.values())):
        return losses, None
    return losses, ", ".join(f"{name}={loss.item():g}" for name, loss in losses.items())


def _stop_if_not_finite(
    problem: str | None, batch: list[dict], iteration: int, lr: float, process: ProcessInfo
) -> None:
    """Raise NonFiniteError on every rank as soon as one has a problem."""
    if not distributed.any_rank(problem is not None, process.device):
        return
    own = problem and (
        f"rank {process.rank}: {problem}; images {', '.join(s['image_id'] for s in batch)}"
    )
    problems = [own]
    if process.world_size > 1:
        problems = [None] * process.world_size
        dist.all_gather_object(problems, own)
    raise NonFiniteError(
        f"iteration {iteration}: the loss is not finite ({' | '.join(p for p in problems if p)}; "
        f"lr {lr:g}). Nothing was updated with it; lower SOLVER.BASE_LR or check these images"
    )


def _resume(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Load the newest verified state; returns the next iteration, None where training is done."""
    path, refused = newest_state(run.output_dir)
    for reason in refused:
        _say(run, f"refused: {reason}")
    if path is None:
        _say(run, f"nothing to resume in {run.output_dir}: starting at iteration 0")
        return 0
    if path.name == FINAL_MODEL:
        _say(run, f"{path} is complete: training is not repeated")
        return None
    start = load_state(run, path, model, optimizer) + 1
    _say(run, f"resuming from {path} at iteration {start}")
    return start


def _update_statistics(run: Run, model: GeneralizedRCNN) -> None:
    """Precise batch norm over a stream of its own, in full precision, as Detectron2 does it."""
    seed = derive_seed(run.seed, "precise-bn")
    batches = train_loader(
        run.data.train_records,
        run.cfg,
        seed=seed,
        start_iteration=0,
        rank=run.process.rank,
        world_size=run.process.world_size,
        num_workers=run.cfg.DATALOADER.NUM_WORKERS,
    )
    torch.manual_seed(derive_seed(seed, "detection-step", 0, run.process.rank))
    update_bn_statistics(model, batches, run.cfg.TEST.PRECISE_BN.NUM_ITER)
    batches.close()


def _load_weights(model: GeneralizedRCNN, cfg: CfgNode, *, eval_only: bool) -> str:
    """Load cfg.MODEL.WEIGHTS; returns what was loaded, in words."""
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
    return f"{path}: {len(report.loaded)} tensors loaded, {len(report.missing)} new ones"


def amp_note(cfg: CfgNode, device: torch.device) -> str | None:
    """What a user of SOLVER.AMP.ENABLED should know about this machine, or None."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    cpu_info = Path("/proc/cpuinfo")  # flags avx512_bf16, amx_bf16 or bf16
    if device.type == "cpu" and cpu_info.is_file() and "bf16" not in cpu_info.read_text():
        return "SOLVER.AMP.ENABLED: this CPU has no bfloat16 instructions, so it may be slower"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "SOLVER.AMP.ENABLED: this GPU only emulates bfloat16, so it may be slower"
    return None


@dataclass
class _StopFlag:
    requested: bool = False


@contextmanager
def _stop_on_sigterm() -> Iterator[_StopFlag]:
    """SIGTERM sets the flag instead of ending the process (in the main thread only)."""
    flag = _StopFlag()
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


def _own_part(num_records: int, process: ProcessInfo) -> slice:
    """A contiguous part a rank, the first ones one longer, as Detectron2's InferenceSampler."""
    share, rest = divmod(num_records, process.world_size)
    start = process.rank * share + min(process.rank, rest)
    return slice(start, start + share + (process.rank < rest))


def _gather(detections: dict, process: ProcessInfo) -> dict:
    if process.world_size == 1:
        return detections
    parts = [None] * process.world_size
    dist.all_gather_object(parts, detections)
    return {image_id: found for part in parts for image_id, found in part.items()}


def _say(run: Run, line: str) -> None:
    if run.progress and run.process.is_main:
        print(line, flush=True)
