"""Shapes that move and sounds that go with them: what the demos' clips are drawn and rendered from.

Eight categories, each a shape together with a sound. Nothing in a second tells of its neighbours: every sound falls
silent at the end of each second.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
import numpy as np

CATEGORIES = ("Bell", "Siren", "Drum", "Engine", "Bird", "Whistle", "Clock", "Rain")
SHAPES = ("triangle", "cross", "disc", "square", "star", "crescent", "ring", "bars")  # in the order of CATEGORIES

SIZE = 128
# A multiple of 3: the 3 frames per second that AVE's protocol extracts are then frames of the file.
FPS = 9
SAMPLE_RATE = 16000

_DIAMETERS = (0.52, 0.62)  # of the objects in clips, as fractions of the frame's side

# AVE's audio windows begin up to 0.1 s early (linspace(0, len - 17600, 10)): with this much quiet at the end of
# each second, no window hears the second before its own, or could tell that a sound begins or ends there.
_QUIET_SECONDS = 0.12
_FADE_SECONDS = 0.02


# Pictures


def random_image(
    rng: np.random.Generator,
    index: int | None,
    size: int = SIZE,
    diameters: tuple[float, float] = _DIAMETERS,
) -> np.ndarray:
    """One picture (size, size, 3) uint8: the shape of category `index`, or only a background for None.

    diameters: the least and the greatest, as fractions of the picture's side.
    """
    background = random_background(rng, size)
    if index is None:
        return background
    look = random_look(rng, background, diameters)
    return render_frame(background, index, *look.pose(0.0), size=look.size, colour=look.colour)


def render_frame(
    background: np.ndarray,
    index: int,
    x: float,
    y: float,
    angle: float,
    *,
    size: float,
    colour: np.ndarray,
) -> np.ndarray:
    """Draw the shape of category `index`.

    Args:
        background: (H, W, 3) uint8.
        x, y, size: the shape's centre and diameter, in units of the frame's shorter side.
        angle: in radians. colour: (3,), 0 to 255.

    Returns: (H, W, 3) uint8.
    """
    frame = background.copy()
    side = min(frame.shape[:2])
    radius = 0.5 * size * side
    # Only the square that holds the shape is drawn; corners reach sqrt(2) radii at most.
    low_x, low_y = (max(0, int(c * side - 1.5 * radius)) for c in (x, y))
    high_x, high_y = (max(0, int(c * side + 1.5 * radius) + 1) for c in (x, y))
    box = frame[low_y:high_y, low_x:high_x]
    columns = (low_x + np.arange(box.shape[1], dtype=np.float32) + 0.5 - x * side) / radius
    rows = (low_y + np.arange(box.shape[0], dtype=np.float32)[:, None] + 0.5 - y * side) / radius
    cover = _coverage(index, columns, rows, angle, radius)[..., None]
    shade = 1 - 0.12 * (columns + rows)[..., None]
    box[:] = np.clip(box + cover * (np.asarray(colour, dtype=np.float32) * shade - box), 0, 255)
    return frame


def render_mask(side: int, index: int, x: float, y: float, angle: float, *, size: float) -> np.ndarray:
    """The pixels of a square picture that `render_frame` would draw on: (side, side) bool, for its arguments."""
    centres = np.arange(side, dtype=np.float32) + 0.5
    radius = 0.5 * size * side
    columns, rows = (centres - x * side) / radius, (centres[:, None] - y * side) / radius
    return _coverage(index, columns, rows, angle, radius) > 0.5


def _coverage(index: int, columns: np.ndarray, rows: np.ndarray, angle: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1: columns (W,) and rows (H, 1) in radii from its centre."""
    cos, sin = math.cos(angle), math.sin(angle)
    u = cos * columns + sin * rows
    v = cos * rows - sin * columns
    # The signed distance in pixels gives each pixel's coverage, and with it smooth edges.
    return np.clip(0.5 - radius * _DISTANCES[SHAPES[index]](u, v), 0, 1)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, inner: float) -> np.ndarray:
    normals = 2 * np.pi * np.arange(sides) / sides
    return np.maximum.reduce([np.cos(n) * u + np.sin(n) * v for n in normals]) - inner


