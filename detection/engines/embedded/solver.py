"""SGD parameter groups and the learning-rate schedule of Detectron2
(detectron2/solver/build.py, lr_scheduler.py), as pure functions of the iteration."""

from __future__ import annotations

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

from detection.engines.embedded.norm import TRAINABLE_NORMS
from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.training.optimizer import FusedSGD, keep_own_ways_


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD over the trainable parameters, in Detectron2's groups and order.

    Weights and biases decay by WEIGHT_DECAY, norms by WEIGHT_DECAY_NORM. Everything called
    `bias`, those of norms included, follows WEIGHT_DECAY_BIAS (None: no rule of its own) and
    BIAS_LR_FACTOR. Each group keeps `initial_lr`, which `set_lr` multiplies. With MODEL.COMPILE
    "kernels" a step is one pass over the memory.
    """
    solver = cfg.SOLVER
    groups: dict[tuple, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            options = {"lr": solver.BASE_LR}
            if isinstance(module, TRAINABLE_NORMS) and solver.WEIGHT_DECAY_NORM is not None:
                options["weight_decay"] = solver.WEIGHT_DECAY_NORM
            if name == "bias" and solver.BIAS_LR_FACTOR != 1.0:
                options["lr"] = solver.BASE_LR * solver.BIAS_LR_FACTOR
            if name == "bias" and solver.WEIGHT_DECAY_BIAS is not None:
                options["weight_decay"] = solver.WEIGHT_DECAY_BIAS
            groups.setdefault(tuple(options.items()), []).append(parameter)
    param_groups = [
        {"params": parameters, "initial_lr": dict(options)["lr"], **dict(options)}
        for options, parameters in groups.items()
    ]
    options = {
        "lr": solver.BASE_LR,
        "momentum": solver.MOMENTUM,
        "weight_decay": solver.WEIGHT_DECAY,
        "nesterov": solver.NESTEROV,
    }
    if cfg.MODEL.COMPILE == "kernels":
        optimizer = FusedSGD(param_groups, **options)
    else:
        optimizer = torch.optim.SGD(param_groups, **options, foreach=True)
    keep_own_ways_(optimizer)
    return optimizer


def clip_gradients_(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> None:
    """With SOLVER.CLIP_GRADIENTS.ENABLED, bound the gradient of each parameter apart: its elements
    by +-CLIP_VALUE (CLIP_TYPE "value"), or its NORM_TYPE-norm by CLIP_VALUE ("norm")."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if clip.CLIP_TYPE == "norm":
                torch.nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
            else:
                torch.nn.utils.clip_grad_value_(parameter, clip.CLIP_VALUE)


def lr_at(cfg: CfgNode, iteration: int) -> float:
    """The learning rate of iteration 0 ... MAX_ITER - 1 (of groups with BIAS_LR_FACTOR 1).

    Raises: ConfigError for a schedule that cannot be built.
    """
    return cfg.SOLVER.BASE_LR * lr_multiplier(cfg, iteration)


def set_lr(optimizer: torch.optim.Optimizer, cfg: CfgNode, iteration: int) -> None:
    """Give every group of `build_optimizer` its learning rate for this iteration."""
    multiplier = lr_multiplier(cfg, iteration)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def lr_multiplier(cfg: CfgNode, iteration: int) -> float:
    """What BASE_LR is multiplied with: warm-up, then steps or half a cosine."""
    return _schedule(cfg)(iteration / cfg.SOLVER.MAX_ITER)


def _schedule(cfg: CfgNode) -> ParamScheduler:
    solver = cfg.SOLVER
    try:
        after = _after_warmup(cfg)
    except ValueError as error:
        raise ConfigError(
            f"SOLVER: MAX_ITER {solver.MAX_ITER} and STEPS {tuple(solver.STEPS)} make no schedule "
            f"({error}); allowed: ascending STEPS other than MAX_ITER; change them"
        ) from error
    warmup_part = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    start = solver.WARMUP_FACTOR * after(0.0)
    end = after(0.0) if solver.RESCALE_INTERVAL else after(warmup_part)
    warmup = {
        "constant": ConstantParamScheduler(start),
        "linear": LinearParamScheduler(start, end),
    }[solver.WARMUP_METHOD]
    return CompositeParamScheduler(
        [warmup, after],
        lengths=[warmup_part, 1 - warmup_part],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )


def _after_warmup(cfg: CfgNode) -> ParamScheduler:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    # A short trial run keeps the STEPS of the full one: those beyond its end do nothing.
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    return MultiStepParamScheduler(
        values=[solver.GAMMA**k for k in range(len(steps) + 1)],
        milestones=steps,
        num_updates=solver.MAX_ITER,
    )
