"""A ResNet cut as a C4 detector needs it: stem, res2, res3, res4, and res5 apart.

Names and random draws are Detectron2's (detectron2/modeling/backbone/resnet.py): the backbone
builds a res5 and drops it, and every convolution is first initialised by torch and then by MSRA.
Depth 18 and 34 have basic blocks, in the res5 of the ROI heads too: those of Detectron2's heads are
bottlenecks at every depth, which a pretrained ResNet-18 has no weights for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from detection.config_keys import has_basic_blocks
from detection.engines.embedded.norm import build_norm, freeze
from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.kernels import convolution, residual
from moco.kernels.norm import norm_relu

STRIDE = 16  # of res4
_NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_NUM_HEAD_BLOCKS = {18: 2}  # of the res5 in the ROI heads; 3 at any other depth


class NormedConv2d(nn.Conv2d):
    """A convolution without bias, followed by its norm: the child `norm`, or none."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, norm: str, **kw):
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=False, **kw)
        self.norm = build_norm(norm, out_channels)

    def forward(self, x_BCHW: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
        if convolution.has_kernels(self, x_BCHW):
            x_BCHW = convolution.by_kernels(self, x_BCHW)
        else:
            x_BCHW = super().forward(x_BCHW)
        if self.norm is None:
            return F.relu_(x_BCHW) if relu else x_BCHW
        return norm_relu(self.norm, x_BCHW, relu=relu)


def _msra_init(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class Stem(nn.Module):
    """7x7 convolution and max-pool; stride 4."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str):
        super().__init__()
        self.conv1 = NormedConv2d(in_channels, out_channels, 7, stride=2, norm=norm)
        _msra_init(self.conv1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.conv1(x_BCHW, relu=True)
        return F.max_pool2d(x_BCHW, kernel_size=3, stride=2, padding=1)


class BasicBlock(nn.Module):
    """3x3 and 3x3 with a shortcut, which is a convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str):
        super().__init__()
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = NormedConv2d(in_channels, out_channels, 1, stride=stride, norm=norm)
        self.conv1 = NormedConv2d(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = NormedConv2d(out_channels, out_channels, 3, norm=norm)
        # The order of the draws, as in `Bottleneck`.
        for conv in (self.conv1, self.conv2, self.shortcut):
            if conv is not None:
                _msra_init(conv)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return _residual((self.conv1, self.conv2), self.shortcut, x_BCHW)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut, which is a convolution where the width changes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        num_groups: int,
        stride_in_1x1: bool,
        norm: str,
    ):
        super().__init__()
        first_stride, middle_stride = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = NormedConv2d(in_channels, out_channels, 1, stride=stride, norm=norm)
        self.conv1 = NormedConv2d(in_channels, width, 1, stride=first_stride, norm=norm)
        self.conv2 = NormedConv2d(
            width, width, 3, stride=middle_stride, groups=num_groups, norm=norm
        )
        self.conv3 = NormedConv2d(width, out_channels, 1, norm=norm)
        # The order of the draws is part of the contract: the shortcut, built first, comes last.
        for conv in (self.conv1, self.conv2, self.conv3, self.shortcut):
            if conv is not None:
                _msra_init(conv)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return _residual((self.conv1, self.conv2, self.conv3), self.shortcut, x_BCHW)


def _residual(
    convs: Sequence[NormedConv2d], shortcut: NormedConv2d | None, x_BCHW: torch.Tensor
) -> torch.Tensor:
    """relu(convs(x) + shortcut(x)) with ReLU also between the convolutions."""
    pairs = [(conv, conv.norm) for conv in convs]
    projection = None if shortcut is None else (shortcut, shortcut.norm)
    if residual.has_kernels(pairs if projection is None else [*pairs, projection], x_BCHW):
        return residual.residual(pairs, projection, x_BCHW)
    *inner, last = convs
    y_BCHW = x_BCHW
    for conv in inner:
        y_BCHW = conv(y_BCHW, relu=True)
    y_BCHW = last(y_BCHW)
    y_BCHW += x_BCHW if shortcut is None else shortcut(x_BCHW)
    return F.relu_(y_BCHW)


class Res5(nn.Sequential):
    """Blocks and perhaps the child `norm`, a batch norm of their output."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for layer in self:
            is_block = isinstance(layer, BasicBlock | Bottleneck)
            x_BCHW = layer(x_BCHW) if is_block else norm_relu(layer, x_BCHW, relu=False)
        return x_BCHW


class ResNet(nn.Module):
    """`stem` and the stages given, e.g. res2, res3, res4.

    forward: images [B, C, H, W] -> {name: features} for the names in `outputs`.
    """

    def __init__(self, stem: Stem, stages: dict[str, nn.Sequential], outputs: tuple[str, ...]):
        super().__init__()
        self.stem = stem
        for name, stage in stages.items():
            self.add_module(name, stage)
        self._stage_names = tuple(stages)
        self._outputs = outputs

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(images_BCHW)
        features = {}
        for name in self._stage_names:
            x = self.get_submodule(name)(x)
            if name in self._outputs:
                features[name] = x
        return features

    def freeze_at(self, num_frozen: int) -> None:
        """Freeze the first `num_frozen` of stem, res2, res3 ... (0: nothing)."""
        for part in list(self.children())[:num_frozen]:
            freeze(part)


def channels(cfg: CfgNode, stage: int) -> int:
    """Output width of res2 ... res5 (`stage` 2 ... 5)."""
    return cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (stage - 2)


def build_stage(cfg: CfgNode, stage: int, num_blocks: int) -> nn.Sequential:
    """res2 ... res5 (`stage` 2 ... 5) in the widths of `MODEL.RESNETS`."""
    options = cfg.MODEL.RESNETS
    width_in = options.STEM_OUT_CHANNELS if stage == 2 else channels(cfg, stage - 1)
    width = channels(cfg, stage)
    blocks = []
    for index in range(num_blocks):
        widths = width_in if index == 0 else width, width
        common = {"stride": 2 if index == 0 and stage > 2 else 1, "norm": options.NORM}
        if has_basic_blocks(cfg):
            blocks.append(BasicBlock(*widths, **common))
            continue
        block = Bottleneck(
            *widths,
            bottleneck_channels=options.NUM_GROUPS * options.WIDTH_PER_GROUP * 2 ** (stage - 2),
            num_groups=options.NUM_GROUPS,
            stride_in_1x1=options.STRIDE_IN_1X1,
            **common,
        )
        blocks.append(block)
    return nn.Sequential(*blocks)


def build_head_res5(cfg: CfgNode) -> Res5:
    """The res5 that the ROI heads apply to each pooled region."""
    return Res5(*build_stage(cfg, 5, _NUM_HEAD_BLOCKS.get(cfg.MODEL.RESNETS.DEPTH, 3)))


def build_backbone(cfg: CfgNode) -> ResNet:
    """stem, res2, res3, res4; forward gives {"res4": [B, C, ceil(H / 16), ceil(W / 16)]}.

    The first `MODEL.BACKBONE.FREEZE_AT` parts are frozen.
    Raises: ConfigError for a depth other than 18, 34, 50, 101 or 152.
    """
    stem, stages = _build_parts(cfg)
    del stages["res5"]  # Built above only for the random numbers it draws.
    backbone = ResNet(stem, stages, outputs=("res4",))
    backbone.freeze_at(cfg.MODEL.BACKBONE.FREEZE_AT)
    return backbone


def feature_trunk(cfg: CfgNode) -> ResNet:
    """stem and res2 ... res5 in one module, nothing frozen.

    forward: normalised images [B, 3, H, W] -> {"res2", "res3", "res4", "res5"}. The converter
    compares it with the pretrained network.
    """
    stem, stages = _build_parts(cfg)
    return ResNet(stem, stages, outputs=tuple(stages))


def _build_parts(cfg: CfgNode) -> tuple[Stem, dict[str, nn.Sequential]]:
    options = cfg.MODEL.RESNETS
    if options.DEPTH not in _NUM_BLOCKS:
        raise ConfigError(
            f"MODEL.RESNETS.DEPTH is {options.DEPTH}; allowed: "
            f"{', '.join(map(str, _NUM_BLOCKS))}; change the depth"
        )
    num_channels = len(cfg.MODEL.PIXEL_MEAN)
    stem = Stem(num_channels, options.STEM_OUT_CHANNELS, norm=options.NORM)
    stages = {
        f"res{stage}": build_stage(cfg, stage, num_blocks)
        for stage, num_blocks in zip(range(2, 6), _NUM_BLOCKS[options.DEPTH], strict=True)
    }
    return stem, stages
