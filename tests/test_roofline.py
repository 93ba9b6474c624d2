import contextlib
import io
import resource
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import Limits, Op, countable, model_ops
from lavish_fast import Config, Model
from lavish_fast.adapter import LavishAdapter
from lavish_fast.config import AdapterConfig, SpectrogramConfig, ViTConfig
from parity import ROOT, tiny_config

TINY = {
    "as it is": tiny_config(),
    "16 latents": tiny_config(adapter=AdapterConfig(latents=16, reduction=4)),
    "4 groups": tiny_config(adapter=AdapterConfig(reduction=4, groups=4)),
    "no p1": tiny_config(adapter=AdapterConfig(reduction=4, p1=False)),
    "no p2": tiny_config(adapter=AdapterConfig(reduction=4, p2=False)),
    "no adapters": tiny_config(adapter=AdapterConfig(reduction=4, p1=False, p2=False)),
    "vision only": tiny_config(modality="video"),
    "not cross-modal": tiny_config(adapter=AdapterConfig(reduction=4, cross_modal=False)),
    "no norms": tiny_config(
        adapter=AdapterConfig(reduction=4, cross_modal=False, batch_norm=False, ln_before=False, ln_after=False)
    ),
    "ViT": tiny_config(
        backbone=ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
        spectrogram=SpectrogramConfig(mel_bins=32, frames=29),
    ),
    "ViT, first block 1, sound only": tiny_config(
        backbone=ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
        spectrogram=SpectrogramConfig(mel_bins=24, frames=32),
        adapter=AdapterConfig(reduction=4, first_block=1, batch_norm=False),
        modality="audio",
    ),
}