def _box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded into a tenth of the star, which has one edge: from the tip at radius 1 to the notch at radius 0.42.
    fold = np.abs((np.arctan2(v, u) % (2 * np.pi / 5)) - np.pi / 5)
    radius = np.hypot(u, v)
    angle = np.pi / 5 - fold
    notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
    return normal[0] * (radius * np.cos(angle) - 1) + normal[1] * radius * np.sin(angle)


# Signed distances (negative inside) to shapes of about unit radius; exact at edges, which is all that is drawn.
_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "triangle": lambda u, v: _polygon(u, v, 3, 0.55),
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.28), _box(u, v, 0.28, 1.0)),
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: _box(u, v, 0.78, 0.78),
    "star": _star,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "bars": lambda u, v: _box(np.abs(np.abs(u) - 0.36) - 0.36, v, 0.17, 0.9),
}


@dataclass(frozen=True)
class Look:
    """An object's looks, and its path, a Lissajous curve; in units of the frame's side, and seconds."""

    size: float
    colour: np.ndarray
    centre: np.ndarray
    swing: np.ndarray
    rate: np.ndarray
    phase: np.ndarray
    angle: float
    spin: float

    def pose(self, t: float) -> tuple[float, float, float]:
        """x, y and angle at t seconds."""
        x, y = self.centre + self.swing * np.sin(2 * np.pi * self.rate * t + self.phase)
        return float(x), float(y), self.angle + self.spin * t


def random_look(
    rng: np.random.Generator,
    background: np.ndarray,
    diameters: tuple[float, float] = _DIAMETERS,
    *,
    middle: tuple[float, float] = (0.5, 0.5),
    extent: tuple[float, float] = (1.0, 1.0),
) -> Look:
    """An object that moves within a part of the frame, of a colour that stands out from the background.

    middle, extent: of that part, x and y, in units of the frame's side.
    """
    size = rng.uniform(*diameters)
    # The object stays whole inside.
    room = 0.5 * np.asarray(extent) - 0.52 * size
    swing = rng.uniform(0.2, 1.0, 2) * room
    mean = background.mean(axis=(0, 1))
    while True:
        colour = rng.uniform(0, 255, 3)
        contrast = np.abs(colour - mean)
        if contrast.max() > 90 and contrast.mean() > 56:
            break
    return Look(
        size=size,
        colour=colour,
        centre=middle + rng.uniform(-1, 1, 2) * (room - swing),
        swing=swing,
        rate=rng.uniform(0.05, 0.3, 2),
        phase=rng.uniform(0, 2 * np.pi, 2),
        angle=rng.uniform(0, 2 * np.pi),
        spin=rng.uniform(-1, 1),
    )


def random_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    base = rng.uniform(0.15, 0.85)
    # A gradient between four muted corners, then the same at finer and finer grids: noise that looks like a texture.
    picture = base + _upsample(rng.uniform(-0.15, 0.15, (2, 2, 3)), size)
    strength = rng.uniform(0.02, 0.1)
    for cells in (5, 9, 17, 33):
        grey = rng.normal(0, strength, (cells, cells, 1)) * (5 / cells) ** 0.3
        picture = picture + _upsample(grey, size)
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _upsample(grid: np.ndarray, size: int) -> np.ndarray:
    """(n, n, C) to (size, size, C), linearly."""
    n = len(grid)
    weights = np.maximum(0, 1 - np.abs(np.linspace(0, n - 1, size)[:, None] - np.arange(n)))
    return np.einsum("yi,ijc,xj->yxc", weights, grid, weights, optimize=True)


def frames(rng: np.random.Generator, seen: tuple[str | None, ...]) -> Iterator[np.ndarray]:
    """(SIZE, SIZE, 3) uint8 for each frame of a clip: of each second the category that is seen, or None."""
    margin = SIZE // 4
    scene = random_background(rng, SIZE + margin)
    pan = rng.uniform(0, margin, (2, 2))
    looks = [(category, seconds, random_look(rng, scene)) for category, seconds in runs(seen)]
    for category, seconds, look in looks:
        for i in range(seconds.start * FPS, seconds.stop * FPS):
            t = i / FPS
            y, x = (pan[0] + (pan[1] - pan[0]) * t / len(seen)).astype(int)
            view = scene[y : y + SIZE, x : x + SIZE]
            if category is None:
                yield view.copy()
            else:
                index = CATEGORIES.index(category)
                yield render_frame(view, index, *look.pose(t), size=look.size, colour=look.colour)


# Sounds


