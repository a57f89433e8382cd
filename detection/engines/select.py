"""Choice of the engine that trains and runs the detector."""

from __future__ import annotations

from detection.engines.base import Engine
from detection.engines.d2 import Detectron2Engine
from detection.engines.d2_settings import refuse_amp, refuse_keys, refuse_widths
from detection.engines.embedded.engine import EmbeddedEngine
from moco.cfgnode import CfgNode
from moco.errors import ConfigError

CHOICES = ("auto", "detectron2", "embedded")


def select_engine(
    name: str, cfg: CfgNode | None = None, device_type: str = "cpu"
) -> tuple[Engine, str]:
    """The engine called `name` and, in words, why it is the one.

    Call it after the processes have found each other: Detectron2 trains in one CPU process only.

    Args:
        name: "detectron2", "embedded", or "auto": Detectron2 where it works, else the embedded
            one.
        cfg, device_type: what is to be run, and on "cpu" or "cuda"; "auto" leaves to the embedded
            engine what only that implements.
    Raises: ConfigError for an unknown name, or an engine that cannot run here.
    """
    if name not in CHOICES:
        raise ConfigError(f"--engine {name!r} is unknown; allowed: {', '.join(CHOICES)}")
    asked = "asked for by --engine"
    if name == "embedded":
        return EmbeddedEngine(), asked
    engine = Detectron2Engine()
    reason = engine.unavailable_reason()
    if name == "detectron2":
        if reason:
            raise ConfigError(f"--engine detectron2: {reason}; or give --engine embedded")
        return engine, asked
    reason = reason or _refusal(cfg, device_type)
    if reason:
        return EmbeddedEngine(), f"auto: {reason}"
    return engine, "auto: Detectron2 works here; --engine embedded gives the other one"


def _refusal(cfg: CfgNode | None, device_type: str) -> str | None:
    """What in the configuration Detectron2 does not implement."""
    if cfg is None:
        return None
    try:
        refuse_keys(cfg)
        refuse_widths(cfg)
        refuse_amp(cfg, device_type)
    except ConfigError as error:
        return str(error)
    return None
