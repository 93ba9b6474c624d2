"""Log-mel filter banks of one clip, ten windows of a second: ours at once against torchaudio's one by one."""

import pytest
import torch

from lavish_fast.config import VIT_SPECTROGRAM, SpectrogramConfig
from lavish_fast.spectrogram import fbank, fbank_reference

SPECTROGRAMS = {"swin": SpectrogramConfig(), "vit": VIT_SPECTROGRAM}


def by_torchaudio(windows, spectrogram):
    return torch.stack([fbank_reference(window, spectrogram) for window in windows])


@pytest.mark.parametrize("threads", [1, None], ids=["one thread", "default threads"])
@pytest.mark.parametrize("function", [by_torchaudio, fbank], ids=["torchaudio", "ours"])
@pytest.mark.parametrize("name", SPECTROGRAMS)
def test_fbank(benchmark, name, function, threads):
    spectrogram = SPECTROGRAMS[name]
    windows = torch.randn(10, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    difference = (function(windows, spectrogram) - by_torchaudio(windows, spectrogram)).abs().max()
    assert difference <= 1e-4
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        benchmark.group = f"fbank, {name}, {threads or before} threads"
        benchmark.extra_info["difference"] = float(difference)
        benchmark(function, windows, spectrogram)
    finally:
        torch.set_num_threads(before)
