import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lavish_fast.config import VIT_SPECTROGRAM, SpectrogramConfig
from lavish_fast.media import load_clip
from lavish_fast.spectrogram import fbank, fbank_reference, patches_of, spectrograms, windows_of
from lavish_fast.vggish import log_mel_patches
from test_media import SWIN, encode, film, mel_bin, tone

WHOLE = SpectrogramConfig(window_seconds=0.0, mel_bins=64, frames=32, frame_shift_ms=10.0)


def random_waveform(seed):
    g = torch.Generator().manual_seed(seed)
    samples = (16000, 400, 401, 17600, 483, 12345, 8000)[seed % 7]
    t = torch.arange(samples) / 16000
    hertz = float(torch.rand(1, generator=g)) * 7900 + 50
    noise = torch.randn(samples, generator=g)
    return (
        lambda: noise * 0.1,
        lambda: torch.zeros(samples),
        lambda: (noise * 5).clamp(-1, 1),
        lambda: torch.full((samples,), float(torch.rand(1, generator=g)) * 2 - 1),
        lambda: torch.sin(2 * torch.pi * hertz * t),
        lambda: torch.sin(2 * torch.pi * hertz * t) * 1e-3 + 0.5,
        lambda: torch.sin(2 * torch.pi * hertz * t).sign(),
        lambda: noise * 1e-5,
        lambda: torch.sin(2 * torch.pi * hertz * t * t) * torch.linspace(0, 1, samples),
    )[seed % 9]()


@pytest.mark.parametrize("spectrogram", [SWIN, VIT_SPECTROGRAM], ids=["swin", "vit"])
def test_fbank_parity(spectrogram):
    for seed in range(200):
        waveform = random_waveform(seed)
        got, expected = fbank(waveform, spectrogram), fbank_reference(waveform, spectrogram)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-4, f"seed {seed}"


def test_fbank_batches_strides_and_float64():
    wide = torch.randn(3, 2, 32000, generator=torch.Generator().manual_seed(0)) * 0.2
    strided = wide[..., ::2].transpose(0, 1)
    got = fbank(strided, SWIN)
    assert got.shape == (2, 3, 188, 192)
    for i in range(2):
        for j in range(3):
            # Of a strided waveform torchaudio's own means round otherwise: the reference is that of a copy.
            torch.testing.assert_close(got[i, j], fbank_reference(strided[i, j].clone(), SWIN), rtol=0, atol=1e-5)
    double = strided[0].double()
    expected = torch.stack([fbank_reference(waveform, SWIN) for waveform in double])
    assert expected.dtype == torch.float64
    torch.testing.assert_close(fbank(double, SWIN), expected, rtol=0, atol=1e-12)
    assert fbank(wide[:0], SWIN).shape == (0, 2, 381, 192)


def test_fbank_shape_and_empty_filters():
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    mel = fbank(noise, SWIN)
    assert mel.shape == (188, 192)
    floor = mel < -15.94
    assert floor.all(0).nonzero().flatten().tolist() == [2, 5, 8, 11, 14, 19, 24, 29]
    assert mel[floor].max() == pytest.approx(-15.9424, abs=1e-4)
    assert fbank(noise, VIT_SPECTROGRAM).shape == (98, 128)
    assert (fbank(noise, VIT_SPECTROGRAM) < -15.94).all(0).sum() == 1


