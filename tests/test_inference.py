"""Inference is the model in evaluation: concatenated streams and folded constants change rounding, nothing else."""

import copy
import itertools

import pytest
import torch
from torch import nn

from kernel_parity import DEVICE, DTYPES, small_backbone
from lavish_fast import Model, ops, tasks
from lavish_fast.adapter import LavishAdapter
from lavish_fast.concatenated import Linear
from lavish_fast.config import AdapterConfig, ViTConfig
from lavish_fast.inference import FoldedStep, Inference, PackedLinear
from parity import AVE_GOLDENS, golden, randomise, relative_error, tiny_config, tiny_inputs

SWIN_GOLDENS = [name for name in AVE_GOLDENS if "swin" in name]


def make(dtype=torch.float32, seed=0, **options) -> Model:
    torch.manual_seed(seed)
    config = tiny_config(adapter=AdapterConfig(**({"reduction": 4} | options)))
    return randomise(Model(config), seed).to(dtype).eval()


def run(module, inputs):
    """Features and probabilities: the softmax alone would hide most of an error."""
    features = []
    beside = lambda _, args: features.append(tasks.side_by_side(module.config, args[0]))  # noqa: E731
    handle = module.head.register_forward_pre_hook(beside)
    with torch.no_grad():
        probabilities = module(*inputs)
    handle.remove()
    return {"features": features[0], "probs": probabilities}


def errors(got, expected):
    return {what: relative_error(got[what], expected[what]) for what in ("features", "probs")}


def assert_same(inference, model, inputs, limit):
    found = errors(run(inference, inputs), run(model, inputs))
    assert max(found.values()) <= limit, found


def a_clip(name, dtype):
    """The golden's first clip, and what the released code gave for it."""
    released = golden(name)
    inputs = [x[:1] for x in released.inputs(dtype)]
    seconds = inputs[0].shape[1]
    return released, inputs, {what: released.expect[f"eval_{what}"][:seconds] for what in ("features", "probs")}


@pytest.mark.parametrize("name", SWIN_GOLDENS)
def test_goldens(name, record_property):
    released, inputs, expected = a_clip(name, torch.float64)
    model = released.model(torch.float64).eval()
    own = run(model, inputs)
    for fold in (True, False):
        inference = Inference(model, fold=fold)
        got = run(inference, inputs)
        assert max(errors(got, own).values()) <= 1e-12
        assert max(errors(got, expected).values()) <= 1e-6
        found = errors(run(Inference(model, fold=fold, dtype=torch.float32), inputs), expected)
        record_property(f"float32, fold={fold}", found)
        assert max(found.values()) <= 1e-5


@pytest.mark.parametrize("name", SWIN_GOLDENS)
def test_goldens_in_bfloat16(name, record_property):
    dtype = torch.bfloat16
    released, inputs, expected = a_clip(name, dtype)
    model = released.model(dtype).eval()
    own = errors(run(model, inputs), expected)
    record_property("model", own)
    for rounded, inference in (
        ("after folding", Inference(released.model(torch.float32), dtype=dtype)),
        ("packed", Inference(released.model(torch.float32), dtype=dtype, pack=True)),
        ("before folding", Inference(model)),
        ("not folded", Inference(model, fold=False)),
    ):
        found = errors(run(inference, inputs), expected)
        record_property(rounded, found)
        for what, error in found.items():
            assert error <= 2 * own[what] + 4 * torch.finfo(dtype).eps, (rounded, what)
            assert error <= 0.05, (rounded, what)


@pytest.mark.parametrize(
    ("batch_norm", "ln_before", "ln_after", "audio_gate", "cross_modal"),
    list(itertools.product([True, False], repeat=5)),
)
def test_every_option_combination(batch_norm, ln_before, ln_after, audio_gate, cross_modal):
    options = {"batch_norm": batch_norm, "ln_before": ln_before, "ln_after": ln_after}
    model = make(torch.float64, **options, audio_gate=audio_gate, cross_modal=cross_modal)
    inputs = tiny_inputs(1, dtype=torch.float64)
    for fold in (True, False):
        assert_same(Inference(model, fold=fold), model, inputs, 1e-12)


