"""The optimizers of pretraining."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from moco.cfgnode import CfgNode

_TRUST = 0.001


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled to each tensor's weights (arXiv 1708.03888).

    The update d of a tensor w (its gradient + weight_decay * w) becomes trust * |w| / |d| * d
    before it enters the momentum; d stays as it is where a norm is zero. Biases and batch norm's
    parameters, all of one dimension, are neither decayed nor scaled, as SimCLR and BYOL do.
    As torch's fused optimizers do, it leaves out an update where its attribute `found_inf`, a
    scalar on the device, is 1.

    Args:
        parameters: tensors that may lack a gradient; those are left alone.
        lr: learning rate. momentum, weight_decay: factors. trust: trust coefficient.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float = _TRUST,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(parameters, options)
        self._step_supports_amp_scaling = True  # torch's name for: `found_inf` is obeyed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_tensor(weight, group)

    def _step_tensor(self, weight: torch.Tensor, group: dict) -> None:
        update = weight.grad
        if weight.dim() > 1:
            update = update.add(weight, alpha=group["weight_decay"])
            weight_norm, update_norm = weight.norm(), update.norm()
            ratio = group["trust"] * weight_norm / update_norm
            usable = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(usable, ratio, 1.0)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer, found_inf = state["momentum_buffer"], getattr(self, "found_inf", None)
        if found_inf is not None:
            skip = found_inf.bool()
            moved = torch.where(skip, buffer, buffer.mul(group["momentum"]).add_(update))
            weight.copy_(torch.where(skip, weight, weight.sub(moved, alpha=group["lr"])))
            buffer.copy_(moved)
            return
        buffer.mul_(group["momentum"]).add_(update)
        weight.sub_(buffer, alpha=group["lr"])


def build_optimizer(cfg: CfgNode, method: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer `cfg.TRAIN` names, over all parameters.

    "sgd": momentum, weight decay on all parameters (MoCo v1, section 4). "lars", "adamw": MoCo v3
    for ResNets and ViTs; AdamW decays all parameters too.
    The key encoder's parameters are listed, as in the reference, so that optimizer states can be
    exchanged with it; they have no gradient and are never stepped.
    """
    train, parameters = cfg.TRAIN, method.parameters()
    if train.OPTIMIZER == "lars":
        return LARS(
            parameters, lr=train.LR, momentum=train.SGD_MOMENTUM, weight_decay=train.WEIGHT_DECAY
        )
    options = {"lr": train.LR, "weight_decay": train.WEIGHT_DECAY}
    options["fused"] = None if train.REFERENCE else True  # torch's default, or one pass
    if train.OPTIMIZER == "adamw":
        optimizer = torch.optim.AdamW(parameters, **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=train.SGD_MOMENTUM, **options)
    # A state brings the choice of the process that saved it.
    optimizer.register_load_state_dict_post_hook(functools.partial(_set_fused, options["fused"]))
    return optimizer


def _set_fused(fused: bool | None, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = fused, None
