"""The demo of action recognition: a class is what is seen together with what is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lavish_fast import media, plots
from lavish_fast.config import AdapterConfig, Config, TrainConfig
from lavish_fast.demos import BACKBONE, SPECTROGRAM, WEIGHTS
from lavish_fast.synthetic.action import SECONDS
from lavish_fast.synthetic.action import TRUTH as TRUTH
from lavish_fast.synthetic.action import perfect_senses as perfect_senses
from lavish_fast.synthetic.action import write_dataset as write_dataset

CONFIG = Config(
    backbone=BACKBONE,
    task="action",
    adapter=AdapterConfig(latents=2, reduction=4, groups=2),
    spectrogram=SPECTROGRAM,
    frames=SECONDS,
    backbone_weights=WEIGHTS,
)
TRAIN = TrainConfig(batch_size=12, epochs=6, lr=3e-3, head_lr=2e-3, lr_step=3, lr_gamma=0.25, workers=0)
CLIPS = {"train": 243, "val": 36, "test": 81}

SCORE = "accuracy"
MORE = ()
TITLE = "LAVISH learns what is seen and heard"
NOTES = (
    "A class is one of three shapes together with one of three sounds: DiscBird is a disc, and the sound is a bird's.",
    "One clip in nine has no sound track and is read as silence; no model can know its sound. 'perfect "
    "senses' is what a model reaches that recognises everything in the streams it has.",
    "The frozen backbone was trained on drawn pictures alone; it had never seen a spectrogram.",
)


def table(config: Config, item: dict[str, Any], probabilities: Tensor) -> Table:
    """The classes by their probability (K,)."""
    title = f"An unseen clip: {item['id']}"
    table = Table(title=title, min_width=len(title))
    table.add_column("action")
    table.add_column("probability", justify="right")
    for name, probability in _best(config, probabilities):
        table.add_row(name, f"{probability:.1%}")
    return table


def picture(config: Config, item: dict[str, Any], probabilities: Tensor) -> tuple[Figure, str]:
    """The clip and its most probable classes: probabilities (K,)."""
    best, truth = _best(config, probabilities), config.classes[int(item["labels"])]
    clip = media.Clip(item["audio"], item["video"], float(SECONDS), ())
    figure = plots.choice(clip, best, title=item["id"], what="action")
    return figure, "right" if best[0][0] == truth else f"wrong: it is {truth}, not {best[0][0]}"


def invitation(data: Path, name: str, checkpoint: Path) -> tuple[str | Path, ...]:
    """The command to try next."""
    video = next((data / "UCF-101").glob(f"*/{name}.mp4"))
    return "lavish-fast", "classify", video, "--checkpoint", checkpoint


def _best(config: Config, probabilities: Tensor) -> list[tuple[str, float]]:
    order = probabilities.argsort(descending=True)[:4].tolist()
    return [(config.classes[i], float(probabilities[i])) for i in order]
