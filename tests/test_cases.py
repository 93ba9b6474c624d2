"""Every path of every case against its truth in float64, at the smallest sizes that have every kind of block."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention as TimmWindowAttention

from benchmarks import cases, measure
from benchmarks.baselines.mbt import MBTConfig
from benchmarks.cases import CASES, PRESETS, Preset, refusal
from benchmarks.measure import PRECISIONS, Unavailable, relative_error
from benchmarks.run import Truth
from lavish_fast import runtime
from lavish_fast.backbones.swin_v2 import WindowAttention
from lavish_fast.config import VIT_SPECTROGRAM, AdapterConfig, Config, SpectrogramConfig, SwinV2Config, ViTConfig

TINY = Preset(
    Config(
        SwinV2Config(32, 2, embed_dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2), window_size=4),
        spectrogram=SpectrogramConfig(mel_bins=32, frames=32, frame_shift_ms=31.0),
        frames=2,
    ),
    Config(
        ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2),
        adapter=AdapterConfig(reduction=4),
        spectrogram=replace(VIT_SPECTROGRAM, mel_bins=16, frames=24, frame_shift_ms=40.0),
        frames=2,
    ),
    MBTConfig((4, 16, 16), (2, 8, 8), (16, 16), (8, 8), width=16, depth=2, heads=2, mlp=32, fusion_layer=1),
    frames=4,
    side=32,
)
# Tens of millions of parameters at any size of image.
LARGE = ("cmbs", "xdc", "avts", "gdt")


def problem(name, clips=2, setting=0):
    case = CASES[name]
    return case.problem(TINY, case.settings(TINY)[setting], clips)


def run(problem, path, truth, dtype=torch.float32, repeats=1):
    """The errors of a path on the CPU, by the truth's own judgement."""
    function = problem.build(path, dtype, "cpu", training=truth.training)
    with torch.set_grad_enabled(truth.training):
        outputs = function(*problem.batch(repeats, dtype, "cpu"))
        if truth.training:
            labels = problem.labels.repeat(repeats, *(1,) * (problem.labels.ndim - 1))
            problem.loss(outputs, labels).backward()
    return truth.errors(path, function, outputs, repeats)


@pytest.mark.parametrize(
    ("name", "mode"),
    # XDC and AVTS are one network at this size: its training step is taken once.
    [(name, mode) for name, case in CASES.items() for mode in case.modes if (name, mode) != ("avts", "training")],
)
def test_every_path_equals_the_truth(name, mode, monkeypatch):
    # Compiling takes a minute, and has tests of its own.
    monkeypatch.setattr(runtime, "optimize", partial(runtime.optimize, compile=False))
    training, precision = mode == "training", PRECISIONS["float32"]
    found = {}
    for setting in range(len(CASES[name].settings(TINY))):
        if name == "latents" and setting not in (0, 6):
            continue
        ours = problem(name, 1 if name in LARGE and name != "gdt" else 2, setting)
        truth = Truth(ours, "reference", "cpu", training)
        assert truth.outputs.dtype == torch.float64
        assert truth.outputs.std() > 1e-3
        for path in ours.paths:
            if training and ours.trains is not None and path not in ours.trains:
                continue
            if refusal(name, mode, path, "float32", "cpu"):
                continue
            try:
                errors = run(ours, path, truth, repeats=1 if name in LARGE else 2)
            except Unavailable:
                continue
            found[path] = max(found.get(path, 0), errors[0])
            assert 0 < errors[0] <= (100 if training else 1) * precision.cap, (path, setting)
            assert not training or 0 < errors[1] <= precision.gradient_cap, (path, setting)
    expected = {
        ("ave", "inference"): {
            "reference",
            "model",
            "released",
            "released-bmm",
            "concatenated",
            "folded",
            "optimized",
        },
        ("ave", "training"): {"reference", "released", "released-bmm", "optimized"},
        ("backbone", "inference"): {"reference", "timm"},
        ("adapter", "inference"): {"reference", "released", "released-bmm"},
        ("window_attention", "inference"): {"reference", "timm-order", "sdpa-math", "sdpa-flash", "sdpa"},
    }
    assert found.keys() == expected.get((name, mode), {"reference"})


@pytest.mark.parametrize("name", ["ave", "mbt", "gather_latents", "window_attention"])
def test_a_batch_repeats_its_clips_and_each_is_checked(name):
    ours = problem(name)
    once, twice = (ours.batch(repeats, torch.float32, "cpu") for repeats in (1, 2))
    for small, large, batched in zip(once, twice, ours.batched):
        assert torch.equal(large, torch.cat((small, small)) if batched else small)
    first = next(x for x, batched in zip(once, ours.batched) if batched)
    assert not torch.equal(*first.chunk(2))

    truth = Truth(ours, "reference", "cpu", False)
    function = ours.build("reference", torch.float32, "cpu", training=False)
    with torch.no_grad():
        outputs = function(*twice)
    assert truth.errors("reference", function, outputs, 2)[0] < 1e-5
    rows = len(outputs) // 4  # of a clip
    for clip in range(4):
        wrong = outputs.clone()
        wrong[clip * rows : (clip + 1) * rows] *= 1 + 0.01 * torch.rand(wrong.shape[1:])
        assert truth.errors("reference", function, wrong, 2)[0] > 1e-3


