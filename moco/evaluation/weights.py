"""The encoder of a weights file, ready to be evaluated, and the proof that it did not change.

`moco.training.layouts` tells which file it is and which network its tensors are: a run folder or
checkpoint of tools/pretrain.py, one of the reference, torchvision's names, other projects' layouts
(docs/CHECKPOINTS.md). Projection heads are read from this project's and the reference's only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD
from moco.data.rgb import DEFAULT_DECODING, Decoding
from moco.distributed import tensors_digest
from moco.errors import CheckpointError
from moco.models import backbone, vit
from moco.models.encoders import build_encoder
from moco.models.heads import mlp_with_norm, replace_by_mlp
from moco.training.checkpoint import sha256_of
from moco.training.layouts import (
    COUNTER,
    HEAD,
    Network,
    ViT,
    find_source,
    named_tensors,
    read_backbone,
    read_weights,
    settings_of,
)

_VIT_HEADS = 12  # of this project's ViTs, whatever their width
_VIT_STEMS = {16: "imagenet", 4: "cifar"}  # by the patches' side


@dataclass(frozen=True)
class Pretrained:
    """An encoder's tensors, and what is known about them.

    Attributes:
        path, sha256: the file; layout: whose, see `moco.training.layouts`.
        backbone, head: tensors on the CPU under canonical names; `head` those of `fc`, empty where
            the file has no projection head that can be evaluated.
        options: keyword arguments of `build_encoder` but `num_classes`.
        size, mean, std: of the images it was trained with, None where the file does not say.
        notes: lines worth printing.
        decoding: how files became pixels in its pretraining; the default where the file does not
            say.
    """

    path: str
    sha256: str
    layout: str
    backbone: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    options: dict[str, object]
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    decoding: Decoding = DEFAULT_DECODING

    @property
    def arch(self) -> str:
        return str(self.options["arch"])

    @property
    def channels(self) -> int:
        """Of its images."""
        return int(self.options["channels"])

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the pixels; ImageNet's where an RGB file does not say them.

        Raises: CheckpointError where a file of other images does not.
        """
        if self.mean and self.std:
            return self.mean, self.std
        if self.channels != 3:
            raise CheckpointError(
                f"{self.path}: does not say mean and std of its {self.channels} channels; give a "
                "checkpoint of tools/pretrain.py"
            )
        return IMAGENET_MEAN, IMAGENET_STD

    def digest(self) -> str:
        """SHA-256 over the backbone's tensors, whatever file holds them."""
        return tensors_digest(dict(sorted(self.backbone.items())))

    def build_encoder(self, *, image_size: int, head: bool = False, norm: str = "BN") -> nn.Module:
        """A new encoder with these weights, in eval mode, on the CPU.

        Args:
            image_size: of the images to come; a ViT must have been trained with it.
            head: with the projection head as `fc`; else `fc` is a fresh linear layer.
            norm: "BN" or "SyncBN", which differ in training only.
        Raises: CheckpointError where the file has no projection head, or one of an unknown shape.
        """
        if self.arch in vit.ARCHITECTURES and image_size != self.size:
            raise CheckpointError(
                f"{self.path}: this {self.arch} was trained with images of {self.size} pixels and "
                f"takes no others; set the size to {self.size} (now {image_size})"
            )
        encoder = build_encoder(num_classes=1, image_size=image_size, norm=norm, **self.options)
        given = dict(self.backbone)
        if head:
            encoder.fc = self._untrained_head()
            given.update(self.head)
        state = encoder.state_dict()
        needed = {n for n in state if head or not n.startswith(HEAD)}
        absent = {name for name in needed - given.keys() if not name.endswith(COUNTER)}
        wrong = {n for n, t in given.items() if n not in needed or t.shape != state[n].shape}
        if absent or wrong:
            raise CheckpointError(
                f"{self.path}: its projection head is unknown ({', '.join(sorted(absent | wrong))})"
                "; evaluate the features of its backbone"
            )
        encoder.load_state_dict({**state, **given})
        return encoder.eval()

    def _untrained_head(self) -> nn.Module:
        """A head of the shape that the names and shapes of `fc` tell: v1's, v2's or v3's."""
        if not self.head:
            raise CheckpointError(
                f"{self.path}: holds no projection head of MoCo (layout: {self.layout}); evaluate "
                "the features of its backbone"
            )
        weights = {n: t for n, t in self.head.items() if n.endswith(".weight") and t.dim() == 2}
        dims = [weight.shape for weight in weights.values()]
        if set(weights) == {"fc.weight"}:
            return nn.Linear(dims[0][1], dims[0][0])
        if set(weights) == {"fc.0.weight", "fc.2.weight"} and "fc.0.bias" in self.head:
            holder = nn.Module()
            holder.fc = nn.Linear(dims[1][1], dims[1][0])
            replace_by_mlp(holder)
            return holder.fc
        numbers = [re.match(r"fc\.(\d+)\.", name) for name in self.head]
        if not weights or not all(numbers):
            return nn.Identity()  # refused by its names
        last = max(int(number.group(1)) for number in numbers)
        return mlp_with_norm(
            [dims[0][1], *(shape[0] for shape in dims)],
            last_affine=f"fc.{last}.weight" in self.head,
        )

    def differing(self, encoder: nn.Module) -> list[str]:
        """Names of the backbone's tensors whose bytes in `encoder` are not those of the file."""
        now = encoder.state_dict()
        return [
            name
            for name, tensor in self.backbone.items()
            if not _same_bytes(tensor.to(now[name].dtype), now[name])
        ]


