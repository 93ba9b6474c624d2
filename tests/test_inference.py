"""Inference is the model in evaluation: concatenated streams and folded constants change rounding, nothing else."""

import copy
import itertools

import pytest
import torch

from lavish_fast import Model
from lavish_fast.adapter import LavishAdapter
from lavish_fast.config import AdapterConfig, ViTConfig
from lavish_fast.inference import FoldedAdapter, Inference
from parity import AVE_GOLDENS, golden, randomise, relative_error, tiny_config, tiny_inputs

SWIN_GOLDENS = [name for name in AVE_GOLDENS if "swin" in name]


def make(dtype=torch.float32, seed=0, **options) -> Model:
    torch.manual_seed(seed)
    config = tiny_config(adapter=AdapterConfig(**({"reduction": 4} | options)))
    return randomise(Model(config), seed).to(dtype).eval()


def run(module, inputs):
    """Features and probabilities: the softmax alone would hide most of an error."""
    features = []
    head = module.model.head if isinstance(module, Inference) else module.head
    handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
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
        found = errors(run(inference.float(), [x.float() for x in inputs]), expected)
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
        ("after folding", Inference(released.model(torch.float32)).to(dtype)),
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
        for what, error in errors(run(Inference(model, fold=fold).to(dtype), low), expected).items():
            assert error <= 2 * own[what] + 4 * torch.finfo(dtype).eps, what


def test_constants_are_folded_in_float64():
    # A product rounded before the last rounding would show: a weight is off by no more than half a unit.
    adapter = make(torch.bfloat16).adapters[0]["video_p1"]
    folded = FoldedAdapter(adapter)
    expected = {
        "ln_weight": adapter.ln_after.weight.double() * adapter.gate.double(),
        "ln_bias": adapter.ln_after.bias.double() * adapter.gate.double(),
        "up": adapter.up.double()
        * (adapter.bn2.weight.double() / (adapter.bn2.running_var.double() + adapter.bn2.eps).sqrt())[:, None],
    }
    for name, tensor in expected.items():
        assert torch.equal(getattr(folded, name), tensor.bfloat16()), name


def test_a_folded_adapter_builds_no_gradient():
    adapter = randomise(LavishAdapter(16, AdapterConfig(reduction=4)))
    folded = FoldedAdapter(adapter)
    assert not list(folded.parameters())
    assert not any(buffer.requires_grad for buffer in folded.buffers())


def test_fold_leaves_no_norm_before_a_product():
    norms = [
        [type(m).__name__ for m in Inference(make(), fold=fold).model.adapters.modules() if "Norm" in type(m).__name__]
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
    Inference(model, fold=fold, path="fused").bfloat16()
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


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        (
            {"backbone": ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)},
            r"vit with audio\+video",
        ),
        ({"modality": "video"}, "swinv2 with video"),
        ({"modality": "audio"}, "swinv2 with audio"),
    ],
)
def test_other_models_are_refused(changes, got):
    with pytest.raises(ValueError, match=rf"^inference: expected a swinv2 with audio\+video, got {got}$"):
        Inference(Model(tiny_config(**changes)))


@pytest.mark.parametrize("fold", [True, False])
def test_fused_raises_the_reasons_of_the_ops(fold):
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match=r"window_attention: .*expected CUDA tensors, got cpu"):
        Inference(make(), fold=fold, path="fused")(*inputs)
    with pytest.raises(ValueError, match=r"gather_latents: .*expected CUDA tensors, got cpu"):
        Inference(make(), fold=fold, path="fused", attention="sdpa")(*inputs)
    with pytest.raises(ValueError, match=r"grouped_linear: .*expected CUDA tensors, got cpu"):
        Inference(make(cross_modal=False), fold=fold, path="fused", attention="sdpa")(*inputs)
    with pytest.raises(ValueError, match="path: expected 'auto', 'fused' or 'reference', got 'fast'"):
        Inference(make(), fold=fold, path="fast")(*inputs)


@pytest.mark.parametrize("options", [{"path": "reference"}, {"attention": "sdpa"}, {"attention": "reference"}])
def test_paths_that_a_cpu_has(options):
    model = make(torch.float64)
    inference = Inference(model, **options)
    path = options.get("attention") or options["path"]
    assert {block.attn.path for block in inference.model.backbone.blocks} == {path}
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


@pytest.mark.parametrize("fold", [True, False])
def test_autocast(fold):
    model, inputs = make(), tiny_inputs()
    expected, inference = run(model, inputs), Inference(model, fold=fold)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = (errors(run(module, inputs), expected)["features"] for module in (model, inference))
    assert 1e-4 < found <= 2 * own + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("ends", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("fold", [True, False])
def test_constants_follow_the_dtype(ends, fold):
    start, end = ends
    model, inputs = make(start), tiny_inputs(dtype=end)
    inference = Inference(model, fold=fold).to(end)
    made_anew = make(end, seed=1)
    made_anew.load_state_dict(model.state_dict())
    # A position bias left as float32 computed it would show in float64; folded weights were rounded to float32.
    assert_same(inference, made_anew, inputs, 1e-12 if end == torch.float64 and not fold else 1e-6)
    attention = [block.attn for block in inference.model.backbone.blocks]
    assert {t.dtype for attn in attention for t in (attn.scale, attn.bias)} == {end}
    assert {t.dtype for t in inference.state_dict().values() if t.is_floating_point()} == {end}


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
    for block, frozen, adapters in zip(other.blocks, other.model.backbone.blocks, other.model.adapters, strict=True):
        assert block.frozen is frozen
        assert block.adapters is adapters
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    assert torch.equal(inference(*inputs), expected)


@pytest.mark.parametrize(("fold", "attention"), [(True, None), (False, "sdpa")])
def test_a_block_compiles_without_a_graph_break(fold, attention):
    inference, (audio, video) = Inference(make(), fold=fold, attention=attention), tiny_inputs()
    images = torch.cat((audio.unsqueeze(2).expand_as(video), video)).flatten(0, 1)
    block = inference.blocks[1]  # the one with a shift and its mask
    assert block.frozen.attn.mask is not None
    torch.compiler.reset()
    with torch.no_grad():
        x = inference.model.backbone.embed(images)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), block(x))
