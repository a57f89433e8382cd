"""Strict loading of weights into the detector.

Detectron2 matches a file's names by their endings, so `res5.*` of a converted backbone lands in
`roi_heads.res5.*`, and renames those of Caffe2 (detectron2/checkpoint/c2_model_loading.py). There
a tensor without partner or of another shape is a warning; here it is an error, but for declared
sets, which are reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from detection.weights_file import find_weights, read_weights_file
from moco.cfgnode import CfgNode
from moco.errors import CheckpointError

# What a pretrained backbone does not have: the RPN head, the box predictor, the mask head, the
# norm after res5. Each is there as a whole or not at all, the first two together.
DECLARED_MISSING = (
    "proposal_generator.rpn_head.",
    "roi_heads.box_predictor.",
    "roi_heads.mask_head.",
    "roi_heads.res5.norm.",
)
_DETECTOR = DECLARED_MISSING[:2]
_COUNTER = ".num_batches_tracked"  # of batch norms; no converted file has it
_STATISTICS = {".running_mean": 0.0, ".running_var": 1.0}  # and what an absent one is set to
# What files of Detectron2's own have beside the weights: name -> what it is, in reports.
_LEFTOVERS = {
    r"pixel_(mean|std)": "input normalisation (the config's is used)",
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d+": "anchors (computed here)",
    # facebookresearch/moco, detection/convert-pretrain-to-detectron2.py keeps MoCo's heads: v1's
    # has the names of a classifier.
    r"(stem\.)?fc\.(weight|bias)": "ImageNet classifier or linear projection head",
    r"(stem\.)?fc\.\d+\.\w+": "projection head",
    r".*\.num_batches_tracked": "batch counters that frozen norms do not have",
    r"(roi_heads\.)?mask_head\..*": "mask head (MODEL.MASK_ON is False)",
}
_CLASS_SCORES = "roi_heads.box_predictor.cls_score."
_CLASS_BOXES = "roi_heads.box_predictor.bbox_pred."
_CLASS_MASKS = "roi_heads.mask_head.predictor."


@dataclass(frozen=True)
class ResetTensor:
    """A tensor of the model that keeps its first values: name, and name and shape in the file."""

    name: str
    source: str
    there: tuple[int, ...]
    here: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """Names in the model: `loaded` from the file; `missing` from it and left as initialised.

    `missing` is empty or whole declared sets. `without_statistics` are the norms whose running
    mean and variance the file lacks and that were set to 0 and 1;
    `num_trained_without_statistics` of them are not frozen. `dropped` is {what they are: names in
    the file} of tensors with no place in the model. `num_batches_tracked` counters that a file
    lacks are in none of them. `reset` are those of other classes, left as initialised.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    without_statistics: tuple[str, ...] = ()
    num_trained_without_statistics: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    reset: tuple[ResetTensor, ...] = ()

    def words(self) -> str:
        """One line for the user."""
        line = f"{self.path}: {len(self.loaded)} tensors loaded, {len(self.missing)} new ones"
        groups = [p for p in DECLARED_MISSING if any(n.startswith(p) for n in self.missing)]
        if groups:
            line += f" ({', '.join(p + '*' for p in groups)})"
        for what, names in self.dropped.items():
            line += f"; dropped {len(names)}: {what} ({_first(names)})"
        if self.reset:
            listed = ", ".join(f"{t.name} {t.there} -> {t.here}" for t in self.reset)
            line += f"; {len(self.reset)} class-dependent tensors initialised anew: {listed}"
        if self.without_statistics:
            line += (
                f"; {len(self.without_statistics)} norms without statistics in the file, set to "
                "mean 0 and variance 1, as in Detectron2"
            )
        if self.num_trained_without_statistics:
            line += (
                f". WARNING: {self.num_trained_without_statistics} of them are trained, but such "
                "a file suits MODEL.RESNETS.NORM FrozenBN only"
            )
        return line


def class_dependent(cfg: CfgNode) -> tuple[str, ...]:
    """What the names of a detector's tensors with a part for each class begin with."""
    prefixes = [_CLASS_SCORES]
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        prefixes.append(_CLASS_BOXES)
    if not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
        prefixes.append(_CLASS_MASKS)
    return tuple(prefixes)


def load_backbone_weights(
    model: torch.nn.Module,
    path: str | os.PathLike,
    *,
    reset: str = "never",
    class_dependent: tuple[str, ...] = (),
) -> LoadReport:
    """Copy a file's weights into `model`, a detector or its feature trunk, in place.

    Each tensor of the file must match, by the whole dotted end of its name, exactly one of the
    model, with the same shape, or be one that is known to have no place there (see `LoadReport`).
    What the file lacks must be nothing, or whole sets of `DECLARED_MISSING`; a file of Caffe2 with
    fused norms lacks their statistics. All is checked before anything is copied.

    Args:
        reset: when the model's tensors that begin with `class_dependent` are left as initialised
            though the file, of a fine-tuned detector, has them: "never", "always", or with
            "other classes": where it has another number of classes.
    Raises: CheckpointError naming the missing, unexpected, mismatched or non-finite tensors.
    """
    path = find_weights(path)
    file = read_weights_file(path)
    state = model.state_dict()
    sources, leftovers = _match(list(state), file.tensors, path)
    absent = [name for name in state if name not in sources and not name.endswith(_COUNTER)]
    fused = [
        name
        for name in absent
        if file.fused
        and name.endswith(tuple(_STATISTICS))
        and not name.startswith(DECLARED_MISSING)
    ]
    missing = [name for name in absent if name not in set(fused)]
    _check_missing(missing, list(state), path)
    anew = _reset_tensors(sources, state, file.tensors, reset, class_dependent)
    for tensor in anew:
        del sources[tensor.name]
    for name, source in sources.items():
        _check_tensor(name, state[name], source, file.tensors[source], path)
    with torch.no_grad():
        for name, source in sources.items():
            state[name].copy_(file.tensors[source])
        for name in absent:  # Detectron2 does so for frozen norms; trained ones start so anyway
            for ending, value in _STATISTICS.items():
                if name.endswith(ending):
                    state[name].fill_(value)
    norms = tuple(dict.fromkeys(name.rpartition(".")[0] for name in fused))
    return LoadReport(
        path=path,
        loaded=tuple(sources),
        missing=tuple(missing),
        without_statistics=norms,
        num_trained_without_statistics=sum(_is_trained(model.get_submodule(n)) for n in norms),
        dropped={**file.dropped, **leftovers},
        reset=anew,
    )


