"""Whether the classes of weights are those of the data, by name and in order.

A class is a number to the network. What it means is known where the weights' file has the names
(`class_names`, which every checkpoint of this project holds) or lies in the folder of its run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.run_folder import read_class_names
from detection.weights_file import find_weights, read_weights_file
from moco.cfgnode import CfgNode
from moco.errors import ConfigError

_NUM_SHOWN = 25
_PREDICTOR = "cls_score.weight"


@dataclass(frozen=True)
class DetectorClasses:
    """The classes of a fine-tuned detector's file; `names` is None where nothing tells them."""

    path: Path
    count: int
    names: tuple[str, ...] | None


def classes_of_weights(weights: str) -> DetectorClasses | None:
    """Of the file that MODEL.WEIGHTS names; None for "" and for a backbone.

    Raises: CheckpointError as `read_weights_file`, or for a damaged file of names.
    """
    if not weights:
        return None
    path = find_weights(weights)
    file = read_weights_file(path)
    predictor = next((t for n, t in file.tensors.items() if n.endswith(_PREDICTOR)), None)
    if predictor is None or not predictor.dim():
        return None
    count = len(predictor) - 1
    names = file.class_names or read_class_names(path.parent)
    return DetectorClasses(path, count, names if names and len(names) == count else None)


def check_classes(cfg: CfgNode, class_names: Sequence[str], *, eval_only: bool) -> str | None:
    """Compare the classes of MODEL.WEIGHTS with those of the data.

    Returns: a line about what cannot be compared, or None.
    Raises: ConfigError where evaluation or training would take one class for another.
    """
    found = classes_of_weights(cfg.MODEL.WEIGHTS)
    if found is None or (found.names is None and found.count != len(class_names)):
        return None
    starts_anew = not eval_only and (
        cfg.MODEL.RESET_PREDICTORS or found.count != len(class_names)
    )
    if starts_anew or found.names == tuple(class_names):
        return None
    if found.names is None:
        return (
            f"classes: {found.path} does not name its {found.count} classes; they are taken for "
            f"{_listed(class_names)}, in this order"
        )
    remedy = "; or set MODEL.RESET_PREDICTORS True, to start with new class-dependent tensors"
    raise ConfigError(
        f"{found.path}: {classes_differ(cfg, found.names, class_names)}"
        f"{'' if eval_only else remedy}"
    )


def classes_differ(
    cfg: CfgNode, of_weights: Sequence[str], of_data: Sequence[str], where: str = "the data"
) -> str:
    """Both lists, and what to give, in words; `of_data` are those of `where`."""
    is_order = sorted(of_weights) == sorted(of_data)
    text = (
        f"was trained for the classes {_listed(of_weights)}; those of {where} are "
        f"{_listed(of_data)}{', in another order' if is_order else ''}"
    )
    pairs = zip(of_weights, of_data, strict=False)
    number, pair = next(((n, p) for n, p in enumerate(pairs) if p[0] != p[1]), (None, None))
    if pair and max(len(of_weights), len(of_data)) > _NUM_SHOWN:
        text += f" (class {number} is {pair[0]!r} there and {pair[1]!r} here)"
    if not is_order:
        return f"{text}; give data of the weights' classes, or weights of those"
    if cfg.DATASETS.VOC_ROOT:
        names = ",".join(f'"{name}"' for name in of_weights)
        return f"{text}; give them in the weights' order: DATASETS.VOC_CLASSES '({names})'"
    return (
        f"{text}; the order is that of the category ids: number the categories of the data as "
        f"({', '.join(of_weights)})"
    )


def _listed(names: Sequence[str]) -> str:
    shown, rest = ", ".join(names[:_NUM_SHOWN]), len(names) - _NUM_SHOWN
    return f"({shown}{f' and {rest} more' if rest > 0 else ''})"
