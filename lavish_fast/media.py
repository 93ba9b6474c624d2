"""A video file to frames and log-mel spectrograms, as the released AVE data loader makes them.

Files are taken as hostile: only local regular files are opened, playlists are refused, sizes are capped before
anything is decoded, and `load_clips` decodes in worker processes that may die without ending the run.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import os
import pickle
import re
import signal
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from itertools import chain, groupby, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lavish_fast.config import SpectrogramConfig
from lavish_fast.vggish import PATCH_SAMPLES, log_mel_patches

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".ogv", ".avi", ".flv", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".mxf", ".gif"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FRAME_RATE = 3.0  # frames per second at which AVE videos are extracted
SILENCE = "silence used"  # the end of each warning that there is no sound
MAX_PIXELS = 8192 * 8192  # of one frame
MAX_SECONDS = 3600.0
MAX_AUDIO_DELAY = 0.05  # seconds of a late audio stream that count as jitter of the container
OPEN_TIMEOUT, READ_TIMEOUT = 60.0, 60.0  # seconds

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SPECTROGRAM = SpectrogramConfig()

# Demuxers that open further files, or whose input is a script.
_INDIRECT_FORMATS = {"avisynth", "concat", "dash", "hls", "imf", "lavfi", "sdp", "vapoursynth", "webm_dash_manifest"}
# Kaldi's fbank with the arguments that every LAVISH spectrogram has.
_FRAME_MS, _PREEMPHASIS, _LOW_HZ = 25.0, 0.97, 20.0
_EPSILON = torch.finfo(torch.float32).eps


class MediaError(ValueError):
    """A file that gives no clip. `path`: the file; `reason`: what was expected and what came, in one line."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        # Both go into args, so that the error survives pickling.
        super().__init__(os.fspath(path), reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.reason}".splitlines())


class Clip(NamedTuple):
    """What the model reads of one file.

    audio: (T, spectrogram.frames, mel_bins) float32, normalised; T = 1 for a spectrogram of the whole clip.
    video: (T, 3, S, S) float32, normalised by the ImageNet mean and std. duration: seconds. warnings: one line each,
    with the file's path. patches: (T, 96, 64) float32, VGGish's of the sound, where they are asked for.
    """

    audio: Tensor
    video: Tensor
    duration: float
    warnings: tuple[str, ...] = ()
    patches: Tensor | None = None

    @property
    def silent(self) -> bool:
        """Whether silence stands in for sound that the file lacks."""
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
    path = _local_file(path)
    damage: Counter[str] = Counter()
    source = _scan(path, spectrogram.sample_rate, damage)
    count = frames or max(1, round(source.duration))
    video: list[Tensor | None] = [None] * count

    def take(places: list[int], _: float, image: np.ndarray) -> None:
        picture = resize(image, img_size, antialias)
        for place in places:
            video[place] = picture

    choose = lambda keys: [keys[i - 1] for i in np.linspace(1, len(keys), count, dtype=int)]  # noqa: E731
    _take_frames(path, source, frame_rate, choose, take, damage)
    video = torch.stack(video)
    audio = spectrograms(source.waveform, count, spectrogram)
    heard = _patches(source.waveform, count) if patches else None
    return Clip(audio, video, source.duration, _warnings(path, source.warnings, damage), heard)


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
    path = _local_file(path)
    damage: Counter[str] = Counter()
    source = _scan(path, sample_rate, damage)
    _take_frames(path, source, frame_rate, lambda keys: keys, take, damage)
    return Sound(source.waveform, source.duration, _warnings(path, source.warnings, damage))


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
    images = _images(frames_dir)
    wav_path = _local_file(wav_path)
    damage: Counter[str] = Counter()
    with _opened(wav_path) as container:
        if not container.streams.audio:
            raise MediaError(wav_path, f"expected an audio stream, got {_kinds(container)}")
        sound = _Sound(wav_path, container.streams.audio[0], 0, damage)
        for packet in _packets(container, [sound.stream], damage):
            sound.hear(packet)
        sound.hear(None)
    waveform = sound.waveform(spectrogram.sample_rate)
    warnings = [] if len(waveform) else [f"no sound could be decoded from its audio stream, {SILENCE}"]
    duration = len(waveform) / spectrogram.sample_rate or len(images) / FRAME_RATE
    count = frames or max(1, round(duration))
    resized: dict[int, Tensor] = {}
    chosen = np.linspace(1, len(images), count, dtype=int)
    for i in chosen:
        if i not in resized:
            resized[i] = resize(_read_image(images[i - 1]), img_size, antialias)
    video = torch.stack([resized[i] for i in chosen])
    audio = spectrograms(waveform, count, spectrogram)
    heard = _patches(waveform, count) if patches else None
    return Clip(audio, video, duration, _warnings(wav_path, warnings, damage), heard)


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
        return ((path, _loaded(load, path, kwargs)) for path in paths)
    return _load_in_workers(iter(paths), workers, timeout, load, kwargs)