def test_weights_are_not_the_identity():
    ours = problem("ave", 1)
    network = ours.build("reference", torch.float32, "cpu", training=False)
    inputs = ours.batch(1, torch.float32, "cpu")
    with torch.no_grad():
        expected = ours.rows(network(*inputs))
        for block in (0, len(network.adapters) - 1):
            for name, adapter in network.adapters[block].items():
                for gate in (adapter.gate, adapter.gate_av):
                    before = gate.clone()
                    assert 0.3 <= gate.item() <= 0.7
                    gate.zero_()
                    assert relative_error(ours.rows(network(*inputs)), expected) > 1e-3, (block, name)
                    gate.copy_(before)
    buffers = [buffer for name, buffer in network.named_buffers() if "running" in name]
    assert len(buffers) == 4 * 4 * len(network.adapters)
    assert all((buffer.ne(0) & buffer.ne(1)).all() for buffer in buffers)


def test_inputs_are_exact_in_every_precision():
    for name in ("ave", "ave-vit", "mbt", "window_attention"):
        for x, batched in zip(problem(name).inputs, problem(name).batched):
            if batched:
                assert torch.equal(x, x.bfloat16().double())
                assert torch.equal(x, x.half().double())


def test_constants_stay_wide():
    qkv, *constants = problem("window_attention").batch(1, torch.bfloat16, "cpu")
    assert qkv.dtype == torch.bfloat16
    assert {x.dtype for x in constants} == {torch.float32}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shift", [0, 2], ids=["without a mask", "with a mask"])
def test_timm_order_is_timms(shift, dtype, limit):
    torch.manual_seed(0)
    width, heads, size, window, n = 24, 3, 8, 4, 2
    ours = WindowAttention(width, heads, size, window, shift, 0)
    torch.nn.init.normal_(ours.cpb_mlp[2].weight, std=0.5)
    torch.nn.init.uniform_(ours.logit_scale, 1, 5)  # one beyond the clamp
    torch.nn.init.normal_(ours.q_bias)
    ours = ours.to(dtype)
    timm = TimmWindowAttention(width, (window, window), heads).to(dtype)
    timm.load_state_dict(ours.state_dict())
    order = cases.TimmOrder(ours).to(dtype)

    x = torch.randn(n, size**2, width, dtype=dtype)
    mask = ours.mask
    assert (mask is None) == (shift == 0)
    with torch.no_grad():
        expected = timm(x[:, ours.order].reshape(4 * n, window**2, width), mask).view(n, size**2, width)
        expected = expected[:, ours.order.argsort()]
        qkv = x @ timm.qkv.weight.T + torch.cat((timm.q_bias, torch.zeros_like(timm.q_bias), timm.v_bias))
        # table and bias are timm's own, whatever is passed
        constants = [ours.table * math.nan, ours.bias * math.nan] + ([] if mask is None else [mask])
        got = timm.proj(order(qkv, timm.logit_scale, *constants))
    assert (got - expected).norm() / expected.norm() <= limit


def test_refusals():
    assert refusal("ave", "inference", "reference", "float32", "cpu") is None
    assert "CUDA's tensor cores" in refusal("ave", "inference", "reference", "tf32", "cpu")
    assert "bfloat16 is not a number" in refusal("xdc", "training", "reference", "bfloat16", "cpu")
    assert "bfloat16 is not a number" in refusal("gdt", "training", "reference", "bfloat16-autocast", "cpu")
    assert refusal("xdc", "inference", "reference", "bfloat16", "cpu") is None
    assert refusal("xdc", "training", "reference", "float32", "cpu") is None
    assert (
        refusal("ave", "inference", "xformers", "float32", "cpu") == "xformers' attention takes CUDA tensors, got cpu"
    )
    for case in ("ave", "gather_latents"):
        assert refusal(case, "inference", "fused", "float32", "cpu") == "the kernels take CUDA tensors, got cpu"


def test_xformers_that_is_missing_is_refused(monkeypatch):
    assert refusal("ave", "inference", "xformers", "float32", "cuda") is None
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    assert (
        refusal("ave", "inference", "xformers", "float32", "cuda")
        == "xformers is missing: pip install 'xformers==0.0.35'"
    )


@pytest.mark.parametrize("preset", [*PRESETS.values(), TINY], ids=[*PRESETS, "tiny"])
def test_presets_have_the_papers_shape(preset):
    stages = [attention for *_, attention in cases._stages(preset)]
    assert [(a.size // a.window) ** 2 for a in stages] == [16, 4, 1, 1]
    assert [a.shift > 0 for a in stages] == [True, True, False, False]
    assert [a.mask is not None for a in stages] == [True, True, False, False]
    assert [stage for stage, *_ in cases._stages(preset)] == [1, 2, 3, 4]
    backbone = preset.swin.backbone
    assert [width for _, width, *_ in cases._stages(preset)] == [backbone.embed_dim * 2**i for i in range(4)]
    # As its network has them.
    assert all(a.qkv.in_features == width for a, (_, width, *_) in zip(stages, cases._stages(preset)))


def test_gdt_alone_does_not_train():
    assert problem("gdt", clips=1).trains == ()
    assert problem("ave", clips=1).trains == ("reference", "released", "released-bmm", "optimized")


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_the_paths_of_its_problems(name):
    case, preset = CASES[name], PRESETS["small"]
    assert set(case.problem(preset, case.settings(preset)[0], 1).paths) == set(case.paths)


@pytest.mark.parametrize(("name", "paths"), [("ave", ("released", "folded")), ("backbone", ("timm",))])
def test_the_baselines_have_blocks_to_compile(name, paths):
    case, preset = CASES[name], PRESETS["small"]
    for setting in case.settings(preset):
        problem = case.problem(preset, setting, 1)
        for path in paths:
            network = problem.build(path, torch.float32, "cpu", training=False)
            config = getattr(preset, setting.get("backbone", "swin"))
            assert len(measure._blocks(network)) == len(config.backbone.block_widths)
        assert measure._blocks(problem.truth) == []  # its blocks are called by branches
