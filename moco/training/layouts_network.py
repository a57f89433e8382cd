"""The networks that weights files hold: how their tensors are called, and which shapes they have.

Canonical names are torchvision's for ResNets and timm's for ViTs, without the head. Everything here
is read from names and shapes; the number of heads of a ViT is in neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from moco.errors import CheckpointError

COUNTER = "num_batches_tracked"  # of a batch norm; old files lack it, evaluation reads it nowhere
HEAD = "fc."  # the canonical name of whatever comes after the features
# depth -> (whether blocks are bottlenecks, their number in layer1..layer4)
DEPTHS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
_WIDE = (50, 101)  # depths that torchvision has with double width, too
_EXPANSION = 4  # of a bottleneck's output over its planes
_NORM = ("weight", "bias", "running_mean", "running_var")
CHANNELS = (1, 3, 4)  # of the images
_STEMS = {7: "imagenet", 3: "cifar"}  # by the first convolution's size
# (channels, blocks) -> name, of the ViTs of arXiv 2010.11929 and 2012.12877
_VITS = {
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
    (1280, 32): "vit_huge",
}


@dataclass(frozen=True)
class ResNet:
    """What fixes every tensor of a ResNet; the defaults are those of torchvision's.

    planes: of layer1. width: channels of layer1's 3x3 convolutions, which differ from `planes` in
    wide ResNets. stem_size: side of the first convolution, 7 or 3 (CIFAR, without max-pool).
    channels: of the images.
    """

    depth: int
    stem_channels: int = 64
    planes: int = 64
    width: int = 64
    stem_size: int = 7
    channels: int = 3

    @property
    def arch(self) -> str:
        if self.width == 2 * self.planes:
            return f"wide_resnet{self.depth}_2"
        return f"resnet{self.depth}"

    @property
    def stem(self) -> str:
        return _STEMS[self.stem_size]

    @property
    def is_bottleneck(self) -> bool:
        return DEPTHS[self.depth][0]

    @property
    def blocks(self) -> tuple[int, ...]:
        return DEPTHS[self.depth][1]

    @property
    def is_standard(self) -> bool:
        """Whether torchvision's function of this name builds it, but for the stem."""
        wide = self.width == 128 and self.depth in _WIDE
        standard = self.stem_channels == self.planes == 64 and self.channels == 3
        return standard and (self.width == 64 or wide)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors but the head's, in torchvision's order."""
        shapes: dict[str, tuple[int, ...]] = {}

        def add(conv: str, norm: str, *shape: int) -> None:
            shapes[f"{conv}.weight"] = shape
            shapes.update({f"{norm}.{entry}": shape[:1] for entry in _NORM})
            shapes[f"{norm}.{COUNTER}"] = ()

        add("conv1", "bn1", self.stem_channels, self.channels, self.stem_size, self.stem_size)
        num_in = self.stem_channels
        for stage, num_blocks in enumerate(self.blocks):
            width = self.width << stage
            num_out = (self.planes << stage) * (_EXPANSION if self.is_bottleneck else 1)
            for block in range(num_blocks):
                at = f"layer{stage + 1}.{block}."
                first = 1 if self.is_bottleneck else 3
                add(f"{at}conv1", f"{at}bn1", width, num_in, first, first)
                if self.is_bottleneck:
                    add(f"{at}conv2", f"{at}bn2", width, width, 3, 3)
                    add(f"{at}conv3", f"{at}bn3", num_out, width, 1, 1)
                else:
                    add(f"{at}conv2", f"{at}bn2", num_out, width, 3, 3)
                if block == 0 and (stage > 0 or num_in != num_out):
                    add(f"{at}downsample.0", f"{at}downsample.1", num_out, num_in, 1, 1)
                num_in = num_out
        return shapes


@dataclass(frozen=True)
class ViT:
    """What fixes every tensor of a ViT with a class token, and the number of heads if known."""

    arch: str
    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int | None
    channels: int = 3  # of the images

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors but the head's, in timm's order."""
        dim, hidden = self.dim, 4 * self.dim
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + (self.image_size // self.patch_size) ** 2, dim),
        }

        def add(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

        add("patch_embed.proj", dim, self.channels, self.patch_size, self.patch_size)
        for block in range(self.depth):
            at = f"blocks.{block}."
            add(f"{at}norm1", dim)
            add(f"{at}attn.qkv", 3 * dim, dim)
            add(f"{at}attn.proj", dim, dim)
            add(f"{at}norm2", dim)
            add(f"{at}mlp.fc1", hidden, dim)
            add(f"{at}mlp.fc2", dim, hidden)
        add("norm", dim)
        return shapes


Network = ResNet | ViT


def read_network(
    state: Mapping[str, torch.Tensor], where: str, *, arch: str | None, num_heads: int | None
) -> Network:
    """The network whose tensors, in canonical names and without head, are `state`.

    Args:
        where: what the tensors come from, for messages.
        arch, num_heads: what the file says about it; the first only names a ViT, and must be true
            of a ResNet.
    Raises: CheckpointError for another network, and for any tensor that is missing, not part of it
        or of another shape. Batch counters may be missing all together.
    """
    if "cls_token" in state:
        network: Network = _read_vit(state, where, arch, num_heads)
    else:
        network = _read_resnet(state, where)
        known = [f"resnet{depth}" for depth in DEPTHS]
        known += [f"wide_resnet{depth}_2" for depth in _WIDE]
        if arch in known and arch != network.arch:
            raise CheckpointError(
                f"{where}: its 'arch' is {arch}, its tensors are a {network.arch}'s; it is damaged"
            )
    _check_coverage(state, network, where)
    return network


def _read_resnet(state: Mapping[str, torch.Tensor], where: str) -> ResNet:
    blocks, is_bottleneck = _count_blocks(state), "layer1.0.conv3.weight" in state
    for name in ("conv1", *(f"layer1.0.conv{i}" for i in range(1, 4 if is_bottleneck else 3))):
        if not _has_dims(state, f"{name}.weight", 4):
            raise CheckpointError(
                f"{where}: '{name}.weight' is missing or no convolution; give a ResNet of "
                "torchvision's kind"
            )
    depth = next((d for d, kind in DEPTHS.items() if kind == (is_bottleneck, blocks)), None)
    if depth is None:
        known = "; ".join(f"resnet{d}: {counts}" for d, (_, counts) in DEPTHS.items())
        kind = "bottleneck" if is_bottleneck else "basic"
        raise CheckpointError(f"{where}: layers hold {blocks} {kind} blocks; allowed: {known}")
    middle = state["layer1.0.conv2.weight"].shape
    if middle[1] != state["layer1.0.conv1.weight"].shape[0]:
        raise CheckpointError(
            f"{where}: has grouped convolutions (ResNeXt); allowed: ResNets of depth "
            f"{', '.join(map(str, DEPTHS))}"
        )
    stem = state["conv1.weight"].shape
    if stem[-1] not in _STEMS:
        raise CheckpointError(
            f"{where}: 'conv1.weight' has shape {tuple(stem)}; allowed: 7x7, or 3x3 (CIFAR stem)"
        )
    _check_channels(stem[1], "conv1.weight", where)
    planes = middle[0]
    if is_bottleneck:
        planes = state["layer1.0.conv3.weight"].shape[0] // _EXPANSION
    return ResNet(depth, stem[0], planes, width=middle[1], stem_size=stem[-1], channels=stem[1])


def _read_vit(
    state: Mapping[str, torch.Tensor], where: str, arch: str | None, num_heads: int | None
) -> ViT:
    for name, dims in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if not _has_dims(state, name, dims):
            raise CheckpointError(
                f"{where}: {name!r} is missing or has not {dims} dimensions; give a ViT with a "
                "class token and a position for each patch"
            )
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    _check_channels(channels, "patch_embed.proj.weight", where)
    num_patches = state["pos_embed"].shape[1] - 1
    side = round(max(num_patches, 0) ** 0.5)
    if side * side != num_patches or not side:
        raise CheckpointError(
            f"{where}: 'pos_embed' has {num_patches + 1} positions; allowed: a class token and a "
            "square of patches"
        )
    found = [re.match(r"blocks\.([0-9]{1,4})\.", name) for name in state]
    depth = 1 + max((int(match.group(1)) for match in found if match), default=-1)
    if depth > len(state):  # its names alone would fill the memory
        raise CheckpointError(
            f"{where}: its blocks are numbered to {depth - 1}, it has {len(state)} tensors; give "
            "an undamaged checkpoint"
        )
    if not depth:
        raise CheckpointError(f"{where}: this ViT holds no blocks; give an undamaged checkpoint")
    name = arch if arch and arch.startswith("vit_") else _VITS.get((dim, depth))
    name = name or f"vit_{dim}x{depth}"
    return ViT(name, side * patch, patch, dim, depth, num_heads, channels)


def _check_channels(channels: int, name: str, where: str) -> None:
    if channels not in CHANNELS:
        raise CheckpointError(
            f"{where}: {name!r} takes images of {channels} channels; allowed: "
            f"{', '.join(map(str, CHANNELS))} (DATA.CHANNELS)"
        )


def _has_dims(state: Mapping[str, torch.Tensor], name: str, dims: int) -> bool:
    return name in state and state[name].dim() == dims and state[name].numel() > 0


def _count_blocks(state: Iterable[str]) -> tuple[int, ...]:
    counts = [0] * 4
    for name in state:
        match = re.fullmatch(r"layer([1-4])\.([0-9]{1,4})\.conv1\.weight", name)
        if match:
            stage = int(match.group(1)) - 1
            counts[stage] = max(counts[stage], int(match.group(2)) + 1)
    return tuple(counts)


def _check_coverage(state: Mapping[str, torch.Tensor], network: Network, where: str) -> None:
    expected = network.tensor_shapes()
    has_counters = any(name.endswith(COUNTER) for name in state)
    missing = [
        name
        for name in expected
        if name not in state and (has_counters or not name.endswith(COUNTER))
    ]
    unknown = [name for name in state if name not in expected]
    for problem, names in (("are missing", missing), ("are not part of it", unknown)):
        if names:
            raise CheckpointError(
                f"{where}: looks like {network.arch}, but {len(names)} tensors {problem}: "
                f"{', '.join(names[:3])}; give an undamaged checkpoint"
            )
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}, this {network.arch} needs "
                f"{expected[name]}; give an undamaged checkpoint"
            )
