"""Proof of an export: the library's own network with the file's tensors gives the same features."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import CheckpointError
from moco.models import backbone as own_resnet
from moco.models import vit as own_vit
from moco.seeding import torch_generator
from moco.training.layouts import Backbone, Network, ResNet, ViT

_FC = ("fc.weight", "fc.bias")
_SIZES = {"imagenet": (101, 139), "cifar": (33, 45)}  # odd: strides and paddings show


@dataclass(frozen=True)
class Target:
    """The network that a file is for.

    call: the expression that makes it. missing: its tensors that the file lacks. build: makes it,
    without those; a forward pass then gives the features.
    """

    call: str
    missing: tuple[str, ...]
    build: Callable[[], nn.Module]


def network_for(network: Network, form: str, where: str) -> Target:
    """The network of torchvision, timm or this project that takes a file of format `form`.

    Raises: CheckpointError where there is none.
    """
    if isinstance(network, ViT):
        return _vit_target(network, form, where)
    if form == "timm":
        if not network.is_standard or network.stem != "imagenet":
            raise CheckpointError(
                f"{where}: timm has no {_kind(network)}; use --format torchvision or safetensors"
            )
        return Target(
            f"timm.create_model({network.arch!r}, num_classes=0)",
            (),
            _timm(lambda timm: timm.create_model(network.arch, num_classes=0))
            or (lambda: _torchvision_resnet(network)),
        )
    if network.is_standard:
        stem = "" if network.stem == "imagenet" else ", conv1 3x3 of stride 1, no maxpool"
        call = f"torchvision.models.{network.arch}(){stem}"
        return Target(call, _FC, lambda: _torchvision_resnet(network))
    if network.width == network.planes == network.stem_channels:
        channels = "" if network.channels == 3 else f", channels={network.channels}"
        call = (
            f"moco.models.backbone.ResNet({_block(network).__name__}, {network.blocks}, "
            f"num_classes=1, width={network.planes / 64}, stem={network.stem!r}{channels})"
        )
        return Target(call, _FC, lambda: _own_resnet(network))
    raise CheckpointError(
        f"{where}: neither torchvision nor this project has a {_kind(network)}, so nothing could "
        "check or load the file"
    )


def check_export(
    backbone: Backbone, state: Mapping[str, torch.Tensor], target: Target, where: str
) -> dict[str, object]:
    """Compare features of a random image: source tensors in this project's network, where it has
    one, and `state`, read from the file to be, in the target's.

    Returns: what was compared, for the record.
    Raises: CheckpointError where a bit differs, names do not fit, or the features are all zero.
    """
    network = backbone.network
    sides = (network.image_size,) * 2 if isinstance(network, ViT) else _SIZES[network.stem]
    shape = (1, network.channels, *sides)
    image = torch.randn(shape, generator=torch_generator(0, "export-self-check"))
    source, other = _source_network(network), target.build()
    with torch.no_grad():
        wanted = _loaded(source, backbone.state)(image)
        try:
            given = _loaded(other, state)(image)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{where}: self-check failed, {target.call} does not take the file ({reason}); "
                "nothing was written; report this as a bug"
            ) from error
    scale = wanted.abs().max().item()
    if not 0 < scale < float("inf"):
        raise CheckpointError(
            f"{where}: the features of a random image are all zero or not finite (largest: "
            f"{scale}); such a network transfers nothing; use another checkpoint"
        )
    if not torch.equal(given, wanted):
        difference = (given - wanted).abs().max().item()
        raise CheckpointError(
            f"{where}: self-check failed, features of the file differ by {difference:.3g} from the "
            f"source's (largest {scale:.3g}); nothing was written; report this as a bug"
        )
    return {
        "image_size": list(sides),
        "features": given.shape[1],
        "bitwise_equal": True,
        "source_network": _class_of(source),
        "file_network": _class_of(other),
    }


def _vit_target(network: ViT, form: str, where: str) -> Target:
    if form == "torchvision":
        raise CheckpointError(
            f"{where}: torchvision's ViTs have other names and none of {network.arch}'s shape and "
            "heads; use --format timm or safetensors"
        )
    if network.num_heads is None:
        raise CheckpointError(
            f"{where}: the number of heads of this {network.arch} is in no tensor; add --num-heads "
            "(timm and DeiT: channels / 64; MoCo v3: 12 for ViT-S and ViT-B)"
        )
    if network.num_heads < 1 or network.dim % network.num_heads:
        raise CheckpointError(
            f"{where}: {network.num_heads} heads do not divide {network.dim} channels; give the "
            "number the network was trained with"
        )
    options = {
        "img_size": network.image_size,
        "patch_size": network.patch_size,
        "embed_dim": network.dim,
        "depth": network.depth,
        "num_heads": network.num_heads,
        "num_classes": 0,
        **({} if network.channels == 3 else {"in_chans": network.channels}),
    }
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return Target(
        f"timm.models.vision_transformer.VisionTransformer({words})",
        (),
        _timm(lambda timm: timm.models.vision_transformer.VisionTransformer(**options))
        or (lambda: _own_vit(network)),
    )


def _timm(build: Callable) -> Callable[[], nn.Module] | None:
    """`build` with timm, None where it is not installed; no global random number is drawn."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return None

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return build(timm)

    return built


def _source_network(network: Network) -> nn.Module:
    if isinstance(network, ViT):
        return _own_vit(network)
    if network.width == network.planes == network.stem_channels:
        return _own_resnet(network)
    return _torchvision_resnet(network)


def _own_resnet(network: ResNet) -> nn.Module:
    with torch.device("meta"):  # no memory, and no random numbers drawn
        model = own_resnet.ResNet(
            _block(network),
            network.blocks,
            num_classes=1,
            width=network.planes / 64,
            stem=network.stem,
            channels=network.channels,
        )
    return _without_fc(model)


def _own_vit(network: ViT) -> nn.Module:
    with torch.device("meta"):
        model = own_vit.ViT(
            image_size=network.image_size,
            patch_size=network.patch_size,
            dim=network.dim,
            heads=network.num_heads,
            blocks=network.depth,
            num_classes=1,
            freeze_patches=False,
            channels=network.channels,
        )
    return _without_fc(model)


def _torchvision_resnet(network: ResNet) -> nn.Module:
    with torch.device("meta"):
        model = torchvision.models.get_model(network.arch)
        if network.stem == "cifar":
            model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
    return _without_fc(model)


def _without_fc(model: nn.Module) -> nn.Module:
    model.fc = nn.Identity()
    return model


def _loaded(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """`model` in eval mode with the tensors of `state`, which must be all it has."""
    values = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    model.load_state_dict(values, strict=True, assign=True)
    return model.eval()


def _block(network: ResNet) -> type[BasicBlock] | type[Bottleneck]:
    return Bottleneck if network.is_bottleneck else BasicBlock


def _class_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def _kind(network: ResNet) -> str:
    return (
        f"{network.arch} of {network.planes} planes with a first convolution of "
        f"{network.stem_channels} channels, {network.stem_size}x{network.stem_size}"
        + ("" if network.channels == 3 else f", for images of {network.channels} channels")
    )
