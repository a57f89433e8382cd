"""Contrast mechanisms, one file each, under one protocol (`moco.methods.base.Method`)."""

from __future__ import annotations

from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.methods.moco import MoCo

BUILDERS = {"moco": MoCo.from_config}

__all__ = ["BUILDERS", "Method", "StepOutput", "build_method"]


def build_method(cfg: CfgNode) -> Method:
    """The method `cfg.METHOD` names. Raises ConfigError for an unknown name."""
    if cfg.METHOD not in BUILDERS:
        raise ConfigError(f"METHOD is {cfg.METHOD!r}; allowed: {', '.join(BUILDERS)}")
    return BUILDERS[cfg.METHOD](cfg)
