"""Encoders: a backbone with the head that a configuration asks for."""

from __future__ import annotations

import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.models import backbone, vit
from moco.models.heads import replace_by_mlp


def build_encoder(
    arch: str,
    *,
    num_classes: int,
    image_size: int = 224,
    freeze_patches: bool = True,
    **options,
) -> nn.Module:
    """A ResNet or a ViT with `forward_features`, and `fc` with `num_classes` outputs.

    Args:
        image_size, freeze_patches: of a ViT. options: see `build_backbone`, `build_vit`.
    Raises: ConfigError for an unknown architecture, or options that do not fit it.
    """
    if arch in vit.ARCHITECTURES:
        return vit.build_vit(
            arch,
            num_classes=num_classes,
            image_size=image_size,
            freeze_patches=freeze_patches,
            **options,
        )
    if arch not in backbone.ARCHITECTURES:
        known = ", ".join([*backbone.ARCHITECTURES, *vit.ARCHITECTURES])
        raise ConfigError(f"MODEL.ARCH is {arch!r}; allowed: {known}")
    return backbone.build_backbone(arch, num_classes=num_classes, **options)


def build_encoders(
    num_encoders: int, arch: str, *, dim: int, mlp: bool, **options
) -> list[nn.Module]:
    """Encoders with D = `dim` outputs: all backbones first, then their heads.

    Args:
        mlp: MoCo v2's two-layer head; False gives v1's linear one.
        options: see `build_encoder`.
    """
    encoders = [build_encoder(arch, num_classes=dim, **options) for _ in range(num_encoders)]
    if mlp:
        for encoder in encoders:
            replace_by_mlp(encoder)
    return encoders


def backbone_options(cfg: CfgNode) -> dict:
    """The keyword arguments of `build_encoder`, but `num_classes`, that a configuration holds."""
    model = cfg.MODEL
    return {
        "arch": model.ARCH,
        "width": model.WIDTH,
        "stem": model.STEM,
        "bn_splits": model.BN_SPLITS,
        "norm": model.NORM,
        "image_size": cfg.DATA.SIZE,
        "freeze_patches": model.FREEZE_PATCHES,
        "channels": cfg.DATA.CHANNELS,
    }


def encoder_options(cfg: CfgNode) -> dict:
    """The keyword arguments of `build_encoders` that a configuration holds."""
    return {**backbone_options(cfg), "dim": cfg.MODEL.DIM, "mlp": cfg.MODEL.HEAD == "mlp"}
