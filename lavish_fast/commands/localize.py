"""`lavish-fast localize`: the event of every second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import terminal, watch
from lavish_fast.commands.options import Backbone, Checkpoint, VGGish, Videos

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

    from lavish_fast.media import Clip
    from lavish_fast.model import Model

_CHUNK = 10  # seconds that go through the model at once; AVE's clips are that long


def localize(
    videos: Videos,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for localize.jsonl and a picture a video.")] = Path(
        "localize"
    ),
    backbone: Backbone = None,
    vggish: VGGish = None,
) -> None:
    """Name the event in each second of videos.

    Writes OUT/localize.jsonl, a line a second, and a picture for each video. A file that cannot be read is reported
    and left out, and the exit code is 1.
    """
    from lavish_fast import plots

    files = watch.find(videos, out)
    model = watch.ready(watch.load_model(checkpoint, backbone, "ave", vggish))
    config = model.config

    def show(file: Path, clip: Clip, place: Path, bar: Progress) -> list[dict[str, Any]]:
        probabilities = per_second(model, clip)
        seconds = clip.duration / len(probabilities)
        rows = segments(probabilities, probabilities.argmax(1), config.classes, seconds)
        title = terminal.printable(file.name)
        figure = plots.timeline(clip, probabilities, config.classes, title=title, seconds=seconds)
        plots.save(figure, place.with_name(f"{place.name}.png"))
        watch.print_table(bar.console, str(file), _table(rows), f"events: {summary(rows)}")
        return rows

    options = {"frames": None, "img_size": config.backbone.img_size, "spectrogram": config.spectrogram}
    options["patches"] = config.head.vggish
    watch.each("localize", files, out, show, **options)


def per_second(model: Model, clip: Clip) -> Tensor:
    """(T, K) of a clip of any length: the model takes each second on its own."""
    import torch

    tensors = {"audio": clip.audio, "video": clip.video, "patches": clip.patches}
    chunks = {name: x.split(_CHUNK) for name, x in tensors.items() if x is not None}
    with torch.inference_mode():
        given = (dict(zip(chunks, parts)) for parts in zip(*chunks.values()))
        return torch.cat([model(**watch.inputs(model, **part)).float().cpu() for part in given])


def segments(probabilities: Tensor, decided: Tensor, classes: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """A row for each segment: probabilities (T, K), class indices (T,). start and end are in seconds."""
    return [
        {
            "segment": i,
            "start": round(i * seconds, 3),
            "end": round((i + 1) * seconds, 3),
            "event": classes[k],
            "probability": round(float(probabilities[i, k]), 6),
        }
        for i, k in enumerate(decided.tolist())
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """ "Bark 2-6 s (0.93); Truck 8-10 s (0.71)": neighbours of one event merged, with their mean probability."""
    return "; ".join(_events(rows)) or "none"


def _events(rows: list[dict[str, Any]]) -> Iterator[str]:
    from lavish_fast.tasks.ave import BACKGROUND

    for event, run in groupby(rows, key=lambda row: row["event"]):
        run = list(run)
        if event != BACKGROUND:
            mean = sum(row["probability"] for row in run) / len(run)
            yield f"{event} {_span(run[0]['start'], run[-1]['end'])} s ({mean:.2f})"


def _span(start: float, end: float) -> str:
    return f"{round(start, 1):g}-{round(end, 1):g}"


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from lavish_fast.tasks.ave import BACKGROUND

    table = Table()
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("event")
    table.add_column("probability", justify="right")
    for row in rows:
        style = "dim" if row["event"] == BACKGROUND else ""
        table.add_row(_span(row["start"], row["end"]), Text(row["event"]), f"{row['probability']:.2f}", style=style)
    return table
