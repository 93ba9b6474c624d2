"""Every path of every case against its truth in float64, at the smallest sizes that have every kind of block."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention as TimmWindowAttention

from benchmarks import cases, measure
from benchmarks.baselines.mbt import MBTConfig
from benchmarks.cases import CASES, MODES, PRESETS, Preset, refusal
from benchmarks.measure import PRECISIONS, Unavailable, relative_error
from benchmarks.run import Group, Selection, Truth, step
from lavish_fast import TrainingStep, runtime
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
WITHOUT_PARAMETERS = ("gather_latents", "window_attention")


def problem(name, clips=2, setting=0):
    case = CASES[name]
    return case.problem(TINY, case.settings(TINY)[setting], clips)


def run(problem, path, truth, dtype=torch.float32, repeats=1):
    """The errors of a path on the CPU, by the truth's own judgement."""
    function = problem.build(path, dtype, "cpu", training=truth.training)
    inputs = problem.batch(repeats, dtype, "cpu", training=truth.training)
    with torch.set_grad_enabled(truth.training):
        call = step(problem, function, function, inputs, repeats) if truth.training else function
        outputs = call(*inputs)
    return truth.errors(path, function, outputs, repeats, inputs)


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
            found[path] = max(found.get(path, 0), errors["outputs"])
            assert 0 < errors["outputs"] <= (100 if training else 1) * precision.cap, (path, setting)
            assert ("parameters" in errors) == (training and name not in WITHOUT_PARAMETERS)
            assert {f"input {i}" for i in ours.differentiated if training} <= errors.keys()
            # Of a kind by itself float32's rounding shows more where its gradient is small.
            limits = {what: precision.gradient_cap * (2 if "," in what else 1) for what in errors}
            assert all(0 < error <= limits[what] for what, error in errors.items()), (path, setting, errors)
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
        ("ave", "training"): {"reference", "released", "released-bmm", "concatenated", "optimized"},
        ("backbone", "inference"): {"reference", "timm"},
        **{("networks", mode): {"reference", "optimized"} for mode in MODES},
        **{("adapter", mode): {"reference", "released", "released-bmm"} for mode in MODES},
        **{
            ("window_attention", mode): {"reference", "timm-order", "sdpa-math", "sdpa-flash", "sdpa"} for mode in MODES
        },
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
    assert truth.errors("reference", function, outputs, 2)["outputs"] < 1e-5
    rows = len(outputs) // 4  # of a clip
    for clip in range(4):
        wrong = outputs.clone()
        wrong[clip * rows : (clip + 1) * rows] *= 1 + 0.01 * torch.rand(wrong.shape[1:])
        assert truth.errors("reference", function, wrong, 2)["outputs"] > 1e-3


OP_CASES = ("gather_latents", "adapter", "window_attention")


@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("repeats", [1, 3])
def test_gradients_of_an_op_are_those_of_autograd(name, repeats):
    """By hand, in float64, on the clips as they are; and a wrong one, or one too many or too few, shows."""
    ours = problem(name)
    truth = Truth(ours, "reference", "cpu", True)
    function = ours.build("reference", torch.float64, "cpu", training=True)
    leaves = [x.clone().requires_grad_(i in ours.differentiated) for i, x in enumerate(ours.inputs)]
    outputs = function(*leaves)
    drawn = cases._draw(*ours.rows(outputs).shape, seed=9)
    (ours.rows(outputs) * drawn).sum().backward()
    wanted = {i: leaves[i].grad for i in ours.differentiated}
    if isinstance(function, torch.nn.Module):
        wanted |= {name: p.grad for name, p in function.named_parameters() if p.grad is not None}
        assert not any(str(name).startswith("norm.") for name in wanted)
        assert len(wanted) == 3 + len(list(function.adapter.parameters()))
    assert truth.gradients.keys() == wanted.keys()
    for key, expected in wanted.items():
        assert relative_error(truth.gradients[key], expected) < 1e-12, key
        assert expected.norm() > 0, key

    function = ours.build("reference", torch.float64, "cpu", training=True)
    inputs = ours.batch(repeats, torch.float64, "cpu", training=True)
    assert [x.requires_grad for x in inputs] == [i in ours.differentiated for i in range(len(inputs))]
    outputs = step(ours, function, function, inputs, repeats)(*inputs)

    def errors():
        return truth.errors("reference", function, outputs, repeats, inputs)

    assert max(errors().values()) < 1e-10
    missing = {"outputs": errors()["outputs"], "gradients": math.inf}
    for i in ours.differentiated:
        before, inputs[i].grad = inputs[i].grad, inputs[i].grad * torch.linspace(0.99, 1.01, inputs[i].shape[-1])
        assert [what for what, error in errors().items() if not error < 1e-10] == [f"input {i}"]
        assert errors()[f"input {i}"] > 1e-3
        inputs[i].grad = None
        assert errors() == missing
        inputs[i].grad = before
    if isinstance(function, torch.nn.Module):
        before = function.adapter.gate_av.grad.clone()
        function.adapter.gate_av.grad.mul_(1.1)
        wrong = [what for what, error in errors().items() if not error < 1e-10]
        assert wrong == ["parameters", "parameters, gate_av"]
        assert errors()["parameters, gate_av"] == pytest.approx(0.1)
        function.adapter.gate_av.grad.zero_()
        assert errors()["parameters, gate_av"] == math.inf
        # BatchNorm takes it away: there is no gradient, and none is right.
        function.adapter.gate_av.grad.copy_(before)
        function.adapter.ln_before.bias.grad.zero_()
        assert max(errors().values()) < 1e-10
        function.adapter.up.grad = None
        assert errors() == missing


