"""ResNet, frozen, by timm's own modules and parameter names (He et al., arXiv 1512.03385).

LAVISH compares its ViTs with a ResNet-152 and has no released code for it. Our reading: the adapters stand behind each
stage of bottlenecks, whose map is the stream, one place a stage: X <- stage(X), then X <- X + LAV(X, Y). In terms of
`Block` a stream enters a block through the whole stage, and the block's branches are zero. There is one place, p1:
a configuration with adapters at p2 is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from lavish_fast.backbones import Backbone, Block
from lavish_fast.config import ResNetConfig


class Boundary(Block):
    """What is between two stages: nothing of the frozen network, only a place for adapters."""

    def branch(self, place: str, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[-1]).expand_as(x)


class ResNet(Backbone):
    """The frozen ResNet: (n, 3, S, S) images of any side to features (n, C). Its BatchNorms keep their statistics.

    Streams are tokens (n, H * W, C), the same memory as a channels-last map. They do not carry H and W, so images are
    square.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        if len(config.layers) != len(config.channels):
            raise ValueError(
                f"backbone: expected as many layers as channels, got {config.layers} and {config.channels}"
            )
        # timm starts each bottleneck at the identity: useless for a frozen backbone.
        network = TimmResNet(
            Bottleneck,
            config.layers,
            num_classes=0,
            in_chans=config.in_chans,
            channels=config.channels,
            zero_init_last=False,
        )
        self.stem = ("conv1", "bn1", "act1", "maxpool")
        self.stages = tuple(f"layer{i + 1}" for i in range(len(config.layers)))
        for name in (*self.stem, *self.stages):
            self.add_module(name, getattr(network, name))
        self.blocks = nn.ModuleList(Boundary(0.0) for _ in self.stages)
        self.eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> ResNet:
        """Always in evaluation: BatchNorm on a batch's own statistics is another network."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, N, C), the stem's map. Raises: ValueError for images that are not square."""
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            expected = f"(n, {self.config.in_chans}, S, S)"
            raise ValueError(f"images: expected square ones {expected}, got {tuple(images.shape)}")
        images = images.contiguous(memory_format=torch.channels_last)
        for name in self.stem:
            images = getattr(self, name)(images)
        return _tokens(images)

    def enter(self, i: int, x: Tensor) -> Tensor:
        """A stream through stage i: (n, N, C) -> (n, N', C')."""
        side = math.isqrt(x.shape[1])
        return _tokens(getattr(self, self.stages[i])(x.mT.unflatten(2, (side, side))))

    def finish(self, x: Tensor) -> Tensor:
        """(n, N, C) as it is."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """(n, N, C) -> (n, C): the mean over the map."""
        return x.mean(1)


def own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trained ResNet's weights, of timm or torchvision, without the classifier.

    torchvision's first files have no `num_batches_tracked`, which no frozen network reads: it is 0 for them.
    """
    kept = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
    norms = [name.removesuffix("running_mean") for name in kept if name.endswith(".running_mean")]
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | kept


def _tokens(x: Tensor) -> Tensor:
    """A map (n, C, H, W) as (n, H * W, C)."""
    return x.flatten(2).mT
