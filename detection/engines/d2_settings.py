"""Our configuration as Detectron2's, which is not imported here."""

from __future__ import annotations

from detection.config import get_defaults
from detection.config_keys import EXTRA_KEYS, has_basic_blocks
from moco.cfgnode import CfgNode, flatten, get_key
from moco.errors import ConfigError

# The keys that Detectron2 lacks and that are acted on outside of it, or here.
UNDERSTOOD_KEYS = (
    "DATASETS.VOC_ROOT",
    "DATASETS.VOC_CLASSES",
    "DATASETS.VOC_METRIC",
    "DATASETS.COCO_FILES",
    "DATALOADER.STREAM",  # Detectron2 has its own stream whatever is asked for
    "INPUT.MAX_IMAGE_PIXELS",
    "MODEL.RESET_PREDICTORS",
    "TEST.ROUND_DETECTIONS",
    "SOLVER.PROGRESS_PERIOD",
    "LOG.TENSORBOARD",
)


def refuse_keys(cfg: CfgNode) -> None:
    """Raise ConfigError for the settings that only the embedded engine has."""
    defaults = get_defaults()
    for key in EXTRA_KEYS:
        value, default = get_key(cfg, key), get_key(defaults, key)
        if key not in UNDERSTOOD_KEYS and value != default:
            raise ConfigError(
                f"{key} is {value!r}, which only the embedded engine implements; with --engine "
                f"detectron2 leave it at {default!r}, or use --engine embedded"
            )


def refuse_widths(cfg: CfgNode) -> None:
    """Raise ConfigError for a ResNet-18 or 34 of another width than Detectron2 builds."""
    options = cfg.MODEL.RESNETS
    if has_basic_blocks(cfg) and options.RES2_OUT_CHANNELS != 64:
        raise ConfigError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {options.RES2_OUT_CHANNELS}, but Detectron2 "
            f"builds DEPTH {options.DEPTH} with 64 only; use --engine embedded"
        )


def refuse_amp(cfg: CfgNode, device_type: str) -> None:
    """Raise ConfigError for mixed precision in training where Detectron2 lacks it."""
    if cfg.SOLVER.AMP.ENABLED and device_type != "cuda":
        raise ConfigError(
            "SOLVER.AMP.ENABLED is True, which Detectron2 can do on a GPU only; set it to False, "
            "or use --engine embedded"
        )


def fill_config(theirs: CfgNode, cfg: CfgNode) -> None:
    """Set our values of the keys that both have in `theirs`, Detectron2's `get_cfg()`.

    Raises: ConfigError for another value than the default of a key this Detectron2 lacks.
    """
    known, defaults = flatten(theirs), flatten(get_defaults())
    for key, value in flatten(cfg).items():
        if key in EXTRA_KEYS:
            continue
        if key in known:
            _set_key(theirs, key, value)
        elif value != defaults[key]:
            raise ConfigError(
                f"{key} is {value!r}, but the installed Detectron2 does not know this key; update "
                "Detectron2, leave the key out, or use --engine embedded"
            )


def _set_key(node, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    # Tuples and lists are the same to a user, not to Detectron2.
    node[last] = type(node[last])(value) if isinstance(node[last], list | tuple) else value
