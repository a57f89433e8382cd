"""Names and shapes of ResNets, torchvision's against Detectron2's."""

from __future__ import annotations

import pytest
import torch
import torchvision

from detection.keymap import (
    ResNetShape,
    is_batch_counter,
    read_shape,
    to_detectron2,
    to_torchvision,
)
from moco.errors import CheckpointError

TINY = ResNetShape(50, stem_out_channels=8, res2_out_channels=32, width_per_group=8)


def tiny_state(shape: ResNetShape = TINY) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size) for name, size in shape.tensor_shapes().items()}


@pytest.mark.parametrize(
    "torchvision_name, detectron2_name",
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer1.0.bn1.bias", "res2.0.conv1.norm.bias"),
        ("layer2.3.bn3.running_mean", "res3.3.conv3.norm.running_mean"),
        ("layer3.22.conv2.weight", "res4.22.conv2.weight"),
        ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("layer4.0.downsample.1.weight", "res5.0.shortcut.norm.weight"),
    ],
)
def test_names_by_hand_both_ways(torchvision_name, detectron2_name):
    assert to_detectron2(torchvision_name) == detectron2_name
    assert to_torchvision(detectron2_name) == torchvision_name


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_every_name_goes_there_and_back(depth):
    names = list(ResNetShape(depth).tensor_shapes())
    mapped = [to_detectron2(name) for name in names]
    assert len(set(mapped)) == len(names)
    assert [to_torchvision(name) for name in mapped] == names


def test_a_round_trip_is_not_the_identity():
    assert all(to_detectron2(name) != name for name in ResNetShape().tensor_shapes())


@pytest.mark.parametrize(
    "name",
    [
        "fc.weight",
        "conv2.weight",
        "bn2.bias",
        "conv1.bias",
        "downsample.0.weight",
        "layer5.0.conv1.weight",
        "layer1.00.conv1.weight",
        "layer1.0.conv4.weight",
        "layer1.0.downsample.0.bias",
        "layer1.0.downsample.2.weight",
        "layer1.0.bn1.num_batches_tracked",
        "xlayer1.0.conv1.weight",
        "layer1.0.conv1.weight\n",
        "layer1.0.conv1.weight.layer1.0.conv1.weight",
        "module.conv1.weight",
        "",
    ],
)
def test_other_torchvision_names_are_refused_by_name(name):
    with pytest.raises(CheckpointError) as caught:
        to_detectron2(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["stem.conv2.weight", "stem.shortcut.weight", "res1.0.conv1.weight", "stem.fc.weight"]
)
def test_other_detectron2_names_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=name):
        to_torchvision(name)


def test_batch_counters_are_told_by_structure():
    assert is_batch_counter("bn1.num_batches_tracked")
    assert is_batch_counter("layer1.0.downsample.1.num_batches_tracked")
    assert not is_batch_counter("fc.1.num_batches_tracked")
    assert not is_batch_counter("bn1.running_mean")


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"]
)
def test_shapes_equal_torchvisions(arch):
    with torch.device("meta"):
        network = torchvision.models.get_model(arch)
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    shape = read_shape(wanted, arch)
    assert {n: tuple(t.shape) for n, t in wanted.items()} == shape.tensor_shapes()
    assert list(wanted) == list(shape.tensor_shapes())
    assert shape.arch == arch.removeprefix("wide_").removesuffix("_2")
    assert shape.width_per_group == (128 if arch.startswith("wide_") else 64)


def test_resnet50_has_265_names():
    shape = ResNetShape()
    assert len(shape.tensor_shapes()) == 265
    assert sum(name.startswith("layer4.2.") for name in shape.tensor_shapes()) == 15


def test_width_is_read_from_the_tensors():
    assert read_shape(tiny_state(), "x") == TINY


def test_basic_blocks_are_told_from_bottlenecks_of_as_many():
    basic, bottlenecks = ResNetShape(34, res2_out_channels=64), ResNetShape(50)
    assert basic.tensor_shapes().keys() < bottlenecks.tensor_shapes().keys()
    assert len(basic.tensor_shapes()) == 5 * 36 and len(ResNetShape(18).tensor_shapes()) > 100
    state = tiny_state(ResNetShape(34, stem_out_channels=8, res2_out_channels=8))
    assert read_shape(state, "x").arch == "resnet34"
    del state["layer3.5.conv1.weight"]
    with pytest.raises(CheckpointError, match=r"resnet34, but 1 tensors are missing: layer3\.5"):
        read_shape(state, "x")
    state = {n: t for n, t in state.items() if not n.startswith("layer3.5.")}
    with pytest.raises(CheckpointError, match=r"\(3, 4, 5, 3\) basic blocks; allowed: resnet18"):
        read_shape(state, "x")


def test_grouped_convolutions_are_refused():
    with torch.device("meta"):
        state = torchvision.models.resnext50_32x4d().state_dict()
    with pytest.raises(CheckpointError, match="grouped"):
        read_shape(state, "x")


def test_a_cifar_stem_is_refused():
    state = {**tiny_state(), "conv1.weight": torch.zeros(8, 3, 3, 3)}
    with pytest.raises(CheckpointError, match="CIFAR stem"):
        read_shape(state, "x")


@pytest.mark.parametrize("block", [2, 5])
def test_a_missing_block_is_refused(block):
    state = {n: t for n, t in tiny_state().items() if not n.startswith(f"layer3.{block}.")}
    # Block 5 is the last one: the depth is unknown then. Block 2 leaves a hole.
    wanted = r"\(3, 4, 5, 3\)" if block == 5 else r"15 tensors are missing: layer3\.2\.conv1"
    with pytest.raises(CheckpointError, match=wanted):
        read_shape(state, "x")


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named():
    state = tiny_state()
    del state["layer2.1.bn2.bias"]
    with pytest.raises(CheckpointError, match=r"missing: layer2\.1\.bn2\.bias"):
        read_shape(state, "x")
    with pytest.raises(CheckpointError, match=r"not part of it: layer1\.1\.downsample\.0\.weight"):
        read_shape({**tiny_state(), "layer1.1.downsample.0.weight": torch.zeros(1)}, "x")
    with pytest.raises(CheckpointError, match=r"'layer4\.2\.bn3\.bias' has shape \(7,\)"):
        read_shape({**tiny_state(), "layer4.2.bn3.bias": torch.zeros(7)}, "x")