def test_a_training_step_of_the_adapter_has_wide_parameters_and_narrow_streams():
    ours = problem("adapter")
    for path in ("reference", "released", "fused"):
        step_ = ours.build(path, torch.bfloat16, "cpu", training=True)
        assert step_.training
        assert step_.adapter.bn1.training
        assert {p.dtype for p in step_.adapter.parameters()} == {torch.float32}
        assert {p.dtype for p in step_.norm.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in step_.norm.parameters())
        assert {p.dtype for p in ours.build(path, torch.bfloat16, "cpu", training=False).parameters()} == {
            torch.bfloat16
        }
    truth = Truth(ours, "reference", "cpu", True)
    for path in ("reference", "released-bmm"):
        errors = run(ours, path, truth, torch.bfloat16, repeats=2)
        assert all(1e-4 < error < 0.1 for what, error in errors.items() if "," not in what), (path, errors)


@pytest.mark.parametrize(
    ("setting", "forward", "training"),
    # Elements of streams a token and channel: X, B and out; in training also X, B, dout, dX and dB.
    [("adapter", 3, 8), ("gather_latents", 1, 3), ("window_attention", 4, 11)],
)
def test_the_least_work_counts_each_stream_once(setting, forward, training):
    """In stage 1, where the rest is small: latents, weights, statistics, the bias."""
    case, preset = CASES[setting], PRESETS["paper"]
    setting = case.settings(preset)[0]
    ours = case.problem(preset, setting, 1)
    n, tokens, width = cases._stage(preset, setting, 1)
    images = n if len(ours.differentiated) == 2 else 2 * n
    for elements, mode in ((forward, False), (training, True)):
        (op,) = ours.work(4, 2, mode)
        assert op.bytes == pytest.approx(4 * images * tokens * width * 2 * elements, rel=0.06)


def test_whole_steps_of_the_optimised_network(monkeypatch):
    monkeypatch.setattr(runtime, "optimize", partial(runtime.optimize, compile=False))
    monkeypatch.setitem(PRESETS, "small", TINY)
    selection = Selection("cpu", "small", [2], cases=["ave"], modes=["training"])
    (key,) = selection.groups()
    group, built = Group(selection, key, {}, {}, 0.0), []
    group._prepare_problem()
    build = group.problem.build
    monkeypatch.setattr(group.problem, "build", lambda path, *a, **k: built.append(build(path, *a, **k)) or built[-1])
    done = group.prepare("optimized", "step", "float32")
    assert done.row["status"] == "ok", done.row["reason"]
    module = built[-1]
    before = [p.detach().clone() for p in module.parameters()]
    done.call()
    moved = [(p.detach() - old).abs().max().item() for p, old in zip(module.parameters(), before) if p.requires_grad]
    assert 0 < max(moved) < 3e-6
    assert len([x for x in moved if x > 1e-8]) > 0.9 * len(moved)
    # Weights stay while a step is checked, and a wrong gradient shows.
    true = TrainingStep.finish

    def finish(step):
        outcome = true(step)
        for p in step._parameters:
            p.grad.mul_(1.1)
        return outcome

    monkeypatch.setattr(TrainingStep, "finish", finish)
    assert group.prepare("optimized", "step", "float32").row["status"] == "wrong"
    with pytest.raises(Unavailable, match="for training alone"):
        measure.execute(module, "step", group.problem.batch(1, torch.float32, "cpu"), training=False)


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
                    gate.zero_()
                    assert relative_error(ours.rows(network(*inputs)), expected) > 1e-3, (block, name)
                    gate.copy_(before)
    buffers = [buffer for name, buffer in network.named_buffers() if "running" in name]
    assert len(buffers) == 4 * 4 * len(network.adapters)
    assert all((buffer.ne(0) & buffer.ne(1)).all() for buffer in buffers)


