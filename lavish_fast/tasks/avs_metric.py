"""The scores of audio-visual segmentation, as AVSBench defines them, and made independent of the batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavish_fast.tasks import some

BETA_SQUARED = 0.3
THRESHOLDS = 255


class VideoScore(NamedTuple):
    """What one video adds to the metric.

    iou: mean over its frames. curve: F by threshold, summed over those of its frames, `frames` in number, whose mask
    is not empty.
    """

    video_id: str
    iou: float
    curve: Tensor
    frames: int


@dataclass
class Metric:
    """AVSBench's two scores, mean intersection over union and F, independent of batches, of their order and of ranks.

    IoU of a frame: |P and G| / (|P or G| + 1e-7), P the pixels with a probability above 0.5, G the mask; where G is
    empty the share of pixels outside P. mIoU: the mean over a video's frames, then over videos.

    F of a frame at each of 255 thresholds t from 0 to 1: 1.3 p r / (0.3 p + r) for P the pixels with a probability of
    at least t, p = |P and G| / |P|, r = |P and G| / |G|, 0 where that is 0 / 0. The official score takes the curve's
    mean over the frames of a *batch* whose mask is not empty, its maximum, and the mean of that over batches, and so
    depends on the batch size. "F-score" has one video a batch, as the official test does; a video whose masks are all
    empty counts as 0. "pooled F-score" has the whole set as one batch; `official_f_score` any other size.

    official_batch: a batch size at which the official F is a result too. order: the ids of the videos as the official
    loader reads them, those of the data set's list.
    """

    official_batch: int | None = None
    order: Sequence[str] = ()
    videos: list[VideoScore] = field(default_factory=list)

    def update(self, outputs: Tensor | Sequence[Any], labels: Tensor, ids: Sequence[str]) -> None:
        """Scores a batch: logits (B*T, 1, H, W) or what begins with them, masks (B, M, H, W) of 0 and 1, B ids.

        Raises: ValueError naming what does not fit.
        """
        logits, labels = by_clip(outputs, labels)
        if len(ids) != len(labels):
            raise ValueError(f"ids: expected {len(labels)}, got {len(ids)}")
        if ((labels != 0) & (labels != 1)).any():
            raise ValueError("labels: expected masks of 0 and 1, got other values")
        masks = labels.to(logits.device, torch.bool)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        count, frames = masks.shape[:2]
        ious, curves = frame_scores(probabilities.flatten(0, 1), masks.flatten(0, 1))
        ious, curves = ious.view(count, frames).cpu(), curves.view(count, frames, -1).cpu()
        with_object = masks.flatten(2).any(2).cpu()
        for i, video_id in enumerate(ids):
            seen = curves[i, with_object[i]]
            self.videos.append(VideoScore(video_id, ious[i].mean().item(), seen.sum(0), len(seen)))

    def merge(self, other: Metric) -> None:
        """Adds what another one has scored."""
        self.videos += other.videos

    def results(self) -> dict[str, float]:
        """mIoU, F-score and pooled F-score, NaN before any video was scored; with `official_batch` N, "official F-score
        (batch N)" too.
        """
        count = len(self.videos)
        results = {
            "mIoU": math.fsum(v.iou for v in self.videos) / count if count else float("nan"),
            "F-score": self.official_f_score(1),
            "pooled F-score": self.official_f_score(max(1, count)),
        }
        if self.official_batch is not None:
            score = self.official_f_score(self.official_batch, self.order)
            results[f"official F-score (batch {self.official_batch})"] = score
        return results

    def official_f_score(self, batch_size: int, order: Sequence[str] | None = None) -> float:
        """The official F at a batch size, to compare with numbers that were got at one.

        order: the ids of the videos as they were in the batches; without it they are sorted.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        place = {video_id: i for i, video_id in enumerate(order or sorted(v.video_id for v in self.videos))}
        if unknown := sorted({v.video_id for v in self.videos} - place.keys()):
            raise ValueError(f"order: expected all that were scored, got none of {some(unknown)}")
        videos = sorted(self.videos, key=lambda v: place[v.video_id])
        batches = [videos[i : i + batch_size] for i in range(0, len(videos), batch_size)]
        return math.fsum(map(_max_f, batches)) / len(batches) if batches else float("nan")


def _max_f(videos: Sequence[VideoScore]) -> float:
    frames = sum(v.frames for v in videos)
    # Summed exactly, so that the order of the videos does not matter.
    return max(map(math.fsum, zip(*(v.curve.tolist() for v in videos)))) / frames if frames else 0.0


def frame_scores(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """IoU (n,) and F at each threshold (n, 255) of frames, as in `Metric`, in float64.

    probabilities (n, H, W) in float32 or wider; NaN counts as no object. masks (n, H, W) bool. F is 0 for a frame
    whose mask is empty.
    """
    p, masks = probabilities.flatten(1), masks.flatten(1)
    n, pixels = p.shape
    # In float32, as the official thresholds are: the last of them rounds to 1. Made on the CPU, for the same bits.
    thresholds = torch.linspace(0, 1 - 1e-10, THRESHOLDS).to(p)
    # How many thresholds a probability reaches, 0 to 255; then a histogram of that for each frame, outside and inside
    # its mask, instead of 255 comparisons of each pixel.
    reached = torch.bucketize(p.nan_to_num(nan=-1.0), thresholds, right=True)
    bins = THRESHOLDS + 1
    where = 2 * torch.arange(n, device=p.device)[:, None] + masks
    histogram = torch.bincount((where * bins + reached).flatten(), minlength=2 * n * bins).view(n, 2, bins)
    at_least = histogram.flip(2).cumsum(2).flip(2)[:, :, 1:].double()  # pixels that reach each threshold
    hit, positive, size = at_least[:, 1], at_least.sum(1), masks.sum(1, dtype=torch.float64)
    precision, recall = hit / (positive + 1e-20), hit / (size[:, None] + 1e-20)
    curves = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)

    predicted = p > 0.5
    both, either, outside = (x.sum(1).double() for x in (predicted & masks, predicted | masks, ~predicted))
    ious = torch.where(size > 0, both / (either + 1e-7), outside / pixels)
    return ious, curves.nan_to_num(nan=0.0)


def by_clip(outputs: Tensor | Sequence[Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and masks of the frames that have a mask, (B, M, H, W) each. Raises: ValueError naming what does not fit.

    They are the first frames: a clip has one mask in training, one a frame otherwise.
    """
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    if labels.ndim != 4 or not labels.shape[1]:
        raise ValueError(f"labels: expected masks (B, M, H, W), got {tuple(labels.shape)}")
    clips, masks, *size = labels.shape
    n = len(logits)
    if list(logits.shape[1:]) != [1, *size] or (n % clips if clips else n) or n < clips * masks:
        raise ValueError(
            f"logits: expected (B*T, 1, H, W) for masks of shape {tuple(labels.shape)}, got {tuple(logits.shape)}"
        )
    return logits.view(clips, n // clips if clips else masks, *size)[:, :masks], labels