@pytest.mark.parametrize(("p1", "p2"), [(True, False), (False, True), (False, False)])
def test_adapter_places(p1, p2):
    model = make(torch.float64, p1=p1, p2=p2)
    assert_same(Inference(model), model, tiny_inputs(dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("latents", "reduction", "groups"), list(itertools.product([1, 2, 16], [2, 4], [1, 2, 4])))
def test_sizes(latents, reduction, groups):
    model = make(torch.float64, latents=latents, reduction=reduction, groups=groups)
    assert_same(Inference(model), model, tiny_inputs(1, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"batch_norm": False}, {"ln_before": False, "ln_after": False}])
def test_low_precision(options, dtype):
    model, inputs = make(**options), tiny_inputs()
    low = [x.to(dtype) for x in inputs]
    expected = run(copy.deepcopy(model).double(), [x.double() for x in inputs])
    own = errors(run(copy.deepcopy(model).to(dtype), low), expected)
    for fold in (True, False):
        for what, error in errors(run(Inference(model, fold=fold, dtype=dtype), inputs), expected).items():
            assert error <= 2 * own[what] + 4 * torch.finfo(dtype).eps, what


def test_constants_are_folded_in_float64():
    # A product rounded before the last rounding would show: a weight is off by no more than half a unit.
    model = make(torch.bfloat16)
    adapters = model.adapters[0].at("p1")
    folded, adapter = FoldedStep(model.backbone.blocks[0].norm1, adapters, "auto"), adapters[1]
    expected = {
        "ln_weight": adapter.ln_after.weight.double() * adapter.gate.double(),
        "ln_bias": adapter.ln_after.bias.double() * adapter.gate.double(),
        "up": adapter.up.double()
        * (adapter.bn2.weight.double() / (adapter.bn2.running_var.double() + adapter.bn2.eps).sqrt())[:, None],
    }
    for name, tensor in expected.items():
        assert torch.equal(getattr(folded, name)[1].squeeze(), tensor.bfloat16()), name


def test_folded_weights_take_no_gradient():
    folded = FoldedStep(nn.LayerNorm(16), [randomise(LavishAdapter(16, AdapterConfig(reduction=4)))], "auto")
    assert {name for name, _ in folded.named_parameters()} == {"norm.weight", "norm.bias"}
    assert not any(buffer.requires_grad for buffer in folded.buffers())


def test_fold_leaves_no_norm_before_a_product():
    norms = [
        [
            type(module).__name__
            for block in Inference(make(), fold=fold).blocks
            for module in block.p1.modules()
            if "Norm" in type(module).__name__ and module is not block.p1.norm
        ]
        for fold in (True, False)
    ]
    assert not norms[0]
    assert set(norms[1]) == {"BatchNorm1d", "LayerNorm"}


def test_a_clip_alone_equals_the_clip_in_a_batch():
    inference, (audio, video) = Inference(make(torch.float64)), tiny_inputs(4, dtype=torch.float64)
    together = inference(audio, video).view(4, 3, -1)
    assert together.std(0).min() > 1e-6, "the clips must differ"
    for i in range(4):
        torch.testing.assert_close(inference(audio[i : i + 1], video[i : i + 1]), together[i], rtol=1e-10, atol=1e-12)


def test_a_clip_of_nan_stays_alone():
    inference, (audio, video) = Inference(make()), tiny_inputs(3)
    audio[1] = float("nan")
    out = inference(audio, video).view(3, 3, -1)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


def test_empty_batch_one_second_and_strided_inputs():
    inference, (audio, video) = Inference(make()), tiny_inputs(4)
    assert inference(audio[:0], video[:0]).shape == (0, 3)
    assert inference(audio[:1, :1], video[:1, :1]).shape == (1, 3)
    torch.testing.assert_close(
        inference(audio[::2], video[::2]), inference(audio, video).view(4, 3, -1)[::2].flatten(0, 1)
    )


@pytest.mark.parametrize("fold", [True, False])
def test_the_model_stays_as_it_is(fold):
    model, inputs = make(), tiny_inputs()
    model.backbone.blocks[0].attn.path = "reference"
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(*inputs)
    trained = {name for name, _ in model.trainable_parameters()}
    model.train()
    inference = Inference(model, fold=fold, path="auto", attention="sdpa")
    before = inference(*inputs)
    Inference(model, fold=fold, path="fused", dtype=torch.bfloat16)
    assert all(module.training for module in model.modules())
    assert {name for name, _ in model.trainable_parameters()} == trained
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    adapters = [adapter for block in model.adapters for adapter in block.values()]
    assert {(type(adapter), adapter.path) for adapter in adapters} == {(LavishAdapter, "auto")}
    assert [block.attn.path for block in model.backbone.blocks] == ["reference", "auto", "auto"]
    assert torch.equal(model.eval()(*inputs), expected)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_()
    assert torch.equal(inference(*inputs), before), "the weights must be copies"


