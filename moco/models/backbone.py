"""ResNets with torchvision's names, optionally narrower, with a CIFAR stem or split batch norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torchvision
from torchvision.models import resnet

from moco.errors import ConfigError
from moco.kernels import residual
from moco.kernels.convolution import convolve
from moco.models.heads import Linear
from moco.models.norm import choose_norm, groups_of, norm_relu


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, whose layers may run joined."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        layers = (self.conv1, self.bn1), (self.conv2, self.bn2)
        return _residual(layers, self.downsample, x_BCHW)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, whose layers may run joined."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        layers = (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)
        return _residual(layers, self.downsample, x_BCHW)


def _residual(
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    downsample: nn.Sequential | None,
    x_BCHW: torch.Tensor,
) -> torch.Tensor:
    """What a block computes of its convolutions, each with the norm after it."""
    if residual.has_kernels([*pairs, *([downsample] if downsample else [])], x_BCHW):
        groups = groups_of(pairs[0][1], len(x_BCHW))
        return residual.residual(pairs, downsample, x_BCHW, groups)
    out_BCHW = x_BCHW
    for convolution, norm in pairs[:-1]:
        out_BCHW = norm_relu(norm, convolve(convolution, out_BCHW))
    convolution, norm = pairs[-1]
    out_BCHW = convolve(convolution, out_BCHW)
    shortcut_BCHW = x_BCHW
    if downsample is not None:
        shortcut_BCHW = norm_relu(downsample[1], convolve(downsample[0], x_BCHW), relu=False)
    return norm_relu(norm, out_BCHW, shortcut_BCHW)


# architecture -> (block, blocks in layer1..4)
ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet with a width factor and a choice of stem.

    With width 1 and the ImageNet stem its names, shapes and initial weights are torchvision's.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int,
        width: float = 1.0,
        stem: str = "imagenet",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        channels: int = 3,
    ):
        nn.Module.__init__(self)  # torchvision's own constructor fixes the widths
        self._norm_layer = norm_layer
        self.dilation, self.groups, self.base_width = 1, 1, 64
        planes = [round(64 * width * 2**i) for i in range(4)]
        self.inplanes = planes[0]
        if stem == "cifar":
            self.conv1 = nn.Conv2d(channels, planes[0], 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, planes[0], 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, planes[0], layers[0])
        self.layer2 = self._make_layer(block, planes[1], layers[1], stride=2)
        self.layer3 = self._make_layer(block, planes[2], layers[2], stride=2)
        self.layer4 = self._make_layer(block, planes[3], layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(planes[3] * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Pooled features before `fc`, [B, 2048] for ResNet-50 at width 1."""
        x = self.maxpool(norm_relu(self.bn1, convolve(self.conv1, x_BCHW)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def _forward_impl(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.fc(self.forward_features(x_BCHW))


def build_backbone(
    arch: str,
    *,
    num_classes: int,
    width: float = 1.0,
    stem: str = "imagenet",
    bn_splits: int = 1,
    norm: str = "BN",
    channels: int = 3,
) -> ResNet:
    """A ResNet whose `fc` has `num_classes` outputs.

    Args:
        width: factor on all channel counts; 64 * width must be a whole number.
        bn_splits, norm: see `choose_norm`. channels: of the images.
    Raises: ConfigError for an unknown architecture or a width that gives fractions.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"MODEL.ARCH is {arch!r}; allowed: {', '.join(ARCHITECTURES)}")
    if 64 * width != round(64 * width) or width <= 0:
        raise ConfigError(f"MODEL.WIDTH is {width}; allowed: multiples of 1/64 above 0")
    block, layers = ARCHITECTURES[arch]
    norm_layer = choose_norm(norm, bn_splits)
    return ResNet(
        block, layers, num_classes=num_classes, width=width, stem=stem, norm_layer=norm_layer,
        channels=channels,
    )  # fmt: skip
