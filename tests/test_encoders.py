"""The encoders of Table 2: their sizes, and R(2+1)D's convolution spelled out."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.encoders import CONFIGS, INPUTS, AudioVisualEncoders, FactoredConv, video_encoder


def parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture(scope="module", params=["xdc", "gdt"])
def model(request):
    torch.manual_seed(0)
    return AudioVisualEncoders(CONFIGS[request.param]).eval()


def clips(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((2, 3, 4, 32, 32), (2, 40, 24))]


@pytest.mark.parametrize(("name", "exact", "table"), [("xdc", 44_439_404, 45e6), ("gdt", 38_905_964, 39.2e6)])
def test_as_many_parameters_as_table_2_says(name, exact, table):
    with torch.device("meta"):
        model = AudioVisualEncoders(CONFIGS[name])
        assert parameters(model) == exact
        assert abs(parameters(model) / table - 1) < 0.03


def test_avts_is_xdc_on_other_inputs():
    assert CONFIGS["avts"] == CONFIGS["xdc"]
    assert INPUTS["avts"][:2] != INPUTS["xdc"][:2]


def test_r2plus1d_has_the_published_size():
    with torch.device("meta"):
        assert parameters(video_encoder()) + (512 + 1) * 400 == 33_370_839


@pytest.mark.parametrize("name", INPUTS)
def test_takes_the_inputs_of_its_source(name):
    with torch.device("meta"):
        video, audio, source = INPUTS[name]
        assert source
        logits = AudioVisualEncoders(CONFIGS[name]).eval()(torch.empty(3, *video), torch.empty(3, *audio))
        assert logits.shape == (3, 101)


# M by hand: 27 * 64 * 128 / (9 * 64 + 3 * 128) = 230.4.
WIDTHS = [(64, 64, 144), (64, 128, 230), (128, 128, 288), (256, 512, 921), (512, 512, 1152)]


@pytest.mark.parametrize(("before", "after", "middle"), WIDTHS)
def test_middle_width_is_each_convolutions_own(before, after, middle):
    with torch.device("meta"):
        conv = FactoredConv(before, after, midplanes=1)
        assert conv[0].weight.shape == (middle, before, 1, 3, 3)
        assert conv[3].weight.shape == (after, middle, 3, 1, 1)


def test_every_convolution_of_the_video_encoder_is_factored():
    with torch.device("meta"):
        blocks = [block for i in range(1, 5) for block in getattr(video_encoder(), f"layer{i}")]
        convs = [conv for block in blocks for conv in (block.conv1[0], block.conv2[0])]
        middles = [144] * 4 + [230] + [288] * 3 + [460] + [576] * 3 + [921] + [1152] * 3
        assert [conv[0].out_channels for conv in convs] == middles


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_factored_convolution_is_frames_then_time(stride):
    torch.manual_seed(0)
    conv = FactoredConv(6, 8, midplanes=5, stride=stride).double().eval()
    spatial, norm, _, temporal = conv
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 5, 8, 6, dtype=torch.float64)
    kernel = spatial.weight.squeeze(2)
    frames = torch.stack([F.conv2d(frame, kernel, stride=stride, padding=1) for frame in x.unbind(2)], 2)
    mean, variance, weight, bias = (
        t[:, None, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    frames = ((frames - mean) / (variance + norm.eps).sqrt() * weight + bias).clamp(min=0)
    pixels = frames.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B * H * W, M, T)
    pixels = F.conv1d(pixels, temporal.weight[..., 0, 0], stride=stride, padding=1)
    expected = pixels.unflatten(0, (2, *frames.shape[3:])).permute(0, 3, 4, 1, 2)
    assert (conv(x) - expected).abs().max() < 1e-12


@torch.no_grad()
def test_both_modalities_matter(model):
    (video, audio), (other_video, other_audio) = clips(), clips(1)
    logits = model(video, audio)
    assert logits.shape == (2, 101)
    scale = logits.std()
    assert (model(other_video, audio) - logits).abs().max() > 0.01 * scale
    assert (model(video, other_audio) - logits).abs().max() > 0.01 * scale
    assert (model(video[1:], audio[1:]) - logits[1:]).abs().max() < 1e-4 * scale


def test_gradients_reach_every_parameter(model):
    model.zero_grad()
    model(*clips()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
