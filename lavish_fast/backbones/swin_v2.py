"""Swin-V2, frozen, with timm's parameter names (Swin Transformer V2, arXiv 2111.09883).

What depends on frozen weights and shapes alone is made once: the position bias, the logit scale, the shift masks.
It is made anew when weights are loaded or the module moves to another device or dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops
from lavish_fast.backbones import Backbone, drop_path_rates
from lavish_fast.backbones import Block as FrozenBlock
from lavish_fast.config import SwinV2Config

CONSTANTS = ("scale", "table", "bias", "mask", "order")  # of the op, made once


class WindowAttention(nn.Module):
    """Cosine attention inside (shifted) windows of a square map of `size` x `size` tokens."""

    path = "auto"  # of the op

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int, pretrained_window: int) -> None:
        super().__init__()
        self.heads, self.size, self.window, self.shift = heads, size, window, shift
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        for name in ("qkv_bias", *CONSTANTS):
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.make_constants())
        self.make_constants()

    def derived(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What follows from the weights, with their gradients where they are wanted.

        The bias of q, k and v (3C), the logit scale (heads, 1, 1), the position bias by offset (heads, (2 window - 1)²)
        and by pair of tokens (heads, N, N); all but the first in at least float32.
        """
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        device, window = self.logit_scale.device, self.window
        scale = self.logit_scale.to(dtype).clamp(max=math.log(100)).exp()
        offsets = torch.arange(1 - window, window, device=device, dtype=torch.float32)
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)
        # Log-spaced, in float32 and in timm's order of operations: the weights were trained on these very numbers.
        table = table / max((self.pretrained_window or window) - 1, 1) * 8
        table = table.sign() * (table.abs() + 1).log2() / math.log2(8)
        hidden = F.relu(F.linear(table.to(dtype), self.cpb_mlp[0].weight.to(dtype), self.cpb_mlp[0].bias.to(dtype)))
        table = 16 * F.linear(hidden, self.cpb_mlp[2].weight.to(dtype)).sigmoid()  # (2w - 1, 2w - 1, heads)
        table = table.flatten(0, 1).T.contiguous()
        row = torch.arange(window * window, device=device) // window
        column = torch.arange(window * window, device=device) % window
        offset = (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return qkv_bias, scale, table, table[:, offset]

    @torch.no_grad()
    def make_constants(self) -> None:
        """Makes anew what is derived, the shift's mask (windows, N, N) and the order of the tokens (T,)."""
        self.qkv_bias, self.scale, self.table, self.bias = self.derived()
        device, window = self.table.device, self.window
        self.mask = self.order = None
        if window < self.size:
            tokens = torch.arange(self.size**2, device=device).view(self.size, self.size)
            self.order = self._windows(tokens.roll((-self.shift, -self.shift), (0, 1))).flatten()
        if self.shift:
            edges = torch.arange(self.size, device=device)
            region = (edges >= self.size - window).long() + (edges >= self.size - self.shift).long()
            region = self._windows(3 * region[:, None] + region)
            self.mask = torch.where(region[:, :, None] == region[:, None], 0.0, -100.0).to(self.bias.dtype)

    def _windows(self, map_: Tensor) -> Tensor:
        """(size, size) -> (windows, window * window)."""
        side = self.size // self.window
        return map_.view(side, self.window, side, self.window).transpose(1, 2).reshape(side * side, -1)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.make_constants()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (n, size * size, C) -> the same."""
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias)
        constants = (getattr(self, name) for name in CONSTANTS)
        out = ops.window_attention(qkv, *constants, window=self.window, shift=self.shift, path=self.path)
        return self.proj(out)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(FrozenBlock):
    """A residual-post-norm block."""

    def __init__(self, width: int, attn: WindowAttention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(drop_path)
        self.attn = attn
        self.norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width)

    def branch(self, place: str, x: Tensor) -> Tensor:
        return self.attn(x) if place == "p1" else self.mlp(x)

    def norm(self, place: str) -> nn.LayerNorm:
        return self.norm1 if place == "p1" else self.norm2


class PatchMerging(nn.Module):
    """Four neighbouring tokens into one of twice the width: (n, N, C) -> (n, N / 4, 2C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        half = math.isqrt(tokens) // 2
        x = x.view(n, half, 2, half, 2, width).permute(0, 1, 3, 4, 2, 5)
        return self.norm(self.reduction(x.reshape(n, half * half, 4 * width)))


class PatchEmbed(nn.Module):
    def __init__(self, config: SwinV2Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).mT)


class Stage(nn.Module):
    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class SwinV2(Backbone):
    """The frozen Swin-V2: (n, 3, S, S) images, S = `config.img_size`, to features (n, C)."""

    def __init__(self, config: SwinV2Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        stages = []
        for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            width = config.embed_dim * 2**i
            size = config.img_size // config.patch_size // 2**i
            window = min(config.window_size, size)
            if size < 1 or size % window or size * config.patch_size * 2**i != config.img_size:
                raise ValueError(
                    f"backbone: expected an image side that patches, stages and windows divide, got img_size "
                    f"{config.img_size}, patch_size {config.patch_size}, window_size {config.window_size}, stage {i}"
                )
            blocks = []
            for j in range(depth):
                shift = window // 2 if j % 2 and size > window else 0
                attn = WindowAttention(width, heads, size, window, shift, config.pretrained_window_sizes[i])
                blocks.append(Block(width, attn, config.mlp_ratio, next(rates)))
            stages.append(Stage(PatchMerging(width // 2) if i else nn.Identity(), blocks))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(config.embed_dim * 2 ** (len(config.depths) - 1))
        self.apply(_init)

    @property
    def blocks(self) -> list[Block]:
        return [block for stage in self.layers for block in stage.blocks]

    def embed(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, N, C) tokens of the first stage."""
        return self.patch_embed(images)

    def entrance(self, i: int) -> PatchMerging | None:
        """The patch merging before block i, where a stage begins."""
        starts = {sum(self.config.depths[:s]): s for s in range(1, len(self.config.depths))}
        return self.layers[starts[i]].downsample if i in starts else None

    def enter(self, i: int, x: Tensor) -> Tensor:
        """A stream on its way into block i."""
        merging = self.entrance(i)
        return x if merging is None else merging(x)

    def finish(self, x: Tensor) -> Tensor:
        """(n, N, C) -> the same, normalised."""
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """(n, N, C) -> (n, C): the mean over tokens."""
        return x.mean(1)


def _init(module: nn.Module) -> None:
    # timm starts a block's norms at zero, which makes every block the identity: useless for a frozen backbone.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, WindowAttention):
        module.make_constants()
