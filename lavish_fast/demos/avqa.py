"""The demo of question answering: what is heard, what is seen, and whether they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lavish_fast import media, plots
from lavish_fast.config import AdapterConfig, AVQAConfig, Config, TrainConfig
from lavish_fast.demos import BACKBONE, SPECTROGRAM, WEIGHTS
from lavish_fast.synthetic.avqa import SECONDS
from lavish_fast.synthetic.avqa import TRUTH as TRUTH
from lavish_fast.synthetic.avqa import perfect_senses as perfect_senses
from lavish_fast.synthetic.avqa import write_dataset as write_dataset
from lavish_fast.tasks.avqa_questions import PAD, questions_path, read_questions

CONFIG = Config(
    backbone=BACKBONE,
    task="avqa",
    adapter=AdapterConfig(latents=2, reduction=4, groups=2),
    spectrogram=SPECTROGRAM,
    frames=SECONDS,
    head=AVQAConfig(length=9, width=64),
    backbone_weights=WEIGHTS,
)
TRAIN = TrainConfig(batch_size=8, epochs=7, lr=1e-3, head_lr=2e-3, lr_step=5, lr_gamma=0.4, workers=0)
CLIPS = {"train": 240, "val": 24, "test": 60}

SCORE = "accuracy"
MORE = ("audio", "visual", "audio-visual")
TITLE = "LAVISH learns to answer questions"
NOTES = (
    "Four questions a clip: one of the sound, one of the picture, two of both. A disc goes with the drum, a star with "
    "the bird, a cross with the siren; half of the clips have another one's sound.",
    "'perfect senses' is what a model reaches that recognises everything in the streams it has; 'chance' is the most "
    "frequent answer to each question. Clips per second are questions per second, each with its clip.",
    "The frozen backbone was trained on drawn pictures alone; it had never seen a spectrogram.",
)


def table(config: Config, item: dict[str, Any], probabilities: Tensor) -> Table:
    """The answers by their probability (K,)."""
    title = f"An unseen clip: {_question(config, item)}"
    table = Table(title=title, caption=f"right: {_truth(config, item)}", min_width=len(title))
    table.add_column("answer")
    table.add_column("probability", justify="right")
    for answer, probability in _best(config, probabilities):
        table.add_row(answer, f"{probability:.1%}")
    return table


def picture(config: Config, item: dict[str, Any], probabilities: Tensor) -> tuple[Figure, str]:
    """The clip, the question and its most probable answers: probabilities (K,)."""
    best, truth = _best(config, probabilities), _truth(config, item)
    clip = media.Clip(item["audio"], item["positive"], float(SECONDS), ())
    figure = plots.choice(clip, best, title=_question(config, item), what="answer")
    return figure, f"right: {truth}" if best[0][0] == truth else f"wrong: the answer is {truth}, not {best[0][0]}"


def invitation(data: Path, name: str, checkpoint: Path) -> tuple[str | Path, ...]:
    """The command to try next."""
    asked = next(q for q in read_questions(questions_path(data, "test")) if str(q.question_id) == name)
    video, question = data / "videos" / f"{asked.video_id}.mp4", " ".join(asked.words) + "?"
    return "lavish-fast", "answer", video, question, "--checkpoint", checkpoint


def _question(config: Config, item: dict[str, Any]) -> str:
    """In words."""
    words = (config.head.words[i] for i in item["question"].tolist())
    return " ".join(word for word in words if word != PAD) + "?"


def _best(config: Config, probabilities: Tensor) -> list[tuple[str, float]]:
    order = probabilities.argsort(descending=True)[:4].tolist()
    return [(config.classes[i], float(probabilities[i])) for i in order]


def _truth(config: Config, item: dict[str, Any]) -> str:
    return config.classes[int(item["labels"])]