def read_pretrained(path: str, *, drop: Sequence[str] = ()) -> Pretrained:
    """The encoder of a weights file, or of a run folder's newest verified checkpoint.

    Args:
        drop: see `moco.training.layouts.read_backbone`.
    Raises: CheckpointError for a file that is missing, damaged, of an unknown layout, not finite,
        or of a network that cannot be built here.
    """
    file, refused = find_source(path)
    notes = tuple(f"refused: {reason}" for _, reason in refused)
    content = read_weights(file)
    return pretrained_from(content, str(file), sha256_of(file), notes=notes, drop=drop)


def pretrained_from(
    content: object,
    where: str,
    sha256: str,
    *,
    notes: tuple[str, ...] = (),
    drop: Sequence[str] = (),
) -> Pretrained:
    """The encoder in the content of a file. Raises: CheckpointError, see `read_pretrained`."""
    found = read_backbone(content, where, drop=drop)
    head = {}
    if found.layout == "moco":
        start = f"{found.prefix}{HEAD}"
        own = {n: t for n, t in named_tensors(content, where).items() if n.startswith(start)}
        head = {name.removeprefix(found.prefix): tensor.detach() for name, tensor in own.items()}
    size, mean, std = _trained_with(content, where, found.network.channels)
    return Pretrained(
        path=where,
        sha256=sha256,
        layout=found.layout,
        backbone=found.state,
        head=head,
        options=_options(found.network, where),
        size=found.network.image_size if isinstance(found.network, ViT) else size,
        mean=mean,
        std=std,
        notes=(*notes, *found.notes),
        decoding=_decoding(content),
    )


def _decoding(content: object) -> Decoding:
    """How images were decoded, of a checkpoint of tools/pretrain.py; else the default."""
    try:
        return Decoding.of(content["extra"]["config"]["DATA"])
    except (KeyError, TypeError):
        return Decoding()


def _trained_with(
    content: object, where: str, channels: int
) -> tuple[int | None, tuple | None, tuple | None]:
    """Size, mean and std of the images, of a checkpoint of tools/pretrain.py; mean and std of a
    detector whose configuration is beside it; None of another.

    Raises: CheckpointError where its configuration lacks them.
    """
    settings = settings_of(content)
    if settings is not None:  # a detector's images have no one size
        return None, settings["mean"], settings["std"]
    found = content
    for name in ("extra", "config", "DATA"):
        found = found.get(name) if isinstance(found, Mapping) else None
        if name == "config" and not (isinstance(found, Mapping) and "MODEL" in found):
            return None, None, None
    data = found if isinstance(found, Mapping) else {}
    size, pixels = data.get("SIZE"), [data.get(name) for name in ("MEAN", "STD")]
    ok = type(size) is int and size > 0
    for values in pixels:
        ok = ok and isinstance(values, list | tuple) and len(values) == channels
        ok = ok and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not ok or 0 in pixels[1]:
        raise CheckpointError(
            f"{where}: its config has no usable DATA.SIZE, DATA.MEAN and DATA.STD; give a "
            "checkpoint of tools/pretrain.py"
        )
    return size, tuple(pixels[0]), tuple(pixels[1])


def _options(network: Network, where: str) -> dict[str, object]:
    """Keyword arguments of `build_encoder`. Raises: CheckpointError where it cannot be built."""
    if isinstance(network, ViT):
        is_ours = (network.num_heads, network.depth) == (_VIT_HEADS, _VIT_HEADS)
        if is_ours and network.patch_size in _VIT_STEMS:
            # Width 1 of vit_base is width 2 of vit_small.
            arch = "vit_base" if network.dim == vit.ARCHITECTURES["vit_base"][0] else "vit_small"
            width = network.dim / vit.ARCHITECTURES[arch][0]
            stem = _VIT_STEMS[network.patch_size]
            return {"arch": arch, "width": width, "stem": stem, "channels": network.channels}
    elif network.arch in backbone.ARCHITECTURES:
        if network.width == network.planes == network.stem_channels:
            return {
                "arch": network.arch,
                "width": network.planes / 64,
                "stem": network.stem,
                "channels": network.channels,
            }
    raise CheckpointError(
        f"{where}: {network} cannot be evaluated here; allowed: "
        f"{', '.join(backbone.ARCHITECTURES)} of one width, and ViTs of 12 blocks and 12 heads "
        "with patches of 16 or 4"
    )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """A NaN is equal to itself; 0.0 and -0.0 differ."""
    b = b.detach().cpu().contiguous()
    if a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
