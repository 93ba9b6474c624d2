"""VGGish, a sound encoder beside LAVISH (the paper's Table 3) and in the CMBS baseline: second-long log-mel patches to
128 features, and the recipe of those patches (Hershey et al., CNN Architectures for Large-Scale Audio Classification,
ICASSP 2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SAMPLE_RATE = 16000
FRAMES, BANDS = PATCH = 96, 64  # of a patch
FEATURES = 128
_WINDOW, _HOP, _FFT = 400, 160, 512  # samples
_LOW_HZ, _HIGH_HZ = 125.0, 7500.0
_LOG_OFFSET = 0.01
PATCH_SAMPLES = _WINDOW + (FRAMES - 1) * _HOP


class VGGish(nn.Module):
    """The network without PCA, its last ReLU kept. Names are those of the public PyTorch weights (vggish-10086976)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for widths in ((64,), (128,), (256, 256), (512, 512)):
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(FRAMES // 16 * (BANDS // 16) * before, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, FEATURES),
            nn.ReLU(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(n, 1, 96, 64) log-mel patches -> (n, 128)."""
        # Channels last before flattening: the weights come from TensorFlow.
        return self.embeddings(self.features(patches).permute(0, 2, 3, 1).flatten(1))


def log_mel_patches(waveform: Tensor) -> Tensor:
    """VGGish's input: log mel magnitudes, cut into patches of 0.96 s without padding; 5 s give 5, 10 s give 10.

    Args:
        waveform: (..., samples), floating point in [-1, 1], mono, 16 kHz, on any device. Computed in at least float32.

    Returns: (..., patches, 96, 64) of the waveform's dtype.

    Raises: ValueError for integers, or for less than one patch.
    """
    if not waveform.is_floating_point():
        raise ValueError(f"waveform: expected floating point in [-1, 1], got {waveform.dtype}")
    samples = waveform.shape[-1] if waveform.ndim else 0
    if samples < PATCH_SAMPLES:
        raise ValueError(f"waveform: expected at least {PATCH_SAMPLES} samples, got {samples}")
    dtype = torch.promote_types(waveform.dtype, torch.float32)
    window = torch.hann_window(_WINDOW, dtype=dtype, device=waveform.device)
    frames = waveform.to(dtype).unfold(-1, _WINDOW, _HOP) * window
    mel = torch.fft.rfft(frames, _FFT).abs() @ _mel_weights().to(waveform.device, dtype)  # (..., frames, BANDS)
    patches = mel.shape[-2] // FRAMES
    log_mel = (mel[..., : patches * FRAMES, :] + _LOG_OFFSET).log()
    return log_mel.unflatten(-2, (patches, FRAMES)).to(waveform.dtype)


def _mel_weights() -> Tensor:
    """(Fourier bins, BANDS) float64: triangles linear in mel, where torchaudio's melscale_fbanks are linear in Hz."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (_LOW_HZ, _HIGH_HZ))
    edges = torch.linspace(low, high, BANDS + 2, dtype=torch.float64)
    hertz = torch.arange(_FFT // 2 + 1, dtype=torch.float64)[:, None] * SAMPLE_RATE / _FFT
    bins = 1127 * (hertz / 700).log1p()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0)