@pytest.mark.parametrize("fold", [True, False])
def test_it_stays_in_evaluation(fold):
    model, inputs = make(), tiny_inputs()
    inference = Inference(model.train(), fold=fold)
    assert not any(module.training for module in inference.modules())
    expected = model.eval()(*inputs)
    inference.train()
    assert not any(module.training for module in inference.modules())
    torch.testing.assert_close(inference(*inputs), expected)


@pytest.mark.parametrize("fold", [True, False])
def test_no_gradient_is_built(fold):
    inference = Inference(make(), fold=fold)
    assert not any(p.requires_grad for p in inference.parameters())
    out = inference(*(x.requires_grad_() for x in tiny_inputs()))
    assert not out.requires_grad
    assert out.grad_fn is None


def test_a_vit_is_refused():
    config = tiny_config(backbone=ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2))
    with pytest.raises(ValueError, match=r"^inference: expected a model on a swinv2, got one on a vit$"):
        Inference(Model(config))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_stream(modality):
    model = randomise(Model(tiny_config(modality=modality))).double().eval()
    audio, video = tiny_inputs(dtype=torch.float64)
    inputs = (None, video) if modality == "video" else (audio,)
    for fold in (True, False):
        assert_same(Inference(model, fold=fold), model, inputs, 1e-12)


def test_fused_raises_the_reasons_of_the_ops():
    model, inputs = make(torch.float64), tiny_inputs(dtype=torch.float64)
    reason = "expected float32, float16 or bfloat16, got float64"
    with pytest.raises(ValueError, match=rf"window_attention: .*{reason}"):
        Inference(model, fold=False, path="fused")(*inputs)
    with pytest.raises(ValueError, match=rf"adapter: .*{reason}"):
        Inference(model, fold=False, path="fused", attention="sdpa")(*inputs)
    with pytest.raises(ValueError, match=r"adapter: .*expected adapters as they were trained, got folded ones"):
        Inference(model, fold=True, path="fused", attention="sdpa")(*inputs)
    with pytest.raises(ValueError, match="path: expected 'auto', 'fused' or 'reference', got 'fast'"):
        Inference(model, path="fast")(*inputs)


def fused_model(dtype=torch.float32, streams=None):
    """Wide enough for every kernel, with a shifted block and 16 and 4 windows' worth of tokens."""
    backbone = small_backbone(streams or dtype)
    torch.manual_seed(0)
    return randomise(Model(tiny_config(backbone=backbone, frames=1))).to(dtype).to(DEVICE).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_in_a_network(dtype):
    # In a Model as it is, rearranged, and optimised: every op of every block is fused.
    model = fused_model(streams=dtype)
    inputs = [x.to(DEVICE) for x in tiny_inputs(1, frames=1)]
    expected = run(copy.deepcopy(model).double(), [x.double() for x in inputs])
    own = errors(run(fused_model(dtype).set_path("reference"), [x.to(dtype) for x in inputs]), expected)
    networks = {
        "model": fused_model(dtype).set_path("fused"),
        "inference": Inference(model, dtype=dtype, fold=False, path="fused"),
    }
    for name, network in networks.items():
        with torch.no_grad(), ops.recording() as choices:
            found = errors(run(network, [x.to(dtype) for x in inputs]), expected)
        assert {choice.path for choice in choices} == {"fused"}
        # The model runs the frozen branch of each stream by itself.
        count = {op: [choice.op for choice in choices].count(op) for op in ("window_attention", "adapter")}
        assert count == {"window_attention": 3 if name == "inference" else 6, "adapter": 6}
        for what, error in found.items():
            assert error <= 2 * own[what] + 4 * torch.finfo(dtype).eps, (name, what)
            assert dtype != torch.float32 or error <= 1e-5, (name, what)


