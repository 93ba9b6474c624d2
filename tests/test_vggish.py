"""VGGish and its log-mel patches, against definitions written out here."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

from lavish_fast.vggish import VGGish, _mel_weights, log_mel_patches
from parity import relative_error

CONVOLUTIONS = {0: (1, 64), 3: (64, 128), 6: (128, 256), 8: (256, 256), 11: (256, 512), 13: (512, 512)}
LINEARS = {0: (12288, 4096), 2: (4096, 4096), 4: (4096, 128)}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1


def mel(hertz):
    return 1127 * math.log(1 + hertz / 700)


def by_definition(samples):
    """(patches, 96, 64) of samples (n,), number by number, as the recipe says it."""
    frames = 1 + (len(samples) - 400) // 160
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * i / 400) for i in range(400)])
    waves = np.array([[np.exp(-2j * math.pi * k * i / 512) for k in range(257)] for i in range(400)])
    edges = [mel(125) + i * (mel(7500) - mel(125)) / 65 for i in range(66)]
    weights = np.zeros((257, 64))
    for k in range(1, 257):
        for band, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:])):
            place = mel(k * 16000 / 512)
            if left < place < right:
                rising = place < centre
                weights[k, band] = (place - left) / (centre - left) if rising else (right - place) / (right - centre)
    out = np.zeros((frames // 96, 96, 64))
    for i in range(frames // 96 * 96):
        magnitudes = abs((samples[160 * i : 160 * i + 400] * window) @ waves)
        out[i // 96, i % 96] = np.log(magnitudes @ weights + 0.01)
    return out


@pytest.fixture(scope="module")
def net():
    with torch.device("meta"):
        net = VGGish()
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.detach().uniform_(-1, 1, generator=generator).mul_((6 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
    return net


def test_parameters_are_the_public_ones():
    with torch.device("meta"):
        net = VGGish()
    assert sum(p.numel() for p in net.parameters()) == 72_141_184
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    expected = {f"features.{i}.weight": (after, before, 3, 3) for i, (before, after) in CONVOLUTIONS.items()}
    expected |= {f"features.{i}.bias": (after,) for i, (_, after) in CONVOLUTIONS.items()}
    expected |= {f"embeddings.{i}.weight": (after, before) for i, (before, after) in LINEARS.items()}
    expected |= {f"embeddings.{i}.bias": (after,) for i, (_, after) in LINEARS.items()}
    assert shapes == expected


@torch.no_grad()
def test_forward_is_the_network_written_out(net):
    patches = noise(2, 1, 96, 64).float()
    x, weights = patches, net.state_dict()
    for i in CONVOLUTIONS:
        x = F.conv2d(x, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1).clamp_min(0)
        if i not in (6, 11):  # the first of two in a row
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    assert x.shape == (2, 512, 6, 4)
    x = torch.stack([torch.cat([x[n, :, i, j] for i in range(6) for j in range(4)]) for n in range(2)])
    for i in LINEARS:
        x = (x @ weights[f"embeddings.{i}.weight"].T + weights[f"embeddings.{i}.bias"]).clamp_min(0)
    out = net(patches)
    assert out.shape == (2, 128)
    assert 0 < (out == 0).sum() < out.numel(), "the last ReLU"
    assert relative_error(out, x) < 1e-5


@torch.no_grad()
def test_patches_are_the_recipe_number_by_number():
    waveform = noise(400 + 160 * 200)
    expected = torch.from_numpy(by_definition(waveform.numpy()))
    got = log_mel_patches(waveform)
    assert got.shape == (2, 96, 64)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-11
    single = log_mel_patches(waveform.float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-4
    half = log_mel_patches(waveform.half())
    assert half.dtype == torch.float16
    assert (half - expected).abs().max() < 2e-2


def test_mel_bands_are_kaldis():
    bands, _ = kaldi.get_mel_banks(64, 512, 16000.0, 125.0, 7500.0, 0.0, 0.0, 1.0)
    assert (_mel_weights()[:256].T - bands).abs().max() < 1e-4
    assert not _mel_weights()[[0, 256]].any()  # at 0 Hz and at 8 kHz


@pytest.mark.parametrize(("samples", "patches"), [(15600, 1), (30959, 1), (30960, 2), (80000, 5), (160000, 10)])
def test_patch_counts(samples, patches):
    assert log_mel_patches(torch.zeros(samples)).shape == (patches, 96, 64)


def test_a_batch_is_its_waveforms():
    waveforms = noise(2, 3, 16000)
    together = log_mel_patches(waveforms)
    assert together.shape == (2, 3, 1, 96, 64)
    for i in range(2):
        for j in range(3):
            assert (together[i, j] - log_mel_patches(waveforms[i, j])).abs().max() < 1e-12


def test_silence_is_the_logarithm_of_the_offset():
    assert (log_mel_patches(torch.zeros(16000, dtype=torch.float64)) - math.log(0.01)).abs().max() < 1e-12


def test_a_tone_is_in_its_band_and_linear_in_loudness():
    seconds = torch.arange(16000, dtype=torch.float64) / 16000
    tone = 0.2 * (2 * math.pi * 1000 * seconds).sin()
    quiet, loud = (log_mel_patches(x)[0].exp() - 0.01 for x in (tone, 2 * tone))
    centres = [mel(125) + (i + 1) * (mel(7500) - mel(125)) / 65 for i in range(64)]
    nearest = min(range(64), key=lambda i: abs(centres[i] - mel(1000)))
    assert (quiet.argmax(1) == nearest).all()
    assert relative_error(loud, 2 * quiet) < 1e-12, "a magnitude, not a power"


@pytest.mark.parametrize(
    ("waveform", "words"),
    [
        (torch.zeros(16000, dtype=torch.int16), "floating point in .-1, 1., got torch.int16"),
        (torch.zeros(2, 15599), "at least 15600 samples, got 15599"),
        (torch.tensor(0.0), "at least 15600 samples, got 0"),
    ],
)
def test_what_cannot_be_a_patch_is_refused(waveform, words):
    with pytest.raises(ValueError, match=words):
        log_mel_patches(waveform)
