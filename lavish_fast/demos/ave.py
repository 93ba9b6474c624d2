"""The demo of event localisation: an event counts only while it is both seen and heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lavish_fast import media, plots
from lavish_fast.config import AdapterConfig, Config, TrainConfig
from lavish_fast.demos import BACKBONE, SPECTROGRAM, WEIGHTS
from lavish_fast.synthetic.ave import TRUTH as TRUTH
from lavish_fast.synthetic.ave import perfect_senses as perfect_senses
from lavish_fast.synthetic.ave import write_dataset as write_dataset

CONFIG = Config(
    backbone=BACKBONE,
    adapter=AdapterConfig(latents=2, reduction=4, groups=2),
    spectrogram=SPECTROGRAM,
    backbone_weights=WEIGHTS,
)
TRAIN = TrainConfig(batch_size=4, epochs=5, lr=3e-3, head_lr=2e-3, lr_step=2, lr_gamma=0.25, workers=0)
CLIPS = {"train": 256, "val": 32, "test": 48}

SCORE = "accuracy"
MORE = ()
TITLE = "LAVISH learns to see and hear"
NOTES = (
    "A second is an event only while its source is both seen and heard. 'perfect senses' is what a model "
    "reaches that recognises everything in the streams it has.",
    "The frozen backbone was trained on drawn pictures alone; it had never seen a spectrogram.",
    "With one stream an event and its background are nearly a toss-up (62 to 38), so those two scores waver.",
)


def table(config: Config, item: dict[str, Any], probabilities: Tensor) -> Table:
    """Second by second: probabilities (T, K)."""
    table = Table(title=f"An unseen clip, second by second: {item['id']}")
    for column in ("second", "event", "probability", "truth"):
        table.add_column(column, justify="right" if column in ("second", "probability") else "left")
    for second, (row, label) in enumerate(zip(probabilities, item["labels"])):
        table.add_row(f"{second}", config.classes[row.argmax()], f"{row.max():.2f}", config.classes[label])
    return table


def picture(config: Config, item: dict[str, Any], probabilities: Tensor) -> tuple[Figure, str]:
    """The clip over time, and how many seconds are right: probabilities (T, K)."""
    clip = media.Clip(item["audio"], item["video"], float(len(probabilities)), ())
    figure = plots.timeline(clip, probabilities, config.classes, title=item["id"], truth=item["labels"])
    right = int((probabilities.argmax(-1) == item["labels"]).sum())
    return figure, f"{right} of {len(probabilities)} seconds right"


def invitation(data: Path, name: str, checkpoint: Path) -> tuple[str | Path, ...]:
    """The command to try next."""
    return "lavish-fast", "localize", data / "videos" / f"{name}.mp4", "--checkpoint", checkpoint
