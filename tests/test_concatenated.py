"""Both streams in one batch, in training: the model's losses, gradients, buffers and steps."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernel_parity import DEVICE, DTYPES, small_backbone
from lavish_fast import Model, TrainingStep, explain, ops, optimize
from lavish_fast.concatenated import Concatenated
from lavish_fast.config import AdapterConfig, SwinV2Config
from lavish_fast.tasks import ave
from parity import VIT, randomise, relative_error, tiny_config, tiny_inputs


def make(dtype=torch.float32, **changes) -> Model:
    torch.manual_seed(0)
    return randomise(Model(tiny_config(**changes))).to(dtype).train()


def labels(count=2):
    return torch.arange(3 * count).view(count, 3) % 3


def given(model, count=2, seed=0, dtype=torch.float32):
    audio, video = tiny_inputs(count, seed=seed, dtype=dtype)
    return {"audio": (audio,), "video": (None, video)}.get(model.config.modality, (audio, video))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modality": "video"},
        {"modality": "audio"},
        {"backbone": VIT},
        {"adapter": AdapterConfig(reduction=4, batch_norm=False, ln_after=False)},
        {"adapter": AdapterConfig(reduction=4, p1=False)},
        {"adapter": AdapterConfig(reduction=4, cross_modal=False)},
    ],
)
def test_loss_gradients_and_buffers_are_the_models(changes):
    model = make(torch.float64, **changes)
    fast = optimize(copy_ := copy.deepcopy(model), training=True, compile=False)
    for module in (model, fast):
        loss = ave.loss(module(*given(model, dtype=torch.float64)), labels())
        loss.backward()
    for (name, p), (_, q) in zip(model.trainable_parameters(), copy_.trainable_parameters(), strict=True):
        assert p.grad is not None, name
        assert relative_error(q.grad, p.grad) <= 1e-9 or (q.grad - p.grad).abs().max() <= 1e-15, name
    for name, buffer in model.trainable_state_dict().items():
        torch.testing.assert_close(copy_.trainable_state_dict()[name], buffer, rtol=1e-12, atol=0, msg=name)
    assert not any(p.grad is not None for p in copy_.backbone.parameters())


def steps(module, parameters, count, dtype=torch.float32, **options):
    """Losses of some steps of Adam, on two batches by turns."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, **options)
    losses = []
    for step in range(count):
        audio, video = tiny_inputs(2, seed=step % 2)
        optimizer.zero_grad()
        loss = ave.loss(module(audio.to(dtype), video.to(dtype)), labels())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