@pytest.fixture
def meta(monkeypatch):
    """Tensors without data; autocast, which the meta device does not know, does nothing."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with torch.device("meta"):
        yield


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def inputs(config: Config, batch: int):
    side, s = config.backbone.img_size, config.spectrogram
    return torch.empty(batch, config.frames, s.frames, s.mel_bins), torch.empty(batch, config.frames, 3, side, side)


def flops(ops) -> int:
    return sum(op.total_flops for op in ops)


def is_attention(op: Op) -> bool:
    return op.name in ("attention", "window_attention")


def test_the_paper_s_model_has_the_flops_that_pytorch_counts(meta):
    config = Config.from_preset("ave-swinv2-large")
    total = flops(model_ops(config, 1, itemsize=2))
    model, data = Model(config), inputs(config, 1)
    with torch.no_grad():
        assert total == counted(lambda: model(*data))
    assert total == pytest.approx(1.06e12, rel=0.01)
    assert flops(model_ops(config, 7, itemsize=4)) == 7 * total


@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_that_pytorch_counts(name, meta):
    config = TINY[name]
    model, data = Model(config), inputs(config, 2)
    with FlopCounterMode(display=False) as counter:
        probabilities = model(*data)
        forward = counter.get_total_flops()
        probabilities.sum().backward()
    for fused in (False, True):
        listed, trained = (
            model_ops(config, 2, itemsize=4, training=training, fused=fused) for training in (False, True)
        )
        assert flops(listed) == forward
        # The ideal attention computes its scores again in the backward, a fifth of that; autograd has kept them.
        again = (flops(filter(is_attention, trained)) - flops(filter(is_attention, listed))) / 5
        assert flops(trained) - again == counter.get_total_flops()


@pytest.mark.parametrize("name", ["as it is", "ViT"])
def test_a_bare_backbone_has_the_flops_that_pytorch_counts(name, meta):
    config = TINY[name]
    audio, video = inputs(config, 2)
    backbone = Model(config).backbone
    images = [audio.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(0, 1), video.flatten(0, 1)]
    assert flops(model_ops(config, 2, itemsize=4, adapters=False)) == counted(lambda: [backbone(x) for x in images])


def test_frozen_products_take_one_more_in_training_from_the_first_adapter_on():
    for name, first in (("as it is", 0), ("no p1", 1)):
        forward, training = (
            {(op.stage, op.name): op for op in model_ops(TINY[name], 1, itemsize=2, training=training)[::-1]}
            for training in (False, True)
        )
        for op, factor in (("qkv", 1), ("proj", 1), ("fc1 + gelu", 2 - first), ("fc2", 2 - first)):
            assert training[1, op].flops == factor * forward[1, op].flops, op
            assert training[2, op].flops == 2 * forward[2, op].flops, op
        assert training[0, "patch_embed"] == forward[0, "patch_embed"]


def test_bytes_of_single_ops():
    """n = 2, N = 5 tokens of C = 12 channels, M = 7 of the other stream, m = 3, r = 2, G = 2; element by element."""
    x, y, s, table, weights_x, weights_y = 2 * 5 * 12, 2 * 7 * 12, 2 * 3 * 12, 3 * 12, 2 * 5 * 3, 2 * 7 * 3
    op = roofline.gather_latents(2, 7, 12, 3, 2)
    assert op.bytes == 2 * (table + y + s)
    assert op.flops == 2 * 2 * 3 * 7 * 12 * 2
    op = roofline.gather_latents(2, 7, 12, 3, 4, True)
    assert op.bytes == 4 * ((table + y + s + weights_y) + (s + y + weights_y + table) + (y + table))
    op = roofline.gather_latents(2, 7, 12, 3, 4, True, input_grad=False)
    assert op.bytes == 4 * ((table + y + s + weights_y) + (s + y + weights_y) + table)

    op = roofline.read_latents(2, 5, 12, 3, 2)
    assert op.bytes == 2 * (x + s + 1 + x)
    assert op.flops == 2 * 2 * 5 * 3 * 12 * 2
    op = roofline.read_latents(2, 5, 12, 3, 4, True)
    assert op.bytes == 4 * ((x + s + 1 + x + weights_x) + (x + x + s + 1 + weights_x) + (x + s + 1))

    down, weight = 2 * 5 * 6, 6 * (12 // 2)
    op = roofline.grouped_linear(2, 5, 12, 6, 2, 2)
    assert op.bytes == 2 * (x + weight + down)
    assert op.flops == 2 * 2 * 5 * weight
    op = roofline.grouped_linear(2, 5, 12, 6, 2, 4, True)
    assert op.bytes == 4 * ((x + weight + down) + (down + x + weight) + (x + weight))
    assert op.flops == 3 * 2 * 2 * 5 * weight

    q, bias = 2 * 4 * 3 * 9 * 8, 3 * 9 * 9 + 3
    op = roofline.window_attention(2, 4, 9, 3, 8, 2)
    assert op.bytes == 2 * (3 * q + q) + 4 * bias
    assert op.flops == 2 * 2 * 2 * 4 * 3 * 9 * 9 * 8
    op = roofline.window_attention(2, 4, 9, 3, 8, 8, True)
    assert op.bytes == 8 * ((3 * q + q) + (3 * q + q + 3 * q)) + 2 * 8 * bias
    assert roofline.attention(8, 9, 3, 8, 2).bytes == 2 * 4 * q

    config = AdapterConfig(latents=3, reduction=2)
    parameters = sum(p.numel() for p in LavishAdapter(12, config).parameters())
    parts = [roofline.gather_latents(2, 7, 12, 3, 2), roofline.read_latents(2, 5, 12, 3, 2)]
    parts += [roofline.grouped_linear(2, 5, 12, 6, 2, 2), roofline.grouped_linear(2, 5, 6, 12, 2, 2)]
    op = roofline.adapter(2, 5, 7, 12, config, 2)
    assert op.bytes == 2 * (x + y + x + parameters)
    assert op.flops == flops(parts)
    op = roofline.adapter(2, 5, 7, 12, config, 4, True)
    assert op.bytes == 4 * ((x + y + x + parameters) + (x + x + y + parameters) + (x + y + parameters))
    for off in ("batch_norm", "ln_before", "ln_after", "cross_modal"):
        config = AdapterConfig(latents=3, reduction=2, **{off: False})
        module = LavishAdapter(12, config, cross_modal=config.cross_modal)
        assert roofline.adapter(0, 5, 7, 12, config, 1).bytes == sum(p.numel() for p in module.parameters()), off


def test_bytes_of_the_ops_of_a_block():
    """The tiny Swin's first block in training: 2 clips of 3 frames and spectrograms, 64 tokens of 16 channels."""
    config = TINY["as it is"]
    x, hidden, z, image = 12 * 64 * 16, 4 * 12 * 64 * 16, 6 * 64 * 16, 6 * 32 * 32
    ops = {(op.stage, op.name): op for op in model_ops(config, 2, itemsize=2)}
    size = {key: op.bytes / 2 for key, op in ops.items()}
    assert size[0, "patch_embed"] == (image + 3 * image) + (3 * 16 * 16 + 16) + 2 * 16 + x
    assert size[1, "qkv"] == x + (16 * 48 + 48) + 3 * x
    assert size[1, "proj"] == x + (16 * 16 + 16) + x
    assert size[1, "fc1 + gelu"] == x + (16 * 64 + 64) + hidden
    assert size[1, "fc2"] == hidden + (64 * 16 + 16) + x
    assert size[1, "norm1 + residual"] == (x + x + x) + 2 * 16 + x
    assert size[1, "read_latents"] == z + 6 * 2 * 16 + 1 + 2 * 16 + z
    assert size[1, "down"] == z + 16 * 4 // 2 + 2 * 4 + z / 4
    assert size[1, "up"] == z / 4 + 4 * 16 // 2 + 2 * 16 + 2 * 16 + 1 + z
    assert size[2, "merge"] == x + 64 * 32 + 2 * 32 + x / 2
    assert {name: ops[1, name].calls for name in ("qkv", "norm1 + residual", "up")} == {
        "qkv": 2,
        "norm1 + residual": 2,
        "up": 8,
    }
    assert (ops[2, "up"].calls, ops[0, "head"].calls) == (4, 1)

    training = model_ops(config, 2, itemsize=2, training=True)
    # The first block's attention has no gradient to pass; from its MLP on, every part has.
    size = {(op.name, op.calls): op.bytes / 2 for op in training if op.stage == 1}
    assert size["qkv", 1] == ops[1, "qkv"].bytes / 2 + 3 * x + (16 * 48) + x + x
    assert size["fc1 + gelu", 2] == ops[1, "fc1 + gelu"].bytes / 2 + hidden + (16 * 64) + x + x
    assert size["fc2", 2] == ops[1, "fc2"].bytes / 2 + x + (64 * 16) + hidden + hidden
    assert size["norm2 + residual", 2] == ops[1, "norm2 + residual"].bytes / 2 + (x + x) + 2 * 16 + x
    # Stream and other stream get one more part of their gradients each: who adds it reads what is there.
    options = {"input_grad": True, "training": True}
    gather, read = (f(6, 64, 16, 2, 2, **options) for f in (roofline.gather_latents, roofline.read_latents))
    assert size["gather_latents", 6] == gather.bytes / 2 + z
    assert size["read_latents", 6] == read.bytes / 2 + z + 3 * 2 * 16
    whole = roofline.adapter(6, 64, 64, 16, config.adapter, 2, True)
    fused = model_ops(config, 2, itemsize=2, training=True, fused=True)
    assert [op.bytes / 2 for op in fused if (op.name, op.stage, op.calls) == ("adapter", 1, 6)] == [
        whole.bytes / 2 + z + z
    ]
    # BatchNorm's sums first: the gradient at either norm, and what it normalises, are read twice.
    trained = {"down": 16 * 4 // 2 + 2 * 4, "up": 4 * 16 // 2 + 2 * 16 + 2 * 16 + 1}
    assert size["down", 8] == (z + z / 4) + (z / 4 + z / 4 + z) + z + 3 * trained["down"]
    assert size["up", 8] == (z / 4 + z) + (2 * z + 2 * z + z / 4) + z / 4 + 3 * trained["up"]


def test_without_its_gate_a_stream_s_adapters_read_one_number_less():
    sizes = [
        sum(op.total_bytes for op in model_ops(tiny_config(adapter=adapter), 1, itemsize=2))
        for adapter in (AdapterConfig(reduction=4), AdapterConfig(reduction=4, audio_gate=False))
    ]
    assert sizes[0] - sizes[1] == 2 * 3 * 2  # bytes, blocks, p1 and p2


def test_a_bare_backbone_keeps_the_frozen_ops():
    for training in (False, True):
        whole, bare = (
            model_ops(TINY["as it is"], 2, itemsize=2, training=training, adapters=adapters)
            for adapters in (True, False)
        )
        trained = {"gather_latents", "read_latents", "down", "up", "head"}
        names = {op.name for op in whole}
        assert {op.name for op in bare} == names - trained
        kept = [op for op in whole if op.name not in trained and "residual" not in op.name]
        assert kept == [op for op in bare if "residual" not in op.name]


def test_the_streams_of_a_vit_share_the_frozen_weights():
    config = TINY["ViT"]
    ops = model_ops(config, 1, itemsize=2)
    qkv = [op for op in ops if op.name == "qkv"]
    # 16 patches a frame, 3 x 4 a spectrogram, and a cls token each.
    rows = 3 * (17 + 13)
    assert [(op.calls, op.bytes) for op in qkv] == [(3, 2 * (rows * 32 * 4 + 32 * 96 + 96 + 64))]
    proj, bare = (
        [op.bytes for op in model_ops(config, 1, itemsize=2, adapters=adapters) if op.name == "proj"]
        for adapters in (True, False)
    )
    # The product adds the stream, and the adapter's output if there is one.
    assert proj == [2 * (rows * 32 * 4 + 32 * 32 + 32)]
    assert bare == [2 * (rows * 32 * 3 + 32 * 32 + 32)]
    patch_embed = next(op for op in ops if op.name == "patch_embed")
    pixels, weight = 3 * (3 * 32 * 32 + 24 * 32), 3 * 64 * 32 + 32
    assert patch_embed.bytes == 2 * (pixels + weight + 17 * 32 + 32 + rows * 32)
    assert sorted(op.flops for op in ops if op.name == "attention") == [4 * 3 * 32 * n * n for n in (13, 17)]


@pytest.mark.parametrize("preset", [name for name in Config.presets() if countable(Config.from_preset(name))])
@pytest.mark.parametrize("training", [False, True])
def test_flops_rise_by_the_same_for_every_latent_token(preset, training):
    """Figure 1 of the paper: the cost is linear in the number of latent tokens."""
    config = Config.from_preset(preset)
    m = np.array([1, 2, 4, 8, 16, 32, 64])
    listings = [
        model_ops(replace(config, adapter=replace(config.adapter, latents=int(x))), 1, itemsize=2, training=training)
        for x in m
    ]
    totals = np.array([flops(ops) for ops in listings])
    slopes = np.diff(totals) / np.diff(m)
    assert slopes[0] > 0
    assert (slopes == slopes[0]).all()
    assert (np.diff([sum(op.total_bytes for op in ops) for ops in listings]) > 0).all()


def test_a_network_that_is_not_known_whole_is_refused():
    for name in ("avs-swinv2-tiny", "ave-resnet152", "ave-swinv2-large-vggish", "action-videomae-base"):
        with pytest.raises(ValueError, match="roofline: expected event localisation on a Swin-V2 or ViT"):
            model_ops(Config.from_preset(name), 1, itemsize=2)


def test_the_limit_is_where_the_notes_have_it():
    """Swin-V2-Large in bf16 on an H200's measured limits; by hand: 536-597 samples/s forward, some 235 in training."""
    config, limits = Config.from_preset("ave-swinv2-large"), Limits(790, 4300)

    def rate(**options):
        return 16 / roofline.floor(model_ops(config, 16, itemsize=2, **options), limits)

    assert 480 < rate() < rate(fused=True) < rate(adapters=False)
    assert rate(fused=True) == pytest.approx(536, rel=0.02)
    assert rate(training=True) < 235 < rate(training=True, fused=True) < 270


def test_seconds_are_the_longer_of_compute_and_bandwidth():
    limits = Limits(tflops=2.0, gb_per_s=100.0)
    compute, bandwidth = Op("a", 1, 3, 4 * 10**12, 10**9), Op("b", 2, 2, 10**9, 5 * 10**10)
    assert roofline.seconds(compute, limits) == pytest.approx(6.0)
    assert roofline.seconds(bandwidth, limits) == pytest.approx(1.0)
    assert roofline.floor([compute, bandwidth], limits) == pytest.approx(7.0)
    console = Console(file=io.StringIO(), width=200)
    console.print(roofline.table([compute, bandwidth], limits, batch=14))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["1", "a", "3", "12000", "3000", "4000", "FLOPs", "6000", "85.7%"] in lines
    assert ["2", "b", "2", "2", "100000", "0.02", "bytes", "1000", "14.3%"] in lines
    assert ["total", "5", "12002", "103000", "117", "FLOPs", "7000", "100.0%"] in lines
    assert "2 samples/s at most" in console.file.getvalue()


def test_limits_are_measured():
    before = torch.backends.cuda.matmul.allow_tf32
    limits = roofline.measure_limits("cpu", "float32")
    assert 1e-3 < limits.tflops < 100
    assert 0.1 < limits.gb_per_s < 10_000
    assert torch.backends.cuda.matmul.allow_tf32 == before
    for wrong in ("tf32", "int8"):
        with pytest.raises(ValueError, match=f"dtype: expected .*float64.* on cpu, got '{wrong}'"):
            roofline.measure_limits("cpu", wrong)


def test_a_limit_is_the_best_round():
    delays = iter([0.03, 0.03, 0.03, 0.001, 0.03, 0.03])
    assert roofline._best_seconds(lambda: time.sleep(next(delays)), "cpu") < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_limits_are_measured_on_a_gpu():
    before = torch.backends.cuda.matmul.allow_tf32
    limits = {dtype: roofline.measure_limits("cuda", dtype) for dtype in ("float32", "tf32", "bfloat16")}
    assert limits["float32"].tflops < limits["tf32"].tflops < limits["bfloat16"].tflops
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_listing_needs_no_torch_and_no_second():
    code = (
        "import sys\n"
        "from benchmarks.roofline import Config, Limits, model_ops, table\n"
        "ops = model_ops(Config.from_preset('ave-swinv2-large'), 16, itemsize=2, training=True)\n"
        "table(ops, Limits(790, 4300), 16)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stdout.split() == ["False", "False"]
    assert after.ru_utime - before.ru_utime < 1