def find_videos(path: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or the video files (by `VIDEO_SUFFIXES`) under a directory in sorted order.

    Raises: MediaError if there is nothing at `path`.
    """
    if not os.path.isdir(path):
        return [Path(_local_file(path))]
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
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


# Workers


def _loaded(load: Callable[..., Clip], path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Clip | MediaError:
    try:
        return load(path, **kwargs)
    except MediaError as error:
        return error
    except Exception as error:  # one strange file must not end a run over thousands
        return MediaError(path, f"expected a clip, got {type(error).__name__}: {error}")


def _work(connection: Connection, load: Callable[..., Clip], kwargs: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    connection.send_bytes(b"")
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        # Plain pickle: multiprocessing's own would pass tensors as shared memory, which dies with this process.
        connection.send_bytes(pickle.dumps(_loaded(load, path, kwargs), protocol=5))


class _Slot:
    """A place in the order of results, empty until its file is done."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.result: Clip | MediaError | None = None


class _Worker:
    """A process that decodes one file at a time. A process of our own for each pipe tells who died, and of what."""

    def __init__(self, load: Callable[..., Clip], kwargs: dict[str, Any], timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.timeout = timeout
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_work, args=(child, load, kwargs), daemon=True)
        self.process.start()
        child.close()
        self.started = False
        self.slot: _Slot | None = None
        self.deadline = math.inf

    def give(self, slot: _Slot) -> None:
        self.slot = slot
        if self.started:
            self.deadline = time.monotonic() + self.timeout
        with suppress(OSError):  # a worker that died between two files: `take` finds the end of the pipe
            self.connection.send(slot.path)

    def take(self) -> bool:
        """Reads what has come. False once the process is gone."""
        assert self.slot is not None
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            self.stop()
            code = self.process.exitcode or 0
            if not self.started:
                raise RuntimeError(
                    f"load_clips: expected a worker process to start, got exit code {code}; "
                    "a script needs `if __name__ == '__main__':` around its call, or workers=0"
                ) from None
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.slot.result = MediaError(self.slot.path, f"expected a clip, got a decoder that died ({cause})")
            return False
        if message:
            self.slot.result, self.slot, self.deadline = pickle.loads(message), None, math.inf
        else:
            self.started = True
            self.deadline = time.monotonic() + self.timeout
        return True

    def give_up(self) -> None:
        assert self.slot is not None
        self.slot.result = MediaError(self.slot.path, f"expected a clip within {self.timeout:g} s, got none")
        self.stop(kill=True)

    def stop(self, kill: bool = False) -> None:
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.join()


def _load_in_workers(
    paths: Iterator[str | os.PathLike[str]],
    workers: int,
    timeout: float,
    load: Callable[..., Clip],
    kwargs: dict[str, Any],
) -> Iterator[tuple[str | os.PathLike[str], Clip | MediaError]]:
    crew: list[_Worker] = []
    slots: deque[_Slot] = deque()
    try:
        while True:
            while len(slots) < 2 * workers:
                worker = next((w for w in crew if w.slot is None), None)
                if worker is None and len(crew) == workers:
                    break
                path = next(paths, None)
                if path is None:
                    break
                if worker is None:
                    worker = _Worker(load, kwargs, timeout)
                    crew.append(worker)
                slots.append(_Slot(path))
                worker.give(slots[-1])
            if not slots:
                return
            if (first := slots[0]).result is not None:
                slots.popleft()
                yield first.path, first.result
                continue
            busy = {w.connection: w for w in crew if w.slot is not None}
            left = min(w.deadline for w in busy.values()) - time.monotonic()
            for connection in wait(list(busy), timeout=None if left == math.inf else max(0.0, left)):
                if not busy[connection].take():
                    crew.remove(busy[connection])
            for late in [w for w in crew if w.slot is not None and w.deadline < time.monotonic()]:
                late.give_up()
                crew.remove(late)
    finally:
        for worker in crew:
            worker.stop(kill=True)


# Spectrograms


def fbank_reference(waveform: Tensor, spectrogram: SpectrogramConfig) -> Tensor:
    """Kaldi's log-mel filter banks by torchaudio: waveform (samples,) -> (n, mel_bins)."""
    from torchaudio.compliance import kaldi

    return kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=spectrogram.sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=spectrogram.mel_bins,
        dither=0.0,
        frame_shift=spectrogram.frame_shift_ms,
    )