@pytest.mark.parametrize(("dtype", "limit"), [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_32_steps(dtype, limit, changes):
    model = make(**changes)
    other = copy.deepcopy(model)
    expected = steps(model, [p for _, p in model.trainable_parameters()], 32, fused=True)
    fast = optimize(other, training=True, dtype=dtype, compile=False)
    got = steps(fast, [p for p in fast.parameters() if p.requires_grad], 32, fused=True)
    assert expected[-1] < 0.9 * expected[0], "it must learn something"
    # A ViT's loss falls to a twentieth, of which bfloat16's rounding is more.
    size = expected if dtype is None or not changes else expected[0]
    assert ((got - expected).abs() / size).max() <= limit
    if dtype is None:
        parameters = zip(model.trainable_parameters(), other.trainable_parameters(), strict=True)
        errors = {name: relative_error(q, p) for (name, p), (_, q) in parameters}
        # BN1 takes away what LN_before's bias adds: its gradient is rounding, which Adam makes into whole steps.
        errors = {name: error for name, error in errors.items() if not name.endswith("ln_before.bias")}
        assert max(errors.values()) <= 5e-3, errors


def test_it_trains_the_model():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = optimize(model, training=True, compile=False)
    explain(fast)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "looking changes nothing"
    trained = {p.data_ptr() for p in fast.parameters() if p.requires_grad}
    assert trained == {p.data_ptr() for _, p in model.trainable_parameters()}
    steps(fast, [p for p in fast.parameters() if p.requires_grad], 1)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {name for name in changed if "running" in name} == {name for name in before if "running" in name}
    assert not {name for name in changed if name.startswith("backbone.")}
    fast.eval()
    assert model.training, "the mode is its own"
    with torch.no_grad():
        expected = model.eval()(*given(model))
    assert relative_error(fast(*given(model)), expected) <= 1e-5


def test_drop_path_is_the_configurations():
    backbone = SwinV2Config(
        img_size=32, embed_dim=16, depths=(2,), num_heads=(1,), window_size=4, pretrained_window_sizes=(0,),
        drop_path_rate=0.5,
    )  # fmt: skip
    fast = optimize(make(backbone=backbone), training=True, compile=False)
    one, two = fast(*given(fast)), fast(*given(fast))
    assert not torch.equal(one, two)
    assert torch.equal(fast.eval()(*given(fast)), fast(*given(fast)))


@pytest.mark.parametrize("training", [True, False])
def test_frozen_images_are_the_models(training):
    model, found = make(backbone=DROPPING).train(training), []
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network in (model, optimize(model, training=training, compile=False).network):
        torch.manual_seed(1)
        found.append(network.frozen(images))
    torch.testing.assert_close(*found)


def test_compiled_training(monkeypatch):
    def compile(function, **options):
        return torch._dynamo.optimize("aot_eager", dynamic=options["dynamic"])(function)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    model = make()
    other = copy.deepcopy(model)
    fast = optimize(other, training=True)
    for count in (2, 3):
        for module in (model, fast):
            ave.loss(module(*given(model, count)), labels(count)).backward()
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert relative_error(q.grad, p.grad) <= 1e-3 or (q.grad - p.grad).abs().max() <= 1e-7, name


def test_explain_says_what_training_takes():
    rows = explain(optimize(make(), training=True, compile=False))
    assert {row["op"] for row in rows} == {"window_attention", "adapter", "gather_latents"}
    assert {row["path"] for row in rows} == {"reference"}


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_explain_sees_the_types_of_training(changes, dtype):
    fast = optimize(make(**changes), training=True, dtype=dtype, compile=False)
    with ops.recording() as choices:
        fast(*given(fast))
    taken = {(choice.op, str(choice.dtype)) for choice in choices}
    assert {(row["op"], f"torch.{row['dtype']}") for row in explain(fast)} == taken


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
def test_autocast_around_narrow_streams_has_no_say(changes):
    model = make(**changes)
    gradients = []
    for around in (None, torch.bfloat16, torch.float16):
        own = copy.deepcopy(model)
        fast = optimize(own, training=True, dtype=torch.bfloat16, compile=False)
        with torch.autocast("cpu", around, enabled=around is not None):
            outputs = fast(*given(model))
        ave.loss(outputs, labels()).backward()
        gradients.append([p.grad for _, p in own.trainable_parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=0, atol=0)


def test_explain_between_a_forward_pass_and_its_backward_pass():
    gradients = []
    for look in (False, True):
        model = make()
        fast = optimize(model, training=True, compile=False)
        loss = ave.loss(fast(*given(model)), labels())
        before = {name: t.clone() for name, t in fast.state_dict().items()}
        if look:
            explain(fast)
        assert all(torch.equal(t, before[name]) for name, t in fast.state_dict().items())
        loss.backward()
        gradients.append([p.grad for _, p in model.trainable_parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bad_calls_are_named():
    model = make()
    fast = optimize(model, training=True, compile=False)
    with pytest.raises(ValueError, match=r"video: expected a floating tensor \(B, T, 3, 32, 32\), got NoneType"):
        fast(given(model)[0])
    with pytest.raises(ValueError, match="audio: expected a tensor on cpu, got one on meta"):
        fast(given(model)[0].to("meta"), given(model)[1])
    with pytest.raises(ValueError, match="concatenated: expected a model on a swinv2, got one on a vit"):
        Concatenated(make(backbone=VIT))
    for network in (model, fast.network):
        with pytest.raises(RuntimeError):  # streams of different numbers of images
            network.classify(torch.randn(2, 3, 32, 32), torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
def test_types_of_training(changes, own):
    model, narrow = make(own, **changes), (torch.bfloat16, torch.float16)
    for dtype in (None, torch.float64, torch.float32, *narrow):
        if dtype in (None, own) or (own == torch.float32 and dtype in narrow):
            fast, found = optimize(model, training=True, dtype=dtype, compile=False), []
            assert fast.dtype == (dtype or own)
            for given_as in (torch.bfloat16, torch.float32, torch.float64):
                out = fast(*(x.to(given_as) for x in given(model, dtype=torch.bfloat16)))
                out.float().square().sum().backward()
                assert out.dtype == own
                found.append(out)
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
        else:
            with pytest.raises(ValueError, match=f"^dtype: expected {own}, the trained parameters'.*, got {dtype}$"):
                optimize(model, training=True, dtype=dtype, compile=False)


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
def test_it_is_not_moved_or_cast(changes):
    fast = optimize(make(**changes), training=True, compile=False)
    before = {name: t.data_ptr() for name, t in fast.state_dict().items()}
    assert fast.to("cpu", torch.float32) is fast
    for move in (fast.double, fast.bfloat16, lambda: fast.to("meta")):
        with pytest.raises(ValueError, match=r"network: expected .* call optimize on the moved model"):
            move()
    assert {name: t.data_ptr() for name, t in fast.state_dict().items()} == before


def pretended_graphs(module, inputs, allow_unused_input):
    """make_graphed_callables as far as it shows: runs beforehand, and gradients that the next backward overwrites."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for _ in range(3):
        (out,) = module(*inputs)
        torch.autograd.grad(out.sum(), parameters)
    static = [torch.zeros_like(p) for p in parameters]

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            with torch.enable_grad():
                (ctx.out,) = module(*given[: len(inputs)])
            return (ctx.out.detach(),)

        @staticmethod
        def backward(ctx, gradient):
            for own, new in zip(static, torch.autograd.grad(ctx.out, parameters, gradient)):
                own.copy_(new)
            return *[None] * len(inputs), *(own.detach() for own in static)

    def replay(*given):
        assert [x.shape for x in given] == [x.shape for x in inputs]
        return Graph.apply(*given, *parameters)

    return replay


def with_and_without_graphs(monkeypatch):
    """A model and its copy, and the training form of each, the second one's as if it were on a card."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", pretended_graphs)
    model = make()
    other = copy.deepcopy(model)
    plain, fast = (optimize(m, training=True, compile=False) for m in (model, other))
    fast._cuda_graphs = True
    return model, other, plain, fast


def test_gradients_accumulate_over_graphs(monkeypatch):
    model, other, plain, fast = with_and_without_graphs(monkeypatch)
    for count, seed in ((2, 0), (2, 1), (2, 2), (1, 3)):
        for module in (plain, fast):
            ave.loss(module(*given(model, count, seed)), labels(count)).backward()
    assert [inputs[0][0][0] for inputs in fast._graphed] == [6]
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for name, buffer in model.trainable_state_dict().items():
        torch.testing.assert_close(other.trainable_state_dict()[name], buffer, msg=name)
    assert torch.equal(fast.eval()(*given(model)), plain.eval()(*given(model)))


def test_a_graph_is_of_what_was_trained_then(monkeypatch):
    model, other, plain, fast = with_and_without_graphs(monkeypatch)

    def freeze(own, module):
        own.head.requires_grad_(False)

    def evaluate(own, module):
        next(m for m in module.modules() if isinstance(m, nn.BatchNorm1d)).eval()

    def thaw(own, module):
        own.head.requires_grad_(True)

    for step, change in enumerate((lambda *_: None, freeze, evaluate, thaw)):
        for own, module in ((model, plain), (other, fast)):
            change(own, module)
            own.zero_grad()
            ave.loss(module(*given(model, seed=step)), labels()).backward()
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=f"{step} {name}")
        torch.testing.assert_close(other.trainable_state_dict(), model.trainable_state_dict())
    assert len(fast._graphed) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_graphed_training(dtype):
    model = make().cuda()
    other = copy.deepcopy(model)
    plain = optimize(model, training=True, dtype=dtype, compile=False, cuda_graphs=False)
    fast = optimize(other, training=True, dtype=dtype, compile=False)
    inputs = [x.cuda() for x in given(model)]
    for _ in range(3):
        for module in (plain, fast):
            ave.loss(module(*inputs), labels().cuda()).backward()
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for name, buffer in model.trainable_state_dict().items():
        torch.testing.assert_close(other.trainable_state_dict()[name], buffer, msg=name)
    assert isinstance(fast(*(x[:1] for x in inputs)), torch.Tensor), "another batch size runs without a graph"


def fused_model(dtype=torch.float32, backbone=None):
    """Wide enough for every kernel on streams of this type, float32 itself; a Swin-V2 with a shifted block."""
    return make(backbone=backbone or small_backbone(dtype), frames=1).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["training", "running statistics"])
def test_a_step_through_the_kernels(dtype, mode):
    assert_steps_agree(dtype, mode)


def test_a_step_with_frozen_norms_through_the_kernels():
    assert_steps_agree(torch.float32, "frozen norms")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vits_step_through_the_kernels(dtype):
    backbone = replace(VIT, embed_dim=64 if DEVICE == "cpu" else 192)
    assert_steps_agree(dtype, "training", backbone)


def assert_steps_agree(dtype, mode, backbone=None):
    model = fused_model(dtype, backbone)
    inputs = [x.to(DEVICE) for x in tiny_inputs(2, frames=1)]
    target = torch.tensor([[0], [2]], device=DEVICE)
    found = {}
    for name, options in {
        "truth": {"path": "reference"},
        "reference": {"path": "reference", "dtype": dtype},
        "fused": {"path": "fused", "dtype": dtype},
    }.items():
        own = copy.deepcopy(model).double() if name == "truth" else copy.deepcopy(model)
        fast = optimize(own, training=True, compile=False, cuda_graphs=False, **options)
        fast.train(mode != "running statistics")
        for module in fast.modules():
            if mode == "frozen norms" and isinstance(module, nn.BatchNorm1d):
                module.eval()
        with ops.recording() as choices:
            loss = ave.loss(fast(*(x.double() if name == "truth" else x for x in inputs)), target)
            (1024 * loss).backward()  # as loss scaling has it, for float16
        assert {choice.path for choice in choices if choice.op != "attention"} == {options["path"]}
        buffers = [t for n, t in own.trainable_state_dict().items() if "running" in n]
        gradients = [p.grad for _, p in own.trainable_parameters()]
        assert all(g.isfinite().all() for g in gradients)
        whole = {"gradients": gradients, "buffers": buffers, "loss": [loss.detach()]}
        found[name] = {what: torch.cat([t.double().flatten() for t in tensors]) for what, tensors in whole.items()}
    eps = torch.finfo(dtype).eps
    for what, expected in found["truth"].items():
        error, own = (relative_error(found[path][what], expected) for path in ("fused", "reference"))
        assert error <= 2 * own + 4 * eps, what
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2), what


def test_norms_of_two_modes_are_refused_by_the_kernels():
    fast = optimize(fused_model(torch.float32), training=True, path="fused", compile=False, cuda_graphs=False)
    frozen = next(module for module in fast.modules() if isinstance(module, nn.BatchNorm1d)).eval()
    inputs = [x.to(DEVICE) for x in tiny_inputs(2, frames=1)]
    for call in (lambda: fast(*inputs), lambda: explain(fast)):
        with pytest.raises(ValueError, match="expected all BatchNorms in training or all in evaluation, got some of"):
            call()
        assert [m for m in fast.modules() if isinstance(m, nn.BatchNorm1d) and not m.training] == [frozen]


DROPPING = SwinV2Config(
    img_size=32, embed_dim=16, depths=(2,), num_heads=(1,), window_size=4, pretrained_window_sizes=(0,),
    drop_path_rate=0.5,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}, {"modality": "audio"}, {"backbone": DROPPING}])
def test_checkpointing_keeps_gradients_and_buffers(changes, dtype):
    model, saved, found = make(**changes), [], []
    for checkpointing in (False, True):
        own = copy.deepcopy(model)
        fast = optimize(own, training=True, dtype=dtype, compile=False, checkpointing=checkpointing)
        for step in (0, 1):
            torch.manual_seed(step)
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, to=kept: to.append(x.numel()) or x, lambda x: x):
                loss = ave.loss(fast(*given(model, seed=step)), labels())
            loss.backward()
        saved.append(sum(kept))
        found.append(({n: p.grad for n, p in own.trainable_parameters()}, own.trainable_state_dict()))
        fast.eval()
        with torch.no_grad():
            fast(*given(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert all(t == 2 for name, t in found[1][1].items() if name.endswith("num_batches_tracked"))
    assert saved[1] < 0.2 * saved[0]


def test_compiled_checkpointing(monkeypatch):
    def compile(function, **options):
        return torch._dynamo.optimize("aot_eager", dynamic=options["dynamic"])(function)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    model = make(backbone=replace(DROPPING, depths=(1,), drop_path_rate=0.0))
    other = copy.deepcopy(model)
    fast = optimize(other, training=True, checkpointing=True)
    for module in (model, fast):
        ave.loss(module(*given(model)), labels()).backward()
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert relative_error(q.grad, p.grad) <= 1e-3 or (q.grad - p.grad).abs().max() <= 1e-7, name
    for name, buffer in model.trainable_state_dict().items():
        torch.testing.assert_close(other.trainable_state_dict()[name], buffer, rtol=1e-3, atol=1e-5, msg=name)


def test_checkpointing_is_for_training():
    with pytest.raises(ValueError, match="checkpointing: expected training=True, got a model for inference"):
        optimize(make(), checkpointing=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_four_micro_batches_are_one_batch(scaled):
    model = make(adapter=AdapterConfig(reduction=4, batch_norm=False))
    other, (audio, video) = copy.deepcopy(model), given(model, 8)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for own, parts in ((model, 1), (other, 4)):
        fast = optimize(own, training=True, compile=False)
        optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad])
        for part in zip(*(x.chunk(parts) for x in (audio, video, labels(8)))):
            scaler.scale(ave.loss(fast(*part[:2]), part[2]) / parts).backward()
        scaler.unscale_(optimizer)
    whole, summed = (torch.cat([p.grad.flatten() for _, p in own.trainable_parameters()]) for own in (model, other))
    assert relative_error(summed, whole) <= 1e-5


@pytest.mark.parametrize("place", ["p1", "p2"])
def test_nothing_is_saved_for_frozen_weights_alone(place):
    # A place without adapters: what its linear layers read is needed for nobody's gradient.
    fast = optimize(make(adapter=AdapterConfig(reduction=4, **{place: False})), training=True, compile=False)
    block, inputs, saved = fast.network.blocks[1], {}, set()
    for name in ("qkv", "proj", "fc1", "fc2"):
        linear = getattr(block, name)
        linear.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    x = torch.randn(4, 64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        out = block(2 * x)
    kept = {name for name, t in inputs.items() if t.untyped_storage().data_ptr() in saved}
    # Where there are adapters, they read the stream too.
    assert kept == {{"p1": "fc1", "p2": "qkv"}[place]}
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(t.requires_grad for t in block.buffers())


def test_synchronised_batch_norm_takes_the_reference_path():
    model = make()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    reason = "expected BatchNorm1d with momentum and running statistics, got another BatchNorm"
    with pytest.raises(ValueError, match=f"adapter: .*{reason}"):
        optimize(other, training=True, path="fused")
    for own in (model, other):
        ave.loss(optimize(own, training=True, compile=False)(*given(model)), labels()).backward()
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    torch.testing.assert_close(other.trainable_state_dict(), model.trainable_state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_synchronised_batch_norm_on_a_gpu():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make()).cuda()
    with pytest.raises(ValueError, match="cuda_graphs: expected BatchNorm of one process, got SyncBatchNorm"):
        optimize(model, training=True, cuda_graphs=True)
    fast = optimize(model, training=True, compile=False)
    rows = [row for row in explain(fast) if row["op"] == "adapter"]
    assert {row["path"] for row in rows} == {"reference"}
    assert all("got another BatchNorm" in row["why"] for row in rows)
    ave.loss(fast(*(x.cuda() for x in given(model))), labels().cuda()).backward()
    assert all(p.grad.isfinite().all() for _, p in model.trainable_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["module", "step"])
def test_checkpointing_under_graphs(form):
    model, found = make().cuda(), []
    audio, video, target = (x.cuda() for x in (*given(model), labels()))
    for options in ({"checkpointing": False, "cuda_graphs": False}, {"checkpointing": True}):
        own = copy.deepcopy(model)
        fast = optimize(own, training=True, compile=False, **options)
        parameters = [p for p in fast.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-3, fused=True)
        step = TrainingStep(fast, ave.loss, optimizer, cuda_graphs=options.get("cuda_graphs"))
        for _ in range(5):
            if form == "step":
                step.accumulate(audio, video, labels=target)
                step.finish()
            else:
                optimizer.zero_grad()
                ave.loss(fast(audio, video), target).backward()
                optimizer.step()
        found.append({name: t.clone() for name, t in own.trainable_state_dict().items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cuda_graphs: expected no drop path where blocks run again, got one"):
        optimize(make(backbone=DROPPING).cuda(), training=True, checkpointing=True, cuda_graphs=True)
