"""The fused residual step with its adapters: every option, the presets' stages, the laws, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from lavish_fast.kernels.adapter import BatchNorm, Norm, Weights, _adapter, adapter, reasons
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.cases import randomise
from kernel_parity import DEVICE, DTYPES, assert_built, assert_within_budget, draw, guarded, poisoned  # noqa: F401
from lavish_fast import reference
from lavish_fast.adapter import LavishAdapter
from lavish_fast.config import AdapterConfig

EPS = (1e-1, 2e-2, 3e-2, 4e-2, 5e-2)  # far apart, so that one taken for another shows


class Step(nn.Module):
    """What the op computes, from the adapter's own module, for one or two streams.

    streams: number of them. latents: 0 for streams that do not read each other. gates: which streams have the outer
    gate. options: of AdapterConfig.
    """

    def __init__(self, width=32, *, streams=2, latents=2, post_norm=True, gates=(True, True), seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        config = AdapterConfig(**({"reduction": 4} | options))
        self.adapters = nn.ModuleList(
            LavishAdapter(width, config, gate=gates[i], cross_modal=False) for i in range(streams)
        )
        self.gates_av = nn.ParameterList(torch.zeros(1) for _ in range(streams if latents else 0))
        self.post_norm = nn.LayerNorm(width) if post_norm else None
        self.latents = latents
        randomise(self, seed)
        generator = torch.Generator().manual_seed(seed)
        for gate in self.gates_av:
            gate.data.uniform_(0.3, 0.7, generator=generator)
        for a in self.adapters:
            for norm, eps in zip((a.ln_before, a.bn1, a.bn2, a.ln_after), EPS):
                if norm is not None:
                    norm.eps = eps
        if post_norm:
            self.post_norm.eps = EPS[4]
        self.eval().requires_grad_(False).to(DEVICE)

    def forward(self, xs, branches, summaries) -> Tensor:
        out = []
        for i, a in enumerate(self.adapters):
            seen = xs[i] if summaries is None else reference.read_latents(xs[i], summaries[i], self.gates_av[i])
            added = branches[i] if self.post_norm is None else self.post_norm(branches[i])
            out.append(xs[i] + added + a(seen))
        return torch.stack(out)

    def weights(self) -> list[Weights]:
        def batch_norm(n):
            return None if n is None else BatchNorm(n.running_mean, n.running_var, n.weight, n.bias)

        def layer_norm(n):
            return None if n is None else Norm(n.weight, n.bias)

        gates_av = self.gates_av or [None] * len(self.adapters)
        return [
            Weights(
                gate_av,
                layer_norm(a.ln_before),
                a.down,
                batch_norm(a.bn1),
                a.up,
                batch_norm(a.bn2),
                layer_norm(a.ln_after),
                a.gate,
            )
            for gate_av, a in zip(gates_av, self.adapters)
        ]

    def fused(self, xs, branches, summaries) -> Tensor:
        norm = None if self.post_norm is None else Norm(self.post_norm.weight, self.post_norm.bias)
        return adapter(xs, branches, summaries, self.weights(), norm, eps=EPS)

    def inputs(self, n=2, tokens=5, *, seed=0, dtype=torch.float32, scale=1.0):
        streams, width = len(self.adapters), len(self.adapters[0].up)
        shape = (n, tokens, width)
        xs = [draw(*shape, seed=seed + i, dtype=dtype, scale=scale) for i in range(streams)]
        branches = [draw(*shape, seed=seed + 10 + i, dtype=dtype, scale=scale) for i in range(streams)]
        summaries = draw(streams, n, self.latents, width, seed=seed + 20, dtype=dtype, scale=scale * width**-0.25)
        return xs, branches, summaries if self.latents else None

    def check(self, inputs) -> Tensor:
        """The fused step of these inputs, within its budget of the truth."""
        dtype = inputs[0][0].dtype
        got = copy.deepcopy(self).to(dtype).fused(*inputs)
        wide = [None if t is None else [x.double() for x in t] for t in inputs]
        same = copy.deepcopy(self).to(dtype)
        # The truth has the weights as the narrow type has them.
        assert_within_budget(got, same(*inputs), copy.deepcopy(same).double()(*wide))
        return got


def held_or_refused(width: int, dtype: torch.dtype):
    """On a card rows of float32 beyond 768 channels do not fit in registers, which the kernels say."""
    if DEVICE == "cpu" or dtype != torch.float32 or width <= 768:
        return nullcontext()
    return pytest.raises(ValueError, match=r"expected at most 768 channels in torch\.float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (192, {}),
        (384, {"streams": 1}),
        (768, {"streams": 1}),
        (1536, {"streams": 1}),
        (768, {"streams": 1, "reduction": 4, "latents": 16}),
        (96, {"reduction": 4, "latents": 16}),
    ],
)
def test_every_stage(width, options, dtype):
    step = Step(width, **({"reduction": 8} | options))
    with held_or_refused(width, dtype):
        step.check(step.inputs(1, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("batch_norm", "ln_before", "ln_after", "gate", "cross_modal", "post_norm"),
    list(itertools.product([True, False], repeat=6)),
)
def test_every_option_combination(batch_norm, ln_before, ln_after, gate, cross_modal, post_norm):
    step = Step(
        streams=1,
        latents=2 if cross_modal else 0,
        post_norm=post_norm,
        gates=(gate,),
        batch_norm=batch_norm,
        ln_before=ln_before,
        ln_after=ln_after,
    )
    step.check(step.inputs(1, 3))


@pytest.mark.parametrize(
    ("width", "tokens", "options"),
    [
        (16, 1, {"groups": 1}),
        (32, 31, {"groups": 4, "reduction": 8}),
        (48, 17, {"latents": 1}),  # 24 channels in a group: the last chunk of each is half full
        (64, 3, {"groups": 4, "reduction": 16, "latents": 64}),
        (80, 3, {"groups": 1, "latents": 17, "reduction": 16}),
        (128, 3, {"groups": 1, "reduction": 2}),  # a bottleneck of more than one tile
        (192, 3, {"groups": 2, "reduction": 2, "streams": 1}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(width, tokens, options, dtype):
    step = Step(width, **options)
    step.check(step.inputs(1, tokens, dtype=dtype))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds(seed, dtype):
    step = Step(seed=seed)
    step.check(step.inputs(seed=seed, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "tokens", "options"),
    [
        (width, tokens, options)
        for width, tokens in ((192, 2304), (384, 576), (768, 144), (768, 197), (1536, 36), (1536, 49), (384, 1025))
        for options in ({"reduction": 8}, {"reduction": 4, "latents": 16})
    ],
)
def test_every_stage_in_full(width, tokens, options, dtype):
    step = Step(width, **options)
    with held_or_refused(width, dtype):
        step.check(step.inputs(3, tokens, dtype=dtype))


def fold(step: Step) -> tuple[list[Weights], Norm]:
    """The step's weights with BatchNorms and LN_before's affine in the products, and the gate in LN_after."""
    folded = []
    for w, a in zip(step.weights(), step.adapters):
        down, up = a.down.double(), a.up.double()
        groups = len(up) // down.shape[1]
        weight, bias = (
            p.double().view(groups, 1, -1).expand(-1, len(down) // groups, -1).reshape(down.shape)
            for p in (a.ln_before.weight, a.ln_before.bias)
        )
        biases = []
        products = []
        for norm, product, shift in ((a.bn1, down * weight, (down * bias).sum(1)), (a.bn2, up, 0.0)):
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            products.append((product * scale[:, None]).float())
            biases.append(((shift - norm.running_mean.double()) * scale + norm.bias.double()).float())
        ln_after = Norm(a.ln_after.weight * a.gate, a.ln_after.bias * a.gate)
        folded.append(
            Weights(
                w.gate_av,
                Norm(),
                products[0],
                BatchNorm(bias=biases[0]),
                products[1],
                BatchNorm(bias=biases[1]),
                ln_after,
                None,
            )
        )
    return folded, Norm(step.post_norm.weight, step.post_norm.bias)


def test_folded_constants_give_the_same():
    step = Step(48)
    inputs = step.inputs()
    weights, norm = fold(step)
    got = adapter(*inputs, weights, norm, eps=EPS)
    truth = copy.deepcopy(step).double()(*[[x.double() for x in t] for t in inputs])
    assert (got - truth).abs().max() < 2e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_parameters_in_float32_beside_narrower_streams(dtype):
    step = Step(48)
    xs, branches, summaries = step.inputs(dtype=dtype)
    weights = [w._replace(down=w.down.to(dtype), up=w.up.to(dtype)) for w in step.weights()]
    norm = Norm(step.post_norm.weight, step.post_norm.bias)
    got = adapter(xs, branches, summaries, weights, norm, eps=EPS)
    assert got.dtype == dtype
    same = copy.deepcopy(step).to(dtype)
    truth = copy.deepcopy(step).double()
    for a, b in zip(truth.adapters, same.adapters):
        a.down.data, a.up.data = b.down.double(), b.up.double()
    wide = [[x.double() for x in t] for t in (xs, branches, summaries)]
    assert_within_budget(got, same(xs, branches, summaries), truth(*wide))


@pytest.mark.parametrize("gates", [(False, True), (True, False)])
def test_a_gate_in_one_stream_only(gates):
    step = Step(gates=gates)
    step.check(step.inputs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_streams_equal_two_calls(dtype):
    step = Step(48).to(dtype)
    xs, branches, summaries = step.inputs(2, 17, dtype=dtype)
    norm = Norm(step.post_norm.weight, step.post_norm.bias)
    both = step.fused(xs, branches, summaries)
    for i, w in enumerate(step.weights()):
        alone = adapter(xs[i : i + 1], branches[i : i + 1], summaries[i : i + 1], [w], norm, eps=EPS)
        assert torch.equal(both[i], alone[0])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_zero_return_x(dtype):
    step = Step(post_norm=False).to(dtype)
    for a in step.adapters:
        a.gate.zero_()
    xs, branches, summaries = step.inputs(dtype=dtype)
    out = step.fused(xs, [torch.zeros_like(b) for b in branches], summaries)
    assert torch.equal(out, torch.stack(xs))


def test_gate_av_of_zero_leaves_the_latents_out():
    step = Step()
    for gate in step.gates_av:
        gate.zero_()
    xs, branches, summaries = step.inputs()
    got, expected = step.fused(xs, branches, summaries), step.fused(xs, branches, None)
    # Two kernels, whose sums a card's compiler may round in another order.
    atol = 0 if DEVICE == "cpu" else 4 * torch.finfo(got.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_in_another_order(dtype):
    step = Step(latents=16).to(dtype)
    xs, branches, summaries = step.inputs(dtype=dtype)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got, expected = step.fused(xs, branches, summaries[:, :, order]), step.fused(xs, branches, summaries)
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_alone_equals_the_image_in_a_batch(dtype):
    step = Step().to(dtype)
    xs, branches, summaries = step.inputs(5, 17, dtype=dtype)
    whole = step.fused(xs, branches, summaries)
    for chosen in (slice(2, 3), slice(1, 4), [4, 0, 3, 1, 2]):
        part = step.fused([x[chosen] for x in xs], [b[chosen] for b in branches], summaries[:, chosen])
        assert torch.equal(part, whole[:, chosen])


@pytest.mark.parametrize("where", ["xs", "branches", "summaries"])
def test_an_image_of_nan_stays_alone(where):
    step = Step()
    xs, branches, summaries = step.inputs(3, 17)
    expected = step.fused(xs, branches, summaries)
    {"xs": xs[1], "branches": branches[1], "summaries": summaries[1]}[where][1] = float("nan")
    out = step.fused(xs, branches, summaries)
    assert out[1, 1].isnan().all()
    out[1, 1] = expected[1, 1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["down", "up"])
def test_a_weight_of_nan_shows(name):
    # ReLU keeps NaN, as torch's does.
    step = Step(ln_after=False)
    inputs = step.inputs()
    getattr(step.adapters[1], name)[0] = float("nan")
    out, expected = step.fused(*inputs), step(*inputs)
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(out.isnan(), expected.isnan())


def laid_out(kind: str, x: Tensor) -> Tensor:
    """The same numbers of x (n, N, C) in another layout."""
    n, N, C = x.shape
    if kind == "every other image":
        return guarded(torch.stack((x, x), 1).flatten(0, 1))[::2].copy_(x)
    if kind == "tokens first":
        return guarded(x.transpose(0, 1).contiguous()).transpose(0, 1)
    if kind == "part of wider rows":
        return guarded(torch.cat((x, x, x), -1))[..., C : 2 * C]
    if kind == "misaligned":
        return guarded(torch.cat((x.flatten(), x.new_zeros(1))))[1:].copy_(x.flatten()).view(n, N, C)
    return guarded(x)


@pytest.mark.parametrize(
    "kind", ["contiguous", "every other image", "tokens first", "part of wider rows", "misaligned"]
)
def test_layouts_inside_nan(kind):
    step = Step(48)
    xs, branches, summaries = step.inputs(3, 5)
    expected = step.fused(xs, branches, summaries)
    laid = [laid_out(kind, s) for s in summaries]
    streams = [laid_out(kind, x) for x in xs], [laid_out(kind, b) for b in branches]
    margins = guarded(summaries) if kind == "contiguous" else torch.stack(laid)
    got = step.fused(*streams, margins)
    # One stream in one layout, the other in another.
    mixed = step.fused([streams[0][0], xs[1]], [branches[0], streams[1][1]], margins)
    for out in (got, mixed):
        torch.testing.assert_close(out, expected, rtol=0, atol=0 if kind != "misaligned" else 1e-5)


def test_parameters_inside_nan():
    step = Step(48)
    inputs = step.inputs()
    expected = step.fused(*inputs)
    for module in step.modules():
        for tensors in (module._parameters, module._buffers):
            for t in tensors.values():
                if t is not None and t.is_floating_point():
                    t.data = guarded(t.data)
    assert torch.equal(step.fused(*inputs), expected)


def test_one_image_stands_for_all():
    step = Step()
    xs, branches, summaries = step.inputs(1, 5)
    expected = step.fused(xs, branches, summaries)
    wide = [x.expand(3, -1, -1) for x in xs], [b.expand(3, -1, -1) for b in branches], summaries.expand(-1, 3, -1, -1)
    assert torch.equal(step.fused(*wide), expected.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["times 1000", "constant", "zero", "large mean", "sharp softmax", "silent branch"])
def test_extremes(case, dtype):
    step = Step(64)
    xs, branches, summaries = step.inputs(2, 5, dtype=dtype, scale=1000.0 if case == "times 1000" else 1.0)
    for i, x in enumerate(xs):
        if case in ("constant", "zero"):
            x[:] = 3.0 if case == "constant" else 0.0
        if case == "large mean":
            x += 100.0
            branches[i] += 100.0
            summaries[i] -= 100.0
        if case == "sharp softmax":
            summaries[i] *= 1e4 / (x.float() @ summaries[i].float().mT).abs().max()
        if case == "silent branch":
            branches[i][:] = 0.0
    step.check((xs, branches, summaries))


def test_no_images_and_no_tokens():
    step = Step()
    xs, branches, summaries = step.inputs(2, 3)
    assert step.fused([x[:0] for x in xs], [b[:0] for b in branches], summaries[:, :0]).shape == (2, 0, 3, 32)
    assert step.fused([x[:, :0] for x in xs], [b[:, :0] for b in branches], summaries).shape == (2, 2, 0, 32)


def test_what_it_refuses():
    step = Step()
    xs, branches, summaries = step.inputs()
    weights, norm = step.weights(), Norm(step.post_norm.weight, step.post_norm.bias)
    w = weights[0]

    def refused(*expected: str, xs=xs, branches=branches, summaries=summaries, weights=weights, norm=norm):
        found = reasons(xs, branches, summaries, weights, norm)
        assert len(found) == len(expected), found
        for text, reason in zip(expected, found):
            assert text in reason
        with pytest.raises(ValueError, match="adapter: ") as error:
            adapter(xs, branches, summaries, weights, norm, eps=EPS)
        assert str(error.value) == "adapter: " + "; ".join(found)

    assert reasons(xs, branches, summaries, weights, norm) == []
    refused("of one type, got float16, float32", xs=[xs[0].half(), xs[1]])
    refused("float32, float16 or bfloat16, got torch.int64", norm=Norm(norm.weight.long(), None))
    refused("xs[1] of shape (2, 5, 32), got (2, 4, 32)", xs=[xs[0], xs[1][:, :4]])
    refused("branches[0] of shape (2, 5, 32), got (2, 5, 16)", branches=[branches[0][..., :16], branches[1]])
    refused("summaries of shape (2, 2, 2, 32), got (1, 2, 2, 32)", summaries=summaries[:1])
    refused("xs[0] with its last dimension contiguous", xs=[xs[0].mT.contiguous().mT, xs[1]])
    refused("up of shape (32, 4), got (32, 8)", weights=[w._replace(up=torch.cat((w.up, w.up), 1)), weights[1]])
    refused("bn1.bias of shape (8,), got (32,)", weights=[w._replace(bn1=w.bn1._replace(bias=w.bn2.bias)), weights[1]])
    refused("the same norms in both streams", weights=[w._replace(ln_after=None), weights[1]])
    refused("the same norms", weights=[w._replace(ln_before=Norm()), weights[1]._replace(ln_before=None)])
    refused("mean and variance", weights=[v._replace(bn1=v.bn1._replace(mean=None)) for v in weights])
    refused("up with its last dimension contiguous", weights=[w._replace(up=w.up.T.contiguous().T), weights[1]])
    none = w.bn2._replace(mean=None, variance=None)
    refused("running statistics beside a BatchNorm's weight", weights=[v._replace(bn2=none) for v in weights])
    narrow = w._replace(ln_after=Norm(w.ln_after.weight.half(), w.ln_after.bias))
    refused("ln_after.weight of one type in both streams, got torch.float16", weights=[narrow, weights[1]])
    refused("gate_av beside summaries", weights=[w._replace(gate_av=None), weights[1]])
    refused("one or two streams, got 2, 2 and 1", weights=[w])
    refused("got 3, 2, 3", summaries=summaries[0])
    refused("1 to 64 latents, got 65", summaries=torch.zeros(2, 2, 65, 32, device=DEVICE))
    both = {"xs": [xs[0][:, :4], xs[1]], "norm": Norm(norm.weight[:3], norm.bias)}
    refused(
        "xs[1]", "branches[0] of shape", "branches[1] of shape", "post_norm.weight of shape (32,), got (3,)", **both
    )
    wide, deep = Step(36, groups=3, reduction=2, streams=1), Step(1536, reduction=2, streams=1, groups=1)
    for other, text in ((wide, "1, 2 or 4 groups"), (deep, "a bottleneck of at most 384, got 768")):
        other.to(torch.float16)  # whose rows of 1536 channels fit in registers
        xs, branches, summaries = other.inputs(1, 1, dtype=torch.float16)
        norm = Norm(other.post_norm.weight, other.post_norm.bias)
        refused(text, xs=xs, branches=branches, summaries=summaries, weights=other.weights(), norm=norm)


def test_it_refuses_gradients_and_other_devices(monkeypatch):
    step = Step()
    xs, branches, summaries = step.inputs()
    xs[0].requires_grad_()
    with pytest.raises(ValueError, match="expected evaluation without gradients"):
        step.fused(xs, branches, summaries)
    with torch.no_grad():
        assert torch.isfinite(step.fused(xs, branches, summaries)).all()
    monkeypatch.setattr("lavish_fast.kernels._checks._INTERPRETED", False)
    cpu = step.cpu()
    inputs = [x.detach().cpu() for x in xs], [b.cpu() for b in branches], summaries.cpu()
    with pytest.raises(ValueError, match="expected CUDA tensors, got cpu"):
        cpu.fused(*inputs)


@pytest.mark.parametrize("options", [{}, {"streams": 1, "latents": 0, "post_norm": False, "batch_norm": False}])
def test_opcheck(options):
    step = Step(16, groups=1, **options)
    calls = []
    xs, branches, summaries = step.inputs(1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavish_fast.kernels.adapter._adapter", lambda *args: calls.append(args))
        step.fused(xs, branches, summaries)
    torch.library.opcheck(_adapter, calls[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole_with_any_batch(backend):
    step = Step(16)
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(step.fused, fullgraph=True, backend=counter)
    for n in (1, 2, 3, 5, 16):
        inputs = step.inputs(n, 3, seed=n)
        assert torch.equal(compiled(*inputs), step.fused(*inputs))
    assert counter.frame_count <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 768, 1536])
def test_repeats_are_equal(width):
    step = Step(width, reduction=8).to(torch.bfloat16)
    inputs = step.inputs(60, 36, dtype=torch.bfloat16)
    expected = step.fused(*inputs)
    for _ in range(250):
        assert torch.equal(step.fused(*inputs), expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    step = Step(192, streams=1, reduction=8).to(torch.bfloat16)
    n, N, C = 4860, 2304, 192
    assert n * N * C > 2**31
    x = torch.randn(n, N, C, dtype=torch.bfloat16, device=DEVICE)
    branch = torch.randn_like(x)
    summaries = torch.randn(1, n, 2, C, dtype=torch.bfloat16, device=DEVICE)
    whole = step.fused([x], [branch], summaries)
    for chunk in range(0, n, 972):
        part = slice(chunk, chunk + 972)
        assert torch.equal(step.fused([x[part]], [branch[part]], summaries[:, part]), whole[:, part])


@pytest.mark.gpu
def test_cuda_graph():
    step = Step(192, reduction=8).to(torch.bfloat16)
    xs, branches, summaries = step.inputs(4, 144, dtype=torch.bfloat16)
    step.fused(xs, branches, summaries)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.fused(xs, branches, summaries)
    for seed in range(20):
        new = step.inputs(4, 144, seed=100 * seed, dtype=torch.bfloat16)
        for held, fresh in zip((*xs, *branches, summaries), (*new[0], *new[1], new[2])):
            held.copy_(fresh)
        graph.replay()
        assert torch.equal(out, step.fused(*new))


def test_build():
    # Of 1536 channels a thread of 8 warps holds 96 numbers; with 16 latents some are spilled. At 768 channels on sm_90
    # they are kept to 128, so that an SM has two programs: 1.2 times as fast as without spills (_tuning.ROWS).
    others = "", " reduction 4 latents 16", " norms folded", " norms none groups 1", " latents 64"
    spills = {"bfloat16 1536 reduction 4 latents 16": 16}
    assert_built("adapter", spills=spills | {f"bfloat16 768{other}": 40 for other in others})
