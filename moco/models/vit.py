"""Vision Transformers as MoCo v3 trains them (arXiv 2104.02057, sections 4.2, 5 and table 2).

Patches are projected by a random matrix that is never trained, positions are fixed sine-cosine
codes in 2-D, and the class token after the last LayerNorm is the feature. Names are timm's, but for
`fc`, the head's place, which timm calls `head`. Weights start as in arXiv 2010.11929's code:
Xavier-uniform matrices, zero biases and class token.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from moco.errors import ConfigError

# architecture -> (channels, heads, blocks); ViT-S has 12 heads here, not DeiT's 6
ARCHITECTURES = {"vit_small": (384, 12, 12), "vit_base": (768, 12, 12)}
_PATCH = {"imagenet": 16, "cifar": 4}  # by MODEL.STEM
_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, C]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x_BNC.shape
        qkv = self.qkv(x_BNC).view(batch, length, 3, self.heads, dim // self.heads)
        q_BHNc, k_BHNc, v_BHNc = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q_BHNc, k_BHNc, v_BHNc)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and with a shortcut."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=_NORM_EPS) for _ in range(2))
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        x_BNC = x_BNC + self.attn(self.norm1(x_BNC))
        return x_BNC + self.mlp(self.norm2(x_BNC))


class ViT(nn.Module):
    """A ViT for images of one size, whose `fc` has `num_classes` outputs.

    Args:
        image_size, patch_size: sides in pixels; the first a multiple of the second.
        freeze_patches: the patch projection keeps its random start.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        heads: int,
        blocks: int,
        num_classes: int,
        freeze_patches: bool,
        channels: int = 3,
    ):
        super().__init__()
        self.image_size = image_size
        projection = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", position_codes(image_size // patch_size, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.fc = nn.Linear(dim, num_classes)
        self._initialise()
        self.patch_embed.requires_grad_(not freeze_patches)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
                weight = module.weight.view(len(module.weight), -1)
                # Queries, keys and values are three matrices.
                for part in weight.chunk(3) if len(weight) == 3 * weight.shape[1] else [weight]:
                    nn.init.xavier_uniform_(part)

    def forward_features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The class token after the last norm, [B, C]."""
        if x_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"ViT built for images of {self.image_size} pixels got {list(x_BCHW.shape[-2:])}; "
                "its positions are fixed: use one DATA.SIZE"
            )
        patches_BNC = self.patch_embed(x_BCHW).flatten(2).transpose(1, 2)
        tokens_BNC = torch.cat([self.cls_token.expand(len(x_BCHW), -1, -1), patches_BNC], dim=1)
        return self.norm(self.blocks(tokens_BNC + self.pos_embed))[:, 0]

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.fc(self.forward_features(x_BCHW))


def position_codes(side: int, dim: int) -> torch.Tensor:
    """Sine-cosine codes of side x side patches in row order, [1, 1 + side^2, C].

    A quarter of the channels each: sin and cos of the column, sin and cos of the row, at
    wavelengths 2 pi 10000^(i / (C / 4)). The class token, first, has none.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, C / 2] of one coordinate
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, dim=0)
    codes = F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0))
    return codes[None].float()


def build_vit(
    arch: str,
    *,
    num_classes: int,
    image_size: int,
    width: float = 1.0,
    stem: str = "imagenet",
    bn_splits: int = 1,
    norm: str = "BN",
    freeze_patches: bool = True,
    channels: int = 3,
) -> ViT:
    """A ViT with patches of 16 pixels (stem "imagenet") or 4 ("cifar").

    Args:
        width: factor on the network's channels. norm: for heads alone, a ViT has no batch norm.
        channels: of the images.
    Raises: ConfigError for sizes that do not fit, or groups of a batch norm.
    """
    full_dim, heads, blocks = ARCHITECTURES[arch]
    dim, patch = round(full_dim * width), _PATCH[stem]
    if dim != full_dim * width or dim % heads or dim % 4 or dim <= 0:
        raise ConfigError(
            f"MODEL.WIDTH {width} gives {arch} {full_dim * width:g} channels; allowed: multiples "
            f"of {heads} above 0"
        )
    if image_size % patch:
        raise ConfigError(
            f"DATA.SIZE {image_size} is no multiple of {arch}'s patches of {patch} pixels "
            f"(MODEL.STEM {stem})"
        )
    if bn_splits > 1:
        raise ConfigError(f"MODEL.BN_SPLITS {bn_splits}: {arch} has no batch norm; set it to 1")
    return ViT(
        image_size=image_size,
        patch_size=patch,
        dim=dim,
        heads=heads,
        blocks=blocks,
        num_classes=num_classes,
        freeze_patches=freeze_patches,
        channels=channels,
    )
