"""What people look at: a picture per clip, the curves of a training run, and a report that holds both in one file."""

from __future__ import annotations

import base64
import html
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavish_fast import checkpoint, media

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

_WIDTH, _LEFT, _RIGHT = 10.0, 1.1, 0.25  # inches
_INNER = _WIDTH - _LEFT - _RIGHT
_GAP = 0.1
_MAX_THUMBNAILS, _MAX_THUMBNAIL = 10, 1.73  # pictures side by side, and inches of one
_MAX_SHEET = 60  # pictures
_FINEST = 4000  # columns of a spectrogram, unless the model heard more
_LINES, _LEAST = 4, 0.05  # classes whose probability is drawn: at most so many, if they ever reach so much
_COLUMNS = 5  # of the legend
_DPI = 120

MARK = "#d55e00"  # of what is heard in a picture
_INK, _MUTED, _BACKGROUND = "#1f2933", "#7b8794", "#dde2e7"
# Okabe and Ito's colours, which colour-blind people tell apart, and darker ones for the classes beyond them.
_PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"),
    *("#7a5195", "#8c6d1f", "#8f9e1e", "#a83232", "#2f4b7c", "#5c5c5c"),
)


def timeline(
    clip: media.Clip,
    probabilities: Tensor,
    classes: Sequence[str],
    *,
    title: str,
    truth: Tensor | None = None,
    seconds: float = 1.0,
) -> Figure:
    """A picture of one clip over time: frames, spectrogram, probabilities, predicted and true events.

    Args:
        clip: as `media.load_clip` gives it; T segments.
        probabilities: (T, K). The most probable class of a segment is the predicted one.
        classes: the K names, background last; background is light grey in the picture.
        truth: (T,) class indices, if they are known.
        seconds: of a segment.

    Raises: ValueError when the shapes do not agree.
    """
    probabilities = probabilities.detach().float().cpu()
    segments, count = len(clip.video), len(classes)
    if tuple(probabilities.shape) != (segments, count):
        raise ValueError(f"probabilities: expected {(segments, count)}, got {tuple(probabilities.shape)}")
    if truth is not None and tuple(truth.shape) != (segments,):
        raise ValueError(f"truth: expected {(segments,)}, got {tuple(truth.shape)}")

    tracks = {"predicted": probabilities.argmax(1).tolist()}
    if truth is not None:
        tracks["true"] = truth.tolist()
    events = probabilities[:, :-1].amax(0)
    lines = [k for k in events.topk(min(_LINES, count - 1)).indices.tolist() if events[k] >= _LEAST]
    shown = sorted({*lines, *(k for track in tracks.values() for k in track)} - {count - 1})
    colours = _colours(shown) | {count - 1: _BACKGROUND}
    labels = _labels(classes, [*shown, count - 1])

    thumbnails = min(segments, _MAX_THUMBNAILS)
    strip = min(_INNER / thumbnails, _MAX_THUMBNAIL)
    rows = -(-(len(shown) + 1) // _COLUMNS)
    heights = {"title": 0.35, "frames": strip, "sound": 1.35, "axis": 0.2, "p": 1.35, "space": 0.0}
    heights |= dict.fromkeys(tracks, 0.34) | {"last axis": 0.2, "legend": 0.24 * rows}
    figure, axes = _rows(title, heights, ("frames", "sound", "p", *tracks), segments * seconds)

    span = segments * seconds
    _draw_frames(axes["frames"], media.denormalise(clip.video.cpu()), thumbnails, strip, span, clip.times)
    _draw_sound(axes["sound"], clip, span)
    _draw_probabilities(axes["p"], probabilities, [*lines, count - 1], colours, seconds)
    for name, track in tracks.items():
        _draw_track(axes[name], name, track, classes, labels, colours, seconds)
    for name in ("sound", list(tracks)[-1]):
        _show_seconds(axes[name])
    _draw_legend(figure, labels, colours, rows)
    return figure


def segmentation(
    clip: media.Clip, masks: Tensor, *, title: str, truth: Tensor | None = None, seconds: float = 1.0
) -> Figure:
    """A picture of one clip over time: frames, spectrogram, and the frames under predicted and true masks.

    Args:
        clip: as `media.load_clip` gives it; T frames (T, 3, S, S).
        masks: (T, S, S), the predicted ones, not zero in what sounds.
        truth: (T, S, S), if it is known; each predicted mask then has its IoU beside it.
        seconds: from a frame to the next.

    Raises: ValueError when the shapes do not agree.
    """
    video = media.denormalise(clip.video.cpu())
    shape = tuple(video.shape[:3])
    tracks = {"predicted": masks} | ({} if truth is None else {"true": truth})
    for name, x in zip(("masks", "truth"), tracks.values()):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(x.shape)}")
    tracks = {name: x.detach().cpu().bool() for name, x in tracks.items()}

    thumbnails = min(len(video), _MAX_THUMBNAILS)
    strip = min(_INNER / thumbnails, _MAX_THUMBNAIL)
    heights = {"title": 0.35, "frames": strip, "sound": 1.0, "axis": 0.2} | dict.fromkeys(tracks, strip) | {"end": 0.0}
    figure, axes = _rows(title, heights, ("frames", "sound", *tracks), len(video) * seconds)
    span = len(video) * seconds
    _draw_frames(axes["frames"], video, thumbnails, strip, span)
    _draw_sound(axes["sound"], clip, span)
    _show_seconds(axes["sound"])
    for name, x in tracks.items():
        pictures = torch.stack([torch.tensor(marked(*pair)) for pair in zip(video.numpy(), x.numpy())])
        _draw_frames(axes[name], pictures, thumbnails, strip, span)
        _name_row(axes[name], name)
    if truth is not None:
        both, either = ((f(*tracks.values())).sum((1, 2)).float() for f in (torch.logical_and, torch.logical_or))
        style = {"fontsize": 8.5, "color": "white", "textcoords": "offset points", "parse_math": False}
        style["bbox"] = {"facecolor": _INK, "edgecolor": "none", "pad": 2.5}
        for image, iou in zip(axes["predicted"].images, _thumbnails(both / either, thumbnails)):
            left, _, bottom, _ = image.get_extent()
            text = "nothing in either" if iou.isnan() else f"IoU {iou:.0%}"
            axes["predicted"].annotate(text, (left, bottom), (6, 7), **style)
    return figure


