"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_OF_TASK = "the paper's for the task"

PRESETS = {
    "ave": "ave-swinv2-large",
    "avs": "avs-swinv2-large",
    "avqa": "avqa-swinv2-large",
    "action": "action-videomae-base",
}

TaskName = Literal["ave", "avs", "avqa", "action"]
_TASKS = "Event localisation, segmentation, question answering or action recognition."
Task = Annotated[TaskName, typer.Argument(help=_TASKS)]
TaskOption = Annotated[TaskName, typer.Option(help=_TASKS)]
Data = Annotated[
    Path,
    typer.Option(exists=True, file_okay=False, help="Folder of a data set in the layout that `prepare` tells of."),
]
Videos = Annotated[list[Path], typer.Argument(metavar="VIDEO...", exists=True, help="Video files, or folders.")]
Checkpoint = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Folder of a trained model, such as the best/ of a run.")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="The frozen weights: a file or a timm model's name. The configuration names them otherwise.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Clips that go through the model at once, per device.")]
Amp = Annotated[
    Literal["bf16", "fp16"] | None, typer.Option(help="bfloat16, or float16 with loss scaling in training.")
]
Workers = Annotated[int, typer.Option(help="Processes that decode.")]
Fold = Annotated[int, typer.Option(min=1, max=3, help="action: which of UCF101's three splits.")]

# Of training

Preset = Annotated[
    str | None, typer.Option(help="A named configuration.", show_default="TASK-swinv2-large, action-videomae-base")
]
ConfigFile = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A config.json instead of a preset.")
]
VGGish = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="VGGish's weights (vggish-10086976.pth): its features join ave's last layer.",
    ),
]
Modality = Annotated[Literal["audio+video", "video", "audio"] | None, typer.Option(help="The streams that run.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs at most.", show_default=_OF_TASK)]
Patience = Annotated[
    int | None, typer.Option(help="Epochs without a better validation score before it ends.", show_default=_OF_TASK)
]
TrainBatchSize = Annotated[
    int | None, typer.Option(help="Clips that go through the model at once, per device.", show_default=_OF_TASK)
]
Accumulate = Annotated[int | None, typer.Option(help="Batches to a step.", show_default=_OF_TASK)]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the adapters.", show_default=_OF_TASK)]
HeadLearningRate = Annotated[float | None, typer.Option(help="Learning rate of the head.", show_default=_OF_TASK)]
LearningRateStep = Annotated[
    int | None, typer.Option(help="Multiply both by --lr-gamma every so many epochs.", show_default=_OF_TASK)
]
LearningRateGamma = Annotated[float | None, typer.Option(help="See --lr-step.", show_default=_OF_TASK)]
Seed = Annotated[int, typer.Option(help="Of weights, order and drop path.")]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between the checkpoints within an epoch.")]
OnNan = Annotated[Literal["skip", "stop"], typer.Option(help="What to do with a step where a clip gives NaN.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Run blocks again in the backward pass, for less memory.")
]


def of_data(task: str, fold: int) -> dict[str, Any]:
    """What the data set of a task takes besides: of action, the fold."""
    if task == "action":
        return {"fold": fold}
    if fold != 1:
        raise typer.BadParameter(f"expected it with action alone, got {task}", param_hint="--fold")
    return {}
