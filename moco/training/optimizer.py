"""The optimizer of pretraining."""

from __future__ import annotations

import torch

from moco.cfgnode import CfgNode


def build_optimizer(cfg: CfgNode, method: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay on all parameters (MoCo v1, section 4).

    The key encoder's parameters are listed too, as in the reference, so that optimizer states
    can be exchanged with it; they have no gradient and are never stepped.
    """
    return torch.optim.SGD(
        method.parameters(),
        lr=cfg.TRAIN.LR,
        momentum=cfg.TRAIN.SGD_MOMENTUM,
        weight_decay=cfg.TRAIN.WEIGHT_DECAY,
    )
