from __future__ import annotations

import pytest
import torch
from torchvision.models import get_model

from detection.config import get_defaults
from detection.engines.embedded.norm import FrozenBatchNorm2d
from detection.engines.embedded.resnet_c4 import (
    BasicBlock,
    build_backbone,
    build_head_res5,
    feature_trunk,
)
from moco.errors import ConfigError


def test_backbone_gives_res4_at_stride_16_and_has_no_res5(tiny_cfg):
    backbone = build_backbone(tiny_cfg())
    features = backbone(torch.zeros(2, 3, 117, 165))
    assert {name: tuple(f.shape) for name, f in features.items()} == {"res4": (2, 128, 8, 11)}
    assert [name for name, _ in backbone.named_children()] == ["stem", "res2", "res3", "res4"]


def test_the_dropped_res5_consumes_random_numbers(tiny_cfg):
    torch.manual_seed(0)
    build_backbone(tiny_cfg())
    after_backbone = torch.rand(1)
    torch.manual_seed(0)
    feature_trunk(tiny_cfg())
    assert torch.equal(torch.rand(1), after_backbone)


@pytest.mark.parametrize(
    ("num_frozen", "names"),
    [(0, []), (1, ["stem"]), (2, ["stem", "res2"]), (5, ["stem", "res2", "res3", "res4"])],
)
def test_freeze_at_counts_the_stem_and_the_stages(tiny_cfg, num_frozen, names):
    backbone = build_backbone(tiny_cfg(MODEL__BACKBONE__FREEZE_AT=num_frozen))
    frozen = [
        name
        for name, part in backbone.named_children()
        if not any(p.requires_grad for p in part.parameters())
    ]
    assert frozen == names
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert bool(norms) == bool(names)
    assert type(backbone.stem.conv1.norm) is (FrozenBatchNorm2d if names else torch.nn.BatchNorm2d)


@pytest.mark.parametrize("in_1x1", [True, False])
def test_where_the_stride_is(tiny_cfg, in_1x1):
    block = build_backbone(tiny_cfg(MODEL__RESNETS__STRIDE_IN_1X1=in_1x1)).res3[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == ((2, 1) if in_1x1 else (1, 2))
    assert block.shortcut.stride[0] == 2


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_trunk_equals_torchvisions(tiny_cfg, depth):
    width = 256 if depth == 50 else 64
    full = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": width, "WIDTH_PER_GROUP": 64}
    full["DEPTH"] = depth
    cfg = tiny_cfg(**{f"MODEL__RESNETS__{key}": value for key, value in full.items()})
    trunk = feature_trunk(cfg).eval()
    reference = get_model(f"resnet{depth}").eval()
    # torchvision registers conv, norm, ..., shortcut; ours is the shortcut first.
    names = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    names |= {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
    names |= {f"layer{i}": f"res{i + 1}" for i in (1, 2, 3, 4)}
    state = {}
    for name, tensor in reference.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name if name.startswith("res") else f"stem.{name}"] = tensor
    trunk.load_state_dict({name: t for name, t in state.items() if "fc." not in name})
    x = torch.randn(1, 3, 61, 50)
    with torch.no_grad():
        features = trunk(x)
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for index in range(1, 5):
            y = getattr(reference, f"layer{index}")(y)
            torch.testing.assert_close(features[f"res{index + 1}"], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth, blocks", [(18, 2), (34, 3)])
def test_the_heads_res5_is_of_basic_blocks_as_many_as_layer4_has(tiny_cfg, depth, blocks):
    cfg = tiny_cfg(MODEL__RESNETS__DEPTH=depth, MODEL__RESNETS__RES2_OUT_CHANNELS=8)
    res5 = build_head_res5(cfg)
    assert [type(block) for block in res5] == [BasicBlock] * blocks
    assert res5(torch.zeros(2, 32, 14, 14)).shape == (2, 64, 7, 7)


def test_another_depth_is_refused():
    cfg = get_defaults()
    cfg.MODEL.RESNETS.DEPTH = 20
    with pytest.raises(ConfigError, match="DEPTH is 20; allowed: 18, 34, 50, 101, 152"):
        build_backbone(cfg)
