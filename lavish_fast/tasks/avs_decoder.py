"""The decoder of the segmentation network: dilated convolutions, sound meeting picture (TPAVI), and fusion by stages.

From AVSBench (Zhou et al., Audio-Visual Segmentation, ECCV 2022), as the released LAVISH code has it. Maps are
(n, C, H, W), n = B * T frames, clip by clip.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = (3, 6, 12, 18)
AUDIO_WIDTH = 128  # of the sound's feature, VGGish's in AVSBench


class Dilated(nn.ModuleList):
    """The sum of four 3x3 convolutions of growing dilation, which keep the map's size."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 3, padding=d, dilation=d) for d in DILATIONS)
        for conv in self:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution with its released weight's shape, over tokens: (..., C) -> (..., D)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TPAVI(nn.Module):
    """Temporal pixel-wise audio-visual interaction (AVSBench, section 4.2, "dot" mode): a map reads the clip's sound.

        z = LN(BN(W y) + x),   y = theta(x) phi(a)^T g(x) / THW

    over the clip's THW pixels, a the sound of each pixel's frame. There is no softmax, so the product is taken from the
    right, and as a is the same all over a frame, phi(a)^T g(x) / HW needs no more of g(x) than its mean over the frame,
    which is g of the mean of x: memory is linear in THW.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.align = nn.Linear(AUDIO_WIDTH, channels)
        self.theta = Pointwise(channels, channels // 2)
        self.phi = Pointwise(channels, channels // 2)
        self.g = Pointwise(channels, channels // 2)
        self.out = Pointwise(channels // 2, channels)
        self.bn = nn.BatchNorm1d(channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.bn.weight)  # at first only the norm acts

    def forward(self, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """x (B * T, C, H, W), audio (B, T, 128) -> the new map, and the sound's feature of C channels (B, T, C)."""
        clips, frames = audio.shape[:2]
        tokens = x.flatten(2).mT  # (B T, HW, C)
        a = self.align(audio)
        phi = self.phi(a)  # (B, T, C / 2)
        g = self.g(tokens.mean(1)).unflatten(0, (clips, frames))
        summary = phi.mT @ g / frames  # (B, C / 2, C / 2)
        theta = self.theta(tokens).unflatten(0, (clips, frames))  # (B, T, HW, C / 2)
        y = self.out(theta @ summary.unsqueeze(1)).flatten(0, 1)
        y = self.bn(y.flatten(0, 1)).view_as(y)
        z = self.norm(y + tokens)
        return z.mT.unflatten(2, x.shape[2:]), a


class ResidualUnit(nn.Module):
    """x + conv2(relu(conv1(x))) of a map without negative values.

    The released unit begins with a ReLU in place, so that its skip carries relu(x): its callers have taken it already.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Fusion(nn.Module):
    """The coarser stages' map joined by this stage's, refined, and twice as large.

    skip: whether there are coarser stages. The released code has the unit without them too, and never reads it.
    """

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.skip = ResidualUnit(channels) if skip else None
        self.refine = ResidualUnit(channels)

    def forward(self, own: Tensor, coarser: Tensor | None = None) -> Tensor:
        """own, coarser (n, C, H, W), own without negative values -> (n, C, 2H, 2W)."""
        x = own if coarser is None else F.relu(coarser + self.skip(own))
        return F.interpolate(self.refine(x), scale_factor=2, mode="bilinear", align_corners=True)


class Output(nn.Sequential):
    """The finest map to logits, at twice its size: (n, C, H, W) -> (n, 1, 2H, 2W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(hidden, hidden // 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden // 4, 1, 1),
        )
