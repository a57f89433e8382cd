"""The optimizers of pretraining."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moco.cfgnode import CfgNode

_TRUST = 0.001


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled to each tensor's weights (arXiv 1708.03888).

    The update d of a tensor w (its gradient + weight_decay * w) becomes trust * |w| / |d| * d
    before it enters the momentum; d stays as it is where a norm is zero. Biases and batch norm's
    parameters, all of one dimension, are neither decayed nor scaled, as SimCLR and BYOL do.

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
        state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        weight.sub_(state["momentum_buffer"], alpha=group["lr"])


def build_optimizer(cfg: CfgNode, method: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer `cfg.TRAIN` names, over all parameters.

    "sgd": momentum, weight decay on all parameters (MoCo v1, section 4). "lars", "adamw": MoCo v3
    for ResNets and ViTs; AdamW decays all parameters too.
    The key encoder's parameters are listed, as in the reference, so that optimizer states can be
    exchanged with it; they have no gradient and are never stepped.
    """
    train, parameters = cfg.TRAIN, method.parameters()
    if train.OPTIMIZER == "adamw":
        return torch.optim.AdamW(parameters, lr=train.LR, weight_decay=train.WEIGHT_DECAY)
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[train.OPTIMIZER]
    return kind(
        parameters, lr=train.LR, momentum=train.SGD_MOMENTUM, weight_decay=train.WEIGHT_DECAY
    )
