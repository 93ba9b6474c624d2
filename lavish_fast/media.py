"""A video file to frames and log-mel spectrograms, as the released AVE data loader makes them."""

from __future__ import annotations

import inspect
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lavish_fast.config import SpectrogramConfig
from lavish_fast.decoding import (
    FRAME_RATE,
    SILENCE,
    MediaError,
    Track,
    list_images,
    local_file,
    opened,
    read_image,
    read_packets,
    scan,
    silence,
    stream_kinds,
    take_frames,
    warnings_of,
)
from lavish_fast.spectrogram import patches_of, spans_of, spectrograms
from lavish_fast.workers import load_in_workers, load_one

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".ogv", ".avi", ".flv", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".mxf", ".gif"),
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SPECTROGRAM = SpectrogramConfig()


class Clip(NamedTuple):
    """What the model reads of one file.

    audio: (T, spectrogram.frames, mel_bins) float32, normalised; T = 1 for a spectrogram of the whole clip.
    video: (T, 3, S, S) float32, normalised by the ImageNet mean and std. duration: seconds. warnings: one line each,
    with the file's path. patches: (T, 96, 64) float32, VGGish's of the sound, where they are asked for.
    Where they are known, in seconds from the start of the earlier stream: times, at which each frame is shown; spans,
    the start and the end of what each spectrogram is of.
    """

    audio: Tensor
    video: Tensor
    duration: float
    warnings: tuple[str, ...] = ()
    patches: Tensor | None = None
    times: tuple[float, ...] = ()
    spans: tuple[tuple[float, float], ...] = ()

    @property
    def silent(self) -> bool:
        """Whether there is no sound to hear: none in the file, or nothing but zeros."""
        return any(line.endswith(SILENCE) for line in self.warnings)


def load_clip(
    path: str | os.PathLike[str],
    *,
    frames: int | None = 10,
    img_size: int = 192,
    spectrogram: SpectrogramConfig = _SPECTROGRAM,
    antialias: bool = False,
    frame_rate: float | None = FRAME_RATE,
    patches: bool = False,
) -> Clip:
    """The clip of a video file, sampled as the released AVE loader samples extracted frames and wav files.

    Video: the frames that `ffmpeg -r 3` would extract are numbered 1..N, and linspace(1, N, T) of them are taken,
    turned upright and resized. Audio: the first audio stream, all channels averaged, at the spectrogram's rate,
    preceded by silence if it starts later than the video. Without sound, silence and a warning.

    Args:
        path: a local file of any format that PyAV reads.
        frames: T; None for one a second, at least 1.
        img_size: S, in pixels.
        antialias: of the bicubic resize. The released results come from a torchvision without it.
        frame_rate: frames a second that are extracted; None for all of the file's own.
        patches: whether to add VGGish's log-mel patches, one for each of T windows of 0.975 s.

    Raises: MediaError naming the file and the reason; ValueError for arguments out of range.
    """
    _check_sizes(frames, img_size)
    if frame_rate is not None and not 0 < frame_rate < math.inf:
        raise ValueError(f"frame_rate: expected a positive number or None, got {frame_rate}")
    path = local_file(path)
    damage: Counter[str] = Counter()
    source = scan(path, spectrogram.sample_rate, damage)
    count = frames or max(1, round(source.duration))
    video: list[Tensor | None] = [None] * count
    times = [0.0] * count

    def take(places: list[int], seconds: float, image: np.ndarray) -> None:
        picture = resize(image, img_size, antialias)
        for place in places:
            video[place], times[place] = picture, seconds

    choose = lambda keys: [keys[i - 1] for i in np.linspace(1, len(keys), count, dtype=int)]  # noqa: E731
    take_frames(path, source, frame_rate, choose, take, damage)
    video = torch.stack(video)
    audio = spectrograms(source.waveform, count, spectrogram)
    heard = patches_of(source.waveform, count) if patches else None
    spans = spans_of(len(source.waveform), count, spectrogram) if len(source.waveform) else ()
    warnings = warnings_of(path, source.warnings, damage)
    return Clip(audio, video, source.duration, warnings, heard, tuple(times), spans)


class Sound(NamedTuple):
    """What `extract` gives beside frames. waveform: (samples,) in [-1, 1]. duration: seconds. warnings: a `Clip`'s."""

    waveform: Tensor
    duration: float
    warnings: tuple[str, ...]


