"""Contrast mechanisms, one file each, under one protocol (`moco.methods.base.Method`)."""

from __future__ import annotations

from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.methods.end_to_end import EndToEnd
from moco.methods.memory_bank import MemoryBank
from moco.methods.moco import MoCo
from moco.methods.moco_symmetric import SymmetricMoCo
from moco.methods.moco_v3 import MoCoV3

BUILDERS = {
    "moco": MoCo.from_config,
    "moco_symmetric": SymmetricMoCo.from_config,
    "end_to_end": EndToEnd.from_config,
    "memory_bank": MemoryBank.from_config,
    "moco_v3": MoCoV3.from_config,
}

__all__ = ["BUILDERS", "Method", "StepOutput", "build_method"]


def build_method(cfg: CfgNode, num_images: int | None = None) -> Method:
    """The method `cfg.METHOD` names.

    Args:
        num_images: of the data set; the memory bank needs it, for others None will do.

    Raises: ConfigError for an unknown name, or settings that do not fit the method.
    """
    if cfg.METHOD not in BUILDERS:
        raise ConfigError(f"METHOD is {cfg.METHOD!r}; allowed: {', '.join(BUILDERS)}")
    return BUILDERS[cfg.METHOD](cfg, num_images)
