"""Names and shapes of a ResNet's tensors: torchvision's names, Detectron2's names, both ways.

Source of the correspondence: facebookresearch/moco, detection/convert-pretrain-to-detectron2.py.
`res5` of a converted file is found by Detectron2 under `roi_heads.res5`; see `weights.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moco.errors import CheckpointError

# depth -> blocks in layer1..layer4 (res2..res5).
BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # of two 3x3 convolutions
BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BLOCKS = {**BASIC_BLOCKS, **BOTTLENECKS}
ALLOWED_ARCHS = (
    ", ".join(f"resnet{depth}" for depth in BLOCKS) + " (any width), with the 7x7 ImageNet stem"
)

_NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")
_NORM = "|".join(_NORM_ENTRIES)
_BLOCK = r"(?P<block>0|[1-9][0-9]{0,3})"
_TORCHVISION = re.compile(
    rf"(?:layer(?P<stage>[1-4])\.{_BLOCK}\.)?"
    rf"(?:conv(?P<conv>[123])\.weight|bn(?P<bn>[123])\.(?P<norm>{_NORM})"
    rf"|downsample\.(?:0\.weight|1\.(?P<shortcut_norm>{_NORM})))"
)
_DETECTRON2 = re.compile(
    rf"(?:stem|res(?P<stage>[2-5])\.{_BLOCK})\."
    rf"(?P<unit>conv[123]|shortcut)\.(?:weight|norm\.(?P<norm>{_NORM}))"
)


class _Part(NamedTuple):
    stage: int  # 0: stem, 1..4: torchvision's layer1..layer4
    block: int
    unit: str  # conv1, conv2, conv3 or shortcut
    norm: str  # entry of the batch norm after that convolution; "" for the convolution's weight


def to_detectron2(name: str) -> str:
    """`layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`. Raises: CheckpointError for other names."""
    match = _TORCHVISION.fullmatch(name)
    if match is None:
        raise _not_understood(name, "torchvision ResNet")
    stage = int(match["stage"] or 0)
    number = match["conv"] or match["bn"]
    unit = f"conv{number}" if number else "shortcut"
    norm = match["norm"] or match["shortcut_norm"] or ""
    part = _checked(_Part(stage, int(match["block"] or 0), unit, norm), name, "torchvision ResNet")
    prefix = f"res{part.stage + 1}.{part.block}" if part.stage else "stem"
    return f"{prefix}.{part.unit}.{'norm.' + part.norm if part.norm else 'weight'}"


def to_torchvision(name: str) -> str:
    """The inverse of `to_detectron2`. Raises: CheckpointError for other names."""
    match = _DETECTRON2.fullmatch(name)
    if match is None:
        raise _not_understood(name, "Detectron2 backbone")
    stage = int(match["stage"] or 1) - 1
    part = _Part(stage, int(match["block"] or 0), match["unit"], match["norm"] or "")
    _checked(part, name, "Detectron2 backbone")
    prefix = f"layer{part.stage}.{part.block}." if part.stage else ""
    if part.unit == "shortcut":
        return f"{prefix}downsample.{'1.' + part.norm if part.norm else '0.weight'}"
    number = part.unit[-1]
    return f"{prefix}bn{number}.{part.norm}" if part.norm else f"{prefix}conv{number}.weight"


def is_batch_counter(name: str) -> bool:
    """True for `num_batches_tracked` of one of the network's batch norms (torchvision's name)."""
    norm, _, entry = name.rpartition(".")
    return entry == "num_batches_tracked" and bool(_TORCHVISION.fullmatch(f"{norm}.running_mean"))


def _checked(part: _Part, name: str, kind: str) -> _Part:
    if part.stage == 0 and part.unit != "conv1":  # the stem is one convolution
        raise _not_understood(name, kind)
    return part


def _not_understood(name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"weights: {name!r} is not the name of a {kind} tensor; allowed architectures: "
        f"{ALLOWED_ARCHS}; convert another checkpoint"
    )


@dataclass(frozen=True)
class ResNetShape:
    """What fixes every tensor shape of a ResNet.

    Fields are Detectron2's MODEL.RESNETS keys; the defaults are ResNet-50's. Basic blocks (depth 18
    and 34) have one width, `res2_out_channels`.
    """

    depth: int = 50
    stem_out_channels: int = 64
    res2_out_channels: int = 256
    width_per_group: int = 64

    @property
    def arch(self) -> str:
        return f"resnet{self.depth}"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """torchvision name -> shape, of all tensors a backbone has: 265 for ResNet-50.

        The order is torchvision's. `fc` and `num_batches_tracked` are not part of it.
        """
        shapes: dict[str, tuple[int, ...]] = {}

        def add(conv: str, bn: str, shape: tuple[int, int, int, int]) -> None:
            shapes[f"{conv}.weight"] = shape
            for entry in _NORM_ENTRIES:
                shapes[f"{bn}.{entry}"] = shape[:1]

        add("conv1", "bn1", (self.stem_out_channels, 3, 7, 7))
        num_in = self.stem_out_channels
        for stage, num_blocks in enumerate(BLOCKS[self.depth]):
            width = self.width_per_group << stage
            num_out = self.res2_out_channels << stage
            for block in range(num_blocks):
                at = f"layer{stage + 1}.{block}."
                if self.depth in BASIC_BLOCKS:
                    add(f"{at}conv1", f"{at}bn1", (num_out, num_in, 3, 3))
                    add(f"{at}conv2", f"{at}bn2", (num_out, num_out, 3, 3))
                else:
                    add(f"{at}conv1", f"{at}bn1", (width, num_in, 1, 1))
                    add(f"{at}conv2", f"{at}bn2", (width, width, 3, 3))
                    add(f"{at}conv3", f"{at}bn3", (num_out, width, 1, 1))
                if block == 0 and num_in != num_out:
                    add(f"{at}downsample.0", f"{at}downsample.1", (num_out, num_in, 1, 1))
                num_in = num_out
        return shapes


def read_shape(state: Mapping[str, torch.Tensor], where: str) -> ResNetShape:
    """The shape of the ResNet whose tensors (torchvision names) are `state`.

    Args:
        where: what the tensors come from, for messages.
    Raises: CheckpointError for a CIFAR stem, grouped convolutions, an unknown depth, and for any
        tensor that is missing, not part of it or of another shape.
    """
    blocks = _count_blocks(state)
    allowed = f"allowed: {ALLOWED_ARCHS}"
    needed = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight")
    absent = [name for name in needed if name not in state or state[name].dim() != 4]
    if absent:
        raise CheckpointError(f"{where}: no 4-d tensor {absent[0]!r}, so no ResNet; {allowed}")
    if tuple(state["conv1.weight"].shape[2:]) == (3, 3):
        raise CheckpointError(
            f"{where}: a CIFAR stem (3x3 conv1, no max-pooling) does not exist in R50-C4, whose "
            f"stem has stride 4; {allowed}; pretrain with MODEL.STEM imagenet"
        )
    is_basic = "layer1.0.conv3.weight" not in state
    of_kind = BASIC_BLOCKS if is_basic else BOTTLENECKS
    depth = next((d for d, counts in of_kind.items() if counts == blocks), None)
    if depth is None:
        known = "; ".join(f"resnet{d}: {counts}" for d, counts in of_kind.items())
        raise CheckpointError(
            f"{where}: layers hold {blocks} {'basic blocks' if is_basic else 'bottlenecks'}; "
            f"allowed: {known}"
        )
    width, width_in = state["layer1.0.conv2.weight"].shape[:2]
    if width_in != width:
        raise CheckpointError(f"{where}: has grouped convolutions (ResNeXt); {allowed}")
    shape = ResNetShape(
        depth=depth,
        stem_out_channels=state["conv1.weight"].shape[0],
        res2_out_channels=state[f"layer1.0.conv{2 if is_basic else 3}.weight"].shape[0],
        **({} if is_basic else {"width_per_group": width}),
    )
    _check_tensors(state, shape, where)
    return shape


def _count_blocks(state: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    highest = [-1] * 4
    for name in state:
        match = _TORCHVISION.fullmatch(name)
        if match and match["stage"]:
            stage = int(match["stage"]) - 1
            highest[stage] = max(highest[stage], int(match["block"]))
    return tuple(index + 1 for index in highest)


def _check_tensors(state: Mapping[str, torch.Tensor], shape: ResNetShape, where: str) -> None:
    expected = shape.tensor_shapes()
    for problem, names in (
        ("are missing", [name for name in expected if name not in state]),
        ("are not part of it", [name for name in state if name not in expected]),
    ):
        if names:
            raise CheckpointError(
                f"{where}: looks like {shape.arch}, but {len(names)} tensors {problem}: "
                f"{', '.join(names[:3])}; give an undamaged checkpoint"
            )
    for name, wanted in expected.items():
        if tuple(state[name].shape) != wanted:
            raise CheckpointError(
                f"{where}: {name!r} has shape {tuple(state[name].shape)}, {shape.arch} with a "
                f"{shape.stem_out_channels}-channel stem needs {wanted}; allowed: {ALLOWED_ARCHS}"
            )
