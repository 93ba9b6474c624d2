"""MBT, the multimodal bottleneck transformer, as a throughput baseline.

Nagrani et al., "Attention Bottlenecks for Multimodal Fusion", NeurIPS 2021: two ViTs that see each other through a few
bottleneck tokens alone. Weights are random, and there is neither dropout nor stochastic depth: this is for timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MBTConfig:
    """The sizes of MBT-B/16x2 on AudioSet; each of video and spectrogram is a multiple of its patch."""

    video: tuple[int, int, int] = (32, 224, 224)
    tubelet: tuple[int, int, int] = (2, 16, 16)
    spectrogram: tuple[int, int] = (800, 128)
    patch: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    fusion_layer: int = 8
    # The paper's four, and the one that the released code adds for the token classifier.
    bottlenecks: int = 5
    classes: int = 527


class Block(nn.Module):
    """A pre-norm block, (B, N, C) -> (B, N, C)."""

    def __init__(self, config: MBTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, config.mlp), nn.GELU(), nn.Linear(config.mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """One modality: its patches, class token, position embedding and blocks."""

    def __init__(self, config: MBTConfig, patches: nn.Conv2d | nn.Conv3d, size: tuple[int, ...]) -> None:
        super().__init__()
        tokens = 1
        for side, step in zip(size, patches.stride, strict=True):
            tokens *= side // step
        self.patches = patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.randn(1, tokens + 1, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def embed(self, x: Tensor) -> Tensor:
        """(B, channels, *size) -> (B, N + 1, C), the class token first."""
        x = self.patches(x).flatten(2).mT
        return torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed


class MBT(nn.Module):
    """Video (B, 3, T, H, W) and spectrogram (B, frames, bins) to logits (B, classes)."""

    def __init__(self, config: MBTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MBTConfig()
        width = config.width
        self.video = Encoder(config, nn.Conv3d(3, width, config.tubelet, config.tubelet), config.video)
        self.audio = Encoder(config, nn.Conv2d(1, width, config.patch, config.patch), config.spectrogram)
        self.bottleneck = nn.Parameter(torch.randn(1, config.bottlenecks, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, config.classes)

    def logits(self, video: Tensor, spectrogram: Tensor) -> Tensor:
        """Each modality's own logits, (B, 2, classes): video, then audio."""
        tokens = [self.video.embed(video), self.audio.embed(spectrogram.unsqueeze(1))]
        bottleneck = self.bottleneck.expand(len(video), -1, -1)
        for layer, blocks in enumerate(zip(self.video.blocks, self.audio.blocks)):
            if layer < self.config.fusion_layer:
                tokens = [block(x) for block, x in zip(blocks, tokens)]
                continue
            both = [block(torch.cat((x, bottleneck), 1)) for block, x in zip(blocks, tokens)]
            tokens = [x[:, : -self.config.bottlenecks] for x in both]
            bottleneck = torch.stack([x[:, -self.config.bottlenecks :] for x in both]).mean(0)
        # The paper normalises all tokens of both modalities; the classifier reads these two.
        return self.classifier(self.norm(torch.stack([x[:, 0] for x in tokens], 1)))

    def forward(self, video: Tensor, spectrogram: Tensor) -> Tensor:
        return self.logits(video, spectrogram).mean(1)
