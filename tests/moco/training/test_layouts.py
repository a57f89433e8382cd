"""Other projects' files in one form: every layout there and back, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from foreign_files import (
    FILES,
    lightly_example,
    moco,
    moco_v3,
    narrow_resnet,
    numbered,
    of_generator,
    small_vit,
    some,
    under,
    vissl,
    weights_of,
)

from moco.errors import CheckpointError
from moco.models.backbone import build_backbone
from moco.models.vit import build_vit
from moco.training.layouts import read_backbone
from moco.training.layouts_network import DEPTHS, ResNet, ViT

WITH_KEY = [name for name, (_, _, key, _) in FILES.items() if key]
WITH_VIT = [name for name, (_, _, _, vit) in FILES.items() if vit]


def equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def stem_of(name: str) -> int:
    return 3 if name == "lightly, generator" else 7


@pytest.fixture(scope="module")
def encoders():
    """(query, key) under torchvision's names, by the first convolution's size."""
    return {s: (narrow_resnet(seed=1, stem=s), narrow_resnet(seed=2, stem=s)) for s in (7, 3)}


def check(content: dict, wanted: dict, layout: str, encoder: str) -> None:
    """The encoder is `wanted`, bit by bit and in its order; all of the file is accounted for."""
    before = copy.deepcopy(content)
    found = read_backbone(content, "f.pth", encoder=encoder)
    assert (found.layout, found.encoder) == (layout, encoder)
    assert equal(found.state, wanted)
    weights = weights_of(content)
    dropped = [name for names in found.dropped.values() for name in names]
    assert sorted([*found.names, *dropped]) == sorted(weights)
    assert sorted(found.names.values()) == sorted(wanted)
    for source, canonical in found.names.items():
        assert torch.equal(weights[source], wanted[canonical])
    assert equal(weights_of(before), weights)  # the content is left as it was


@pytest.mark.parametrize("name", FILES)
def test_the_query_encoder_of_every_layout(encoders, name):
    build, layout, _, _ = FILES[name]
    query, key = encoders[stem_of(name)]
    check(build(query, key), query, layout, "query")


@pytest.mark.parametrize("name", WITH_KEY)
def test_the_key_encoder_of_every_layout_that_has_one(encoders, name):
    build, layout, _, _ = FILES[name]
    query, key = encoders[stem_of(name)]
    check(build(query, key), key, layout, "key")


@pytest.mark.parametrize("name", WITH_VIT)
def test_vits(name):
    build, layout, has_key, _ = FILES[name]
    query, key = small_vit(seed=1), small_vit(seed=2)
    check(build(query, key), query, "timm" if name == "bare" else layout, "query")
    if has_key:
        check(build(query, key), key, layout, "key")


@pytest.mark.parametrize("name", WITH_KEY)
def test_negative_control_exchanged_encoders_are_seen(encoders, name):
    query, key = encoders[stem_of(name)]
    exchanged = read_backbone(FILES[name][0](key, query))
    assert equal(exchanged.state, key) and not equal(exchanged.state, query)


@pytest.mark.parametrize("name", [name for name in FILES if name not in WITH_KEY])
def test_an_encoder_that_is_not_there_is_refused(encoders, name):
    content = FILES[name][0](*encoders[stem_of(name)])
    with pytest.raises(CheckpointError, match="holds no key encoder"):
        read_backbone(content, encoder="key")


def changed(content: dict, end: str, change) -> dict:
    """`content` with `change(dict, name)` done to each name that ends so, outside key encoders."""
    content = copy.deepcopy(content)
    done = []

    def walk(part: dict) -> None:
        for name, value in list(part.items()):
            if isinstance(value, dict):
                walk(value)
            elif name.endswith(end) and torch.is_tensor(value):
                change(part, name)
                done.append(name)

    walk(content)
    assert done
    return content


def misshapen(part: dict, name: str) -> None:
    part[name] = torch.zeros(3)


def spoiled(part: dict, name: str) -> None:
    part[name] = torch.full_like(part[name], float("nan"))


DAMAGES = {
    "a missing tensor": (lambda part, name: part.pop(name), "1 tensors are missing: layer3.0.bn2"),
    "another shape": (misshapen, r"'layer3.0.bn2.running_var' has shape \(3,\), this resnet18"),
    "NaN": (spoiled, r"0\..*\.running_var' holds NaN or Inf"),
    "no tensor": (lambda part, name: part.update({name: "x"}), "is no tensor of floats"),
    "an unknown tensor": (
        lambda part, name: part.update({f"{name}2": torch.zeros(1)}),
        r"1 tensors are not part of it: layer3.0.bn2.running_var2",
    ),
    "an unknown name beside": (
        lambda part, name: part.update({"stray.weight": torch.zeros(1)}),
        "'.*stray.weight' is neither part of the query encoder nor known to be left out",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_in_one_line(encoders, name, damage):
    content = FILES[name][0](*encoders[stem_of(name)])
    end = "6.0.bn2" if name in ("lightly, example", "seco") else "layer3.0.bn2"
    if name.startswith("hugging face"):
        end = "stages.2.layers.0.layer.1.normalization"
    change, message = DAMAGES[damage]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_backbone(changed(content, f"{end}.running_var", change), "f.pth")
    assert str(caught.value).startswith("f.pth: ") and "\n" not in str(caught.value)


def test_a_damaged_key_encoder_is_no_obstacle_to_the_query(encoders):
    query, key = encoders[7]
    key = {**key, "bn1.bias": torch.full((8,), float("nan"))}
    for name in WITH_KEY:
        if name != "lightly, generator":
            assert equal(read_backbone(FILES[name][0](query, key)).state, query)
            with pytest.raises(CheckpointError, match="holds NaN"):
                read_backbone(FILES[name][0](query, key), encoder="key")


def test_unknown_layouts_are_refused_with_their_first_keys_and_the_known_ones():
    for content, first in (
        ({"state_dict": some("net.a", "net.b", "net.c", "net.d")}, "'net.a', 'net.b', 'net.c'"),
        (some("module.base_encoder.cls_token", "b"), "'module.base_encoder.cls_token', 'b'"),
        ({}, "none"),
    ):
        message = f"unknown layout, first keys: {first};"
        with pytest.raises(CheckpointError, match=message) as caught:
            read_backbone(content, "f.pth")
        for layout in ("moco", "moco-v3", "vissl", "lightly", "solo-learn", "mmselfsup"):
            assert f"{layout} ('" in str(caught.value)


@pytest.mark.parametrize("content", [[1], None, torch.zeros(1), {1: torch.zeros(1)}])
def test_what_is_no_dict_of_tensors_is_refused(content):
    with pytest.raises(CheckpointError, match="no dict of named tensors"):
        read_backbone(content)


def test_two_names_for_one_tensor_are_refused(encoders):
    state = of_generator(encoders[3][0])
    state["layer2.0.downsample.0.weight"] = state["layer2.0.shortcut.0.weight"]
    with pytest.raises(CheckpointError, match="two tensors stand for layer2.0.downsample.0.weight"):
        read_backbone(state)


@pytest.mark.parametrize("name", ["solo-learn", "solo-learn, old"])
def test_solo_learns_cifar_stem_is_another_network(encoders, name):
    """solo/methods/base.py: nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2)."""
    with pytest.raises(CheckpointError, match="pads its 3x3 first convolution .* by 2 pixels"):
        read_backbone(FILES[name][0](*encoders[3]))


def test_lightlys_generator_in_sequence_is_another_network(encoders):
    """lightly/models/resnet.py: forward() calls F.relu after bn1, which is no child. Built and run
    here, the two differ."""
    state = of_generator(encoders[3][0])
    numbers = {"conv1": 0, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
    names = {n: f"backbone.{numbers[n.split('.')[0]]}.{n.split('.', 1)[1]}" for n in state}
    content = {"state_dict": {names[n]: t for n, t in state.items()}}
    with pytest.raises(CheckpointError, match="network without the ReLU after bn1"):
        read_backbone(content)
    with pytest.raises(CheckpointError, match="network without the ReLU after bn1"):
        read_backbone({n.removeprefix("backbone."): t for n, t in content["state_dict"].items()})


@pytest.mark.parametrize("splits", [0, 4])
def test_live_features_of_lightlys_generator(splits):
    """Where lightly is installed: its network and ours, and its children in sequence, which are
    not that network."""
    models = pytest.importorskip("lightly.models")
    torch.manual_seed(0)
    theirs = models.ResNetGenerator("resnet-18", width=0.125, num_splits=splits)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        theirs.train()(images)  # statistics, of each split apart
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    found = read_backbone(state)
    ours = build_backbone("resnet18", num_classes=1, width=0.125, stem="cifar").eval()
    ours.load_state_dict({**ours.state_dict(), **found.state})
    theirs.eval()
    theirs.linear = torch.nn.Identity()
    sequential = torch.nn.Sequential(*list(theirs.children())[:-1], torch.nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        features = ours.forward_features(images)
        torch.testing.assert_close(features, theirs(images), rtol=1e-5, atol=1e-6)
        assert (features - sequential(images).flatten(1)).abs().max() > 1e-3
    with pytest.raises(CheckpointError, match="network without the ReLU after bn1"):
        read_backbone(dict(sequential.state_dict()))


def test_statistics_of_lightlys_splits_are_averaged(encoders):
    """lightly/models/batchnorm.py: SplitBatchNorm.train(False) takes the mean over the splits."""
    state = of_generator(encoders[3][0])
    parts = torch.arange(1.0, 25.0)
    state["bn1.running_mean"] = parts  # three splits of eight channels
    found = read_backbone(state)
    assert torch.equal(found.state["bn1.running_mean"], (parts[:8] + parts[8:16] + parts[16:]) / 3)
    assert found.notes == ("running statistics of 3 splits averaged, as lightly does to evaluate",)
    with pytest.raises(CheckpointError, match="has shape"):  # elsewhere it is damage
        read_backbone({**encoders[3][0], "bn1.running_mean": parts})


def test_openmmlabs_caffe_style_is_refused(encoders):
    """mmpretrain/models/backbones/resnet.py: style 'caffe' has stride 2 in the 1x1 convolution."""
    content = FILES["mmselfsup 1.x"][0](*encoders[7])
    assert read_backbone(content).layout == "mmselfsup"
    for config in ("style='caffe'", "{'style': 'caffe'}", 'style = "caffe"'):
        content["meta"] = {"cfg": f"backbone=dict(depth=50, {config})"}
        with pytest.raises(CheckpointError, match="style='caffe'"):
            read_backbone(content)


def test_a_vissl_model_alone_and_in_the_feature_extractor(encoders):
    query, key = encoders[7]
    trunk = under("_feature_blocks.", query)
    assert equal(read_backbone({"model_state_dict": trunk}).state, query)
    content = vissl(query, key)
    content["classy_state_dict"]["base_model"]["model"]["trunk"] = under("base_model.", trunk)
    assert equal(read_backbone(content).state, query)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers(encoders, wrapper):
    query, key = encoders[7]
    assert read_backbone(under(wrapper, query)).prefix == wrapper
    content = {n.replace("module.", wrapper): t for n, t in moco(query, key)["state_dict"].items()}
    found = read_backbone(content)
    assert found.prefix == f"{wrapper}encoder_q." and equal(found.state, query)
    assert equal(read_backbone(content, encoder="key").state, key)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("stem", [7, 3])
def test_the_architecture_follows_from_names_and_shapes(arch, stem):
    state = narrow_resnet(arch, stem=stem)
    network = read_backbone(lightly_example(state, state)).network
    assert (network.arch, network.planes, network.width, network.stem_size) == (arch, 8, 8, stem)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert network.tensor_shapes() == shapes and list(network.tensor_shapes()) == list(shapes)
    assert not network.is_standard


@pytest.mark.parametrize("arch", [*(f"resnet{d}" for d in DEPTHS), "wide_resnet50_2"])
def test_torchvisions_names_shapes_and_order(arch):
    with torch.device("meta"):
        like = torchvision.models.get_model(arch).state_dict()
    width = 128 if arch.startswith("wide") else 64
    network = ResNet(int(arch.removeprefix("wide_")[6:].removesuffix("_2")), width=width)
    wanted = {n: tuple(t.shape) for n, t in like.items() if not n.startswith("fc.")}
    assert network.arch == arch and network.is_standard
    assert network.tensor_shapes() == wanted and list(network.tensor_shapes()) == list(wanted)


def test_names_of_our_vit():
    with torch.device("meta"):
        like = build_vit("vit_small", num_classes=2, image_size=32).state_dict()
    shapes = ViT("vit_small", 32, 16, 384, 12, 12).tensor_shapes()
    assert shapes == {n: tuple(t.shape) for n, t in like.items() if not n.startswith("fc.")}


@pytest.mark.parametrize(
    "content, num_heads",
    [
        (moco_v3(small_vit(), small_vit()), 12),  # its `arch` says vit_small
        ({"state_dict": under("encoder_q.", small_vit())}, None),  # 24 channels are none of theirs
        (small_vit(), None),  # timm's ViT-S has 6 heads, MoCo v3's 12
        ({"state_dict": small_vit(), "num_heads": "6"}, 6),  # as in the metadata of safetensors
    ],
)
def test_heads_are_only_what_the_file_or_its_project_says(content, num_heads):
    network = read_backbone(content).network
    assert (network.num_heads, network.image_size, network.patch_size) == (num_heads, 32, 16)
    assert read_backbone(content, num_heads=3).network.num_heads == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {**s, "pos_embed": torch.zeros(1, 4, 24)}, "'pos_embed' has 4 positions"),
        (lambda s: {**s, "pos_embed": torch.zeros(5, 24)}, "'pos_embed' is missing or has not 3"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(24, 3, 0, 0)}, "has not 4 dim"),
        (lambda s: {**s, "dist_token": torch.zeros(1, 1, 24)}, "'dist_token' is neither part"),
        (lambda s: {n: t for n, t in s.items() if "qkv.bias" not in n}, "2 tensors are missing"),
        (lambda s: {n: t for n, t in s.items() if "blocks" not in n}, "holds no blocks"),
    ],
)
def test_other_vits_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_backbone(change(small_vit()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {n: t for n, t in s.items() if not n.startswith("layer4.1")}, r"\(2, 2, 2, 1\)"),
        (lambda s: {**s, "conv1.weight": torch.zeros(8, 3, 5, 5)}, "allowed: 7x7, or 3x3"),
        (lambda s: {**s, "layer1.0.conv1.weight": torch.zeros(8)}, "missing or no convolution"),
        (lambda s: {**s, "layer1.0.conv3.weight": torch.tensor(0.0)}, "conv3.weight' is missing"),
        (lambda s: {**s, "conv1.weight": torch.zeros(8, 3, 0, 0)}, "missing or no convolution"),
        (lambda s: {**s, "layer1.0.conv2.weight": torch.zeros(8, 2, 3, 3)}, "grouped"),
        (lambda s: {"state_dict": s, "arch": "resnet34"}, "'arch' is resnet34.* a resnet18's"),
        (lambda s: {n: t for n, t in s.items() if n != "bn1.num_batches_tracked"}, "1 tensors are"),
    ],
)
def test_other_resnets_are_refused(encoders, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_backbone(change(encoders[7][0]))


def test_old_files_lack_all_batch_counters(encoders):
    state = {n: t for n, t in encoders[7][0].items() if "num_batches" not in n}
    assert equal(read_backbone(state).state, state)


def test_numbers_are_positions_among_the_children():
    """The test's own mapping against torch's: nn.Sequential names a child by its position."""
    network = torchvision.models.resnet18()
    sequential = torch.nn.Sequential(*list(network.children())[:-1])
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    assert equal(numbered(state), dict(sequential.state_dict()))


def test_left_over_names_are_dropped_when_told(encoders):
    """The message names the flag; what is part of the network is never dropped."""
    query, key = encoders[7]
    content = moco(query, key)
    content["state_dict"] |= some("module.ema.decay", "module.ema.count", "module.probe.weight")
    with pytest.raises(CheckpointError, match="add --drop ema, else give another checkpoint"):
        read_backbone(content, "f.pth")
    with pytest.raises(CheckpointError, match="'module.probe.weight' is neither .*--drop probe"):
        read_backbone(content, "f.pth", drop=("ema",))
    for drop in (("ema", "probe"), ("module.ema.", "module.probe")):
        found = read_backbone(content, "f.pth", drop=drop)
        assert equal(found.state, query)
        assert found.dropped[f"--drop {drop[0]}"] == ["module.ema.decay", "module.ema.count"]
    with pytest.raises(CheckpointError, match="--drop queue: no name that is unknown begins so"):
        read_backbone(content, "f.pth", drop=("ema", "probe", "queue"))
    content["state_dict"]["module.encoder_q.layer1.0.se.weight"] = torch.zeros(1)
    for drop, message in (
        (("ema", "probe"), "not part of it: layer1.0.se.weight"),
        (("ema", "probe", "encoder_q.layer1.0.se"), "--drop encoder_q.layer1.0.se: no name that"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_backbone(content, "f.pth", drop=drop)


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_are_named(encoders, channels):
    state = {**encoders[7][0], "conv1.weight": torch.zeros(8, channels, 7, 7)}
    with pytest.raises(CheckpointError, match=f"images of {channels} channels; allowed: 1, 3"):
        read_backbone(state)
    vit = {**small_vit(), "patch_embed.proj.weight": torch.zeros(24, channels, 16, 16)}
    with pytest.raises(CheckpointError, match=f"images of {channels} channels; allowed: 1, 3"):
        read_backbone(vit)