def masks(clip: media.Clip, masks: Tensor, *, title: str) -> Figure:
    """A picture of what is heard in one clip: frames with their masks, the spectrogram, and the share that is marked.

    Of more than 60 frames as many are shown, spread evenly.

    Args:
        clip: as `media.load_clip` gives it; T frames and their times.
        masks: (T, H, W), bool.

    Raises: ValueError when the shapes do not agree.
    """
    frames, times = len(clip.video), clip.times
    if masks.ndim != 3 or not len(masks) == len(times) == frames:
        raise ValueError(f"masks and times: expected {frames}, got {tuple(masks.shape)} and {len(times)}")
    shown = torch.linspace(0, frames - 1, min(frames, _MAX_SHEET)).round().long()
    columns = min(frames, _MAX_THUMBNAILS)
    lines = -(-len(shown) // columns)
    side = min(_INNER / columns, _MAX_THUMBNAIL)
    heights = {"title": 0.35, "frames": lines * (side + 0.2), "sound": 1.35, "area": 0.9, "last axis": 0.3}
    figure, axes = _rows(title, heights, ("frames", "sound", "area"), clip.duration)

    pictures = media.denormalise(clip.video[shown].cpu()).numpy()
    pictures = [marked(*pair) for pair in zip(pictures, masks[shown].cpu().numpy())]
    _draw_sheet(axes["frames"], pictures, [times[i] for i in shown], columns, side)
    _draw_sound(axes["sound"], clip, clip.duration)
    share = masks.float().mean((1, 2)).tolist()
    axes["area"].fill_between(times, share, color=MARK, alpha=0.3, linewidth=0)
    axes["area"].plot(times, share, color=MARK, linewidth=1.8, marker="o" if frames <= 30 else None, markersize=3.5)
    axes["area"].set(ylim=(0, None if any(share) else 1))
    axes["area"].yaxis.set_major_locator(_few_percents())
    axes["area"].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes["area"].tick_params(axis="y", labelsize=8, colors=_MUTED, length=0)
    axes["area"].grid(axis="y", color=_BACKGROUND, linewidth=0.8)
    _name_row(axes["area"], "marked")
    axes["area"].yaxis.set_label_coords(-0.045, 0.5)
    _show_seconds(axes["area"])
    return figure


def marked(picture: np.ndarray, mask: np.ndarray | Image.Image) -> np.ndarray:
    """A picture with a mask on it, coloured and with an outline.

    (H, W, 3) uint8, and (h, w) bool or what `opacity` makes of it -> (H, W, 3) uint8.
    """
    import numpy as np
    from PIL import Image

    height, width = picture.shape[:2]
    shown = opacity(mask, height, width) if isinstance(mask, np.ndarray) else mask
    colour = Image.new("RGB", (width, height), MARK)
    return np.asarray(Image.composite(colour, Image.fromarray(picture), shown))


def opacity(mask: np.ndarray, height: int, width: int) -> Image.Image:
    """The opacity of a mask (h, w), bool, on a picture of another size."""
    import numpy as np
    from PIL import Image, ImageChops, ImageFilter

    # Blurred by half a pixel of its own and cut off again, so that a small mask has smooth edges on a large picture.
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    scales = [max(1, pixels / own) for pixels, own in zip(grey.size, mask.T.shape)]
    grey = grey.filter(ImageFilter.GaussianBlur([(scale - 1) / 2 for scale in scales]))
    inside = grey.point(lambda value: 128 + 1.5 * max(scales) * (value - 128))  # an edge of about two pixels
    core = inside
    for _ in range(max(1, round(min(height, width) / 150))):  # pixels of the outline
        core = core.filter(ImageFilter.MinFilter(3))
    return ImageChops.subtract(inside, core.point(lambda value: 0.6 * value))


def choice(
    clip: media.Clip, best: Sequence[tuple[str, float]], *, title: str, what: str, below: str | None = None
) -> Figure:
    """A picture of one clip and of what it is taken for: frames, spectrogram, the most probable names.

    Args:
        clip: as `media.load_clip` gives it.
        best: names and their probabilities, the most probable one first.
        what: what the names are of, such as "answer".
        below: a line below the title.
    """
    thumbnails = min(len(clip.video), _MAX_THUMBNAILS)
    strip = min(_INNER / thumbnails, _MAX_THUMBNAIL)
    heights = {
        "title": 0.35 if below is None else 0.6,
        "frames": strip,
        "sound": 1.35,
        "axis": 0.2,
        what: 0.32 * len(best),
        "space": 0.05,
    }
    figure, axes = _rows(title, heights, ("frames", "sound", what), clip.duration)
    if below is not None:
        high = figure.get_figheight()
        _fit(figure.text(_LEFT / _WIDTH, 1 - 0.57 / high, below, fontsize=9, color=_MUTED, parse_math=False), _INNER)
    _draw_frames(axes["frames"], media.denormalise(clip.video.cpu()), thumbnails, strip, clip.duration, clip.times)
    _draw_sound(axes["sound"], clip, clip.duration)
    _show_seconds(axes["sound"])
    _draw_bars(axes[what], best)
    _name_row(axes[what], what)
    return figure


def latents(counts: Sequence[int], scores: Sequence[float], gflops: Sequence[float], score: str) -> Figure:
    """Score and cost against the number of latent tokens, the paper's Figure 1.

    Args:
        counts: numbers of latent tokens, rising. scores: from 0 to 1. gflops: of one clip. score: the scores' name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(_WIDTH, 3.6), dpi=_DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    left, right = figure.subplots(1, 2)
    for axes, values, colour, label in ((left, scores, _PALETTE[0], score), (right, gflops, _PALETTE[4], "GFLOPs")):
        axes.plot(counts, values, color=colour, linewidth=1.8, marker="o", markersize=4)
        _title_panel(axes, label if axes is left else f"{label} of one clip", "latent tokens")
    best = max(range(len(counts)), key=lambda i: scores[i])
    left.plot(counts[best], scores[best], "o", color="none", markeredgecolor=_PALETTE[0], markersize=12)
    note = {"xytext": (0, 12), "textcoords": "offset points", "ha": "center", "fontsize": 9, "color": _INK}
    left.annotate(f"{scores[best]:.1%}", (counts[best], scores[best]), **note)
    left.margins(x=0.08, y=0.25)
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [f"{count}" for count in counts])
    left.minorticks_off()
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.margins(x=0.08, y=0.15)
    right.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    right.ticklabel_format(useOffset=False)
    return figure


def training_curves(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and validation score of each epoch.

    Args:
        history: by the variant's name, the rows of its log.jsonl; rows of single steps are passed over.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(_WIDTH, 3.6), dpi=_DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    panels = {"train_loss": "training loss", "val_score": "validation score"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items()):
        for (name, rows), colour in zip(history.items(), _PALETTE):
            epochs = [row for row in rows if "val_score" in row]
            x, y = [row["epoch"] for row in epochs], [row[key] for row in epochs]
            axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
        _title_panel(axes, label, "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if history:
        for text in axes.legend(frameon=False, fontsize=9, labelcolor=_INK).get_texts():
            text.set_parse_math(False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    return _drawn(figure, "png")


def _drawn(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    with _any_script():
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    # A file's name may be in a script that the font lacks: boxes are drawn, which is good enough.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes the figure as a file of the kind that its name ends with, .png or .svg, atomically."""
    data = _drawn(figure, os.fspath(path).rpartition(".")[2])
    checkpoint.write_atomically(path, lambda file: file.write_bytes(data))


def report(
    path: str | os.PathLike,
    *,
    title: str,
    summary_rows: Sequence[Mapping[str, Any]],
    clips: Iterable[tuple[str, Figure | bytes, str]],
    notes: Sequence[str] = (),
    curves: tuple[Figure | bytes, str] | None = None,
) -> None:
    """Writes an HTML page that needs no other file: a table, notes, the curves, and a picture per clip. Atomic.

    Args:
        summary_rows: a mapping a row, column to value; the columns are in order of first appearance. Numbers are
            right-aligned; format them beforehand if four digits are not what is wanted.
        clips: (name, figure or PNG bytes, caption).
        notes: a paragraph each.
        curves: figure or PNG bytes, and a caption.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _table(summary_rows)]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    if curves is not None:
        parts += ["<h2>Training</h2>", _picture(*curves)]
    sections = [
        f"<section><h3>{html.escape(name)}</h3>{_picture(figure, caption)}</section>" for name, figure, caption in clips
    ]
    if sections:
        parts += ["<h2>Clips</h2>", *sections]
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(part for part in parts if part))
    checkpoint.write_text(path, page)


def _title_panel(axes: Axes, title: str, x: str) -> None:
    """The look of a panel with curves."""
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=_MUTED)
    axes.grid(axis="y", color=_BACKGROUND, linewidth=0.8)
    axes.tick_params(labelsize=9, colors=_MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_BACKGROUND)


# The rows of a picture over time


def _rows(
    title: str, heights: Mapping[str, float], drawn: Iterable[str], span: float
) -> tuple[Figure, dict[str, Axes]]:
    """A figure of rows with their heights in inches, and the axes of those that are drawn, `span` seconds wide."""
    from matplotlib.figure import Figure

    height = sum(heights.values()) + _GAP * len(heights)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    axes, top = {}, height
    for name, tall in heights.items():
        top -= tall + _GAP
        if name in drawn:
            box = (_LEFT / _WIDTH, top / height, _INNER / _WIDTH, tall / height)
            axes[name] = figure.add_axes(box, xlim=(0, span))
            _plain(axes[name])
    style = {"fontsize": 12, "fontweight": "bold", "color": _INK, "parse_math": False}
    _fit(figure.text(_LEFT / _WIDTH, 1 - 0.32 / height, title, **style), _INNER)
    return figure, axes


def _fit(text: Text, inches: float) -> None:
    """Takes from the middle of a text what there is no room for."""
    whole = text.get_text()
    with _any_script():
        for length in range(len(whole), 0, -1):
            text.set_text(_cut(whole, length))
            if text.get_window_extent().width <= inches * _DPI:
                break


def _cut(text: str, length: int) -> str:
    """The text with at most so many characters, those of its middle left out."""
    tail = length // 2
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[len(text) - tail :]}"


def _plain(axes: Axes) -> None:
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _show_seconds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g} s"))
    axes.tick_params(axis="x", bottom=True, labelbottom=True, labelsize=8, colors=_MUTED, length=3)


def _name_row(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=9, color=_INK, rotation=0, ha="right", va="center", labelpad=8)


def _thumbnails(x: Tensor, count: int) -> Tensor:
    """Those of T entries that stand for `count` equal stretches of time."""
    return x[((torch.arange(count, dtype=torch.float64) + 0.5) / count * len(x)).long()]


def _draw_frames(
    axes: Axes, pictures: Tensor, thumbnails: int, side: float, span: float, times: Sequence[float] = ()
) -> None:
    """Pictures (T, S, S, 3) uint8, each over the middle of the stretch of time it stands for.

    times: T seconds, if they are known. Where they end early or begin late there are fewer thumbnails.
    """
    start, end = 0.0, span
    if len(times) > 1:
        start, end = times[0], min(span, times[-1] + (times[-1] - times[0]) / (len(times) - 1))
        thumbnails = max(1, int(thumbnails * (end - start) / span + 0.1))
    half = 0.5 * (side - 0.04) * span / _INNER
    for i, picture in enumerate(_thumbnails(pictures, thumbnails).numpy()):
        middle = min(max(half, start + (i + 0.5) / thumbnails * (end - start)), span - half)
        axes.imshow(picture, extent=(middle - half, middle + half, 0, 1), aspect="auto", interpolation="antialiased")
    axes.set(xlim=(0, span), ylim=(0, 1))
    _name_row(axes, "frames")


def _draw_sheet(axes: Axes, pictures: Sequence[np.ndarray], times: Sequence[float], columns: int, side: float) -> None:
    """Pictures in rows, the time above each, in a box that is `_INNER` inches wide."""
    high = side + 0.2
    lines = -(-len(pictures) // columns)
    for i, (picture, time) in enumerate(zip(pictures, times)):
        left, top = i % columns * side, (lines - i // columns) * high
        axes.imshow(
            picture,
            extent=(left, left + side - 0.04, top - high + 0.02, top - 0.22),
            aspect="auto",
            interpolation="antialiased",
        )
        axes.text(left, top - 0.17, f"{time:.1f} s", fontsize=8, color=_MUTED, va="bottom")
    axes.set(xlim=(0, _INNER), ylim=(0, lines * high))
    _name_row(axes, "frames")


def _draw_bars(axes: Axes, best: Sequence[tuple[str, float]]) -> None:
    """A bar for each name, the first one on top, with name and probability beside it."""
    axes.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
    for i, (name, p) in enumerate(best):
        colour = _PALETTE[0] if i == 0 else "#b4bcc5"
        axes.barh(i, 0.6 * p, 0.72, color=colour)
        style = {"fontsize": 9.5, "va": "center", "parse_math": False, "fontweight": "bold" if i == 0 else "normal"}
        left = 0.6 * p + 0.008
        _fit(axes.text(left, i, f"{p:.2f}  {name}", color=_INK, **style), (1 - left) * _INNER)


def _few_percents() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=3, steps=[1, 2, 5, 10], min_n_ticks=2)


def _draw_sound(axes: Axes, clip: media.Clip, span: float) -> None:
    """The spectrograms over time; without `clip.spans` they share `span` seconds equally."""
    import numpy as np

    audio = clip.audio.detach().float().cpu().numpy()
    windows = len(audio)
    # What follows the last frame of a window is padding: zeros, which no spectrogram of silence has.
    used = np.count_nonzero(np.abs(audio).max((0, 2))) or audio.shape[1]
    spans = clip.spans or [(i * span / windows, (i + 1) * span / windows) for i in range(windows)]
    starts, ends = np.array(spans).T
    start, end = starts[0], ends[-1]
    # Windows may overlap, or leave sound out between them: of each is shown what is nearest to its middle.
    step = (ends[0] - starts[0]) / used
    times = np.linspace(start, end, 2 * min(round((end - start) / step), max(windows * used, _FINEST)) + 1)[1::2]
    middles = (starts + ends) / 2
    nearest = np.searchsorted((middles[1:] + middles[:-1]) / 2, times)
    columns = np.floor((times - starts[nearest]) / step).astype(int)
    heard = (columns >= 0) & (columns < used)
    bands = audio[nearest[heard], columns[heard]].T
    # Narrow mel filters may hold no Fourier bin and are constant then: no sound can reach them.
    empty = np.ptp(bands, axis=1) == 0
    if not empty.all():
        rows = np.arange(len(bands))
        bands = bands[[rows[~empty][np.abs(rows[~empty] - row).argmin()] for row in rows]]
    low, high = np.percentile(bands, (2, 99.8))
    image = np.full((len(bands), len(times)), np.nan, np.float32)
    image[:, heard] = bands
    axes.imshow(
        image,
        extent=(start, end, 0, 1),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=max(high, low + 1e-3),
        interpolation="antialiased",
    )
    axes.set_ylim(0, 1)
    if empty.all():
        axes.text((start + min(end, span)) / 2, 0.5, "silence", color="white", fontsize=9, ha="center", va="center")
    _name_row(axes, "sound\nlow to high")


def _draw_probabilities(
    axes: Axes, probabilities: Tensor, drawn: list[int], colours: Mapping[int, str], seconds: float
) -> None:
    segments, count = probabilities.shape
    x = [(i + 0.5) * seconds for i in range(segments)]
    for level in (0, 0.5, 1):
        axes.axhline(level, color=_BACKGROUND, linewidth=0.8, zorder=0)
    marker = "o" if segments <= 30 else None
    for k in reversed(drawn):
        background = k == count - 1
        axes.plot(
            x,
            probabilities[:, k].tolist(),
            color="#b4bcc5" if background else colours[k],
            linestyle=(0, (4, 2)) if background else "-",
            linewidth=1.2 if background else 1.8,
            marker=None if background else marker,
            markersize=3.5,
            clip_on=False,
        )
    axes.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    axes.tick_params(axis="y", labelsize=8, colors=_MUTED, length=0)
    _name_row(axes, "probability")
    axes.yaxis.set_label_coords(-0.03, 0.5)


def _draw_track(
    axes: Axes,
    name: str,
    track: list[int],
    classes: Sequence[str],
    labels: Mapping[int, str],
    colours: Mapping[int, str],
    seconds: float,
) -> None:
    axes.set_ylim(0, 1)
    _name_row(axes, name)
    first = 0
    for k, run in groupby(track):
        stop = first + len(list(run))
        axes.barh(0.5, (stop - first) * seconds, 1, first * seconds, color=colours[k], edgecolor="white", linewidth=1.2)
        style = {"fontsize": 8.5, "color": _ink_on(colours[k]), "ha": "center", "va": "center", "parse_math": False}
        text = axes.text((first + stop) / 2 * seconds, 0.48, "", **style)
        room = (stop - first) / len(track) * _INNER * _DPI - 8
        for label in (classes[k], labels[k]):
            text.set_text(label)
            if text.get_window_extent().width <= room:
                break
        else:
            text.remove()
        first = stop


def _draw_legend(figure: Figure, labels: Mapping[int, str], colours: Mapping[int, str], rows: int) -> None:
    from matplotlib.patches import Patch

    legend = figure.legend(
        [Patch(color=colours[k]) for k in labels],
        [*labels.values()],
        loc="lower left",
        bbox_to_anchor=(_LEFT / _WIDTH, 0),
        ncols=-(-len(labels) // rows),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1,
        handleheight=1,
        borderaxespad=0.5,
        borderpad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _colours(shown: Iterable[int]) -> dict[int, str]:
    """A class has the same colour in every picture, unless another of the picture has taken it."""
    colours: dict[int, str] = {}
    for k in shown:
        turn = (_PALETTE[(k + i) % len(_PALETTE)] for i in range(len(_PALETTE)))
        colours[k] = next((c for c in turn if c not in colours.values()), _PALETTE[k % len(_PALETTE)])
    return colours


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _labels(classes: Sequence[str], shown: Iterable[int]) -> dict[int, str]:
    """A short name of each class that is shown: its first, unless another one has the same."""
    first = {k: _short(classes[k]) for k in shown}
    names = [*first.values()]
    return {k: name if names.count(name) == 1 else _cut(classes[k], 20) for k, name in first.items()}


def _short(name: str) -> str:
    """A class's first name: "Male speech, man speaking" -> "Male speech"."""
    first = name.split(",")[0].split(" (")[0].strip() or name
    return first if len(first) <= 20 else first[:19] + "…"


# The pieces of a report

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --page: #f7f8fa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --muted: #9aa5b1; --line: #323f4b; --page: #14181d; --card: #1f2730; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; font-size: .85rem; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
section { margin: 0 0 1.5rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
img { display: block; width: 100%; height: auto; }
figcaption { padding: .5rem .9rem; color: var(--muted); background: var(--card); font-size: .9rem; }
"""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ""
    # A column of figures stands to the right even if they come as text, such as "81.1 %".
    right = {c for c in columns if all(_is_figure(row[c]) for row in rows if row.get(c) is not None)}

    def line(tag: str, cells: Iterable[tuple[str, str]]) -> str:
        marked = {c: ' class="number"' if c in right else "" for c in columns}
        return "<tr>" + "".join(f"<{tag}{marked[c]}>{html.escape(text)}</{tag}>" for c, text in cells) + "</tr>"

    body = "\n".join(line("td", ((c, _cell(row.get(c))) for c in columns)) for row in rows)
    head = line("th", ((c, c) for c in columns))
    return f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) or str(value)[:1].isdigit() or str(value)[:2].strip("+-–.")[:1].isdigit()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(figure: Figure | bytes, caption: str) -> str:
    data = figure if isinstance(figure, bytes) else png(figure)
    text = html.escape(caption, quote=True)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    return f'<figure><img alt="{text}" src="{source}">{below}</figure>'
