"""Backbones against torchvision's, split batch norm against separate batches, EMA by formula."""

import pytest
import torch
import torch.nn as nn
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from moco.errors import ConfigError
from moco.models.backbone import build_backbone
from moco.models.heads import replace_by_mlp
from moco.models.momentum import ema_update_, init_key_encoder_
from moco.models.norm import SplitBatchNorm2d, SyncBatchNorm


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_width_1_has_torchvisions_names_and_shapes(arch):
    with torch.device("meta"):
        ours = build_backbone(arch, num_classes=128).state_dict()
        theirs = getattr(torchvision.models, arch)(num_classes=128).state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[n].shape == theirs[n].shape for n in ours)


def test_same_seed_gives_torchvisions_weights_and_features():
    torch.manual_seed(3)
    ours = build_backbone("resnet18", num_classes=16).eval()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=16).eval()
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    x = torch.randn(2, 3, 47, 33)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        torch.nn.init.zeros_(theirs.layer3[0].conv1.weight)  # negative control
        assert not torch.equal(ours(x), theirs(x))


def test_width_scales_every_channel_count():
    net = build_backbone("resnet50", num_classes=8, width=0.25)
    assert net.conv1.out_channels == 16
    assert net.layer1[0].conv2.out_channels == 16
    assert net.layer1[0].conv3.out_channels == 64
    assert net.layer4[2].conv3.out_channels == 512
    assert net.fc.in_features == 512


def test_cifar_stem_keeps_the_resolution():
    net = build_backbone("resnet18", num_classes=8, width=0.125, stem="cifar")
    assert net.maxpool(net.conv1(torch.zeros(1, 3, 32, 32))).shape[-2:] == (32, 32)


@pytest.mark.parametrize("options", [{"arch": "resnet99"}, {"width": 0.01}, {"width": -1.0}])
def test_unknown_options_are_named(options):
    with pytest.raises(ConfigError, match="MODEL.(ARCH|WIDTH) is .*allowed"):
        build_backbone(**{"arch": "resnet18", "num_classes": 2, **options})


def test_mlp_head_has_the_references_names():
    net = build_backbone("resnet18", num_classes=16, width=0.125)
    replace_by_mlp(net)
    shapes = {n: tuple(p.shape) for n, p in net.fc.named_parameters()}
    assert shapes == {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (16, 64), "2.bias": (16,)}


def test_split_batch_norm_equals_separate_batches():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 4)
    split = SplitBatchNorm2d(3, num_splits=4)
    y = split(x)
    plain = [nn.BatchNorm2d(3) for _ in range(4)]
    for group, norm in enumerate(plain):
        torch.testing.assert_close(y[group::4], norm(x[group::4]), rtol=1e-5, atol=1e-6)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in plain]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    whole = nn.BatchNorm2d(3)(x)
    assert not torch.allclose(y, whole, atol=1e-2)  # negative control: groups do matter
    split.eval()
    torch.testing.assert_close(split(x)[:1], split(x[:1]))


def test_split_batch_norm_refuses_a_batch_it_cannot_divide():
    with pytest.raises(ConfigError, match="BN_SPLITS 4 does not divide the 6 images"):
        SplitBatchNorm2d(3, num_splits=4)(torch.zeros(6, 3, 2, 2))


def test_sync_batch_norm_alone_is_plain_and_excludes_groups():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, 4)
    assert torch.equal(SyncBatchNorm(3)(x), nn.BatchNorm2d(3)(x))
    assert isinstance(build_backbone("resnet18", num_classes=2, norm="SyncBN").bn1, SyncBatchNorm)
    with pytest.raises(ConfigError, match="NORM is SyncBN and MODEL.BN_SPLITS 2"):
        build_backbone("resnet18", num_classes=2, norm="SyncBN", bn_splits=2)


def test_ema_closed_form():
    query, key = nn.Linear(2, 2), nn.Linear(2, 2)
    init_key_encoder_(key, query)
    assert all(torch.equal(k, q) for k, q in zip(key.parameters(), query.parameters(), strict=True))
    assert not any(p.requires_grad for p in key.parameters())
    start = key.weight.clone()
    with torch.no_grad():
        query.weight.fill_(1.0)
    for _ in range(5):
        ema_update_(key, query, 0.9)
    torch.testing.assert_close(key.weight, start * 0.9**5 + (1 - 0.9**5))


def test_ema_leaves_buffers_alone():
    query, key = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    query.running_mean.fill_(7.0)
    ema_update_(key, query, 0.5)
    assert key.running_mean.tolist() == [0.0, 0.0]


def test_groups_of_channels_first_images_are_views():
    """No copy of the images, forward or backward: on a GPU they are most of the time of a norm.
    Channels last, the negative control, has them."""

    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.num = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, out = func._schema.name, func(*args, **(kwargs or {}))
            if name in ("aten::clone", "aten::copy_", "aten::_to_copy"):
                self.num += out.numel() >= 8 * 6 * 4 * 4
            return out

    def num_copies(memory_format):
        images = torch.randn(8, 6, 4, 4).contiguous(memory_format=memory_format).requires_grad_()
        with Copies() as copies:
            y = SplitBatchNorm2d(6, num_splits=2)(images)
            y.backward(torch.ones_like(y))
        return copies.num

    assert num_copies(torch.contiguous_format) == 0
    assert num_copies(torch.channels_last) >= 2
