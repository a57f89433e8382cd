"""Caffe2's tensor names, as in the MSRA files of Detectron2's model zoo, in Detectron2's names.

Source of the correspondence: Detectron2 checkpoint/c2_model_loading.py. Known are the ResNet
and the heads of a C4 detector; the classifier, momentum and the biases of convolutions that a
norm follows have no place in the detector and are dropped, under a name that is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from moco.errors import CheckpointError

AUTHOR = "Caffe2"  # what `__author__` of a file with such names says

_UNITS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM_ENTRIES = {
    **{"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"},
    **{"rm": "running_mean", "running_mean": "running_mean"},
    **{"riv": "running_var", "running_var": "running_var"},
}
_HEADS = {
    "conv_rpn": "proposal_generator.rpn_head.conv",
    "rpn_cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn_bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "cls_score": "cls_score",
    "bbox_pred": "bbox_pred",
    "conv5_mask": "mask_head.deconv",
    "mask_fcn_logits": "mask_head.predictor",
}
_KINDS = {"w": "weight", "b": "bias"}
_BLOCK = r"res(?P<stage>[2-5])_(?P<block>\d+)_branch(?P<unit>1|2[abc])"
_CONV = re.compile(rf"(?:conv1|{_BLOCK})_(?P<kind>[wb])")
_NORM = re.compile(rf"(?:(?:res_)?conv1|{_BLOCK})_bn_(?P<entry>{'|'.join(_NORM_ENTRIES)})")
_HEAD = re.compile(rf"(?P<head>{'|'.join(_HEADS)})_(?P<kind>[wb])")
_CLASSIFIER = re.compile(r"(?:fc1000|pred)_[wb]")


def has_caffe2_names(names: Mapping[str, object]) -> bool:
    """True where the stem's convolution has its Caffe2 name, which no other layout has."""
    return "conv1_w" in names


def from_caffe2(
    tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The tensors under Detectron2's names (a detector's box predictor: by its last parts).

    Caffe2 counts the background as class 0 and predicts a box and a mask for it; Detectron2
    counts it last and predicts neither, so rows move or go.

    Returns: (tensors, dropped); `dropped` is {what they are: their Caffe2 names}.
    Raises: CheckpointError naming the tensors that belong to another network.
    """
    renamed: dict[str, torch.Tensor] = {}
    dropped: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in tensors.items():
        group = _dropped_group(name)
        target = None if group else _detectron2_name(name)
        if group:
            dropped.setdefault(group, []).append(name)
        elif target is None:
            unknown.append(name)
        elif target in renamed:
            raise CheckpointError(f"{where}: {name!r} and another tensor both mean {target!r}")
        else:
            renamed[target] = _without_background(target, tensor)
    if unknown:
        raise CheckpointError(
            f"{where}: has Caffe2's names, but {len(unknown)} are of no R50-C4 network: "
            f"{', '.join(unknown[:4])}; allowed: a ResNet without group norm, with or without the "
            "heads of a C4 detector"
        )
    return renamed, dropped


def _dropped_group(name: str) -> str | None:
    if name.endswith("_momentum"):
        return "momentum"
    if _CLASSIFIER.fullmatch(name):
        return "ImageNet classifier"
    conv = _CONV.fullmatch(name)
    if conv and conv["kind"] == "b":
        return "biases of normalised convolutions"
    return None


def _detectron2_name(name: str) -> str | None:
    if match := _CONV.fullmatch(name):
        return f"{_unit(match)}.{_KINDS[match['kind']]}"
    if match := _NORM.fullmatch(name):
        return f"{_unit(match)}.norm.{_NORM_ENTRIES[match['entry']]}"
    if match := _HEAD.fullmatch(name):
        return f"{_HEADS[match['head']]}.{_KINDS[match['kind']]}"
    return None


def _unit(match: re.Match) -> str:
    if match["stage"] is None:
        return "stem.conv1"
    return f"res{match['stage']}.{match['block']}.{_UNITS[match['unit']]}"


def _without_background(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dim():
        return tensor  # of no detector: refused once its shape is compared
    if name.startswith("cls_score."):
        return torch.cat([tensor[1:], tensor[:1]])
    if name.startswith("bbox_pred."):
        return tensor[4:]
    if name.startswith("mask_head.predictor."):
        return tensor[1:]
    return tensor