class _Kaldi(NamedTuple):
    length: int  # samples of a frame
    shift: int
    padded: int  # points of the Fourier transform
    window: Tensor  # (length,)
    bands: tuple[tuple[slice, slice, Tensor], ...]  # (mel filters, Fourier bins they reach, weights (bins, filters))


@lru_cache(maxsize=16)
def _kaldi(spectrogram: SpectrogramConfig, dtype: torch.dtype, device: torch.device) -> _Kaldi:
    rate, filters = spectrogram.sample_rate, spectrogram.mel_bins
    length = int(rate * _FRAME_MS * 0.001)
    padded = 1 << (length - 1).bit_length()

    def mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    # In float32 whatever the dtype, as Kaldi's tables are: which filters are empty depends on it.
    step = (mel(rate / 2) - mel(_LOW_HZ)) / (filters + 1)
    left = mel(_LOW_HZ) + torch.arange(filters)[:, None] * step
    centre = mel(_LOW_HZ) + (torch.arange(filters)[:, None] + 1.0) * step
    right = mel(_LOW_HZ) + (torch.arange(filters)[:, None] + 2.0) * step
    bins = 1127.0 * (1.0 + rate / padded * torch.arange(padded // 2) / 700.0).log()
    weights = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0)
    # (padded + 2, filters): each bin's weight twice, for the squares of its real and its imaginary part
    weights = F.pad(weights, (0, 1)).T.repeat_interleave(2, 0).to(device, dtype)

    # A filter reaches few of the bins: bands of neighbouring filters leave out most of the product's zeros.
    bands = []
    for some in torch.arange(filters).chunk(6 if device.type == "cpu" else 1):
        used = weights[:, some].sum(1).nonzero().flatten().tolist() or [0]
        columns, rows = slice(int(some[0]), int(some[-1]) + 1), slice(used[0], used[-1] + 1)
        bands.append((columns, rows, weights[rows, columns].contiguous()))
    window = torch.hann_window(length, periodic=False, dtype=dtype, device=device)
    return _Kaldi(length, int(rate * spectrogram.frame_shift_ms * 0.001), padded, window, tuple(bands))


@torch.no_grad()
def fbank(waveforms: Tensor, spectrogram: SpectrogramConfig) -> Tensor:
    """Kaldi's log-mel filter banks of many waveforms at once, equal to `fbank_reference`.

    waveforms: (..., samples) float32 or float64 on any device -> (..., n, mel_bins). No gradient.

    Raises: ValueError for another dtype, or for fewer samples than one frame of 25 ms.
    """
    if waveforms.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"waveforms: expected float32 or float64, got {waveforms.dtype}")
    k = _kaldi(spectrogram, waveforms.dtype, waveforms.device)
    samples = waveforms.shape[-1] if waveforms.dim() else 0
    if samples < k.length:
        raise ValueError(f"waveforms: expected at least {k.length} samples, got {samples}")
    flat = waveforms.reshape(-1, samples)
    n = 1 + (samples - k.length) // k.shift
    mel = flat.new_empty(len(flat), n, spectrogram.mel_bins)
    # On a CPU a few hundred frames a thread stay in the cache from the first step to the last.
    rows = 600 * torch.get_num_threads() if flat.device.type == "cpu" else n * len(flat)
    batch = max(1, min(len(flat), rows // n))
    padded = flat.new_zeros(batch, n, k.padded)
    spectrum = torch.empty(batch, n, k.padded // 2 + 1, dtype=flat.dtype.to_complex(), device=flat.device)
    parts = torch.view_as_real(spectrum).flatten(-2)
    for start in range(0, len(flat), batch):
        frames = flat[start : start + batch].unfold(-1, k.length, k.shift)
        b = len(frames)
        x, y, p = parts[:b, :, : k.length], padded[:b, :, : k.length], parts[:b]  # x is read before p is written
        # The steps up to the transform round as Kaldi's do, one by one. Folding them into one matrix would be
        # exact on paper, but near the floor of log(eps) a pure tone shows the last bit of its samples.
        torch.sub(frames, frames.mean(-1, keepdim=True), out=x)
        torch.mul(x[..., :-1], _PREEMPHASIS, out=y[..., 1:])
        torch.mul(x[..., 0], _PREEMPHASIS, out=y[..., 0])
        torch.sub(x, y, out=y).mul_(k.window)
        torch.fft.rfft(padded[:b], out=spectrum[:b])
        p.square_()  # the real and the imaginary parts, which the filters' weights add up
        out = mel[start : start + b].view(b * n, -1)
        for filters, bins, weights in k.bands:
            torch.mm(p.flatten(0, 1)[:, bins], weights, out=out[:, filters])
        out.clamp_min_(_EPSILON).log_()
    return mel.view(*waveforms.shape[:-1], n, spectrogram.mel_bins)


def spectrograms(waveform: Tensor, frames: int, spectrogram: SpectrogramConfig, *, reference: bool = False) -> Tensor:
    """Normalised log-mel spectrograms of T one-second windows, as the released loader cuts them.

    waveform: (samples,) float in [-1, 1] at the spectrogram's rate. Windows start at
    linspace(0, samples - 1.1 s, T); a waveform of 1.1 s or less is used whole for all of them, with zeros up to
    one second. Rows that are missing to `spectrogram.frames` are zeros of the normalised scale.
    With `spectrogram.window_seconds` 0 there is one spectrogram, of the whole waveform: each of its rows is the mean
    of the rows in that part of the waveform, so that any length fills all of them.
    reference: by torchaudio, window by window.

    Returns: (T, spectrogram.frames, mel_bins), or (1, spectrogram.frames, mel_bins).
    """
    whole = not spectrogram.window_seconds
    windows = _whole(waveform, spectrogram)[None] if whole else _windows(waveform, frames, spectrogram)
    if reference:
        mel = torch.stack([fbank_reference(window, spectrogram) for window in windows])
    else:
        mel = fbank(windows, spectrogram)
    rows = spectrogram.frames
    mel = F.adaptive_avg_pool1d(mel.mT, rows).mT if whole else mel[:, :rows]
    mel = mel.sub(spectrogram.mean).div_(2 * spectrogram.std)
    mel = F.pad(mel, (0, 0, 0, rows - mel.shape[1]))
    return mel if whole or len(mel) == frames else mel.repeat(frames, 1, 1)


def _whole(waveform: Tensor, spectrogram: SpectrogramConfig) -> Tensor:
    """(samples,) without its mean, at least one of Kaldi's frames."""
    if len(waveform):
        waveform = waveform - waveform.mean()
    return F.pad(waveform, (0, max(0, int(spectrogram.sample_rate * _FRAME_MS * 0.001) - len(waveform))))


def _windows(waveform: Tensor, frames: int, spectrogram: SpectrogramConfig) -> Tensor:
    """(T, samples of a window), or (1, samples) when all T windows are the same."""
    length = round(spectrogram.sample_rate * spectrogram.window_seconds)
    last = len(waveform) - spectrogram.sample_rate * (spectrogram.window_seconds + 0.1)
    if len(waveform):
        waveform = waveform - waveform.mean()
    if last > 0:
        starts = np.linspace(0, last, frames, dtype=int).tolist()
        return torch.stack([waveform[start : start + length] for start in starts])
    return F.pad(waveform, (0, max(0, length - len(waveform))))[None]


def _patches(waveform: Tensor, frames: int) -> Tensor:
    """VGGish's patches (T, 96, 64) of windows at linspace(0, the last whole window, T); of zeros behind a short one."""
    waveform = F.pad(waveform, (0, max(0, PATCH_SAMPLES - len(waveform))))
    starts = np.linspace(0, len(waveform) - PATCH_SAMPLES, frames, dtype=int).tolist()
    return log_mel_patches(torch.stack([waveform[i : i + PATCH_SAMPLES] for i in starts]))[:, 0]


# Files


def _check_sizes(frames: int | None, img_size: int) -> None:
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1 or None, got {frames}")
    if img_size < 1:
        raise ValueError(f"img_size: expected at least 1 pixel, got {img_size}")


def _local(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if match := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise MediaError(path, f"expected a local file, got the protocol {match.group()!r}")
    return path


def _local_file(path: str | os.PathLike[str]) -> str:
    """The path, once it is known to be a regular file that can be read."""
    path = _local(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(path, "expected a file, got a directory")
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(path, "expected a regular file, got a pipe, socket or device")
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(path, "expected a file, got nothing at this path") from None
    except PermissionError:
        raise MediaError(path, "expected a readable file, got permission denied") from None
    except OSError as error:
        raise MediaError(path, f"expected a readable file, got {error.strerror}") from None
    except MediaError:
        raise
    except ValueError:
        raise MediaError(path, "expected a path, got a null byte in it") from None
    if not status.st_size:
        raise MediaError(path, "expected a media file, got 0 bytes")
    return path


def _images(frames_dir: str | os.PathLike[str]) -> list[str]:
    folder = _local(frames_dir)
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    except OSError as error:
        raise MediaError(folder, f"expected a directory of frames, got {error.strerror}") from None
    if not names:
        raise MediaError(folder, "expected jpg or png frames, got none in this directory")
    names.sort(key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
    return [os.path.join(folder, name) for name in names]


def _read_image(path: str) -> np.ndarray:
    from PIL import Image

    path = _local_file(path)
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(path, f"expected at most {MAX_PIXELS} pixels, got {image.width}x{image.height}")
            return np.asarray(image.convert("RGB"))
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
        raise MediaError(path, f"expected a jpg or png picture, got one that cannot be decoded ({error})") from None


@lru_cache(maxsize=1)
def _format_whitelist() -> str:
    import av

    return ",".join(sorted(av.formats_available - _INDIRECT_FORMATS))


@contextmanager
def _opened(path: str) -> Iterator[InputContainer]:
    import av

    try:
        # The prefix keeps a name from being read as a protocol, whatever its characters.
        container = av.open(
            f"file:{os.path.abspath(path)}",
            options={"protocol_whitelist": "file", "format_whitelist": _format_whitelist()},
            metadata_errors="replace",
            timeout=(OPEN_TIMEOUT, READ_TIMEOUT),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        size, text = os.path.getsize(path), getattr(error, "strerror", None) or error
        reason = f"expected a media file, got {size} bytes that do not open as one ({text})"
        raise MediaError(path, reason) from None
    with container:
        yield container


def _warnings(path: str, warnings: list[str], damage: Counter[str]) -> tuple[str, ...]:
    lines = [*warnings]
    lines += [f"{damage[kind]} damaged {kind} packets or frames" for kind in ("video", "audio") if damage[kind]]
    if damage["file"]:
        lines.append("could not be read to its end")
    return tuple(f"{path}: {line}" for line in lines)


def _kinds(container: InputContainer) -> str:
    kinds = Counter(stream.type for stream in container.streams)
    return "only " + ", ".join(f"{number} {kind}" for kind, number in kinds.items()) if kinds else "no stream at all"


def _video_stream(path: str, container: InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture, within the caps and ready to decode."""
    from av.stream import Disposition

    stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
    if stream is None:
        raise MediaError(path, f"expected a video stream, got {_kinds(container)}")
    context = stream.codec_context
    if context is None:
        raise MediaError(path, "expected a video stream, got one of a codec without a decoder")
    _check_pixels(path, context.width, context.height)
    if container.duration:
        _check_duration(path, container.duration / 1e6)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_type = "AUTO"
    context.thread_count = torch.get_num_threads()
    return stream


def _check_pixels(path: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(path, f"expected at most {MAX_PIXELS} pixels a frame, got {width}x{height}")


def _check_duration(path: str, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise MediaError(path, f"expected at most {MAX_SECONDS:g} s, got {seconds:.1f} s")


# One pass over the packets, which also decodes the sound; then one that decodes the frames wanted


class _Source(NamedTuple):
    """What the packets of a file tell before the video is decoded.

    shown: (timestamp, duration) of each frame in ticks, in order of display; None if packets lack timestamps.
    tick, step: seconds of a tick, and of a frame by the header. origin: seconds, the start of the earlier of the
    two streams. waveform: (samples,), from the origin on. duration: seconds, from the origin on.
    """

    shown: list[tuple[int, int]] | None
    tick: Fraction
    step: Fraction
    origin: float
    waveform: Tensor
    duration: float
    warnings: list[str]


class _Sound:
    """The samples of an audio stream, collected packet by packet; its first sample's time is `start`, in seconds.

    channel: None for the mean of all.
    """

    def __init__(self, path: str, stream: av.AudioStream, channel: int | None, damage: Counter[str]) -> None:
        self.path, self.stream, self.channel, self.damage = path, stream, channel, damage
        self.pieces: list[tuple[int, Tensor]] = []
        self.seconds = 0.0
        self.start = 0.0

    def hear(self, packet: av.Packet | None) -> None:
        """None asks for what the decoder still holds."""
        for frame in _decoded(self.stream, packet, self.damage):
            samples = _mono(frame, self.channel)
            if samples is None or frame.sample_rate < 1:
                self.damage["audio"] += 1
                continue
            if not self.pieces:
                self.start = float(frame.time or 0.0)
            self.pieces.append((frame.sample_rate, samples))
            self.seconds += len(samples) / frame.sample_rate
            _check_duration(self.path, self.seconds)

    def waveform(self, sample_rate: int) -> Tensor:
        """(samples,) at the rate asked for, in [-1, 1]. A stream may change its rate on the way."""
        parts = []
        for rate, group in groupby(self.pieces, key=lambda piece: piece[0]):
            part = torch.cat([samples for _, samples in group])
            # The resampling kernel grows with the reduced rate; a rate near enough keeps it small.
            if rate // math.gcd(rate, sample_rate) > 2000:
                rate = round(rate / 20) * 20
            if rate != sample_rate:
                from torchaudio.functional import resample

                part = resample(part, rate, sample_rate)
            parts.append(part.clamp_(-1, 1))
        return torch.cat(parts) if parts else torch.zeros(0)


def _mono(frame: av.AudioFrame, channel: int | None) -> Tensor | None:
    """(samples,) float32 of one audio frame. None for one whose samples cannot be had."""
    import av

    frames = [frame]
    channels = frame.layout.nb_channels
    try:
        # PyAV finds the end of the planes by a null pointer, which FFmpeg does not set behind the eighth.
        if frame.format.is_planar and channels > 7:
            packer = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
            frames = [*packer.resample(frame), *packer.resample(None)]
        array = np.concatenate([part.to_ndarray() for part in frames], axis=1)
    except (av.FFmpegError, OSError, ValueError):
        return None
    if len(array) != channels:
        array = array.reshape(-1, channels).T
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype.kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    mono = array.mean(0) if channel is None else array[channel]
    return torch.from_numpy(np.nan_to_num(mono.astype(np.float32), nan=0.0, posinf=1.0, neginf=-1.0))


def _packets(container: InputContainer, streams: list[Any], damage: Counter[str]) -> Iterator[av.Packet]:
    import av

    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError):
            damage["file"] += 1
            return
        # Empty packets ask a decoder for its last frames; that is done with None, after a broken file too.
        if packet.size:
            yield packet


def _decoded(stream: Any, packet: av.Packet | None, damage: Counter[str]) -> list[Any]:
    import av

    try:
        return stream.codec_context.decode(packet)
    except av.EOFError:
        return []
    except (av.FFmpegError, OSError, ValueError):
        damage[stream.type] += 1
        return []


def _scan(path: str, sample_rate: int, damage: Counter[str]) -> _Source:
    packets: list[tuple[int | None, int]] = []
    with _opened(path) as container:
        video = _video_stream(path, container)
        tick, step = video.time_base, 1 / (video.average_rate or video.guessed_rate or Fraction(25))
        declared = (container.duration or 0) / 1e6
        streams, sound = [video], None
        if container.streams.audio:
            warnings = [f"no sound could be decoded from its audio stream, {SILENCE}"]
            if container.streams.audio[0].codec_context is not None:
                sound = _Sound(path, container.streams.audio[0], None, damage)
                streams.append(sound.stream)
        else:
            warnings = [f"no audio stream, {SILENCE}"]
        for packet in _packets(container, streams, damage):
            if packet.stream_index != video.index:
                sound.hear(packet)
            elif not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0))
        if sound:
            sound.hear(None)
    if not packets:
        raise MediaError(path, "expected at least one frame, got a video stream without any")

    shown = None if any(pts is None for pts, _ in packets) else sorted(packets)
    start, end = 0.0, len(packets) * float(step)
    if shown:
        start, end = float(shown[0][0] * tick), float(shown[-1][0] * tick + (shown[-1][1] * tick or step))
    origin, duration, waveform = start, end - start, torch.zeros(0)
    if sound and sound.pieces:
        warnings = []
        origin = min(start, sound.start)
        delay = sound.start - origin
        duration = max(end - origin, delay + sound.seconds)
        _check_duration(path, duration)
        waveform = sound.waveform(sample_rate)
        if delay > MAX_AUDIO_DELAY:
            waveform = F.pad(waveform, (round(delay * sample_rate), 0))
    _check_duration(path, duration)
    if duration < declared - max(0.5, 0.05 * declared):
        warnings.append(f"ends early, {declared:.1f} s by its header but {duration:.1f} s found")
    return _Source(shown, tick, step, origin, waveform, duration, warnings)


def _at_frame_rate(times: list[float], durations: list[float], rate: float = FRAME_RATE) -> list[int]:
    """Which input frame each frame of `ffmpeg -r rate` shows.

    times, durations: of the input frames in seconds, times from 0 and rising. This is ffmpeg's own rule for a
    constant output rate (`video_sync_process`, fftools/ffmpeg_filter.c), in which an input frame within 1.1
    output frames of its place is shown once: 10 s at 25 frames a second give 32 frames, not 30.
    """
    shown: list[int] = []
    repeats: deque[int] = deque((0, 0, 0), maxlen=3)
    for i, (start, duration) in enumerate(zip(times, durations)):
        place = start * rate
        place += 2.0**-17 if place > 0 else 0.0
        ahead = place - len(shown)
        until = ahead + duration * rate
        number, previous = 1, 0
        if until < -1.1:
            number = 0
        elif until > 1.1:
            number = round(until)
            if ahead > 1.1:
                previous = round(ahead - 0.6)
        shown += [max(0, i - 1) if j < previous else i for j in range(number)]
        repeats.append(previous)
    return shown + [len(times) - 1] * sorted(repeats)[1]


def _extracted(
    shown: list[tuple[int, int]], tick: Fraction, step: Fraction, origin: float, rate: float | None
) -> list[int]:
    """The keys (timestamps or numbers) of the frames that `ffmpeg -r rate` extracts; of all frames without a rate."""
    if rate is None:
        return [key for key, _ in shown]
    times = [float(key * tick) - origin for key, _ in shown]
    gaps = [after - before for before, after in pairwise(times)]
    gaps.append(gaps[-1] if gaps else float(step))
    durations = [float(length * tick) or gap for (_, length), gap in zip(shown, gaps)]
    return [shown[i][0] for i in _at_frame_rate(times, durations, rate)]


def _keyed_frames(path: str, numbered: bool, damage: Counter[str]) -> Iterator[tuple[int, int, av.VideoFrame]]:
    """(timestamp, duration, frame) in ticks of each frame that decodes; numbered: (0, 1, frame), (1, 1, frame), ..."""
    with _opened(path) as container:
        stream = _video_stream(path, container)
        number = 0
        for packet in chain(_packets(container, [stream], damage), [None]):
            for frame in _decoded(stream, packet, damage):
                _check_pixels(path, frame.width, frame.height)
                if numbered or frame.pts is not None:
                    yield (number, 1, frame) if numbered else (frame.pts, frame.duration or 0, frame)
                number += 1


def _take_frames(
    path: str,
    source: _Source,
    rate: float | None,
    choose: Callable[[list[int]], list[int]],
    take: Callable[[list[int], float, np.ndarray], None],
    damage: Counter[str],
) -> None:
    """Hands over the frames that are chosen among those extracted, each as soon as it is decoded.

    choose: keys of all frames extracted -> keys of those wanted. take: as for `extract`, places in what was chosen.
    """

    def decode(wanted: list[int], numbered: bool, tick: Fraction, origin: float, damage: Counter[str]) -> bool:
        places: dict[int, list[int]] = {}
        for place, key in enumerate(wanted):
            places.setdefault(key, []).append(place)
        for key, _, frame in _keyed_frames(path, numbered, damage):
            if key in places:
                damage["video"] += frame.is_corrupt
                take(places.pop(key), float(key * tick) - origin, _upright(path, frame))
                if not places:
                    return True
        return False

    if source.shown is not None:
        found: Counter[str] = Counter()
        wanted = choose(_extracted(source.shown, source.tick, source.step, source.origin, rate))
        if decode(wanted, False, source.tick, source.origin, found):
            damage.update(found)
            return
    # The packets did not tell which frames can be shown: the decoder does, at the price of decoding twice.
    numbered = source.shown is None
    shown = sorted((key, length) for key, length, _ in _keyed_frames(path, numbered, Counter()))
    if not shown:
        raise MediaError(path, "expected at least one frame, got a video stream of which none can be decoded")
    tick = source.step if numbered else source.tick
    origin = min(source.origin, float(shown[0][0] * tick))
    _check_duration(path, float(shown[-1][0] * tick) - origin)
    decode(choose(_extracted(shown, tick, source.step, origin, rate)), numbered, tick, origin, damage)


def _upright(path: str, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned and mirrored as the frame's display matrix says."""
    import av

    try:
        image = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = f"expected frames that convert to RGB, got {frame.format.name} ({error})"
        raise MediaError(path, reason) from None
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # x' = a x + c y and y' = b x + d y, in 16.16 fixed point
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
