"""Frozen backbones with timm's parameter names.

Each has `embed(images)`, `blocks` (a flat list of `Block`), `enter(i, x)` (what happens to a stream before block i),
`finish(x)` (the final norm) and `pool(x)` (finished tokens to one feature vector).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lavish_fast.config import SwinV2Config, ViTConfig

PLACES = ("p1", "p2")  # beside the attention, beside the MLP


class Block(nn.Module):
    """A frozen block as its two branches, which the model adds to the stream with the adapters beside.

    branch(place, x): the attention's or the MLP's output, before the post-norm. norm(place): the post-norm, or None.
    """

    def __init__(self, drop_path: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)

    def branch(self, place: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def norm(self, place: str) -> nn.LayerNorm | None:
        return None

    def finish(self, place: str, branch: Tensor) -> Tensor:
        """What is added to the stream, but for the adapters."""
        norm = self.norm(place)
        return self.drop_path(branch if norm is None else norm(branch))


class Encoded(NamedTuple):
    """What a backbone with its adapters makes of the streams, audio first.

    stages: by stage, each stream's tokens (n, N, C) at its end; the last stage's after the final norm. The last stage
    alone where the head reads no other. pooled: each stream's feature (n, C).
    """

    stages: list[list[Tensor]]
    pooled: list[Tensor]


class Backbone(nn.Module):
    """What the backbones share: the frozen network by itself, as timm runs it."""

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> features (n, C), without any adapter."""
        return self.pool(self.tokens(images))

    def tokens(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> finished tokens (n, N, C), without any adapter."""
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            x = self.enter(i, x)
            for place in PLACES:
                x = x + block.finish(place, block.branch(place, x))
        return self.finish(x)


def build(config: SwinV2Config | ViTConfig) -> Backbone:
    """The backbone of a configuration, randomly initialised and frozen."""
    if config.kind == "vit":
        from lavish_fast.backbones.vit import ViT as backbone
    else:
        from lavish_fast.backbones.swin_v2 import SwinV2 as backbone
    return backbone(config).requires_grad_(False)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The stochastic depth of each block, rising linearly from 0 to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class DropPath(nn.Module):
    """Stochastic depth: in training, each image's branch is dropped with probability `rate`, the others scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)