def extract(
    path: str | os.PathLike[str],
    take: Callable[[list[int], float, np.ndarray], None],
    *,
    frame_rate: float | None = FRAME_RATE,
    sample_rate: int = _SPECTROGRAM.sample_rate,
) -> Sound:
    """Hands over the frames of a video file, the same that `load_clip` samples from, and returns its sound.

    Args:
        take: called as take(places, seconds, image) for each frame that is extracted, in order of display: its places
            among them, from 0 (more than one where it is repeated), the time at which it is shown, and the picture,
            (H, W, 3) uint8, upright. A file whose packets name frames that do not decode is begun again.
        frame_rate: frames a second that are extracted; None for all of the file's own.
        sample_rate: of the waveform, which is all channels' mean.

    Raises: MediaError naming the file and the reason.
    """
    path = local_file(path)
    damage: Counter[str] = Counter()
    source = scan(path, sample_rate, damage)
    take_frames(path, source, frame_rate, lambda keys: keys, take, damage)
    return Sound(source.waveform, source.duration, warnings_of(path, source.warnings, damage))


def load_frames_and_wav(
    frames_dir: str | os.PathLike[str],
    wav_path: str | os.PathLike[str],
    *,
    frames: int | None = 10,
    img_size: int = 192,
    spectrogram: SpectrogramConfig = _SPECTROGRAM,
    antialias: bool = False,
    patches: bool = False,
) -> Clip:
    """The clip of the extracted layout: a folder of jpg or png frames at 3 frames a second, and a wav file.

    Frames are ordered by the number in their names. Of several channels the first is used, as the released
    loader does. The duration is the sound's. Arguments and errors as in `load_clip`.
    """
    _check_sizes(frames, img_size)
    images = list_images(frames_dir)
    wav_path = local_file(wav_path)
    damage: Counter[str] = Counter()
    with opened(wav_path) as container:
        if not container.streams.audio:
            raise MediaError(wav_path, f"expected an audio stream, got {stream_kinds(container)}")
        sound = Track(wav_path, container.streams.audio[0], 0, damage)
        for packet in read_packets(container, [sound.stream], damage):
            sound.hear(packet)
        sound.hear(None)
    waveform = sound.waveform(spectrogram.sample_rate)
    warnings = silence(waveform)
    duration = len(waveform) / spectrogram.sample_rate or len(images) / FRAME_RATE
    count = frames or max(1, round(duration))
    resized: dict[int, Tensor] = {}
    chosen = np.linspace(1, len(images), count, dtype=int)
    for i in chosen:
        if i not in resized:
            resized[i] = resize(read_image(images[i - 1]), img_size, antialias)
    video = torch.stack([resized[i] for i in chosen])
    audio = spectrograms(waveform, count, spectrogram)
    heard = patches_of(waveform, count) if patches else None
    return Clip(audio, video, duration, warnings_of(wav_path, warnings, damage), heard)


def load_clips(
    paths: Iterable[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    timeout: float = 600.0,
    load: Callable[..., Clip] = load_clip,
    **kwargs: Any,
) -> Iterator[tuple[str | os.PathLike[str], Clip | MediaError]]:
    """The clips of many files, in the order of `paths`, decoded in worker processes.

    A file that cannot be read, that kills its worker or that takes too long gives a MediaError in its place, and
    the others go on. At most two files a worker are ahead of the one being handed out.

    Args:
        workers: processes; None for one a CPU core, 0 to decode in this process, without protection or timeout.
        timeout: seconds for one file.
        load: called as load(path, **kwargs) in the workers, which import it by its name.
        kwargs: `load_clip`'s keyword arguments.

    Raises: TypeError for arguments that `load` does not have; RuntimeError if workers cannot start at all.
    """
    inspect.signature(load).bind("", **kwargs)
    if workers is None:
        workers = os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    if workers == 0:
        return ((path, load_one(load, path, kwargs)) for path in paths)
    return load_in_workers(iter(paths), workers, timeout, load, kwargs)


def find_videos(path: str | os.PathLike[str], *, skip: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
    """The file itself, or the video files (by `VIDEO_SUFFIXES`) under a directory in sorted order.

    skip: whether a folder below the directory is left out.

    Raises: MediaError if there is nothing at `path`.
    """
    if not os.path.isdir(path):
        return [Path(local_file(path))]
    found = []
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not skip(Path(folder, name))]
        found += [Path(folder, name) for name in names]
    return sorted(file for file in found if file.suffix.lower() in VIDEO_SUFFIXES)


def denormalise(video: Tensor) -> Tensor:
    """Frames as pictures: (T, 3, H, W) normalised by ImageNet's mean and std -> (T, H, W, 3) uint8."""
    mean, std = (torch.tensor(v, device=video.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((video.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def resize(image: np.ndarray, size: int, antialias: bool = False) -> Tensor:
    """A picture as the model reads it: (H, W, 3) uint8 -> (3, size, size) float32, bicubic, normalised.

    Not clamped in between: torchvision does not, for floats.
    """
    x = torch.tensor(image).permute(2, 0, 1)[None] / 255
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=antialias)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return x.sub_(mean).div_(std)


def _check_sizes(frames: int | None, img_size: int) -> None:
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1 or None, got {frames}")
    if img_size < 1:
        raise ValueError(f"img_size: expected at least 1 pixel, got {img_size}")
