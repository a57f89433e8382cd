"""The embedded engine: Faster R-CNN R50-C4 trained and run with torch and torchvision alone.

`EmbeddedEngine.train` is the whole loop. Every draw comes from `randomness`; a run that was
interrupted and resumed equals one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from detection.data.loader import eval_loader, load_test_sample
from detection.data.sample_loader import WORKERS_KEY
from detection.engines.base import FINAL_MODEL, Detections, Run
from detection.engines.embedded.acceleration import accelerate_
from detection.engines.embedded.faster_rcnn import GeneralizedRCNN, build_model
from detection.engines.embedded.mask_head import encode_masks
from detection.engines.embedded.precise_bn import update_bn_statistics
from detection.engines.embedded.randomness import Randomness, build_randomness
from detection.engines.embedded.rpn import RPN, wild_proposals
from detection.engines.embedded.run_state import load_state, save_state
from detection.engines.embedded.solver import build_optimizer, clip_gradients_, lr_at, set_lr
from detection.engines.evaluations import PeriodicEvaluation
from detection.engines.session import (
    StopFlag,
    check_losses,
    gather_detections,
    is_complete,
    load_initial_weights,
    loss_problem,
    own_part,
    save_if_due,
    say,
    start_progress,
    state_to_resume,
    stop_if_not_finite,
    stop_on_signal,
    torch_versions,
)
from moco import distributed
from moco.cfgnode import CfgNode
from moco.devices import out_of_memory_as_error
from moco.distributed import ProcessInfo
from moco.errors import dead_worker_as_data_error
from moco.kernels.compiler import compile_kernels
from moco.training.checkpoint import verify_manifest


class EmbeddedEngine:
    """See `detection.engines.base.Engine`."""

    name = "embedded"

    def versions(self) -> dict[str, str]:
        return torch_versions()

    def unavailable_reason(self) -> str | None:
        return None  # what it is made of is installed with the project

    def check(self, cfg: CfgNode, *, eval_only: bool) -> str:
        model = build_model(cfg)
        # What cannot be built is an error here, not after the data check.
        lr_at(cfg, 0)
        if cfg.MODEL.COMPILE == "kernels":
            compile_kernels()
        return load_initial_weights(model, cfg, eval_only=eval_only)

    def train(self, run: Run) -> None:
        cfg, process = run.cfg, run.process
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        # torch's own, and so Detectron2's; pretraining in the same process has its own.
        torch.backends.cudnn.allow_tf32 = True
        randomness = build_randomness(run)
        randomness.seed_model()
        model = build_model(cfg)
        load_initial_weights(model, cfg, eval_only=False)
        model.to(process.device).train()
        compiled = accelerate_(model, cfg, process.device)
        optimizer = build_optimizer(cfg, model)
        start, losses = _resume(run, model, optimizer, randomness) if run.resume else (0, ())
        if start is None:  # the final model is there
            return
        distributed.broadcast_state(model)
        distributed.check_equal_across_ranks(model.state_dict(), "model at start", process.device)
        for note in filter(None, (compiled, amp_note(cfg, process.device))):
            say(run, note)
        if start < cfg.SOLVER.MAX_ITER:
            with (
                stop_on_signal() as stop,
                dead_worker_as_data_error(WORKERS_KEY),
                out_of_memory_as_error(
                    lambda: f"detector training (rank {process.rank})",
                    lambda: "Lower SOLVER.IMS_PER_BATCH with BASE_LR, or INPUT.MAX_SIZE_TRAIN, or "
                    "set SOLVER.AMP.ENABLED True",
                ),
            ):
                _train_iterations(run, model, optimizer, randomness, start, losses, stop)
        # Detectron2's hook order: precise statistics first, then the final checkpoint.
        _update_statistics(run, model, randomness)
        states = randomness.states()
        if process.is_main:
            path = run.output_dir / FINAL_MODEL
            save_state(run, path, model, optimizer, cfg.SOLVER.MAX_ITER - 1, states)
        distributed.barrier()

    def predict(self, run: Run, records: Sequence[dict]) -> Detections:
        return _predict(self._trained(run), run, records)

    def detector(self, run: Run) -> Callable[[dict], tuple]:
        model = self._trained(run)

        def detect(record: dict) -> tuple:
            return _detect(model, load_test_sample(record, run.cfg), run)

        return detect

    @staticmethod
    def _trained(run: Run) -> GeneralizedRCNN:
        """The detector of the run, or of MODEL.WEIGHTS with `run.eval_only`, in eval mode."""
        torch.backends.cudnn.allow_tf32 = True
        model = build_model(run.cfg)
        if run.eval_only:
            load_initial_weights(model, run.cfg, eval_only=True)
        else:
            verify_manifest(run.output_dir / FINAL_MODEL)
            load_state(run, run.output_dir / FINAL_MODEL, model)
        model.to(run.process.device).eval()
        accelerate_(model, run.cfg, run.process.device)
        return model


def _predict(model: GeneralizedRCNN, run: Run, records: Sequence[dict]) -> Detections:
    """The detections of all records by a model in eval mode, on every rank."""
    own = records[own_part(len(records), run.process)]
    samples = eval_loader(own, run.cfg, num_workers=run.cfg.DATALOADER.NUM_WORKERS)
    detections = {}
    with dead_worker_as_data_error(WORKERS_KEY):
        for number, (sample,) in enumerate(samples, start=1):
            detections[sample["image_id"]] = _detect(model, sample, run)
            if number % 500 == 0 or number == len(own):
                say(run, f"predicted {number}/{len(own)} images of rank 0")
    samples.close()
    return gather_detections(detections, run.process)


def _detect(model: GeneralizedRCNN, sample: dict, run: Run) -> tuple:
    """The entry of one test sample in `Detections`."""
    with (
        _autocast(run.process, enabled=run.cfg.TEST.AMP.ENABLED),
        out_of_memory_as_error(
            lambda: f"{sample['file_name']} (rank {run.process.rank})",
            lambda: "Lower INPUT.MAX_SIZE_TEST, or set TEST.AMP.ENABLED True",
        ),
    ):
        found = model.inference([sample])[0]
    # In one piece: each is read after all that the device was given before. Classes stay exact.
    columns = found["boxes"], found["scores"][:, None], found["classes"][:, None].float()
    rows = torch.cat(columns, dim=1).cpu()
    detected = rows[:, :4].numpy(), rows[:, 4].numpy(), rows[:, 5].long().numpy()
    if run.cfg.MODEL.MASK_ON:
        size = sample["height"], sample["width"]
        detected += (encode_masks(found["mask_probs"], found["boxes"], *size),)
    return detected


def _train_iterations(
    run: Run,
    model: GeneralizedRCNN,
    optimizer: torch.optim.Optimizer,
    randomness: Randomness,
    start: int,
    recent_losses: Sequence[Sequence[float]],
    stop: StopFlag,
) -> None:
    """Iterations `start` to MAX_ITER - 1. Raises: TrainingStopped, NonFiniteError."""
    cfg, process, solver = run.cfg, run.process, run.cfg.SOLVER
    progress = start_progress(run, start, losses=recent_losses)
    evaluation = PeriodicEvaluation(run, progress, start)
    forward = model if process.world_size == 1 else distributed.data_parallel(model, process)
    batches = randomness.training_batches(start)
    model.proposal_generator.checked_later = True

    def save(path: Path, iteration: int, **fields: object) -> None:
        states, losses = randomness.states(), progress.recent_losses()
        if process.is_main:
            save_state(run, path, model, optimizer, iteration, states, losses, **fields)

    def evaluate(iteration: int) -> None:
        randomness.pass_evaluation()
        predict = partial(_predict_in_training, model, run)
        evaluation.run(iteration, predict, partial(save, iteration=iteration))

    with contextlib.closing(progress):
        if evaluation.due(start - 1):  # the session before may have ended in between
            evaluate(start - 1)
        for iteration in range(start, solver.MAX_ITER):
            progress.begin()
            batch = next(batches)
            progress.loaded()
            set_lr(optimizer, cfg, iteration)
            randomness.seed_step(iteration)
            with _autocast(process, enabled=solver.AMP.ENABLED):
                losses = forward(batch)
            num_wild = model.proposal_generator.num_wild
            is_bad, stopping = check_losses(losses, num_wild, stop, process)
            if is_bad:
                images = [sample["image_id"] for sample in batch]
                problem = _problem(losses, model.proposal_generator)
                stop_if_not_finite(problem, images, iteration, lr_at(cfg, iteration), process)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            clip_gradients_(optimizer, cfg)
            optimizer.step()

            progress.report(iteration, losses, lr_at(cfg, iteration))
            # Detectron2's hook order: precise statistics, checkpoint, evaluation.
            if evaluation.due(iteration):
                _update_statistics(run, model, randomness)
            at_end = partial(save, iteration=iteration)
            save_if_due(run, iteration, stop, at_end, stopping=stopping)
            if evaluation.due(iteration):
                evaluate(iteration)
    batches.close()
    model.proposal_generator.checked_later = False


def _predict_in_training(model: GeneralizedRCNN, run: Run) -> Detections:
    model.eval()
    try:
        return _predict(model, run, run.data.test_records)
    finally:
        model.train()


def _autocast(process: ProcessInfo, *, enabled: bool) -> torch.autocast:
    return torch.autocast(process.device.type, dtype=torch.bfloat16, enabled=enabled)


def _problem(losses: dict[str, torch.Tensor], rpn: RPN) -> str | None:
    """What is not finite on this rank, in words."""
    if rpn.num_wild:
        return wild_proposals(int(rpn.num_wild), rpn.num_ranked)
    return loss_problem(losses)


def _resume(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, randomness: Randomness
) -> tuple[int | None, Sequence[Sequence[float]]]:
    """Load the newest verified state.

    Returns: the next iteration, None where training is done, and the losses before it.
    """
    path = state_to_resume(run)
    if path is None:
        return 0, ()
    if is_complete(run, path):
        return None, ()
    content = load_state(run, path, model, optimizer, randomness)
    start = content["iteration"] + 1
    say(run, f"resuming from {path} at iteration {start}")
    return start, content.get("recent_losses", ())


def _update_statistics(run: Run, model: GeneralizedRCNN, randomness: Randomness) -> None:
    """Precise batch norm over a stream of its own, in full precision, as Detectron2 does it."""
    if not run.cfg.TEST.PRECISE_BN.ENABLED:
        return
    say(run, f"precise batch norm: {run.cfg.TEST.PRECISE_BN.NUM_ITER} batches")
    batches = randomness.precise_bn_batches()
    update_bn_statistics(model, batches, run.cfg.TEST.PRECISE_BN.NUM_ITER)
    batches.close()


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
