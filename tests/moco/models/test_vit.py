"""ViTs against torchvision's own, positions against their formula, and what stays fixed."""

import math

import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

from moco.errors import ConfigError
from moco.models.encoders import build_encoder
from moco.models.momentum import ema_update_, init_key_encoder_
from moco.models.vit import build_vit, position_codes


def small(**options):
    torch.manual_seed(0)
    options = {"num_classes": 8, "image_size": 48, "width": 0.125, **options}
    return build_vit("vit_small", **options)


def in_torchvisions_names(vit):
    """Our state under torchvision's names, its head left out."""
    named = {
        "class_token": vit.cls_token,
        "conv_proj.weight": vit.patch_embed.proj.weight,
        "conv_proj.bias": vit.patch_embed.proj.bias,
        "encoder.pos_embedding": vit.pos_embed,
    }
    parts = {"encoder.ln": vit.norm}
    for i, block in enumerate(vit.blocks):
        start = f"encoder.layers.encoder_layer_{i}"
        parts |= {
            f"{start}.ln_1": block.norm1,
            f"{start}.self_attention.out_proj": block.attn.proj,
            f"{start}.ln_2": block.norm2,
            f"{start}.mlp.0": block.mlp.fc1,
            f"{start}.mlp.3": block.mlp.fc2,
        }
        named[f"{start}.self_attention.in_proj_weight"] = block.attn.qkv.weight
        named[f"{start}.self_attention.in_proj_bias"] = block.attn.qkv.bias
    for name, module in parts.items():
        named |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return named


def test_features_are_those_of_torchvisions_vit():
    vit = small().eval()
    theirs = VisionTransformer(48, 16, 12, 12, 48, 192).eval()
    theirs.heads = torch.nn.Identity()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vit.parameters():  # biases and the class token are not zero then
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.load_state_dict(in_torchvisions_names(vit))
    images = torch.randn(2, 3, 48, 48, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(images), theirs(images), rtol=1e-4,
                                   atol=1e-5)  # fmt: skip
        vit.pos_embed.zero_()  # negative control
        assert not torch.allclose(vit.forward_features(images), theirs(images), atol=1e-2)


def test_positions_by_the_formula():
    codes = position_codes(3, 16)
    assert codes.shape == (1, 10, 16) and codes.dtype == torch.float32
    assert torch.equal(codes[0, 0], torch.zeros(16))
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = codes[0, 1 + 3 * row + column]
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("arch, millions", [("vit_small", 22), ("vit_base", 86)])
def test_the_papers_sizes(arch, millions):
    with torch.device("meta"):
        vit = build_encoder(arch, num_classes=1)
    backbone = [p for n, p in vit.named_parameters() if not n.startswith("fc.")]
    assert round(sum(p.numel() for p in backbone) / 1e6) == millions
    assert vit.pos_embed.shape[1] == 1 + 196 and vit.blocks[0].attn.heads == 12


def test_patch_projection_stays_random_and_equal_in_both_encoders():
    query, key = small(), small()
    key.load_state_dict(query.state_dict())
    init_key_encoder_(key, query)
    start = query.patch_embed.proj.weight.clone()
    optimizer = torch.optim.AdamW(query.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        query(torch.randn(2, 3, 48, 48)).square().sum().backward()
        optimizer.step()
        ema_update_(key, query, 0.9)
    assert torch.equal(query.patch_embed.proj.weight, start)
    assert torch.equal(key.patch_embed.proj.weight, start)
    assert not torch.equal(key.cls_token, torch.zeros_like(key.cls_token))
    trained = small(freeze_patches=False)  # negative control
    trained(torch.randn(2, 3, 48, 48)).sum().backward()
    assert trained.patch_embed.proj.weight.grad.abs().sum() > 0
    assert start.std() > 0.02


def test_matrices_start_xavier_uniform_queries_keys_and_values_apart():
    vit = build_vit("vit_small", num_classes=8, image_size=32, width=0.5)
    for matrix, fans in (
        (vit.blocks[0].attn.qkv.weight, 192 + 192),
        (vit.blocks[0].mlp.fc1.weight, 192 + 768),
        (vit.patch_embed.proj.weight, 192 + 3 * 256),
    ):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(not b.any() for n, b in vit.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0.03}, "gives vit_small 11.52 channels; allowed: multiples of 12"),
        ({"image_size": 50}, "DATA.SIZE 50 is no multiple of vit_small's patches of 16"),
        ({"bn_splits": 2}, "vit_small has no batch norm"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"built for images of 48 pixels got \[64, 64\]"):
        small()(torch.zeros(1, 3, 64, 64))
