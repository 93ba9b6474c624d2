"""The demo of segmentation: of two moving objects the mask is that of the one that sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lavish_fast import media, plots
from lavish_fast.config import AdapterConfig, AVSConfig, Config, TrainConfig
from lavish_fast.demos import BACKBONE, SPECTROGRAM, WEIGHTS
from lavish_fast.synthetic.avs import SECONDS, SIZE
from lavish_fast.synthetic.avs import TRUTH as TRUTH
from lavish_fast.synthetic.avs import perfect_senses as perfect_senses
from lavish_fast.synthetic.avs import write_dataset as write_dataset

CONFIG = Config(
    backbone=BACKBONE,
    task="avs",
    adapter=AdapterConfig(latents=2, reduction=4, groups=2, zero_latents=True),
    spectrogram=SPECTROGRAM,
    frames=SECONDS,
    head=AVSConfig(channels=16, tpavi_stages=(0, 1, 2), size=SIZE, hidden=32),
    backbone_weights=WEIGHTS,
)
TRAIN = TrainConfig(batch_size=6, epochs=6, lr=5e-3, head_lr=2e-3, lr_step=4, lr_gamma=0.25, patience=3, workers=0)
CLIPS = {"train": 360, "val": 24, "test": 48}

SCORE = "mIoU"
MORE = ()
TITLE = "LAVISH learns to see what sounds"
NOTES = (
    "A solid object and a hollow one move, and one of them sounds: its pixels are the mask. A model learns from the "
    "mask of each clip's first second; the score, mIoU, is over all five.",
    "'perfect senses' is what a model reaches that recognises everything in the streams it has. Whoever only sees "
    "does best to mask the solid object, which sounds in two of three clips; whoever only hears knows nothing of "
    "where. 'chance' is the best mask that is the same for all frames.",
    "What is only heard tells how often a pixel is masked, at most in a quarter of the frames: no probability is above "
    "0.5, nothing is marked, and the sound alone scores 0.0 % mIoU, less than chance.",
    "The frozen backbone was trained on drawn pictures alone, to name one shape a picture; it had never seen a mask "
    "or a spectrogram.",
)


def table(config: Config, item: dict[str, Any], masks: Tensor) -> Table:
    """Second by second: masks (T, S, S), how many pixels are masked, should be, and are in both."""
    table = Table(title=f"An unseen clip, second by second: {item['id']}")
    for column in ("second", "masked pixels", "truth", "in both", "IoU"):
        table.add_column(column, justify="right")
    for second, (mask, truth, iou) in enumerate(zip(masks, item["labels"].bool(), _ious(masks, item["labels"]))):
        pixels = (int(x.sum()) for x in (mask, truth, mask & truth))
        table.add_row(f"{second}", *map(str, pixels), f"{iou:.0%}")
    return table


def picture(config: Config, item: dict[str, Any], masks: Tensor) -> tuple[Figure, str]:
    """The clip over time, and how well its masks (T, S, S) fit."""
    clip = media.Clip(item["audio"], item["video"], float(len(masks)), ())
    figure = plots.segmentation(clip, masks, title=item["id"], truth=item["labels"])
    return figure, f"mIoU {_ious(masks, item['labels']).mean():.0%}"


def invitation(data: Path, name: str, checkpoint: Path) -> tuple[str | Path, ...]:
    """The command to try next."""
    return "lavish-fast", "segment", data / "videos" / f"{name}.mp4", "--checkpoint", checkpoint


def _ious(masks: Tensor, truth: Tensor) -> Tensor:
    """(T,); the true masks are never empty here."""
    both, either = (f(masks, truth).sum((1, 2)) for f in (torch.logical_and, torch.logical_or))
    return both / either
