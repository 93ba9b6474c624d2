"""CMBS, the throughput baseline of the paper's Table 4: frozen Swin-V2 maps and VGGish features, then a temporal head.

The head is Xia and Zhao's (Cross-modal Background Suppression for Audio-Visual Event Localization, CVPR 2022), with
the released names. Like the released code it has no scale in the spatial self-attention and no position encoding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import backbones
from lavish_fast.backbones import PLACES
from lavish_fast.config import Config, SwinV2Config
from lavish_fast.vggish import VGGish

# What the released head creates and never uses.
_DEAD = re.compile(
    r"(audio|video)_(norm|encoder\.encoder_layer|decoder\.decoder_layer|decoder\.decoder\.layers\.0\.self_attn)\."
    r"|spatial_channel_att\.ave_bottleneck\."
)
_AUDIO, _VIDEO = 128, 512  # features of a second of sound, of a place in a frame
_HEADS, _HIDDEN = 4, 1024  # of every transformer layer
_TOP_SECONDS = 4


class Scores(NamedTuple):
    """What the head gives: logits, but for the gate.

    is_event: (T, B, 1), whether a second is an event. event: (B, K), the clip's class. gate: (T, B, 1) in [0, 1],
    how far sound and frames both see an event. av_score: (B, K), the clip's class by each stream alone, averaged.
    """

    is_event: Tensor
    event: Tensor
    gate: Tensor
    av_score: Tensor


def head_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released head's state dict without the parameters that it never uses: loads strictly into `CMBSHead`."""
    return {name: tensor for name, tensor in state_dict.items() if not _DEAD.match(name)}


def loss(scores: Scores, labels: Tensor) -> Tensor:
    """Binary cross-entropy of `is_event` plus cross-entropy of `event`: for timing a step, not the released recipe.

    labels: (B, T) class indices, K for background. A clip's class is its first event's, 0 where it has none.
    """
    is_event = labels != scores.event.shape[-1]
    first = labels.gather(1, is_event.int().argmax(1, keepdim=True)).squeeze(1)
    target = torch.where(is_event.any(1), first, 0)
    found = F.binary_cross_entropy_with_logits(scores.is_event, is_event.T[..., None].to(scores.is_event.dtype))
    return found + F.cross_entropy(scores.event, target)


class SpatialChannelAttention(nn.Module):
    """A frame's map to one vector, its channels and places weighted by the sound: (n, P, 512), (n, 128) -> (n, 512)."""

    def __init__(self, beta: float, dropout: float, hidden: int = 256, key: int = 128) -> None:
        super().__init__()
        self.beta = beta
        self.dropout = nn.Dropout(dropout)
        self.video_query = nn.Linear(_VIDEO, key)
        self.video_key = nn.Linear(_VIDEO, key)
        self.video_value = nn.Linear(_VIDEO, _VIDEO)
        self.norm = nn.LayerNorm(_VIDEO)
        self.affine_video_ave = nn.Linear(_VIDEO, hidden)
        self.affine_video_3 = nn.Linear(_VIDEO, hidden)
        self.ave_v_att = nn.Linear(hidden, 1)
        self.affine_audio_1 = nn.Linear(_AUDIO, _VIDEO)
        self.affine_video_1 = nn.Linear(_VIDEO, _VIDEO)
        self.affine_bottleneck = nn.Linear(_VIDEO, hidden)
        self.affine_v_c_att = nn.Linear(hidden, _VIDEO)
        self.affine_audio_2 = nn.Linear(_AUDIO, hidden)
        self.affine_video_2 = nn.Linear(_VIDEO, hidden)
        self.affine_v_s_att = nn.Linear(hidden, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        audio = audio[:, None]  # (n, 1, 128)
        attention = (self.video_query(video) @ self.video_key(video).mT).softmax(-1)  # (n, P, P)
        attended = self.norm(video + self.dropout(attention @ self.video_value(video)))
        # by the frame itself
        mean = self.affine_video_ave(attended.mean(1, keepdim=True)).relu()
        by_itself = _pool(attended, self.ave_v_att(self.affine_video_3(attended).relu() * mean))
        # by the sound, channels first, then places
        common = (self.affine_audio_1(audio).relu() * self.affine_video_1(attended).relu()).mean(1, keepdim=True)
        channels = self.affine_v_c_att(self.affine_bottleneck(common).relu()).sigmoid()  # (n, 1, 512)
        weighted = video * (1 + channels)
        places = self.affine_v_s_att(self.affine_video_2(weighted).relu() * self.affine_audio_2(audio).relu())
        return _pool(weighted, places) * (1 + self.beta * by_itself.sigmoid())


def _pool(x: Tensor, scores: Tensor) -> Tensor:
    """x (n, P, C) averaged with the weights softmax(tanh(scores)) over places, scores (n, P, 1) -> (n, C)."""
    return (x * scores.tanh().softmax(1)).sum(1)


class RecurrentLayer(nn.Module):
    """A bidirectional LSTM for each stream, widths kept: (B, T, 128), (B, T, 512) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_rnn = nn.LSTM(_AUDIO, _AUDIO, batch_first=True, bidirectional=True)
        self.visual_rnn = nn.LSTM(_VIDEO, _VIDEO // 2, batch_first=True, bidirectional=True)

    def forward(self, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio_rnn(audio)[0], self.visual_rnn(video)[0]


class Encoder(nn.Module):
    """A stream by itself: (B, T, in_features) -> (B, T, width)."""

    def __init__(self, in_features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.affine_matrix = nn.Linear(in_features, width)
        layer = nn.TransformerEncoderLayer(width, _HEADS, _HIDDEN, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.affine_matrix(x))


class DecoderLayer(nn.Module):
    """A post-norm layer in which the query reads the memory and itself in one attention."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, _HEADS, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, _HIDDEN)
        self.linear2 = nn.Linear(_HIDDEN, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        both = torch.cat((memory, query), 1)
        x = self.norm1(query + self.dropout(_attend(self.multihead_attn, query, both)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class Decoder(nn.Module):
    """A stream with the other's encoder output as memory: (B, T, in_features), (B, T, width) -> (B, T, width)."""

    def __init__(self, in_features: int, width: int, dropout: float) -> None:
        super().__init__()
        self.affine_matrix = nn.Linear(in_features, width)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([DecoderLayer(width, dropout)])})

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.decoder["layers"][0](self.affine_matrix(query), memory)


class Interaction(nn.Module):
    """What two streams have in common, seen in the light of both: x, y (B, T, width) -> the same."""

    def __init__(self, width: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.video_multihead = nn.MultiheadAttention(width, _HEADS, attention_dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        common = x * y
        return self.norm1(common + self.dropout(_attend(self.video_multihead, common, torch.cat((x, y), 1))))


def _attend(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> Tensor:
    return attention(query, memory, memory, need_weights=False)[0]


class Localize(nn.Module):
    """(B, T, width) -> a logit for each second (B, T, 1), and K for the clip (B, K)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 1)
        self.event_classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier(x), self.event_classifier(x.amax(1))


class CMBSHead(nn.Module):
    """The released `supv_main_model`, for maps of any size.

    Args:
        classes: K, background left out.
        alpha, beta, gamma: weights of the other stream's gate, of the frame's own attention and of av_score.
        dropout: of the transformer layers and of the interactions' residuals. visual_dropout: of the maps and of
            their self-attention. inter_dropout: of the interactions' attention weights. In training only.
    """

    def __init__(
        self,
        classes: int = 28,
        width: int = 256,
        alpha: float = 0.1,
        beta: float = 0.4,
        gamma: float = 0.3,
        dropout: float = 0.1,
        visual_dropout: float = 0.2,
        inter_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma
        self.v_fc = nn.Linear(_VIDEO, _VIDEO)
        self.dropout = nn.Dropout(visual_dropout)
        self.spatial_channel_att = SpatialChannelAttention(beta, visual_dropout)
        self.audio_visual_rnn_layer = RecurrentLayer()
        self.video_encoder = Encoder(_VIDEO, width, dropout)
        self.audio_encoder = Encoder(2 * _AUDIO, width, dropout)
        self.video_decoder = Decoder(_VIDEO, width, dropout)
        self.audio_decoder = Decoder(2 * _AUDIO, width, dropout)
        self.video_gated = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())
        self.audio_gated = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())
        self.video_cas = nn.Linear(width, classes)
        self.audio_cas = nn.Linear(width, classes)
        self.AVInter = Interaction(width, dropout, inter_dropout)
        self.VAInter = Interaction(width, dropout, inter_dropout)
        self.localize_module = Localize(width, classes)

    def forward(self, video: Tensor, audio: Tensor) -> Scores:
        """video (B, T, H, W, 512), audio (B, T, 128) -> Scores."""
        video = self.dropout(self.v_fc(video).relu())
        pooled = self.spatial_channel_att(video.flatten(2, 3).flatten(0, 1), audio.flatten(0, 1))
        audio, video = self.audio_visual_rnn_layer(audio, pooled.unflatten(0, audio.shape[:2]))

        video_memory, audio_memory = self.video_encoder(video), self.audio_encoder(audio)
        video, audio = self.video_decoder(video, audio_memory), self.audio_decoder(audio, video_memory)
        video_gate, audio_gate = self.video_gated(video_memory), self.audio_gated(audio_memory)  # (B, T, 1)
        video = video * (1 + self.alpha * audio_gate)
        audio = audio * (1 + self.alpha * video_gate)
        av_score = (_clip_scores(self.video_cas(video)) + _clip_scores(self.audio_cas(audio))) / 2

        video = self.AVInter(video, audio)
        audio = self.VAInter(audio, video)
        is_event, event = self.localize_module((video + audio) / 2)
        gate = video_gate * audio_gate
        return Scores(is_event.transpose(0, 1), event + self.gamma * av_score, gate.transpose(0, 1), av_score)


def _clip_scores(scores: Tensor) -> Tensor:
    """(B, T, K) -> (B, K): the mean of each class's highest seconds."""
    return scores.topk(min(_TOP_SECONDS, scores.shape[1]), 1).values.mean(1)


class CMBS(nn.Module):
    """Frozen Swin-V2 and frozen VGGish, then a trainable projection of the maps and the head.

    Args:
        backbone: Swin-V2 by its configuration; None for the paper's large one. Weights are random until loaded.
        classes: K, background left out.
    """

    def __init__(self, backbone: SwinV2Config | None = None, classes: int = 28) -> None:
        super().__init__()
        backbone = backbone or Config.from_preset("ave-swinv2-large").backbone
        self.backbone = backbones.build(backbone)
        self.vggish = VGGish().requires_grad_(False)
        self.projection = nn.Linear(backbone.block_widths[-1], _VIDEO)
        self.head = CMBSHead(classes)

    def forward(self, patches: Tensor, video: Tensor) -> Scores:
        """patches (B, T, 1, 96, 64) log-mel, video (B, T, 3, S, S), S the backbone's image side -> Scores."""
        batch = patches.shape[:2]
        maps, audio = self.encode(patches.flatten(0, 1), video.flatten(0, 1))
        return self.head(self.projection(maps).unflatten(0, batch), audio.unflatten(0, batch))

    @torch.no_grad()
    def encode(self, patches: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is frozen: patches (n, 1, 96, 64), images (n, 3, S, S) -> maps (n, side, side, C), audio (n, 128)."""
        x = self.backbone.embed(images)
        for i, block in enumerate(self.backbone.blocks):
            x = self.backbone.enter(i, x)
            for place in PLACES:
                x = x + block.finish(place, block.branch(place, x))
        side = math.isqrt(x.shape[1])
        return self.backbone.norm(x).unflatten(1, (side, side)), self.vggish(patches)
