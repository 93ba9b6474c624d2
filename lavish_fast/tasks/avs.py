"""AVS, audio-visual segmentation: the head and the loss; the metric is in `avs_metric`, the data set in `avs_data`.

A clip of T frames has a mask a frame: the pixels of what is heard (Zhou et al., Audio-Visual Segmentation, ECCV 2022;
AVSBench, single source, S4). In training only the first frame of a clip has a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import tasks
from lavish_fast.backbones import Encoded
from lavish_fast.config import Config
from lavish_fast.tasks.avs_data import Dataset as Dataset
from lavish_fast.tasks.avs_data import settle as settle
from lavish_fast.tasks.avs_data import verify as verify
from lavish_fast.tasks.avs_decoder import AUDIO_WIDTH, TPAVI, Dilated, Fusion, Output
from lavish_fast.tasks.avs_metric import Metric as Metric
from lavish_fast.tasks.avs_metric import by_clip

WIDTHS = (64, 128, 320, 512)  # of the stages' maps, those of the PVT that AVSBench's decoder was made for
STAGES = range(len(WIDTHS))  # of the released network; a backbone may have fewer

HEAD_NAMES = {
    "audio_linear": "audio",
    "output_conv": "output",
    **{f"x{i + 1}_linear": f"linears.{i}" for i in STAGES},
    **{f"conv{i + 1}.conv2d_list": f"dilated.{i}" for i in STAGES},
    **{
        f"tpavi_b{i + 1}.{theirs}": f"tpavi.{i}.{ours}"
        for i in STAGES
        for theirs, ours in {
            "align_channel": "align",
            "theta": "theta",
            "phi": "phi",
            "g": "g",
            "W_z.0": "out",
            "W_z.1": "bn",
            "norm_layer": "norm",
        }.items()
    },
    **{f"path{i + 1}.resConfUnit1": f"fusion.{i}.skip" for i in STAGES},
    **{f"path{i + 1}.resConfUnit2": f"fusion.{i}.refine" for i in STAGES},
    "path4.resConfUnit1": None,  # there is no coarser stage to join
}


class Head(nn.Module):
    """AVSBench's decoder on the video's tokens, a level for each of the backbone's stages, with the sound by TPAVI.

    With the video alone there is no sound to meet. With the sound alone the maps are the spectrogram's own tokens:
    where in the spectrogram, not where in the picture. Both are our reading of the paper's Table 1.

    Raises: ValueError for a size of frames that the stages do not halve, or channels that do not divide.
    """

    reads_stages = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, size, stages = config.head.channels, config.head.size, len(config.backbone.stages)
        coarsest = 4 * 2 ** (stages - 1)  # pixels to a token of the last stage
        if size < coarsest or size % coarsest:
            raise ValueError(f"head.size: expected a multiple of {coarsest} pixels, got {size}")
        if channels % 2:
            raise ValueError(f"head.channels: expected an even number, got {channels}")
        if config.head.hidden < 4 or config.head.hidden % 4:
            raise ValueError(f"head.hidden: expected a multiple of 4, got {config.head.hidden}")
        self.size, self.frames, self.streams = size, config.frames, config.streams
        both = len(config.streams) == 2
        self.linears = nn.ModuleList(nn.Linear(width, ours) for (_, width), ours in zip(config.backbone.stages, WIDTHS))
        self.dilated = nn.ModuleList(Dilated(width, channels) for width in WIDTHS[:stages])
        self.audio = nn.Linear(config.width, AUDIO_WIDTH) if both else None
        self.tpavi = nn.ModuleDict({str(i): TPAVI(channels) for i in config.head.tpavi_stages if both})
        self.fusion = nn.ModuleList(Fusion(channels, skip=i < stages - 1) for i in range(stages))
        self.output = Output(channels, config.head.hidden)

    def forward(self, encoded: Encoded) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Logits (B * T, 1, size, size), and of each stage its map and its sound, as the released network returns them.

        A stage's map is (B * T, channels, s, s), s = size / 4, / 8 ..., without negative values; its sound
        (B, T, channels), or None without TPAVI.
        """
        stream = self.streams.index("video") if "video" in self.streams else 0
        if self.tpavi:
            pooled = encoded.pooled[self.streams.index("audio")]
            audio = self.audio(pooled).unflatten(0, (len(pooled) // self.frames, self.frames))
        maps, sounds = [], []
        for i, tokens in enumerate(encoded.stages):
            x, sound = self._map(i, tokens[stream]), None
            if str(i) in self.tpavi:
                x, sound = self.tpavi[str(i)](x, audio)
            # The fusion's first ReLU, in place in the released code: the maps that are returned are changed by it.
            maps.append(F.relu(x))
            sounds.append(sound)
        x = None
        for fusion, own in zip(reversed(self.fusion), reversed(maps)):
            x = fusion(own, x)
        return self.output(x), maps, sounds

    def _map(self, stage: int, tokens: Tensor) -> Tensor:
        """Tokens (n, N, C) of a square map -> (n, channels, s, s)."""
        side = math.isqrt(tokens.shape[1])
        x = self.linears[stage](tokens).mT.unflatten(2, (side, side))
        x = F.interpolate(x, [self.size // 4 // 2**stage] * 2, mode="bicubic", align_corners=False)
        return self.dilated[stage](x)


def inputs(config: Config, video: Tensor | None = None, audio: Any = None) -> dict[str, Tensor]:
    """What the backbone sees of each stream that runs, by name, audio first: (B * T, 3, H, W).

    Args:
        video: frames (B, T, 3, size, size), ImageNet-normalised, size = `config.head.size`; None if unused. They are
            resized to the backbone's size, bicubically and without antialiasing as in the released network.
        audio: spectrograms (B, T, frames, mel bins), or a list whose first entry is that; None if unused.

    Raises: ValueError naming the input, what was expected and what came.
    """
    given = {name: x for name, x in (("audio", audio), ("video", video)) if name in config.streams}
    found = {}
    if "audio" in given:
        found["audio"] = tasks.spectrograms(config, "audio", audio)
    if "video" in given:
        found["video"] = tasks.frames(config, "video", video, config.head.size)
    tasks.check_clips(**given)
    for name, x in given.items():
        frames = (x[0] if isinstance(x, (list, tuple)) else x).shape[1]
        if frames != config.frames:
            raise ValueError(f"{name}: expected {config.frames} frames a clip, got {frames}")
    if "video" in found:
        size = [config.backbone.img_size] * 2
        found["video"] = F.interpolate(found["video"], size, mode="bicubic", align_corners=False)
    return found


def loss(outputs: Tensor | Sequence[Any], labels: Tensor) -> Tensor:
    """Binary cross-entropy of the first frame of each clip, mean over its pixels and over the clips.

    That is the released code's loss, whose matching term is off. In float32 or wider.

    Args:
        outputs: logits (B*T, 1, H, W), or what begins with them.
        labels: masks (B, M, H, W) of 0 and 1, of which the first is read.
    """
    logits, labels = by_clip(outputs, labels)
    logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, labels[:, 0].to(logits.dtype))


def kept(outputs: Tensor | Sequence[Any], clips: int) -> Tensor:
    """What evaluation keeps of each clip: its masks (clips, T, H, W), bool, where the probability is above 0.5."""
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return (logits.float().sigmoid() > 0.5).view(clips, -1, *logits.shape[2:])


def fitted(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """The configuration with the decoder's channels and the stages with TPAVI that the tensors are of."""
    names = {"channels": "head.dilated.0.0.bias", "hidden": "head.output.0.bias"}
    sizes = {field: len(tensors[name]) for field, name in names.items() if name in tensors}
    stages = tuple(i for i in STAGES if f"head.tpavi.{i}.theta.bias" in tensors)
    return replace(config, head=replace(config.head, **sizes, tpavi_stages=stages))
