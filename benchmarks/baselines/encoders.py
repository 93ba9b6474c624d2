"""XDC, AVTS and GDT: the encoders of Table 2 whose throughput the paper left blank.

XDC (Alwassel et al., NeurIPS 2020, arXiv 1911.12667) and AVTS (Korbar et al., NeurIPS 2018, arXiv 1807.00230) are here
an R(2+1)D-18 on the frames beside a ResNet-18 on the spectrogram, and differ in their inputs; GDT (Patrick et al.,
arXiv 2003.04298) has a ResNet-9 and an MLP per modality, without its dropout. One linear classifier over both
modalities is what Table 2's counts (45, 45 and 39.2 M) ask for; GDT's own code fine-tunes on UCF101 without audio.
Weights are random: this is for timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as BasicBlock2d
from torchvision.models.resnet import ResNet
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

_FRAMES = "Huo et al., Compressed Video Contrastive Learning, NeurIPS 2021, Table 4 (the same UCF101 accuracy)"

INPUTS = {
    "xdc": (
        (3, 32, 224, 224),
        (40, 100),
        f"video: {_FRAMES}; audio: the default of VMZ, which XDC's code refers to; neither verified in the paper",
    ),
    "avts": (
        (3, 25, 224, 224),
        (40, 100),
        f"video: {_FRAMES}, not verified in the paper; audio: not verified, taken as XDC's",
    ),
    "gdt": (
        (3, 32, 128, 128),
        (40, 99),
        "the released code: video of fine-tuning, 32 frames in crops of 128 (pretraining has 30 of 112, Table 4 of Huo "
        "et al. says 32 of 224); audio of pretraining on Kinetics-400, 40 filters, 1 s in 10 ms steps; not verified "
        "in the paper",
    ),
}
"""Per method one clip's video (channels, frames, height, width), its spectrogram (bins, frames), and the source."""


@dataclass(frozen=True)
class EncodersConfig:
    """ResNet blocks per stage of the audio encoder, and the widths of the MLP per modality: (hidden, out) or none."""

    audio_blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    mlp: tuple[int, int] | None = None
    classes: int = 101


CONFIGS = {
    "xdc": EncodersConfig(),
    "avts": EncodersConfig(),
    "gdt": EncodersConfig((1, 1, 1, 1), (512, 256)),
}


class FactoredConv(Conv2Plus1D):
    """R(2+1)D's convolution: 1x3x3 to M channels, BatchNorm, ReLU, 3x1x1.

    M gives it the parameters of the 3x3x3 convolution that it stands for (Tran et al., CVPR 2018).
    """

    def __init__(self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1) -> None:
        # What torchvision passes as midplanes is the block's first convolution's, for its second one too.
        midplanes = 27 * in_planes * out_planes // (9 * in_planes + 3 * out_planes)
        super().__init__(in_planes, out_planes, midplanes, stride, padding)


def video_encoder() -> VideoResNet:
    """R(2+1)D-18 without its classifier: (B, 3, T, H, W) -> (B, 512).

    Each convolution has its own intermediate width, as in Tran et al. (CVPR 2018): with a 400-class layer 33,370,839
    parameters, 33.3 M in their Table 2. torchvision (and GDT's code) gives both convolutions of a block the width of
    the first: 31.5 M, from which the counts of XDC, AVTS and GDT do not follow.
    """
    model = VideoResNet(BasicBlock, [FactoredConv] * 4, [2, 2, 2, 2], R2Plus1dStem)
    model.fc = nn.Identity()
    return model


def audio_encoder(blocks: tuple[int, int, int, int]) -> ResNet:
    """ResNet-18 or ResNet-9 without its classifier, on one channel: (B, 1, bins, frames) -> (B, 512)."""
    model = ResNet(BasicBlock2d, list(blocks))
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    model.fc = nn.Identity()
    return model


class AudioVisualEncoders(nn.Module):
    """Video (B, 3, T, H, W) and spectrogram (B, bins, frames) of any size to logits (B, classes)."""

    def __init__(self, config: EncodersConfig) -> None:
        super().__init__()
        self.video = video_encoder()
        self.audio = audio_encoder(config.audio_blocks)
        width = 512
        self.video_mlp = self.audio_mlp = nn.Identity()
        if config.mlp:
            self.video_mlp, self.audio_mlp = _mlp(width, *config.mlp), _mlp(width, *config.mlp)
            width = config.mlp[-1]
        self.classifier = nn.Linear(2 * width, config.classes)

    def forward(self, video: Tensor, spectrogram: Tensor) -> Tensor:
        video, audio = self.video(video), self.audio(spectrogram.unsqueeze(1))
        return self.classifier(torch.cat((self.video_mlp(video), self.audio_mlp(audio)), 1))


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )
