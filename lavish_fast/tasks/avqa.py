"""MUSIC-AVQA, questions about what is seen and heard: the head and the loss; the data set and the metric
are in avqa_data.py, the words of questions in avqa_questions.py.

A clip of T frames and as many windows of sound comes with a question, a sequence of words, and has one of a fixed set
of answers (Li et al., Learning to Answer Questions in Dynamic Audio-Visual Scenarios, CVPR 2022). Beside the answer the
network says of every frame whether it goes with the sound; frames of other videos, "negative" ones, teach it that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import tasks
from lavish_fast.backbones import Encoded
from lavish_fast.config import Config
from lavish_fast.tasks.avqa_data import Dataset, Metric, verify
from lavish_fast.tasks.avqa_questions import PAD, encode_question, settle

__all__ = ["HEAD_NAMES", "Dataset", "Head", "Metric"]
__all__ += ["encode_question", "fitted", "inputs", "kept", "loss", "settle", "verify"]

ATTENTION_HEADS = 4
DROPOUT = 0.1  # in training only
MATCH_WEIGHT = 0.5

HEAD_NAMES = {
    "question_encoder.word2vec": "question.words",
    "question_encoder.lstm": "question.lstm",
    "question_encoder.fc": "question.fc",
    "yb_fc_a": "audio_in",
    "fc_a2": "audio_out",
    "yb_fc_v": "video_in",
    "fc_gl": "grounding",
    "fc1": "match.0",
    "fc2": "match.2",
    "fc3": "match.4",
    "fc4": "match.6",
    "attn_a": "read.audio.attention",
    "linear21": "read.audio.fc1",
    "linear22": "read.audio.fc2",
    "norm2": "read.audio.norm",
    "attn_v": "read.video.attention",
    "linear11": "read.video.fc1",
    "linear12": "read.video.fc2",
    "norm1": "read.video.norm",
    "fc_fusion": "fusion",
    "fc_ans": "answer",
    # No forward pass reads these.
    "fc_a1": None,
    "fc_a1_pure": None,
    "fc_a2_pure": None,
    "fc_v": None,
    "fc_st": None,
    "fc": None,
    "fc_aq": None,
    "fc_vq": None,
    "norm3": None,
}


class LSTM(nn.Module):
    """One layer, by its equations, with the names and the initial values of torch's.

    torch.compile takes no nn.LSTM into a graph, and cuDNN's has no gradients in evaluation mode.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * width, width))  # gates i, f, g, o
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * width))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, words, D) -> the last states h and c, (B, D) each."""
        read = F.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)  # (B, words, 4D)
        h = c = x.new_zeros(len(x), x.shape[-1])
        for gates in read.unbind(1):
            i, f, g, o = (gates + F.linear(h, self.weight_hh_l0)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h, c


class QuestionEncoder(nn.Module):
    """A question's words to one vector: embedding, tanh, LSTM, and its last states h and c through tanh and a map."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = LSTM(width)
        self.fc = nn.Linear(2 * width, width)

    def forward(self, question: Tensor) -> Tensor:
        """(B, words) indices -> (B, D). The padding is read like any word."""
        return self.fc(torch.cat(self.lstm(self.words(question).tanh()), -1).tanh())


class Reading(nn.Module):
    """What the question reads off one stream: attention over time, then an MLP and a post-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, ATTENTION_HEADS, dropout=DROPOUT, batch_first=True)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, question: Tensor, stream: Tensor) -> Tensor:
        """question (B, D), stream (B, T, D) -> (B, D)."""
        x = self.attention(question[:, None], stream, stream, need_weights=False)[0][:, 0]
        return self.norm(x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x))))))


class Head(nn.Module):
    """Grounding of the sound in the frames, attention of the question over time, an answer.

    D is `config.head.width`, K the number of answers. One-modality variants, our reading of the paper's Table 1:
    grounding needs both streams, so that without sound the places of a frame are averaged and without frames there is
    no grounding; the question attends to the one stream that there is, `fusion` maps its D channels alone, and no frame
    is judged.
    """

    reads_stages = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.head.width
        self.streams = config.streams
        # A ViT's cls token is no place in the frame. No network was released for ViT; this is our reading.
        self.first_place = int(config.backbone.kind == "vit")
        self.question = QuestionEncoder(len(config.head.words), width)
        if "audio" in self.streams:
            self.audio_in = nn.Linear(config.width, width)
            self.audio_out = nn.Linear(width, width)
        if "video" in self.streams:
            self.video_in = nn.Linear(config.width, width)
            self.grounding = nn.Linear(2 * width, width)
        if len(self.streams) == 2:
            widths = (2 * width, width, width // 2, width // 4)
            layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            self.match = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
        self.read = nn.ModuleDict({stream: Reading(width) for stream in self.streams})
        self.fusion = nn.Linear(len(self.streams) * width, width)
        self.answer = nn.Linear(width, len(config.classes))

    def forward(self, encoded: Encoded, *extras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The answer of each clip, and which frames go with its sound.

        Args:
            encoded: the streams, B*T frames and windows each.
            extras: tokens (B*T, N, C) of the negative frames after the frozen backbone and its final norm, left out in
                evaluation, where no answer depends on them, and in one-modality variants; then the question (B, words),
                indices into the vocabulary.

        Returns: logits of the answers (B, K), and of each positive and of each negative frame going with the sound
        (class 1) or not (class 0), (B*T, 2) each. Those of frames that are not judged have no rows: (0, 2).
        """
        *negative, question = extras
        asked = self.question(question)
        vectors: dict[str, Tensor] = {}
        if "audio" in self.streams:
            # The mean over tokens commutes with the first map.
            vectors["audio"] = audio = self.audio_out(F.relu(self.audio_in(encoded.pooled[0])))
        if "video" in self.streams:
            vectors["video"] = self.ground(encoded.stages[-1][-1], vectors.get("audio"))
        clips, unjudged = len(question), asked.new_empty(0, 2)
        matches = [unjudged, unjudged]
        if len(self.streams) == 2:
            matches[0] = self.match(torch.cat((audio, vectors["video"]), -1))
            if negative:
                matches[1] = self.match(torch.cat((audio, self.ground(negative[0], audio)), -1))
        read = []
        for stream, x in vectors.items():
            x = x.view(clips, len(x) // max(clips, 1), x.shape[-1])  # (B, T, D)
            read.append(self.read[stream](asked, x) + x.mean(1))
        answer = self.answer((self.fusion(torch.cat(read, -1).tanh()) * asked).tanh())
        return answer, *matches

    def ground(self, tokens: Tensor, audio: Tensor | None) -> Tensor:
        """Frames as vectors, by where their sound comes from: tokens (n, N, C), audio (n, D) or None -> (n, D)."""
        places = self.video_in(tokens[:, self.first_place :])
        directions = F.normalize(places, dim=-1)
        if audio is None:
            grounded = directions.mean(1)
        else:
            weights = (directions @ F.normalize(audio, dim=-1)[:, :, None]).softmax(1)  # (n, N, 1)
            grounded = (weights.mT @ directions)[:, 0]
        return self.grounding(torch.cat((places.mean(1), grounded), -1).tanh())


def inputs(
    config: Config, audio: Any, positive: Tensor | None = None, negative: Tensor | None = None, question: Any = None
) -> dict[str, Tensor]:
    """The released call's arguments, `model(audio, visual_posi, visual_nega, question)`, checked and by name.

    Args:
        audio: spectrograms (B, T, frames, mel bins), or a list whose first entry is that; None if unused.
        positive: frames of the clip (B, T, 3, S, S), ImageNet-normalised; None if unused.
        negative: as many frames of other videos; None, as in evaluation, to leave the negative frames out.
        question: (B, length) int64, indices into `config.head.words`.

    Returns: "audio" and "video", images (B*T, 3, H, W) of the streams that run; "negative", images (B*T, 3, S, S), if
    they are given and both streams run; "question".

    Raises: ValueError naming the input, what was expected and what came. Words out of the vocabulary are refused on a
        CPU; a look at them would make a CUDA device wait.
    """
    given = {"audio": audio, "positive": positive, "negative": negative}
    read = {"audio": tasks.spectrograms, "positive": tasks.frames, "negative": tasks.frames}
    names = {stream: "positive" if stream == "video" else stream for stream in config.streams}
    if negative is not None and len(names) == 2:
        names["negative"] = "negative"
    found = {key: read[name](config, name, given[name]) for key, name in names.items()}
    tasks.check_clips(**{name: given[name] for name in names.values()})
    first = given[names[config.streams[0]]]
    shape = (len(first[0] if isinstance(first, (list, tuple)) else first), config.head.length)
    wanted = f"question: expected an int64 tensor {shape}"
    if not isinstance(question, Tensor):
        raise ValueError(f"{wanted}, got {type(question).__name__}")
    if tuple(question.shape) != shape or question.dtype != torch.int64:
        raise ValueError(f"{wanted}, got {tuple(question.shape)} {str(question.dtype).removeprefix('torch.')}")
    words = len(config.head.words)
    if question.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = question[(question < 0) | (question >= words)]
        if len(strange):
            raise ValueError(f"question: expected words from 0 to {words - 1}, got {int(strange[0])}")
    return found | {"question": question}


def loss(outputs: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the answers, and half of that of the frames: positive ones go with the sound, negative ones not.

    That is the released code's loss, each term a mean. Computed in float32 or wider.

    Args:
        outputs: of `Head`. Without frames that are judged there is no second term.
        labels: (B,) indices of the answers.
    """
    answer, positive, negative = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs)
    total = F.cross_entropy(answer, labels)
    match = torch.cat((positive, negative))
    if len(match):
        target = torch.cat((labels.new_ones(len(positive)), labels.new_zeros(len(negative))))
        total = total + MATCH_WEIGHT * F.cross_entropy(match, target)
    return total


def kept(outputs: tuple[Tensor, Tensor, Tensor], clips: int) -> Tensor:
    """What evaluation keeps of each clip: probabilities of the answers (clips, K), float32."""
    return outputs[0].float().softmax(-1)


def fitted(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """The configuration with the width, the words and the answers of these tensors, by our names, of a model.

    Only their number is in the tensors: where the configuration has another, words and answers go by numbers, until
    `settle` reads them off the data set.
    """
    words, answers = tensors.get("head.question.words.weight"), tensors.get("head.answer.weight")
    if words is not None:
        head = replace(config.head, width=words.shape[1])
        if len(words) != len(head.words):
            head = replace(head, words=(PAD, *(f"word {i}" for i in range(1, len(words)))))
        config = replace(config, head=head)
    if answers is not None and len(answers) != len(config.classes):
        config = replace(config, classes=tuple(f"answer {i}" for i in range(1, 1 + len(answers))))
    return config
