"""Choice of the engine that trains and runs the detector."""

from __future__ import annotations

from detection.engines.base import Engine
from detection.engines.embedded.engine import EmbeddedEngine
from moco.errors import ConfigError

CHOICES = ("auto", "detectron2", "embedded")


def select_engine(name: str) -> tuple[Engine, str]:
    """The engine called `name` and, in words, why it is the one.

    Args:
        name: "auto", "detectron2" or "embedded".
    Raises: ConfigError for an unknown name, or an engine that cannot run here.
    """
    if name not in CHOICES:
        raise ConfigError(f"--engine {name!r} is unknown; allowed: {', '.join(CHOICES)}")
    if name == "detectron2":
        raise ConfigError(
            "--engine detectron2: this version has only the embedded engine; "
            "use --engine embedded or leave the flag out"
        )
    engine = EmbeddedEngine()
    reason = engine.unavailable_reason()
    if reason:
        raise ConfigError(f"--engine {name}: the embedded engine cannot run here ({reason})")
    if name == "auto":
        return engine, "auto: this version has no other engine"
    return engine, "asked for by --engine"
