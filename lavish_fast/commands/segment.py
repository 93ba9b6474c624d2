"""`lavish-fast segment`: where in the picture it sounds."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import terminal, watch
from lavish_fast.commands.options import Backbone, Checkpoint, Videos

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress
    from torch import Tensor

    from lavish_fast.media import Clip
    from lavish_fast.model import Model

_TICK = Fraction(1, 90000)  # seconds; the clock of most containers
_SOUND_RATE = 44100


def segment(
    videos: Videos,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for segment.jsonl, pictures and videos.")] = Path(
        "segment"
    ),
    backbone: Backbone = None,
) -> None:
    """Mark what is heard in the pictures of videos.

    A frame for each second is read, evenly from the first to the last, with as many parts of the sound, spread evenly
    as well, and as many go through the model at once as it was trained on. Of a video shorter than that it reads as
    many, closer together.

    Of each video, OUT has NAME.png, its frames with their masks; NAME/, a picture and a black and white mask of each;
    and NAME.mp4, the video with the mask that is nearest in time on every frame, and its sound as one channel.
    OUT/segment.jsonl has a line a mask, with the share of the frame that is marked. A file that cannot be read is
    reported and left out, and the exit code is 1.
    """
    from lavish_fast import media, plots
    from lavish_fast.checkpoint import write_atomically

    files = watch.find(videos, out)
    films = {(out / f"{place}.mp4").resolve() for place in watch.places(files)}
    for file in files:
        if file.resolve() in films:
            raise typer.BadParameter(f"expected another folder than that of {file}, got {out}", param_hint="--out")
    model = watch.ready(watch.load_model(checkpoint, backbone, "avs"))
    config = model.config

    def show(file: Path, clip: Clip, place: Path, bar: Progress) -> list[dict[str, Any]]:
        masks = masks_of(model, clip)
        areas = masks.float().mean((1, 2)).tolist()
        title = terminal.printable(file.name)
        plots.save(plots.masks(clip, masks, title=title), place.with_name(f"{place.name}.png"))
        pictures = media.denormalise(clip.video).numpy()
        place.mkdir(exist_ok=True)
        for old in list(place.iterdir()):  # an earlier run's may be more
            if re.fullmatch(r"\d{3,}(_mask)?\.png", old.name):
                old.unlink()
        for i, (picture, mask) in enumerate(zip(pictures, masks.numpy())):
            _save_picture(plots.marked(picture, mask), place / f"{i:03}.png")
            _save_picture(mask, place / f"{i:03}_mask.png")
        film = place.with_name(f"{place.name}.mp4")
        with _Bar(bar, film.name, clip.duration) as seen:
            arguments = (masks.numpy(), clip.times, not clip.silent, seen)
            write_atomically(film, lambda path: write_film(file, path, *arguments))
        bar.console.print(f"{terminal.printable(file)}: {summary(areas)}", markup=False, soft_wrap=True)
        return [
            {"frame": i, "seconds": round(t, 3), "area": round(area, 6)}
            for i, (t, area) in enumerate(zip(clip.times, areas))
        ]

    options = {"least": config.frames, "img_size": config.head.size, "spectrogram": config.spectrogram}
    watch.each("segment", files, out, show, load=load_seconds, **options)


def load_seconds(path: Path, *, least: int, **options: Any) -> Clip:
    """The clip of a video with a frame a second, and at least so many."""
    from lavish_fast import media

    clip = media.load_clip(path, frames=None, **options)
    return clip if len(clip.video) >= least else media.load_clip(path, frames=least, **options)


def masks_of(model: Model, clip: Clip) -> Tensor:
    """Masks (n, size, size), bool, of a clip of n frames, at least as many as the model takes at once.

    Where n is no multiple of that, the last ones taken at once begin earlier, and frames that have a mask keep it.
    """
    import torch

    from lavish_fast.tasks import avs

    masks, count = [], model.config.frames
    with torch.inference_mode():
        for start in range(0, len(clip.video), count):
            first = min(start, len(clip.video) - count)
            piece = slice(first, first + count)
            outputs = model(**watch.inputs(model, video=clip.video[piece], audio=clip.audio[piece]))
            masks.append(avs.kept(outputs, 1)[0, start - first :].cpu())
    return torch.cat(masks)


def summary(areas: list[float]) -> str:
    """ "something sounds in 8 of 10 frames, in 12 % of their pixels"."""
    marked = [area for area in areas if area]
    if not marked:
        return f"nothing is marked in {len(areas)} frames"
    return f"{len(marked)} of {len(areas)} frames marked, in {sum(marked) / len(marked):.0%} of their pixels"


def write_film(
    source: Path, path: Path, masks: np.ndarray, times: Sequence[float], sound: bool, seen: Callable[[float], None]
) -> None:
    """Writes the video with its masks as an mp4 file.

    Args:
        masks: (n, H, W), bool; each frame of the video has the mask whose time is nearest.
        times: the masks' n times in seconds, none before the one ahead of it.
        sound: whether there is any.
        seen: called with the seconds that have been written.

    Raises: media.MediaError naming the file and the reason.
    """
    import av
    import numpy as np

    from lavish_fast import media, plots

    between = [(a + b) / 2 for a, b in pairwise(times)]
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", options={"crf": "20", "preset": "veryfast"})
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = _TICK
        audio = container.add_stream("aac", rate=_SOUND_RATE, layout="mono") if sound else None
        shown = -1

        @lru_cache(maxsize=1)
        def opacity(index: int, height: int, width: int) -> Any:
            return plots.opacity(masks[index], height, width)

        def take(_: list[int], seconds: float, image: np.ndarray) -> None:
            nonlocal shown
            pts = round(seconds / _TICK)
            if pts <= shown:
                return
            image = plots.marked(image, opacity(bisect.bisect(between, seconds), *image.shape[:2]))
            # Colours are stored for each four pixels.
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            if shown < 0:
                video.height, video.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base, shown = pts, _TICK, pts
            container.mux(video.encode(frame))
            seen(seconds)

        try:
            waveform = media.extract(source, take, frame_rate=None, sample_rate=_SOUND_RATE).waveform
            container.mux(video.encode(None))
            if audio is not None:
                frame = av.AudioFrame.from_ndarray(waveform.numpy()[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = _SOUND_RATE, 0, Fraction(1, _SOUND_RATE)
                container.mux(audio.encode(frame))
                container.mux(audio.encode(None))
        except (av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, media.MediaError):
                raise
            raise media.MediaError(source, f"expected frames that can be written as H.264, got: {error}") from None


class _Bar:
    """The seconds of a video, below the bar of the videos."""

    def __init__(self, bar: Progress, name: str, duration: float) -> None:
        self.bar, self.task = bar, bar.add_task(f"writing {terminal.printable(name)}", total=round(duration))

    def __enter__(self) -> Callable[[float], None]:
        return lambda seconds: self.bar.update(self.task, completed=round(seconds))

    def __exit__(self, *_: object) -> None:
        self.bar.remove_task(self.task)


def _save_picture(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)
