"""Proof that converted weights compute what the pretrained network computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from detection.config import get_defaults
from detection.engines.embedded.resnet_c4 import feature_trunk
from detection.keymap import BASIC_BLOCKS, BLOCKS, ResNetShape
from moco.errors import CheckpointError
from moco.seeding import torch_generator

SELF_CHECK_SIZE = (101, 139)  # no multiples of 32: strides and paddings show
SELF_CHECK_TOLERANCE = 1e-5


def self_check(
    source: Mapping[str, torch.Tensor],
    model: Mapping[str, torch.Tensor],
    shape: ResNetShape,
    where: str = "checkpoint",
) -> dict[str, float]:
    """Compare the features of the detection trunk with those of the source network.

    Args:
        source: torchvision names; run by a functional forward pass, no model class.
        model: Detectron2's names; loaded strictly into the embedded engine's trunk.
    Returns: the largest absolute difference over res2..res5 of a random image, and the largest
        one relative to the largest feature of its stage.
    Raises: CheckpointError where the latter exceeds `SELF_CHECK_TOLERANCE`.
    """
    generator = torch_generator(0, "converter-self-check")
    image = torch.randn(1, 3, *SELF_CHECK_SIZE, generator=generator)
    with torch.no_grad():
        wanted = torchvision_features(source, image, shape.depth)
        given = _build_trunk(model, shape)(image)
    absolute, relative = 0.0, 0.0
    for stage, features in wanted.items():
        scale = features.abs().max().item()
        # NaN compares as false: asked this way round, it is refused too.
        if not 0 < scale < float("inf"):
            raise CheckpointError(
                f"{where}: on a random image the features of {stage} are all zero or not finite "
                f"(largest: {scale}); such a network transfers nothing; use another checkpoint"
            )
        difference = (given[stage] - features).abs().max().item()
        if not difference <= SELF_CHECK_TOLERANCE * scale:
            raise CheckpointError(
                f"{where}: self-check failed, the converted {stage} differs by {difference:.3g} "
                f"from the source's (largest feature {scale:.3g}, allowed: "
                f"{SELF_CHECK_TOLERANCE:g} of it); nothing was written; report this as a bug"
            )
        absolute, relative = max(absolute, difference), max(relative, difference / scale)
    return {"max_absolute_difference": absolute, "max_relative_difference": relative}


def torchvision_features(
    state: Mapping[str, torch.Tensor], image_BCHW: torch.Tensor, depth: int
) -> dict[str, torch.Tensor]:
    """Outputs of layer1..layer4 of torchvision's ResNet in eval mode, as res2..res5.

    Source: He et al. 2016, table 1, with the stride in a bottleneck's 3x3 convolution as
    torchvision has it.
    """

    def conv_bn(x, conv: str, bn: str, stride: int = 1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        entries = (state[f"{bn}.{e}"] for e in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *entries, training=False, eps=1e-5)

    x = F.relu(conv_bn(image_BCHW, "conv1", "bn1", stride=2))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    features = {}
    for stage, num_blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(num_blocks):
            at = f"layer{stage}.{block}."
            stride = 2 if stage > 1 and block == 0 else 1
            if depth in BASIC_BLOCKS:
                y = F.relu(conv_bn(x, f"{at}conv1", f"{at}bn1", stride))
                y = conv_bn(y, f"{at}conv2", f"{at}bn2")
            else:
                y = F.relu(conv_bn(x, f"{at}conv1", f"{at}bn1"))
                y = F.relu(conv_bn(y, f"{at}conv2", f"{at}bn2", stride))
                y = conv_bn(y, f"{at}conv3", f"{at}bn3")
            if f"{at}downsample.0.weight" in state:
                x = conv_bn(x, f"{at}downsample.0", f"{at}downsample.1", stride)
            x = F.relu(x + y)
        features[f"res{stage + 1}"] = x
    return features


def _build_trunk(model: Mapping[str, torch.Tensor], shape: ResNetShape) -> torch.nn.Module:
    cfg = get_defaults()
    options = cfg.MODEL.RESNETS
    options.NORM, options.STRIDE_IN_1X1 = "BN", False
    options.DEPTH, options.WIDTH_PER_GROUP = shape.depth, shape.width_per_group
    options.STEM_OUT_CHANNELS = shape.stem_out_channels
    options.RES2_OUT_CHANNELS = shape.res2_out_channels
    with torch.device("meta"):  # no memory, and no random numbers drawn
        trunk = feature_trunk(cfg)
    counters = {n: torch.tensor(0) for n in trunk.state_dict() if n.endswith("num_batches_tracked")}
    trunk.load_state_dict({**model, **counters}, strict=True, assign=True)
    return trunk.eval()
