"""One optimisation step: everything that changes numbers, nothing that only watches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.data.augment import normalize
from moco.distributed import ProcessInfo, world_size
from moco.errors import NonFiniteError
from moco.methods import Method
from moco.seeding import torch_generator


@dataclass(frozen=True)
class StepResult:
    """loss and metrics of this process (detached), and whether a process was asked to stop."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    stop_requested: bool


def train_step(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    step: int,
    lr: float,
    momentum: float,
    cfg: CfgNode,
    process: ProcessInfo,
    stop_requested: bool = False,
) -> StepResult:
    """Forward, backward, update, and only then the method's own state (its queue).

    Args:
        model: `method`, or its DistributedDataParallel wrapper.
        batch: (view_q, view_k, index), uint8 [B, 3, H, W] twice and int64 [B].
        step: number of the step, from 0; with the seed it determines the step's draws.
        lr, momentum: of the optimizer and of the key encoder in this step.
        stop_requested: whether this process received a signal; shared with all others.
    Raises: NonFiniteError on all processes, before any update, where the loss of one is NaN or Inf.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    view_q, view_k, index = (t.to(process.device, non_blocking=True) for t in batch)
    view_q, view_k = (_to_input(view, cfg) for view in (view_q, view_k))
    generator = torch_generator(cfg.SEED, "method-step", step)
    with torch.autocast(process.device.type, dtype=torch.bfloat16, enabled=cfg.TRAIN.AMP):
        output = model(view_q, view_k, index, momentum=momentum, generator=generator)
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    loss = output.loss.detach()
    not_finite, stop = _agree(~torch.isfinite(loss), stop_requested, process.device)
    if not_finite:
        raise NonFiniteError(
            f"step {step}: the loss is not finite (rank {process.rank}: loss={loss.item()}, "
            f"lr={lr:.6g}); nothing was updated with it. Lower TRAIN.LR, or look at the images of "
            f"this step: {index.tolist()[:8]} ..."
        )
    optimizer.step()
    method.after_step(output, index)
    return StepResult(loss, output.metrics, stop)


def _to_input(images_uint8: torch.Tensor, cfg: CfgNode) -> torch.Tensor:
    images = normalize(images_uint8, cfg.DATA.MEAN, cfg.DATA.STD)
    return images.to(memory_format=torch.channels_last) if cfg.TRAIN.CHANNELS_LAST else images


def _agree(not_finite: torch.Tensor, stop: bool, device: torch.device) -> tuple[bool, bool]:
    """Both flags, true everywhere as soon as one process has them: all stop at the same step."""
    flags = torch.stack([not_finite, torch.tensor(stop, device=device)]).to(torch.uint8)
    if world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    not_finite, stop = flags.tolist()
    return bool(not_finite), bool(stop)
