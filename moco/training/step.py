"""One optimisation step: everything that changes numbers, nothing that only watches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.data.augment import to_inputs
from moco.distributed import ProcessInfo
from moco.kernels.gradient_norm import total_norm
from moco.methods import Method, StepOutput
from moco.seeding import torch_generator
from moco.training.guard import Evidence, StepGuard
from moco.training.loss_scale import LossScale
from moco.training.nonfinite import NonFiniteReport

Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss and metrics of this process (detached); no metrics where none were asked for."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def train_step(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    momentum: float,
    cfg: CfgNode,
    process: ProcessInfo,
    guard: StepGuard | None = None,
    loss_scale: LossScale | None = None,
    stop_requested: bool = False,
    measure: bool = True,
) -> StepResult:
    """Forward and backward of each micro-batch, update, and only then the method's own state.

    Args:
        model: `method`, or its DistributedDataParallel wrapper.
        batch: of this process's images, as its loader gives it (`to_inputs`).
        step: number of the step, from 0; with the seed it determines the step's draws.
        lr, momentum: of the optimizer and of the key encoder in this step.
        guard: of the run; None makes one that reads this step's findings at once.
        loss_scale: of the run, with TRAIN.AMP_DTYPE float16; without it the loss is not scaled.
            The update of a step in which it overflows is left out; its keys are stored.
        stop_requested: whether this process received a signal; `guard` shares it with all others.
        measure: compute the metrics, and read the guard's findings at once.
    Raises: NonFiniteError on all processes, before any update, where one finds NaN or Inf.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if guard is None:
        guard = StepGuard(process, NonFiniteReport(method, process))
    view_q, view_k, index = to_inputs(batch, cfg, process.device)
    generator = torch_generator(cfg.SEED, "method-step", step)
    with _autocast(cfg, process.device):
        parts = method.prepare(
            view_q, view_k, momentum=momentum, generator=generator,
            num_parts=cfg.TRAIN.ACCUMULATION_STEPS,
        )  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    factor = None if loss_scale is None else loss_scale.factor
    output = _accumulate(model, (view_q, view_k, index), parts, cfg, measure, factor=factor)
    if loss_scale is not None:
        loss_scale.unscale_([p.grad for p in method.parameters() if p.grad is not None])
    norm = gradient_norm(method)

    def redo() -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs = to_inputs(batch, cfg, process.device)
        _accumulate(model, inputs, parts, cfg, measure=False, share=False)

    evidence = Evidence(step, lr, output.loss, output.keys_VBD, index, redo)
    overflow = None if loss_scale is None else loss_scale.overflows(norm)
    judged = norm if overflow is None else torch.where(overflow, 0.0, norm)
    skip = guard.check(evidence, judged, stop=stop_requested, wait=measure)
    # torch's fused optimizers leave out their update where this is 1, without a word to the host.
    left_out = [flag for flag in (skip, overflow) if flag is not None]
    optimizer.found_inf = torch.stack(left_out).any().float() if left_out else None
    optimizer.step()
    method.after_step(output, index, skip)
    metrics = {**output.metrics, "gradient_norm": norm} if measure else {}
    if loss_scale is not None:
        loss_scale.update_(overflow)
        if measure:  # the norm of a step that was left out as the largest number
            metrics |= {"gradient_norm": norm.nan_to_num(torch.finfo(norm.dtype).max)}
            metrics |= {"loss_scale": loss_scale.factor.clone()}
    return StepResult(output.loss, metrics)


def gradient_norm(method: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients together, a scalar on their device; NaN or Inf if one of them is."""
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    if getattr(method, "compiled", False) and all(g.dtype == torch.float32 for g in gradients):
        return total_norm(gradients)
    return torch.nn.utils.get_total_norm(gradients)


def _accumulate(
    model: nn.Module,
    images: Images,
    parts: Sequence[Any],
    cfg: CfgNode,
    measure: bool,
    share: bool = True,
    factor: torch.Tensor | None = None,
) -> StepOutput:
    """The mean of the micro-batches' losses, its gradient, shared with the last one's backward.

    Args:
        images: views and numbers of this process's images; parts: what `Method.prepare` gave.
        share: whether processes average their gradients. factor: on the gradients.
    """
    num_parts, outputs = len(parts), []
    micro_batches = zip(*(t.chunk(num_parts) for t in images), parts, strict=True)
    for number, (view_q, view_k, index, part) in enumerate(micro_batches):
        alone = not share or number + 1 < num_parts
        with model.no_sync() if alone and hasattr(model, "no_sync") else contextlib.nullcontext():
            with _autocast(cfg, view_q.device):
                output = model(view_q, view_k, index, part=part, measure=measure)
            loss = output.loss / num_parts
            (loss if factor is None else loss * factor).backward()
        output.loss = output.loss.detach()
        outputs.append(output)
    return _joined(outputs)


def _joined(outputs: Sequence[StepOutput]) -> StepOutput:
    """Means of the micro-batches' losses and metrics, and all their keys."""
    num, keys = len(outputs), [output.keys_VBD for output in outputs]
    return StepOutput(
        loss=sum(output.loss for output in outputs) / num,
        metrics={
            name: sum(output.metrics[name] for output in outputs) / num
            for name in outputs[0].metrics
        },
        keys_VBD=None if keys[0] is None else torch.cat(keys, dim=1),
    )


def _autocast(cfg: CfgNode, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, cfg.TRAIN.AMP_DTYPE)
    return torch.autocast(device.type, dtype=dtype, enabled=cfg.TRAIN.AMP)
