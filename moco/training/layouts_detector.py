"""Detectors as sources of a backbone: what their files do not hold is read from beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from moco.errors import CheckpointError, ConfigError
from moco.safe_yaml import read_yaml
from moco.training.checkpoint import read_json

FINAL_MODEL = "model_final.pth"  # Detectron2's name, in a trial's folder
DETECTOR = "detector"  # the entry that `with_settings` adds
_STEMS = ("backbone.stem.conv1.weight", "stem.conv1.weight")
_CONVERTERS = ("moco", "torchvision")  # `__author__` of files whose stride is in the 3x3
# Detectron2's defaults (config/defaults.py), for a configuration that leaves them out.
_DEFAULTS = {
    "INPUT.FORMAT": "BGR",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
_NEEDED = {
    "MODEL.RESNETS.STRIDE_IN_1X1": (False, "the stride is in another convolution"),
    "MODEL.RESNETS.RES5_DILATION": (1, "res5 is dilated"),
    "INPUT.FORMAT": ("RGB", "its images are BGR"),
}


def with_settings(content: object, path: Path) -> object:
    """`content`, where it has Detectron2's names, with what is known of its network and pixels.

    They stand in `config.yaml` beside a detector, or in the converter's report beside its weights;
    the names and shapes of the tensors do not tell them.

    Returns: a dict of `model` and DETECTOR: {"mean", "std" (of 0-1 pixels, or None), "notes"}.
    Raises: CheckpointError where the network is not torchvision's though its tensors look so.
    """
    model = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not any(name in model for name in _STEMS):
        return content
    config, beside = _configuration(path)
    if config is None:
        notes = []
        if str(content.get("__author__", "")).lower() not in _CONVERTERS:
            notes = [
                f"there is no config.yaml beside {path.name}: its stride is taken to be in the 3x3 "
                "convolutions (STRIDE_IN_1X1 False) and its images to be RGB with ImageNet's "
                "statistics"
            ]
        return {"model": model, DETECTOR: {"mean": None, "std": None, "notes": notes}}
    for key, (needed, why) in _NEEDED.items():
        if _value(config, key) != needed:
            raise CheckpointError(
                f"{path}: {beside} says {key} {_value(config, key)!r}: {why}, so torchvision's "
                f"network with these tensors is another one; allowed: {needed!r}"
            )
    mean, std = (
        tuple(float(v) / 255 for v in _value(config, f"MODEL.PIXEL_{name}"))
        for name in ("MEAN", "STD")
    )
    return {"model": model, DETECTOR: {"mean": mean, "std": std, "notes": []}}


def settings_of(content: object) -> Mapping | None:
    """What `with_settings` added to a content, None for another file."""
    found = content.get(DETECTOR) if isinstance(content, Mapping) else None
    is_ours = isinstance(found, Mapping) and {"mean", "std", "notes"} <= found.keys()
    return found if is_ours else None


def _configuration(path: Path) -> tuple[Mapping | None, str]:
    """The settings beside a file and the name of the file that has them."""
    report, yaml = Path(f"{path}.conversion.json"), path.parent / "config.yaml"
    try:
        config, beside = None, yaml.name
        if report.is_file():
            config, beside = _of_report(read_json(report)["yaml"]), report.name
        elif yaml.is_file():
            config = read_yaml(yaml)
        if config is None or "ROI_HEADS" not in config["MODEL"]:  # of pretraining
            return None, ""
        for name in ("MEAN", "STD"):
            values = [float(v) for v in _value(config, f"MODEL.PIXEL_{name}")]
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"MODEL.PIXEL_{name} is {values}")
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path}: the settings beside it cannot be read ({reason}); restore the file, or move "
            "the weights to a folder of their own"
        ) from error
    return config, beside


def _of_report(lines: list[str]) -> dict:
    """The configuration that the converter prints, which has these settings always."""
    values = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    pixels = {name: json.loads(values[name]) for name in ("PIXEL_MEAN", "PIXEL_STD")}
    resnets = {"STRIDE_IN_1X1": values["STRIDE_IN_1X1"] != "False"}
    model = {**pixels, "RESNETS": resnets, "ROI_HEADS": {}}
    return {"INPUT": {"FORMAT": json.loads(values["FORMAT"])}, "MODEL": model}


def _value(config: Mapping, key: str) -> object:
    value: object = config
    for part in key.split("."):
        if part not in value:
            return _DEFAULTS[key]
        value = value[part]
    return value
