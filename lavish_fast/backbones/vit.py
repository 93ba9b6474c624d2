"""ViT with a cls token, frozen, with timm's parameter names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops
from lavish_fast.backbones import Backbone, drop_path_rates
from lavish_fast.backbones import Block as FrozenBlock
from lavish_fast.backbones.swin_v2 import Mlp
from lavish_fast.config import ViTConfig


class Attention(nn.Module):
    path = "auto"  # "reference", or else PyTorch's kernel

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        path = "reference" if self.path == "reference" else "auto"
        out = ops.attention(q, k, v, q.shape[-1] ** -0.5, path=path)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(FrozenBlock):
    """A pre-norm block."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__(drop_path)
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def branch(self, place: str, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x)) if place == "p1" else self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class ViT(Backbone):
    """The frozen ViT: (n, 3, H, W) images of any size to features (n, C), those of the cls token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        tokens = (config.img_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, config.embed_dim))
        rates = drop_path_rates(config.drop_path_rate, config.depth)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.apply(_init)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, N + 1, C), the cls token first."""
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        position = self.pos_embed
        if position.shape[1] != x.shape[1]:
            # As the released code: linear along the flat token axis, cls token included.
            position = F.interpolate(position.mT, x.shape[1], mode="linear").mT
        return x + position

    def enter(self, i: int, x: Tensor) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        """(n, N + 1, C) -> the same, normalised."""
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """(n, N + 1, C) -> (n, C): the cls token."""
        return x[:, 0]


def own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's ViT, without the classifier."""
    return {name: value for name, value in state_dict.items() if not name.startswith(("head.", "fc_norm."))}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
