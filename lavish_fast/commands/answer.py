"""`lavish-fast answer`: a question about what is seen and heard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import terminal, watch
from lavish_fast.commands.options import Backbone, Checkpoint

if TYPE_CHECKING:
    from rich.progress import Progress

    from lavish_fast.media import Clip


def answer(
    video: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A video file.")],
    question: Annotated[str, typer.Argument(help="In words that the model knows, such as those of its data set.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for answer.jsonl and a picture.")] = Path("answer"),
    backbone: Backbone = None,
) -> None:
    """Answer a question about a video.

    Writes OUT/answer.jsonl, a line with the five most probable answers, and a picture. A word that the model does not
    know is named, with those nearest to it, and the exit code is 2.
    """
    import torch

    from lavish_fast import plots
    from lavish_fast.tasks import avqa
    from lavish_fast.tasks.avqa_data import media_options

    files = watch.find([video], out)
    model = watch.ready(watch.load_model(checkpoint, backbone, "avqa"))
    with terminal.bad_usage(ValueError):
        asked = avqa.encode_question(question, model.config)

    def show(file: Path, clip: Clip, place: Path, bar: Progress) -> list[dict[str, Any]]:
        with torch.inference_mode():
            outputs = model(**watch.inputs(model, audio=clip.audio, positive=clip.video, question=asked))
            probabilities = avqa.kept(outputs, 1)[0].cpu()
        best = watch.top(probabilities, model.config.classes)
        title = terminal.printable(question)
        figure = plots.choice(clip, best, title=title, what="answer", below=terminal.printable(file.name))
        plots.save(figure, place.with_name(f"{place.name}.png"))
        watch.print_table(bar.console, question, watch.top_table("answer", best), f"answer: {best[0][0]}")
        return [{"question": question, "answer": best[0][0], "top": dict(best)}]

    watch.each("answer", files, out, show, **media_options(model.config))