def _reset_tensors(
    sources: Mapping[str, str],
    state: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    reset: str,
    class_dependent: tuple[str, ...],
) -> tuple[ResetTensor, ...]:
    scores = f"{_CLASS_SCORES}weight"
    if reset == "never" or scores not in sources:
        return ()
    if reset == "other classes" and len(state[scores]) == len(tensors[sources[scores]]):
        return ()
    found = [
        ResetTensor(name, source, tuple(tensors[source].shape), tuple(state[name].shape))
        for name, source in sources.items()
        if name.startswith(class_dependent)
    ]
    # Only the classes may differ: a predictor of other features is of another network.
    return tuple(tensor for tensor in found if tensor.there[1:] == tensor.here[1:])


def _is_trained(norm: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in norm.parameters())


def _check_missing(missing: list[str], names: list[str], path: Path) -> None:
    """Part of a backbone is absent, or of a head, or one of two heads: all are errors."""
    lacking = set(missing)
    wrong = [name for name in missing if not name.startswith(DECLARED_MISSING)]
    whole = {}
    for prefix in DECLARED_MISSING:
        group = [n for n in names if n.startswith(prefix) and not n.endswith(_COUNTER)]
        absent = [name for name in group if name in lacking]
        whole[prefix] = bool(absent)
        if len(absent) < len(group):
            wrong += absent
    if len({whole[prefix] for prefix in _DETECTOR}) > 1:
        wrong += [name for name in missing if name.startswith(_DETECTOR)]
    if wrong:
        raise CheckpointError(
            f"{path}: lacks {len(wrong)} tensors of the model: {_first(wrong)}; only "
            f"{', '.join(p + '*' for p in DECLARED_MISSING)} may lack, each as a whole and the "
            "first two together; check MODEL.RESNETS.DEPTH and NORM, or convert the checkpoint "
            "again"
        )


def _match(
    names: list[str], tensors: Mapping[str, torch.Tensor], path: Path
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(model name -> file name, each file name used exactly once; what has no place there)."""
    known = set(names)
    by_ending: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            by_ending.setdefault(".".join(parts[start:]), []).append(name)
    sources: dict[str, str] = {}
    unexpected = []
    leftovers: dict[str, list[str]] = {}
    for source in tensors:
        targets = [source] if source in known else by_ending.get(source, [])
        if len(targets) > 1:
            raise CheckpointError(
                f"{path}: {source!r} fits {len(targets)} tensors of the model: {_first(targets)}; "
                "only unambiguous names are loaded"
            )
        if not targets:
            what = _leftover(source)
            (leftovers.setdefault(what, []) if what else unexpected).append(source)
        elif targets[0] in sources:
            raise CheckpointError(
                f"{path}: {source!r} and {sources[targets[0]]!r} both fit {targets[0]!r}"
            )
        else:
            sources[targets[0]] = source
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} tensors fit nothing in the model: {_first(unexpected)}; "
            "check MODEL.RESNETS.DEPTH and NORM, or give the weights of this model"
        )
    # In the model's order, so that reports and messages do not depend on the file's.
    return {name: sources[name] for name in names if name in sources}, leftovers


def _leftover(name: str) -> str | None:
    return next((what for pattern, what in _LEFTOVERS.items() if re.fullmatch(pattern, name)), None)


def _check_tensor(
    name: str, wanted: torch.Tensor, source: str, given: torch.Tensor, path: Path
) -> None:
    if name.endswith("box_predictor.cls_score.weight") and wanted.shape[1:] == given.shape[1:]:
        if len(wanted) != len(given):
            raise CheckpointError(
                f"{path}: is fine-tuned for {len(given) - 1} classes, MODEL.ROI_HEADS.NUM_CLASSES "
                f"is {len(wanted) - 1}; set it to {len(given) - 1}, or give a pretrained backbone"
            )
    if wanted.shape != given.shape:
        raise CheckpointError(
            f"{path}: {source!r} has shape {tuple(given.shape)}, {name!r} of the model "
            f"{tuple(wanted.shape)}; set MODEL.RESNETS.STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, "
            "WIDTH_PER_GROUP, DEPTH and STRIDE_IN_1X1 (for fine-tuned weights also "
            "MODEL.ROI_HEADS.NUM_CLASSES) as tools/convert_to_d2.py printed them"
        )
    if wanted.is_floating_point() != given.is_floating_point():
        raise CheckpointError(
            f"{path}: {source!r} is {given.dtype}, {name!r} of the model {wanted.dtype}; "
            "give the weights of this model"
        )
    if given.is_floating_point() and not torch.isfinite(given).all():
        raise CheckpointError(
            f"{path}: {source!r} holds NaN or Inf; give weights of an earlier checkpoint"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
