"""Sound to log-mel spectrograms, as the released loaders make them: Kaldi's filter banks of windows of a clip."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lavish_fast.config import SpectrogramConfig
from lavish_fast.vggish import PATCH_SAMPLES, log_mel_patches

# Kaldi's fbank with the arguments that every LAVISH spectrogram has.
_FRAME_MS, _PREEMPHASIS, _LOW_HZ = 25.0, 0.97, 20.0
_EPSILON = torch.finfo(torch.float32).eps


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
    windows = _whole(waveform, spectrogram)[None] if whole else windows_of(waveform, frames, spectrogram)
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


def windows_of(waveform: Tensor, frames: int, spectrogram: SpectrogramConfig) -> Tensor:
    """(T, samples of a window), or (1, samples) when all T windows are the same."""
    length = round(spectrogram.sample_rate * spectrogram.window_seconds)
    last = _last(len(waveform), spectrogram)
    if len(waveform):
        waveform = waveform - waveform.mean()
    if last > 0:
        starts = np.linspace(0, last, frames, dtype=int).tolist()
        return torch.stack([waveform[start : start + length] for start in starts])
    return F.pad(waveform, (0, max(0, length - len(waveform))))[None]


def spans_of(samples: int, frames: int, spectrogram: SpectrogramConfig) -> tuple[tuple[float, float], ...]:
    """What `spectrograms` makes of so many samples, by time: the start and the end of each window, in seconds."""
    rate, seconds = spectrogram.sample_rate, spectrogram.window_seconds
    if not seconds:
        return ((0.0, samples / rate),)
    last = _last(samples, spectrogram)
    length = seconds if last > 0 else max(seconds, samples / rate)
    return tuple((start, start + length) for start in (np.linspace(0, max(0, last), frames) / rate).tolist())


def _last(samples: int, spectrogram: SpectrogramConfig) -> float:
    """The first sample of the last window; 0 or less where the waveform is used whole."""
    return samples - spectrogram.sample_rate * (spectrogram.window_seconds + 0.1)


def patches_of(waveform: Tensor, frames: int) -> Tensor:
    """VGGish's patches (T, 96, 64) of windows at linspace(0, the last whole window, T); of zeros behind a short one."""
    waveform = F.pad(waveform, (0, max(0, PATCH_SAMPLES - len(waveform))))
    starts = np.linspace(0, len(waveform) - PATCH_SAMPLES, frames, dtype=int).tolist()
    return log_mel_patches(torch.stack([waveform[i : i + PATCH_SAMPLES] for i in starts]))[:, 0]
