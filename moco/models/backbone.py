"""ResNets with torchvision's names, optionally narrower, with a CIFAR stem or split batch norm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco.errors import ConfigError

# architecture -> (block, blocks in layer1..4)
ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises `num_splits` groups of the batch separately.

    It gives one process the statistics several GPUs would have, which shuffle BN needs (MoCo v1,
    section 3.3). Sample i belongs to group i % num_splits. In evaluation it is plain batch norm;
    the running statistics are the mean of the groups'.
    """

    def __init__(self, num_features: int, *, num_splits: int):
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        batch, channels, height, width = x_BCHW.shape
        splits = self.num_splits
        if batch % splits:
            raise ConfigError(
                f"MODEL.BN_SPLITS {splits} does not divide the {batch} images of a process; "
                "choose a divisor"
            )
        self.num_batches_tracked += 1
        mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        y = nn.functional.batch_norm(
            x_BCHW.reshape(batch // splits, splits * channels, height, width),
            mean,
            var,
            self.weight.repeat(splits),
            self.bias.repeat(splits),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        with torch.no_grad():
            self.running_mean.copy_(mean.view(splits, channels).mean(0))
            self.running_var.copy_(var.view(splits, channels).mean(0))
        return y.reshape(batch, channels, height, width)


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
    ):
        nn.Module.__init__(self)  # torchvision's own constructor fixes the widths
        self._norm_layer = norm_layer
        self.dilation, self.groups, self.base_width = 1, 1, 64
        planes = [round(64 * width * 2**i) for i in range(4)]
        self.inplanes = planes[0]
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, planes[0], 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, planes[0], 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, planes[0], layers[0])
        self.layer2 = self._make_layer(block, planes[1], layers[1], stride=2)
        self.layer3 = self._make_layer(block, planes[2], layers[2], stride=2)
        self.layer4 = self._make_layer(block, planes[3], layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3] * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Pooled features before `fc`, [B, 2048] for ResNet-50 at width 1."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
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
) -> ResNet:
    """A ResNet whose `fc` has `num_classes` outputs.

    Args:
        width: factor on all channel counts; 64 * width must be a whole number.
        bn_splits: groups that batch norm normalises separately (`SplitBatchNorm2d`).
    Raises: ConfigError for an unknown architecture or a width that gives fractions.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"MODEL.ARCH is {arch!r}; allowed: {', '.join(ARCHITECTURES)}")
    if 64 * width != round(64 * width) or width <= 0:
        raise ConfigError(f"MODEL.WIDTH is {width}; allowed: multiples of 1/64 above 0")
    norm_layer = nn.BatchNorm2d
    if bn_splits > 1:
        norm_layer = functools.partial(SplitBatchNorm2d, num_splits=bn_splits)
    block, layers = ARCHITECTURES[arch]
    return ResNet(
        block, layers, num_classes=num_classes, width=width, stem=stem, norm_layer=norm_layer
    )