def test_fbank_refuses():
    with pytest.raises(ValueError, match=r"expected float32 or float64, got torch\.float16"):
        fbank(torch.zeros(16000).half(), SWIN)
    with pytest.raises(ValueError, match="expected at least 400 samples, got 399"):
        fbank(torch.zeros(399), SWIN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fbank_on_a_gpu():
    noise = torch.randn(10, 16000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    torch.testing.assert_close(fbank(noise.cuda(), SWIN).cpu(), fbank(noise, SWIN), rtol=0, atol=1e-9)
    mel = fbank(noise.float().cuda(), SWIN).double().cpu()
    torch.testing.assert_close(mel, fbank(noise, SWIN), rtol=0, atol=0.02)


@pytest.mark.parametrize("spectrogram", [SWIN, VIT_SPECTROGRAM], ids=["swin", "vit"])
@pytest.mark.parametrize("samples", [0, 100, 4000, 17600, 170000])
def test_spectrograms(spectrogram, samples):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.1
    got = spectrograms(waveform, 10, spectrogram)
    assert got.shape == (10, spectrogram.frames, spectrogram.mel_bins)
    torch.testing.assert_close(got, spectrograms(waveform, 10, spectrogram, reference=True), rtol=0, atol=1e-4)
    if samples != 17600:
        rows = 188 if spectrogram == SWIN else 98
        assert (got[:, rows:] == 0).all()
        mel = fbank(windows_of(waveform, 10, spectrogram), spectrogram)
        expected = ((mel - spectrogram.mean) / (2 * spectrogram.std)).expand(10, -1, -1)
        torch.testing.assert_close(got[:, :rows], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [400, 5000, 16000, 123457])
def test_a_spectrogram_of_the_whole_clip(samples):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    got = spectrograms(waveform, 10, WHOLE)
    rows = fbank(waveform - waveform.mean(), WHOLE)  # (n, 64)
    assert got.shape == (1, 32, 64)
    for i in range(32):
        part = rows[i * len(rows) // 32 : -(-(i + 1) * len(rows) // 32)]
        expected = (part.mean(0) - WHOLE.mean) / (2 * WHOLE.std)
        torch.testing.assert_close(got[0, i], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, spectrograms(waveform, 10, WHOLE, reference=True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seconds", [1, 10])
def test_the_whole_clip_fills_its_spectrogram(tmp_path, seconds):
    half = tone(500, seconds / 2, 16000), tone(3000, seconds / 2, 16000)
    path = encode(tmp_path / "a.mkv", film(seconds), np.concatenate(half, 1), sound_codec="flac")
    clip = load_clip(path, frames=4, img_size=32, spectrogram=WHOLE)
    assert (len(clip.audio), len(clip.video)) == (1, 4)
    peaks = clip.audio[0].argmax(-1)
    assert (peaks[:15] - mel_bin(500, WHOLE)).abs().max() < 1.5
    assert (peaks[17:] - mel_bin(3000, WHOLE)).abs().max() < 1.5


@pytest.mark.parametrize("samples", [0, 1, 399, 16000])
def test_the_whole_of_silence(samples):
    floor = (math.log(torch.finfo(torch.float32).eps) - WHOLE.mean) / (2 * WHOLE.std)
    got = spectrograms(torch.full((samples,), 0.2), 3, WHOLE)
    torch.testing.assert_close(got, torch.full((1, 32, 64), floor), rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [17599, 17600, 17601, 160000, 161234])
def test_windows(samples):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    centred = waveform - waveform.mean()
    got = windows_of(waveform, 10, SWIN)
    if samples <= 17600:
        torch.testing.assert_close(got, centred[None], rtol=0, atol=0)
    else:
        starts = np.linspace(0, samples - 16000 * 1.1, num=10, dtype=int)
        torch.testing.assert_close(got, torch.stack([centred[s : s + 16000] for s in starts]), rtol=0, atol=0)


def test_patches_for_vggish(tmp_path):
    waveform = torch.randn(16000 * 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 10
    patches = patches_of(waveform, 4)
    assert patches.shape == (4, 96, 64)
    for i, start in enumerate(np.linspace(0, 64000 - 15600, 4, dtype=int)):
        assert torch.equal(patches[i], log_mel_patches(waveform[start : start + 15600])[0])
    assert torch.equal(patches_of(waveform[:100], 2)[1], log_mel_patches(F.pad(waveform[:100], (0, 15500)))[0])
    assert torch.equal(patches_of(waveform[:0], 1), log_mel_patches(torch.zeros(15600)))
    path = encode(tmp_path / "a.mkv", film(2), waveform.numpy()[None], 16000, sound_codec="flac")
    assert load_clip(path, frames=3, img_size=8).patches is None
    heard = load_clip(path, frames=3, img_size=8, patches=True).patches
    torch.testing.assert_close(heard, patches_of(waveform, 3), rtol=0, atol=5e-3)
