"""Strict loading of weights into the detector.

Detectron2 matches a file's names by their endings, so `res5.*` of a converted backbone lands in
`roi_heads.res5.*` (detectron2/checkpoint/c2_model_loading.py). There a tensor without partner or
of another shape is a warning; here it is an error, but for one declared set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from detection.safe_pickle import read_pickled_arrays
from moco.errors import CheckpointError
from moco.training.checkpoint import read_torch_file

# What a pretrained backbone does not have: the RPN head, the box predictor, the norm after res5.
DECLARED_MISSING = (
    "proposal_generator.rpn_head.",
    "roi_heads.box_predictor.",
    "roi_heads.res5.norm.",
)
_COUNTER = ".num_batches_tracked"  # of batch norms; no converted file has it
_CONVERT_FIRST = "convert it first with tools/convert_to_d2.py"


@dataclass(frozen=True)
class LoadReport:
    """Names in the model: `loaded` from the file; `missing` from it and left as initialised.

    `missing` is empty or the declared set. `num_batches_tracked` counters that a file lacks are
    in neither.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The named tensors of a weights file, on the CPU; reading it runs no code.

    Args:
        path: a converted `.pth` or `.pkl`, or a `.pth` of a training run, whose "model" is taken.
    Raises: CheckpointError for a missing, damaged or unsafe file, for a checkpoint that is not
        converted yet, and for Caffe2's names.
    """
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path}: there is no such weights file; give the .pth or .pkl that "
            "tools/convert_to_d2.py wrote, in MODEL.WEIGHTS"
        )
    if str(path).endswith(".pkl"):
        arrays, _ = read_pickled_arrays(path)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    else:
        tensors = _model_of(read_torch_file(path), path)
    _refuse_other_layouts(tensors, path)
    return tensors


def load_backbone_weights(model: torch.nn.Module, path: str | os.PathLike) -> LoadReport:
    """Copy a file's weights into `model`, a detector or its feature trunk, in place.

    Each tensor of the file must match, by the whole dotted end of its name, exactly one of the
    model, with the same shape. What the file lacks must be nothing, or exactly the model's names
    under `DECLARED_MISSING`; counters of batch norms may lack. All is checked before anything is
    copied.
    Raises: CheckpointError naming the missing, unexpected, mismatched or non-finite tensors.
    """
    tensors = read_weights(path)
    state = model.state_dict()
    sources = _match(list(state), tensors, path)
    missing = [name for name in state if name not in sources and not name.endswith(_COUNTER)]
    declared = [name for name in state if name.startswith(DECLARED_MISSING)]
    declared = [name for name in declared if not name.endswith(_COUNTER)]
    if missing and missing != declared:
        # Either part of a backbone is absent, or a detector's file lacks part of its head.
        wrong = [name for name in missing if name not in declared] or missing
        raise CheckpointError(
            f"{path}: lacks {len(wrong)} tensors of the model: {_first(wrong)}; only "
            f"{', '.join(p + '*' for p in DECLARED_MISSING)} may lack, all together; check "
            "MODEL.RESNETS.DEPTH and NORM, or convert the checkpoint again"
        )
    for name, source in sources.items():
        _check_tensor(name, state[name], source, tensors[source], path)
    with torch.no_grad():
        for name, source in sources.items():
            state[name].copy_(tensors[source])
    return LoadReport(path=Path(path), loaded=tuple(sources), missing=tuple(missing))


def _model_of(content: object, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        for wrapper in ("model", "state_dict"):
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no dict of named tensors; {_CONVERT_FIRST}")
    for name, value in content.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise CheckpointError(
                f"{path}: the entry {str(name)[:80]!r} is no tensor; allowed: tensors by name, or "
                "such a dict under 'model'"
            )
    return dict(content)


def _refuse_other_layouts(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    for name in ("module.encoder_q.conv1.weight", "encoder_q.conv1.weight", "conv1.weight"):
        if name in tensors or f"module.{name}" in tensors:
            raise CheckpointError(
                f"{path}: is a checkpoint with {name!r}, not converted weights; {_CONVERT_FIRST}"
            )
    if "conv1_w" in tensors or "res_conv1_bn_s" in tensors:
        raise CheckpointError(
            f"{path}: has Caffe2's names ('conv1_w', ...), which only Detectron2 renames; train "
            "with --engine detectron2, or convert torchvision's supervised weights with "
            "tools/convert_to_d2.py"
        )


def _match(
    names: list[str], tensors: Mapping[str, torch.Tensor], path: str | os.PathLike
) -> dict[str, str]:
    """Model name -> file name, each file name used exactly once."""
    known = set(names)
    by_ending: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            by_ending.setdefault(".".join(parts[start:]), []).append(name)
    sources: dict[str, str] = {}
    unexpected = []
    for source in tensors:
        targets = [source] if source in known else by_ending.get(source, [])
        if len(targets) > 1:
            raise CheckpointError(
                f"{path}: {source!r} fits {len(targets)} tensors of the model: {_first(targets)}; "
                "only unambiguous names are loaded"
            )
        if not targets:
            unexpected.append(source)
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
    return {name: sources[name] for name in names if name in sources}


def _check_tensor(
    name: str, wanted: torch.Tensor, source: str, given: torch.Tensor, path: str | os.PathLike
) -> None:
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
