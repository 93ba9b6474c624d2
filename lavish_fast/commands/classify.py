"""`lavish-fast classify`: the action of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import terminal, watch
from lavish_fast.commands.options import Backbone, Checkpoint, Videos

if TYPE_CHECKING:
    from rich.progress import Progress

    from lavish_fast.media import Clip


def classify(
    videos: Videos,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for classify.jsonl and a picture a video.")] = Path(
        "classify"
    ),
    backbone: Backbone = None,
) -> None:
    """Name the action in videos.

    The model reads frames spread evenly over the whole video, and all of its sound; a video without sound is read as
    silent, and said to be. Writes OUT/classify.jsonl, a line a video with its five most probable actions, and a picture
    for each. A file that cannot be read is reported and left out, and the exit code is 1.
    """
    import torch

    from lavish_fast import plots
    from lavish_fast.tasks import action

    files = watch.find(videos, out)
    model = watch.ready(watch.load_model(checkpoint, backbone, "action"))
    classes = model.config.classes

    def show(file: Path, clip: Clip, place: Path, bar: Progress) -> list[dict[str, Any]]:
        with torch.inference_mode():
            outputs = model(**watch.inputs(model, audio=clip.audio, video=clip.video))
            probabilities = action.kept(outputs, 1)[0].cpu()
        best = watch.top(probabilities, classes)
        title = terminal.printable(file.name)
        figure = plots.choice(clip, best, title=title, what="action")
        plots.save(figure, place.with_name(f"{place.name}.png"))
        silent = " (silent)" if clip.silent else ""
        watch.print_table(bar.console, f"{file}{silent}", watch.top_table("action", best))
        return [{"action": best[0][0], "silent": clip.silent, "top": dict(best)}]

    watch.each("classify", files, out, show, **action.media_options(model.config))
