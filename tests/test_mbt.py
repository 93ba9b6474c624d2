"""MBT against a plain functional forward in float64, and what the bottlenecks let through."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.baselines.mbt import MBT, MBTConfig

TINY = MBTConfig((4, 32, 48), (2, 16, 16), (48, 32), (16, 16), 24, 5, 3, 40, fusion_layer=2, bottlenecks=3, classes=7)


def tiny(seed=0, **changes):
    """Every tensor is drawn: fresh norms, class tokens and biases would hide what reads them wrongly."""
    torch.manual_seed(seed)
    model = MBT(replace(TINY, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = name.endswith("weight") and "norm" in name
            parameter.normal_(1.0 if one else 0.0, 0.3)
    return model


def clips(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 3, *TINY.video), (batch, *TINY.spectrogram))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def patches(x, steps):
    """(B, C, *size) -> (B, N, C * prod(steps)), one patch after the other, the last axis fastest."""
    grid = [range(0, side, step) for side, step in zip(x.shape[2:], steps)]
    corners = [()]
    for starts in grid:
        corners = [(*corner, start) for corner in corners for start in starts]
    windows = [tuple(slice(c, c + step) for c, step in zip(corner, steps)) for corner in corners]
    return torch.stack([x[(slice(None), slice(None), *window)].flatten(1) for window in windows], 1)


def expected_logits(state, config, video, spectrogram):
    """Per modality (B, classes), from the paper's equations and a state dict."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def block(x, name):
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.qkv").chunk(3, -1)
        d = config.width // config.heads
        heads = []
        for h in range(config.heads):
            part = slice(h * d, (h + 1) * d)
            scores = (q[..., part] @ k[..., part].mT / math.sqrt(d)).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{name}.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + linear(hidden, f"{name}.mlp.2")

    x = {"video": patches(video, config.tubelet), "audio": patches(spectrogram[:, None], config.patch)}
    for name in x:
        weight, bias = state[f"{name}.patches.weight"].flatten(1), state[f"{name}.patches.bias"]
        cls = state[f"{name}.cls_token"].expand(len(video), 1, config.width)
        x[name] = torch.cat((cls, x[name] @ weight.T + bias), 1) + state[f"{name}.pos_embed"]
    bottleneck = state["bottleneck"].expand(len(video), -1, -1)
    for layer in range(config.depth):
        if layer < config.fusion_layer:
            x = {name: block(x[name], f"{name}.blocks.{layer}") for name in x}
        else:
            both = {name: block(torch.cat((x[name], bottleneck), 1), f"{name}.blocks.{layer}") for name in x}
            n = {name: x[name].shape[1] for name in x}
            bottleneck = (both["video"][:, n["video"] :] + both["audio"][:, n["audio"] :]) / 2
            x = {name: both[name][:, : n[name]] for name in x}
    return {name: linear(norm(x[name], "norm")[:, 0], "classifier") for name in x}


@pytest.mark.parametrize("fusion_layer", [0, 2, 5])
@torch.no_grad()
def test_is_the_plain_forward(fusion_layer):
    model = tiny(fusion_layer=fusion_layer)
    expected = expected_logits(model.state_dict(), model.config, *clips())
    got = model.logits(*clips())
    scale = torch.stack(list(expected.values())).abs().max()
    assert scale > 0.1
    assert (got[:, 0] - expected["video"]).abs().max() < 1e-12 * scale
    assert (got[:, 1] - expected["audio"]).abs().max() < 1e-12 * scale
    assert (model(*clips()) - (expected["video"] + expected["audio"]) / 2).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("fusion_layer", range(TINY.depth + 1))
@torch.no_grad()
def test_modalities_meet_from_the_second_fused_layer_on(fusion_layer):
    """The first fused layer reads bottlenecks that no modality has written yet."""
    model = tiny(fusion_layer=fusion_layer)
    (video, audio), (other_video, other_audio) = clips(), clips(seed=2)
    logits = model.logits(video, audio)
    from_video = (model.logits(other_video, audio) - logits).abs().amax((0, 2))
    from_audio = (model.logits(video, other_audio) - logits).abs().amax((0, 2))
    assert from_video[0] > 1e-3
    assert from_audio[1] > 1e-3
    if fusion_layer >= TINY.depth - 1:
        assert from_video[1] == 0
        assert from_audio[0] == 0
    else:
        assert from_video[1] > 1e-6
        assert from_audio[0] > 1e-6


@pytest.mark.parametrize("modality", [0, 1])
@torch.no_grad()
def test_only_bottlenecks_carry_one_modality_to_the_other(modality):
    """Of what a modality's block before the last gives, the other modality reads the bottlenecks alone."""
    model = tiny()
    encoder = (model.video, model.audio)[modality]
    logits = model.logits(*clips())

    def logits_with(change):
        hook = encoder.blocks[-2].register_forward_hook(lambda block, inputs, x: change(x.clone()))
        changed = model.logits(*clips())
        hook.remove()
        return changed

    def other_bottlenecks(x):
        x[:, -TINY.bottlenecks :] += torch.randn(x[:, -TINY.bottlenecks :].shape, dtype=x.dtype)
        return x

    def other_tokens(x):
        x[:, : -TINY.bottlenecks] += torch.randn(x[:, : -TINY.bottlenecks].shape, dtype=x.dtype)
        return x

    assert (logits_with(other_bottlenecks) - logits)[:, 1 - modality].abs().max() > 1e-3
    change = (logits_with(other_tokens) - logits).abs().amax((0, 2))
    assert change[modality] > 1e-3
    assert change[1 - modality] == 0


@torch.no_grad()
def test_a_clip_alone_is_the_clip_in_a_batch():
    model = tiny()
    video, audio = clips(3)
    batch = model(video, audio)
    alone = torch.cat([model(video[i : i + 1], audio[i : i + 1]) for i in range(3)])
    assert (batch[0] - batch[1]).abs().max() > 1e-3
    assert (batch - alone).abs().max() < 1e-12 * batch.abs().max()


def test_gradients_reach_every_parameter():
    model = tiny()
    model(*clips()).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() < 1e-9]
    assert still == []


def test_full_size_is_the_papers():
    with torch.device("meta"):
        model = MBT()
        assert model.video.pos_embed.shape == (1, 3136 + 1, 768)
        assert model.audio.pos_embed.shape == (1, 400 + 1, 768)
        assert model(torch.empty(2, 3, 32, 224, 224), torch.empty(2, 800, 128)).shape == (2, 527)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == 174_616_079
        assert abs(trainable / 172e6 - 1) < 0.03