def prepared(mode, change):
    """What is said of a bfloat16 path of the small network after a `change` of its module."""
    selection = Selection("cpu", "small", [1], cases=["ave"], modes=[mode])
    (key,) = selection.groups()
    group = Group(selection, key, {}, {}, 0.0)
    group._prepare_problem()
    build = group.problem.build

    def changed(path, *args, **options):
        module = build(path, *args, **options)
        if path == "concatenated":
            for name, p in module.named_parameters():
                change(name, p)
        return module

    group.problem.build = changed
    return group.prepare("concatenated", "eager", "bfloat16").row


def test_a_network_without_latents_is_wrong_in_bfloat16():
    def without(name, p):
        if name.endswith("gate_av"):
            p.data.zero_()

    row = prepared("inference", without)
    assert (row["status"], row["error"] > 2 * row["error_budget"]) == ("wrong", True)
    assert prepared("inference", lambda name, p: None)["status"] == "ok"


@pytest.mark.parametrize("kind", ["adapters", "latents", "gate_av", "gate", "down", "up", "bn2.bias"])
def test_adapters_without_a_gradient_are_wrong_in_bfloat16(kind):
    def without(name, p):
        if p.requires_grad and (f".{kind}." in f".{name}."):
            p.register_hook(torch.zeros_like)

    row = prepared("training", without)
    assert (row["status"], row["error"]) == ("wrong", None)
    assert row["reason"].startswith("error inf of parameters, ")
    row = prepared("training", lambda name, p: None)
    # Of all parameters together, as the baselines' rows have it; latents alone are off by 0.2.
    assert (row["status"], row["error"] < 0.03) == ("ok", True)


def test_gates_of_training_are_small():
    for name in ("ave", "networks"):
        before, after = (
            dict(problem(name, 1).build("reference", torch.float32, "cpu", training=t).named_parameters())
            for t in (False, True)
        )
        for key, p in before.items():
            factor = {"gate": 0.2, "gate_av": 0.04}.get(key.split(".")[-1], 1)
            assert torch.equal(after[key], p * factor), key


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
    for path in ("concatenated", "optimized"):
        assert "narrows the weights itself" in refusal("ave", "training", path, "bfloat16-autocast", "cuda")
        assert refusal("ave", "training", path, "bfloat16", "cuda") is None
    assert refusal("ave", "training", "released", "bfloat16-autocast", "cuda") is None
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
    assert "optimized" in problem("ave", clips=1).trains


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_the_paths_of_its_problems(name):
    case, preset = CASES[name], PRESETS["small"]
    assert set(case.problem(preset, case.settings(preset)[0], 1).paths) == set(case.paths)


@pytest.mark.parametrize(
    ("name", "paths", "training"),
    [
        ("ave", ("released", "folded"), False),
        ("ave", ("released-bmm", "concatenated", "fused"), True),
        ("backbone", ("timm",), False),
    ],
)
def test_the_baselines_have_blocks_to_compile(name, paths, training):
    case, preset = CASES[name], PRESETS["small"]
    for setting in case.settings(preset):
        problem = case.problem(preset, setting, 1)
        for path in paths:
            network = problem.build(path, torch.float32, "cpu", training=training)
            config = getattr(preset, setting.get("backbone", "swin"))
            assert len(measure._blocks(network)) == len(config.backbone.block_widths)
        assert measure._blocks(problem.truth) == []  # its blocks are called by branches