@pytest.mark.parametrize("kind", ["model", "inference"])
def test_fused_blocks_compile_without_a_graph_break(kind):
    model, x = fused_model(), torch.randn(2, 64, small_backbone(torch.float32).embed_dim, device=DEVICE)
    block = Inference(model, fold=False, path="fused").blocks[1]  # the one with a shift

    def forward(x):
        if kind == "inference":
            return block(x)
        frozen, adapters = model.backbone.blocks[1], model.adapters[1]
        return torch.cat([*adapters(frozen, x.chunk(2))])

    model.set_path("fused")
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), forward(x))


@pytest.mark.parametrize("options", [{"path": "reference"}, {"attention": "sdpa"}, {"attention": "reference"}])
def test_paths_that_a_cpu_has(options):
    model = make(torch.float64)
    inference = Inference(model, **options)
    path = options.get("attention") or options["path"]
    assert {block.attention.path for block in inference.blocks} == {path}
    assert_same(inference, model, tiny_inputs(dtype=torch.float64), 1e-12)


def test_inputs_as_the_released_networks_take_them():
    inference, (audio, video) = Inference(make()), tiny_inputs()
    expected = inference(audio, video)
    assert torch.equal(inference([audio], video), expected)
    assert torch.equal(inference(audio=(audio, None), video=video), expected)
    with pytest.raises(ValueError, match=r"video: expected .*got NoneType"):
        inference(audio)
    with pytest.raises(ValueError, match=r"audio: expected .*got \(2, 3, 32, 31\)"):
        inference(audio[..., 1:], video)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_autocast(fold, pack):
    model, inputs = make(), tiny_inputs()
    expected, inference = run(model, inputs), Inference(model, fold=fold, pack=pack)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = (errors(run(module, inputs), expected)["features"] for module in (model, inference))
    assert 1e-4 < found <= 2 * own + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fold", [True, False])
def test_weights_are_narrow_and_position_constants_are_not(fold, dtype):
    inference = Inference(make(), fold=fold, dtype=dtype)
    constants = {
        name for name in inference.state_dict() if name.rpartition(".")[2] in ("scale", "table", "bias", "mask")
    }
    constants = {name for name in constants if ".attention." in name}
    kinds = {name: t.dtype for name, t in inference.state_dict().items() if t.is_floating_point()}
    assert constants
    assert {kinds.pop(name) for name in constants} == {torch.float32}
    assert set(kinds.values()) == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_is_linear(dtype):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(3, 5, 40)
    if not PackedLinear.takes(weight.to(dtype)):
        pytest.skip(f"this processor has no oneDNN product for {dtype}")
    for gelu in (False, True):
        for b in (bias, None):
            given = [t if t is None else t.to(dtype) for t in (weight, b)]
            wide = [t if t is None else t.double() for t in given]
            expected = Linear(*wide, gelu)(x.to(dtype).double())
            for rows in (x, x[:1], x[:0], x[:, ::2]):
                got = PackedLinear(Linear(*given, gelu))(rows.to(dtype))
                assert got.shape == Linear(*given, gelu)(rows.to(dtype)).shape
            got = PackedLinear(Linear(*given, gelu))(x.to(dtype))
            assert relative_error(got, expected) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("fold", [True, False])
def test_a_state_dict_loads(fold):
    source, target = (Inference(make(seed=seed), fold=fold) for seed in range(2))
    inputs = tiny_inputs()
    expected = source(*inputs)
    assert not torch.allclose(target(*inputs), expected)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(*inputs), expected)


@pytest.mark.parametrize("fold", [True, False])
def test_deepcopy(fold):
    inference, inputs = Inference(make(), fold=fold), tiny_inputs()
    expected = inference(*inputs)
    other = copy.deepcopy(inference)
    assert torch.equal(other(*inputs), expected)
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    assert torch.equal(inference(*inputs), expected)


@pytest.mark.parametrize(("fold", "attention"), [(True, None), (False, "sdpa")])
def test_a_block_compiles_without_a_graph_break(fold, attention):
    inference, (audio, video) = Inference(make(), fold=fold, attention=attention), tiny_inputs()
    images = torch.cat((audio.unsqueeze(2).expand_as(video), video)).flatten(0, 1)
    block = inference.blocks[1]  # the one with a shift and its mask
    assert block.attention.mask is not None
    torch.compiler.reset()
    with torch.no_grad():
        x = inference.embed(images)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), block(x))
