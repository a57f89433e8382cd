"""`MODEL.COMPILE`: whether a detector computes by the kernels of `moco.kernels`."""

from __future__ import annotations

import torch

from detection.engines.embedded.faster_rcnn import GeneralizedRCNN
from detection.engines.embedded.norm import NaiveSyncBatchNorm2d
from moco.cfgnode import CfgNode
from moco.distributed import world_size
from moco.kernels.choose import use_kernels_
from moco.kernels.compiler import compile_kernels


def accelerate_(model: GeneralizedRCNN, cfg: CfgNode, device: torch.device) -> str | None:
    """Let `model` compute as `MODEL.COMPILE` says: with "kernels", on a CPU, what pretraining
    computes by them, RoIAlign, and the RPN's suppression. Names, values and random draws stay as
    they are.

    Returns: what was done, in words, or None.
    Raises: ConfigError where the kernels cannot be compiled.
    """
    # A detector that was trained by kernels predicts on a GPU too (`detection.predict`).
    if cfg.MODEL.COMPILE != "kernels" or device.type != "cpu":
        return None
    num_layers, origin = use_kernels_(model, evaluation=True), compile_kernels()
    model.roi_heads.pooler.compiled = model.proposal_generator.compiled = True
    for module in model.modules():
        if isinstance(module, NaiveSyncBatchNorm2d):
            module.compiled = world_size() == 1  # else it has messages to send
    return f"kernels: {num_layers} layers (for this CPU, {origin})"
