"""What `localize`, `segment`, `answer` and `classify` share: a trained model, and video files one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from lavish_fast.commands import terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

    from lavish_fast.media import Clip
    from lavish_fast.model import Model

TOP = 5  # answers or actions that are shown


def load_model(checkpoint: Path, backbone: str | None, task: str, vggish: Path | None = None) -> Model:
    """The trained model, on a CPU."""
    from lavish_fast.model import Model

    with terminal.bad_usage(FileNotFoundError):
        model = Model.from_pretrained(checkpoint, backbone=backbone, vggish=vggish)
    if model.config.task != task:
        raise typer.BadParameter(
            f"expected a model for {task}, got one for {model.config.task}", param_hint="--checkpoint"
        )
    if vggish is not None and model.vggish is None:
        raise typer.BadParameter("expected it for a model with VGGish beside, got one without", param_hint="--vggish")
    return model


def ready(model: Model) -> Model:
    """The model on a GPU, where there is one."""
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def find(videos: Sequence[Path], out: Path) -> list[Path]:
    """The files themselves and those of folders, each once; without what these commands wrote below the folders."""
    from lavish_fast import media

    def written(folder: Path) -> bool:
        return folder.resolve() == out.resolve() or (folder / "segment.jsonl").is_file()

    with terminal.bad_usage(media.MediaError):
        files = list(dict.fromkeys(file for video in videos for file in media.find_videos(video, skip=written)))
    if not files:
        raise typer.BadParameter(f"expected video files in {videos[0]}, got none", param_hint="VIDEO...")
    return files


def each(
    name: str,
    files: Sequence[Path],
    out: Path,
    show: Callable[[Path, Clip, Path, Progress], Iterable[dict[str, Any]]],
    **options: Any,
) -> None:
    """Shows each file's clip, decoded in worker processes, and writes OUT/NAME.jsonl, a line for each row of a file.

    A file that cannot be read is reported and left out, and so is one of which something cannot be written; the exit
    code is 1 then.

    Args:
        show: called as show(file, clip, place, bar): prints, writes what begins with `place`, a path that no other
            file has, and returns the rows. `bar` is the running one.
        options: of `media.load_clips`.
    """
    from lavish_fast import media

    console, failed = terminal.console(), 0
    out.mkdir(parents=True, exist_ok=True)
    clips = media.load_clips(files, **options)
    with _replacing(out / f"{name}.jsonl") as lines, terminal.progress(console) as bar:
        task = bar.add_task(name, total=len(files))
        for (file, clip), place in zip(clips, places(files)):
            try:
                if isinstance(clip, media.MediaError):
                    raise clip
                for message in clip.warnings:
                    terminal.show_warning(message)
                rows = list(show(file, clip, out / place, bar))
            except (media.MediaError, OSError) as error:
                failed += 1
                text = str(error) if isinstance(error, media.MediaError) else f"{file}: {error}"
                terminal.say_error(text)
                rows = [{"error": text}]
            for row in rows:
                print(json.dumps({"video": str(file)} | row), file=lines, flush=True)
            bar.advance(task)
    console.print(
        f"{len(files) - failed} of {len(files)} videos, in {terminal.printable(out)}/", markup=False, soft_wrap=True
    )
    if failed:
        raise typer.Exit(1)


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file for lines that takes the place of an earlier one in the end, also after an error, if it has any."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as lines:
        try:
            yield lines
        finally:
            if lines.tell():
                os.replace(part, path)
            else:
                part.unlink()


def places(files: Sequence[Path]) -> list[str]:
    """A name for what is written of each file. Two that some file systems hold equal are told apart by a number."""
    names: dict[str, str] = {}
    for file in files:
        stem = file.stem if file.stem.strip(".") else "_"  # "." and ".." are folders
        candidates = (f"{stem}{'' if n == 1 else f'-{n}'}" for n in range(1, len(files) + 1))
        name = next(name for name in candidates if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


def inputs(model: Model, **tensors: Tensor) -> dict[str, Tensor]:
    """One clip's inputs as a batch, where the model is."""
    device = next(model.parameters()).device
    return {name: x[None].to(device) for name, x in tensors.items()}


def top(probabilities: Tensor, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The most probable classes and their probabilities (K,), at most `TOP`."""
    best = probabilities.topk(min(TOP, len(classes)))
    return [(classes[k], round(p, 6)) for p, k in zip(best.values.tolist(), best.indices.tolist())]


def print_table(console: Console, title: str, table: Table, *below: str) -> None:
    """A table with a title above, which may be wider than the table, lines below, and an empty one."""
    console.print(terminal.printable(title), style="bold", markup=False, soft_wrap=True)
    console.print(table)
    for line in (*below, ""):
        console.print(line, markup=False, soft_wrap=True)


def top_table(column: str, rows: Sequence[tuple[str, float]]) -> Table:
    """A table of what `top` gives."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(column)
    table.add_column("probability", justify="right")
    for i, (name, p) in enumerate(rows):
        table.add_row(Text(name), f"{p:.2f}", style="bold" if i == 0 else "dim")
    return table