def random_sound(
    rng: np.random.Generator, index: int | None, seconds: float = 1.0, sample_rate: int = SAMPLE_RATE
) -> np.ndarray:
    """A sound (samples,) float32 in [-1, 1] of category `index` over background noise, or only the noise for None."""
    noise = _random_noise(rng, round(seconds * sample_rate), sample_rate)
    if index is None:
        return noise
    return noise + _random_gain(rng) * render_sound(rng, index, seconds, sample_rate)


def render_sound(rng: np.random.Generator, index: int, seconds: float, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The sound of category `index` at a random pitch, pace and phase: (samples,) float32 with a peak of 1.

    The last 0.12 s of each full second are silent. sample_rate: in Hz, at least 16000.
    """
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    sound = _SOUNDS[CATEGORIES[index]](rng, t, sample_rate)
    sound = sound * np.clip(np.minimum(t % 1, 1 - _QUIET_SECONDS - t % 1) / _FADE_SECONDS, 0, 1)
    return (sound / np.abs(sound).max()).astype(np.float32)


def _pitch(rng: np.random.Generator, hertz: float) -> float:
    return hertz * 2 ** rng.uniform(-0.35, 0.35)


def _since_stroke(rng: np.random.Generator, t: np.ndarray, pace: float) -> np.ndarray:
    """Seconds since the last of regular strokes, `pace` of them a second."""
    return (t * pace + rng.random()) % 1 / pace


def _bell(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    since, pitch = _since_stroke(rng, t, rng.uniform(1.8, 2.6)), _pitch(rng, 700)
    partials = (1, 1.19, 1.5, 2, 2.74, 3.76, 5.1)
    return sum(np.exp(-since * (3 + 1.5 * p)) * np.sin(2 * np.pi * pitch * p * since) / p**0.5 for p in partials)


def _siren(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    high = (t * rng.uniform(2, 3.5) + rng.random()) % 1 < 0.5
    phase = np.cumsum(2 * np.pi * _pitch(rng, 650) * np.where(high, 1.5, 1.0)) / rate
    return sum(np.sin(h * phase) / h for h in (1, 2, 3, 4))


def _drum(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    since, pitch = _since_stroke(rng, t, rng.uniform(3, 4.5)), _pitch(rng, 110)
    # The pitch falls from three times its value as the skin settles.
    phase = 2 * np.pi * pitch * (since + 2 * 0.03 * (1 - np.exp(-since / 0.03)))
    skin = _noise(rng, len(t), rate, 100, 1200)
    return np.exp(-since / 0.06) * (np.sin(phase) + 0.4 * skin)


def _engine(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    pitch, beat = _pitch(rng, 160), rng.uniform(14, 20)
    cycle = np.linspace(0, 2 * np.pi, 1025)
    rumble = sum(np.sin(h * cycle + rng.uniform(0, 2 * np.pi)) / h**0.7 for h in range(1, 17))
    rumble = np.interp(2 * np.pi * pitch * t % cycle[-1], cycle, rumble)
    return rumble * (1 + 0.8 * np.sin(2 * np.pi * beat * t + rng.uniform(0, 2 * np.pi)))


def _bird(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    pace = rng.uniform(4.5, 6.5)
    since, pitch = _since_stroke(rng, t, pace), _pitch(rng, 2600)
    stroke = since * pace / 0.7
    envelope = np.sin(np.pi * np.clip(stroke, 0, 1)) ** 0.7
    return envelope * np.sin(2 * np.pi * pitch * since * (1 + 0.5 * stroke))


def _whistle(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    phase = 2 * np.pi * _pitch(rng, 1500) * t + 3 * np.sin(2 * np.pi * rng.uniform(4, 7) * t)
    return np.sin(phase) + 0.2 * np.sin(2 * phase)


def _clock(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    since = _since_stroke(rng, t, rng.uniform(7, 11))
    return np.exp(-since / 0.004) * _noise(rng, len(t), rate, 800 * rng.uniform(0.7, 1.4), 8000)


def _rain(rng: np.random.Generator, t: np.ndarray, rate: int) -> np.ndarray:
    return _noise(rng, len(t), rate, _pitch(rng, 1200), _pitch(rng, 5000))


_SOUNDS: dict[str, Callable[[np.random.Generator, np.ndarray, int], np.ndarray]] = {
    "Bell": _bell,
    "Siren": _siren,
    "Drum": _drum,
    "Engine": _engine,
    "Bird": _bird,
    "Whistle": _whistle,
    "Clock": _clock,
    "Rain": _rain,
}


def _noise(rng: np.random.Generator, samples: int, rate: int, low: float, high: float, slope: float = 0) -> np.ndarray:
    """Noise between two frequencies with a spectrum of f**-slope and an RMS of 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    band = (hertz >= low) & (hertz <= high)
    noise = np.fft.irfft(spectrum * band * np.maximum(hertz, 1) ** -slope, samples)
    return noise / max(noise.std(), 1e-12)


def _random_noise(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    level = 10 ** (rng.uniform(-54, -40) / 20)
    return (level * _noise(rng, samples, rate, 20, rate / 2, slope=rng.uniform(0, 0.8))).astype(np.float32)


def _random_gain(rng: np.random.Generator) -> float:
    return 10 ** (rng.uniform(-16, -5) / 20)


def waveform(rng: np.random.Generator, heard: tuple[str | None, ...]) -> np.ndarray:
    """(seconds * SAMPLE_RATE,) float32 of a clip: of each second the category that is heard, or None."""
    wave = _random_noise(rng, len(heard) * SAMPLE_RATE, SAMPLE_RATE)
    for category, seconds in runs(heard):
        if category is not None:
            sound = render_sound(rng, CATEGORIES.index(category), len(seconds))
            first = seconds.start * SAMPLE_RATE
            wave[first : first + len(sound)] += _random_gain(rng) * sound
    return wave


# Files


def runs(track: Iterable[str | None]) -> Iterator[tuple[str | None, range]]:
    """The stretches of a track in which nothing changes: one object or one sound each."""
    first = 0
    for category, group in groupby(track):
        stop = first + len(list(group))
        yield category, range(first, stop)
        first = stop


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random numbers of clip `index` for one purpose: "deck", "plan", "video" or "audio"."""
    return np.random.default_rng([seed, index, ("deck", "plan", "video", "audio").index(purpose)])


def check_sizes(sizes: Mapping[str, int], *, seed: int, workers: int) -> None:
    """Raises: ValueError for a negative count or seed, no clip at all, or no worker."""
    for name, value in {**sizes, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if not sum(sizes.values()):
        raise ValueError(f"{', '.join(sizes)}: expected at least one clip, got none")


def write_clips(
    write: Callable[[int], None],
    total: int,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Calls `write` with the number of each clip, below `total`.

    Args:
        write: where there are more workers than one, something that can be sent to another process.
        workers: processes that render. 1 renders in this one; more are spawned, so a script that
            asks for them needs its `if __name__ == "__main__"`.
        progress: called as progress(clips written, clips in all) after each clip.
    """
    for done, _ in enumerate(_in_processes(write, total, min(workers, total)), start=1):
        if progress:
            progress(done, total)


def _in_processes(write: Callable[[int], None], total: int, workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(write, range(total))
        return
    # Spawned, because a process that has run torch or CUDA cannot be forked safely.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write, range(total), chunksize=4)


def majority_accuracy(train: Iterable[tuple[Hashable, str]], test: Sequence[tuple[Hashable, str]]) -> float:
    """The share (0 to 1) of the test labels that are the most frequent one for what is observed, by the train pairs.

    train, test: what is observed of something, and its label. Of what was never observed the label is never right.
    """
    counts: dict[Hashable, Counter[str]] = {}
    for observed, label in train:
        counts.setdefault(observed, Counter())[label] += 1
    best = {observed: labels.most_common(1)[0][0] for observed, labels in counts.items()}
    return sum(best.get(observed) == label for observed, label in test) / len(test)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, the same bytes on every system."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def write_video(path: Path, pictures: Iterable[np.ndarray], wave: np.ndarray | None) -> None:
    """Writes an mp4 file: h264 at `FPS` frames per second, AAC in mono at `SAMPLE_RATE`.

    Args:
        pictures: (SIZE, SIZE, 3) uint8 each.
        wave: (samples,) float32, clipped to [-1, 1]; None for a file without sound.
    """
    with av.open(str(path), "w") as container:
        # One thread: x264 gives other bytes for another number of threads.
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "24", "threads": "1"})
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        if wave is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
            audio.bit_rate = 64000

        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))

        if wave is not None:
            frame = av.AudioFrame.from_ndarray(np.clip(wave, -1, 1)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
