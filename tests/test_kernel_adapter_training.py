"""The residual step in training: its output, its statistics and every gradient, against the module in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from lavish_fast.kernels import _launch
from lavish_fast.kernels._adapter_training import shared_by, shared_out
from lavish_fast.kernels._tiles import Norm
from lavish_fast.kernels._weights import Weights
from lavish_fast.kernels.adapter_training import (
    _adapter_training,
    _adapter_training_backward,
    adapter_training,
    reasons,
)
from lavish_fast.kernels.adapter_training_bwd_totals import (
    bwd_bn1_launch,
    bwd_bn2_launch,
    bwd_bn2_programs,
    bwd_products_launch,
    bwd_summaries_launch,
)
from lavish_fast.kernels.adapter_training_passes import _bn2, _parts, _weight_gradients, results
from lavish_fast.kernels.adapter_training_totals import bn1_launch, covariance_launch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kernel_parity import DEVICE, DTYPES, assert_built, assert_within_budget, draw, guarded, poisoned  # noqa: F401
from test_kernel_adapter import EPS, Step, held_or_refused, laid_out


def trained(step: Step) -> dict[str, Tensor]:
    return {name: p for name, p in step.named_parameters() if not name.startswith("post_norm")}


def fused(step: Step, xs, branches, summaries):
    norm = None if step.post_norm is None else Norm(step.post_norm.weight, step.post_norm.bias)
    return adapter_training(xs, branches, summaries, step.weights(), norm, eps=EPS, batch_statistics=step.training)


def module(step: Step, xs, branches, summaries):
    return step(xs, branches, summaries), None


def ready(step: Step, inputs) -> tuple[dict[str, Tensor], tuple]:
    """The leaves that gradients are wanted of, by name, and the inputs made of them, with the same strides."""
    xs, branches, summaries = inputs
    xs, branches = ([t.detach().requires_grad_() for t in ts] for ts in (xs, branches))
    summaries = None if summaries is None else summaries.detach().requires_grad_()
    leaves = {f"xs.{i}": x for i, x in enumerate(xs)} | {f"branches.{i}": b for i, b in enumerate(branches)}
    leaves |= {} if summaries is None else {"summaries": summaries}
    return leaves | {name: p.requires_grad_() for name, p in trained(step).items()}, (xs, branches, summaries)


def run(step: Step, inputs, dout: Tensor, function=fused) -> dict[str, Tensor]:
    """The output and every gradient by name, of a copy of the step, whose statistics stay as they are."""
    step = copy.deepcopy(step)
    leaves, inputs = ready(step, inputs)
    out, _ = function(step, *inputs)
    found = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, found))}


def widened(inputs):
    xs, branches, summaries = inputs
    return [x.double() for x in xs], [b.double() for b in branches], None if summaries is None else summaries.double()


def judge(got: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor], batch: bool) -> None:
    """Every tensor within its budget; what has few numbers all together, each on the scale of its largest.

    A gate's sum cancels, and by the batch's statistics BN1 takes out what LN_before's bias adds: zero but for rounding.
    Their scale is that of the products' gradients.
    """
    assert got.keys() == truth.keys()
    few = [], [], []
    for name, t in truth.items():
        assert got[name].shape == t.shape, name
        of = got[name], reference[name], t
        cancels = t.numel() == 1 or (name.endswith("ln_before.bias") and batch)
        if not t.any():
            assert not got[name].any(), name
        elif not cancels and (t.numel() >= 256 or name.startswith(("out", "xs", "branches"))):
            try:
                assert_within_budget(*of, cap=0.005 if name == "out" else 0.008)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        else:
            largest = t.abs().max()
            if cancels:
                stream = f"adapters.{name.split('.')[1]}"
                largest = max(largest, *(truth[f"{stream}.{product}"].abs().max() for product in ("down", "up")))
            for part, x in zip(few, of):
                part.append(x.flatten() * 2.0 ** -largest.log2().ceil().item())
    if few[0]:
        assert_within_budget(*(torch.cat(part) for part in few), cap=0.008)


def without_kinks(step: Step, inputs) -> None:
    """Moves BN1's biases so that no token is so near ReLU's kink that rounding decides on which side it is."""
    wide, found = copy.deepcopy(step).double(), []
    hooks = [a.bn1 for a in wide.adapters if a.bn1 is not None]
    for norm in hooks:
        norm.register_forward_hook(lambda *args: found.append(args[2].sort(0).values))
    wide(*widened(inputs))
    for a, out in zip(step.adapters, found):
        middle = (out[1:] + out[:-1]) / 2
        place = (middle.abs() + 1e3 * (out.diff(dim=0) < 0.05)).argmin(0, keepdim=True)
        a.bn1.bias -= middle.gather(0, place)[0].to(a.bn1.bias.dtype)


@pytest.fixture(autouse=True)
def _seeded():
    # The module draws its products from the global generator.
    torch.manual_seed(0)


def incoming(inputs, seed: int = 40) -> Tensor:
    xs = inputs[0]
    return torch.stack([draw(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(xs)])


def check(step: Step, inputs, dout: Tensor | None = None, *, batch: bool = True) -> dict[str, Tensor]:
    dtype = inputs[0][0].dtype
    dout = incoming(inputs) if dout is None else dout
    step = copy.deepcopy(step).to(dtype).train(batch)
    if len(inputs[0][0].flatten(0, 1)) > 1:
        without_kinks(step, inputs)
    got = run(step, inputs, dout)
    truth = run(copy.deepcopy(step).double(), widened(inputs), dout.double(), module)
    judge(got, run(step, inputs, dout, module), truth, batch and step.adapters[0].bn1 is not None)
    return got


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
        check(step, step.inputs(1, 9, dtype=dtype))


OPTIONS = [
    options for options in itertools.product([True, False], repeat=7) if options[0] or options[6]
]  # without BatchNorm statistics are nobody's


@pytest.mark.parametrize(("batch_norm", "ln_before", "ln_after", "gate", "cross_modal", "post_norm", "batch"), OPTIONS)
def test_every_option_combination(batch_norm, ln_before, ln_after, gate, cross_modal, post_norm, batch):
    step = Step(
        16,
        streams=1,
        latents=2 if cross_modal else 0,
        post_norm=post_norm,
        gates=(gate,),
        batch_norm=batch_norm,
        ln_before=ln_before,
        ln_after=ln_after,
    )
    check(step, step.inputs(1, 9), batch=batch)


@pytest.mark.parametrize(
    ("width", "n", "tokens", "options"),
    [
        (16, 7, 1, {"groups": 1}),
        (32, 1, 31, {"groups": 4, "reduction": 8}),
        (48, 2, 17, {"latents": 1}),  # 24 channels in a group: the last chunk of each is half full
        (64, 3, 3, {"groups": 4, "reduction": 16, "latents": 64}),
        (80, 3, 3, {"groups": 1, "latents": 17, "reduction": 16}),
        (128, 2, 3, {"groups": 1, "reduction": 2}),
        (192, 2, 3, {"groups": 2, "reduction": 2, "streams": 1}),  # a bottleneck of more than one tile
        (32, 2, 67, {"streams": 1}),  # two blocks of tokens, the second almost empty
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(width, n, tokens, options, dtype):
    step = Step(width, **options)
    check(step, step.inputs(n, tokens, dtype=dtype))


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds(seed, dtype, batch):
    step = Step(seed=seed)
    check(step, step.inputs(1, 11, seed=seed, dtype=dtype), batch=batch)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "tokens", "options"),
    [
        (width, tokens, options)
        for width, tokens in ((192, 2304), (384, 576), (768, 144), (768, 197), (1536, 36))
        for options in ({"reduction": 8}, {"reduction": 4, "latents": 16})
    ],
)
def test_every_stage_in_full(width, tokens, options, dtype, batch):
    step = Step(width, **options)
    with held_or_refused(width, dtype):
        check(step, step.inputs(3, tokens, dtype=dtype), batch=batch)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("n", "tokens", "widths"), [(6, 700, (32, 64)), (5, 700, (16, 24)), (2, 3000, (8, 4)), (3, 0, (8, 4))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_weights_in_parts(n, tokens, widths, groups, dtype):
    d, x = (draw(2, n, tokens, groups * width, seed=width, dtype=dtype) for width in widths)
    # Without LN_before that is all that down's gradient is.
    D, C = d.shape[-1], x.shape[-1]
    w = Weights(None, None, d.new_zeros(D, C // groups), None, d.new_zeros(C, D // groups), None, None, None)
    shared = shared_by("adapter_training_down", [*x], [w, w], None, EPS, _launch.architecture(x.device))
    found, sums = results(d, C, groups), torch.zeros(2, D, device=DEVICE)
    _launch.run([bwd_products_launch(found, _weight_gradients(d, x, groups), sums, None, None, shared)], x.device)
    got = found["down"].unflatten(1, (groups, -1))
    by_group = (t.double().flatten(1, 2).unflatten(2, (groups, -1)) for t in (d, x))
    expected = torch.einsum("srgp,srgq->sgpq", *by_group)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * (n * tokens) ** 0.5)


def test_how_many_parts():
    sizes = (160, 2304), (160, 576), (160, 144), (7, 144), (13, 1000), (4, 512)
    assert [_parts(*size) for size in sizes] == [160, 40, 10, 1, 1, 1]


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(("n", "tokens", "width"), [(2, 75, 48), (3, 64, 16), (13, 5, 16)])
def test_sums_over_tokens_in_parts(n, tokens, width, batch):
    # 64 tokens a program: the last has 22, all of its own, or 1.
    step = Step(width)
    check(step, step.inputs(n, tokens), batch=batch)


def test_how_many_share_the_tokens():
    assert [shared_out(R) for R in (0, 64, 65, 16384, 16385)] == [64, 64, 64, 64, 128]
    # Of the paper's stages, with 16 clips and with 2: some thousand programs for all channels of two streams.
    sizes = [(768, 160, 144), (768, 20, 144), (192, 160, 2304), (192, 20, 2304), (1536, 160, 36), (768, 1, 9)]
    found = []
    for width, n, N in sizes:
        x = torch.empty(n, N, width, dtype=torch.bfloat16, device="meta")
        w = Weights(None, None, x.new_empty(width // 8, width // 2), None, x.new_empty(width, 1), None, None, None)
        shared = shared_by("adapter_training_bwd_up", [x, x], [w, w], None, EPS, 90)
        found.append((shared.sharers(2), shared_out(n * N, shared.sharers(2))))
    assert found == [(40, 576), (23, 128), (128, 2880), (120, 384), (18, 320), (1, 64)]


@pytest.mark.parametrize("batch", [True, False])
def test_means_that_dwarf_the_deviations(batch):
    step = Step(32, streams=1).train(batch)
    (a,), inputs = step.adapters, step.inputs(3, 40)
    a.bn1.bias += 100.0
    with torch.no_grad():
        found = []
        a.bn2.register_forward_hook(lambda *args: found.append(args[1][0]))
        copy.deepcopy(step).double()(*widened(inputs))
    a.bn2._forward_hooks.clear()
    mean, deviation = found[0].mean(0), found[0].std(0)
    assert (mean.abs() / deviation).median() > 50
    a.bn2.running_mean.copy_(mean + a.bn2.running_mean * deviation)
    a.bn2.running_var.mul_(deviation.square())
    dout = incoming(inputs)
    truth = run(copy.deepcopy(step).double(), widened(inputs), dout.double(), module)
    for name, t in run(step, inputs, dout).items():
        # By the batch's statistics BN1 takes out its bias and LN_before's.
        if not (batch and name.endswith(("bn1.bias", "ln_before.bias"))):
            assert (t - truth[name]).abs().max() < 1e-4 * truth[name].abs().max(), name


@pytest.mark.parametrize("affine", [{"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("batch", [True, False])
def test_layer_norms_without_parameters(affine, batch):
    step = Step(32)
    for a in step.adapters:
        for name, eps in (("ln_before", EPS[0]), ("ln_after", EPS[3])):
            norm = nn.LayerNorm(32, eps=eps, device=DEVICE, **affine)
            norm.load_state_dict(getattr(a, name).state_dict(), strict=False)
            setattr(a, name, norm.requires_grad_(False))
    names = check(step, step.inputs(1, 9), batch=batch).keys()
    assert "adapters.0.ln_before.bias" not in names
    assert ("adapters.0.ln_before.weight" in names) == ("bias" in affine)


@pytest.mark.parametrize("gates", [(False, True), (True, False)])
def test_a_gate_in_one_stream_only(gates):
    step = Step(gates=gates)
    check(step, step.inputs(1, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_zero_pass_the_gradient_on(dtype):
    step = Step(post_norm=False)
    for gate in (*step.gates_av, *(a.gate for a in step.adapters)):
        gate.zero_()
    inputs = step.inputs(dtype=dtype)
    dout = incoming(inputs)
    step = step.to(dtype).train()
    got = run(step, inputs, dout)
    truth = run(copy.deepcopy(step).double(), widened(inputs), dout.double(), module)
    assert torch.equal(got["out"], torch.stack([x + b for x, b in zip(*inputs[:2])]))
    for i in range(2):
        assert torch.equal(got[f"xs.{i}"], dout[i])
        assert torch.equal(got[f"branches.{i}"], dout[i])
        gate = truth[f"adapters.{i}.gate"]
        assert (got[f"adapters.{i}.gate"] - gate).abs() < 50 * torch.finfo(dtype).eps * (1 + gate.abs())


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_streams_equal_two_calls(dtype, batch):
    # Statistics are a stream's own.
    step = Step().to(dtype).train(batch)
    xs, branches, summaries = inputs = step.inputs(1, 17, dtype=dtype)
    dout = incoming(inputs)
    both = run(step, inputs, dout)
    for i in range(2):
        alone = copy.deepcopy(step)
        alone.adapters, alone.gates_av = alone.adapters[i : i + 1], alone.gates_av[i : i + 1]
        part = slice(i, i + 1)
        got = run(alone, (xs[part], branches[part], summaries[part]), dout[part])
        for name, t in got.items():
            if name in ("out", "summaries"):
                assert torch.equal(t, both[name][part]), name
            else:
                parts = name.split(".")
                parts[1] = str(i)
                assert torch.equal(t, both[".".join(parts)]), name


@pytest.mark.parametrize(
    "kind", ["contiguous", "every other image", "tokens first", "part of wider rows", "misaligned"]
)
def test_layouts_inside_nan(kind):
    step = Step(48).train()
    xs, branches, summaries = inputs = step.inputs(2, 3)
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    margins = guarded(summaries) if kind == "contiguous" else torch.stack([laid_out(kind, s) for s in summaries])
    laid = [laid_out(kind, x) for x in xs], [laid_out(kind, b) for b in branches], margins
    # One stream in one layout, the other in another; then the gradient that comes in, in it too.
    mixed = [laid[0][0], xs[1]], [branches[0], laid[1][1]], margins
    strided = laid_out(kind, dout.flatten(0, 1)).unflatten(0, (2, 2))
    if kind == "contiguous":
        strided = guarded(dout.mT.contiguous()).mT
    for given, coming in ((mixed, dout), (laid, strided)):
        for name, t in run(step, given, coming).items():
            atol = 1e-5 * expected[name].abs().max().item() if kind == "misaligned" else 0
            torch.testing.assert_close(t, expected[name], rtol=0, atol=atol, msg=name)


def test_expanded_gradients_and_inputs():
    step = Step(streams=1).train()
    xs, branches, summaries = step.inputs(1, 5)
    wide = [x.expand(2, -1, -1) for x in xs], [b.expand(2, -1, -1) for b in branches], summaries.expand(-1, 2, -1, -1)
    copies = [x.contiguous() for x in wide[0]], [b.contiguous() for b in wide[1]], wide[2].contiguous()
    for dout in (torch.ones(1, device=DEVICE), draw(32, seed=3), draw(1, 1, 5, 1, seed=4)):
        dout = dout.expand(1, 2, 5, 32)
        expected = run(step, copies, dout.contiguous())
        for name, t in run(step, wide, dout).items():
            assert torch.equal(t, expected[name]), name


def test_channels_of_a_gradient_beyond_32_bits():
    """What lies between them is never touched."""
    step = Step(16, streams=1).to(torch.float16).train()
    inputs = step.inputs(1, 3, dtype=torch.float16)
    dout, stride = incoming(inputs), 2**31 // 15 + 1
    storage = torch.UntypedStorage(2 * (15 * stride + 3), device=DEVICE)
    far = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage, 0, (1, 1, 3, 16), (3, 3, 1, stride))
    far.copy_(dout)
    expected = run(step, inputs, dout)
    for name, t in run(step, inputs, far).items():
        assert torch.equal(t, expected[name]), name


def test_parameters_inside_nan():
    step = Step(48).train()
    inputs = step.inputs(1, 5)
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    for holder in step.modules():
        for tensors in (holder._parameters, holder._buffers):
            for t in tensors.values():
                if t is not None and t.is_floating_point():
                    t.data = guarded(t.data)
    leaves, given = ready(step, inputs)
    out, _ = fused(step, *given)
    for (name, t), got in zip(leaves.items(), torch.autograd.grad(out, list(leaves.values()), dout)):
        assert t.shape == got.shape
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_parameters_in_float32_beside_narrower_streams(dtype, batch):
    step = Step(48).train(batch)
    inputs = step.inputs(1, 9, dtype=dtype)
    dout = incoming(inputs)
    without_kinks(step, inputs)
    got = run(step, inputs, dout)
    assert {name for name, t in got.items() if t.dtype == torch.float32} == trained(step).keys()
    same = copy.deepcopy(step).to(dtype)
    for a, b in zip(step.adapters, same.adapters):
        a.down.data, a.up.data = b.down.float(), b.up.float()
    truth = run(copy.deepcopy(step).double(), widened(inputs), dout.double(), module)
    judge({name: t.to(dtype) for name, t in got.items()}, run(same, inputs, dout, module), truth, batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype):
    step = Step(48).to(dtype).train()
    inputs = step.inputs(2, 67, dtype=dtype)
    leaves, given = ready(step, inputs)
    out, statistics = fused(step, *given)
    assert out.requires_grad
    assert not any(t.requires_grad for t in statistics)
    truth = copy.deepcopy(step).double()
    for a in truth.adapters:
        for norm in (a.bn1, a.bn2):
            norm.reset_running_stats()
            norm.momentum = 1.0
    truth(*widened(inputs))
    R = 2 * 67
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    for got, name in zip(statistics, statistics._fields):
        assert got.dtype == torch.float32
        for i, a in enumerate(truth.adapters):
            norm = getattr(a, name)
            mean, variance = norm.running_mean, norm.running_var * (R - 1) / R
            assert ((got[i, 0] - mean).abs() <= tolerance * (mean.abs() + 3 * variance.sqrt())).all()
            torch.testing.assert_close(got[i, 1].double(), variance, rtol=5 * tolerance, atol=0)
    # The caller writes to the running ones before the backward.
    for a in step.adapters:
        a.bn1.running_mean.fill_(float("nan"))
    assert all(t.isfinite().all() for t in torch.autograd.grad(out, list(leaves.values()), incoming(inputs)))


def test_no_statistics_without_the_batchs():
    for step in (Step().eval(), Step(batch_norm=False).train()):
        _, statistics = fused(step, *step.inputs())
        assert [tuple(t.shape) for t in statistics] == [(2, 2, 0)] * 2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_statistics_of_means_that_dwarf_the_deviations(groups):
    a = (100 * draw(1, 32, seed=0).abs() + draw(500, 32, seed=1)).relu()
    up = draw(64, 32 // groups, seed=2)
    z = (a.double().unflatten(1, (groups, -1)).transpose(0, 1) @ up.double().unflatten(0, (groups, -1)).mT).transpose(
        0, 1
    )
    # Without BN1 the bottleneck is what the kernel is given.
    w = Weights(None, None, a.new_empty(32, 64 // groups), None, up, None, None, None)
    x = a.new_empty(1, 500, 64)
    shared = shared_by("adapter_training_down", [x], [w], None, EPS, _launch.architecture(a.device))
    got = _bn2(a[None], shared)[0][0].double()
    torch.testing.assert_close(got[0], z.flatten(1).mean(0), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(got[1], z.flatten(1).var(0, correction=0), rtol=1e-5, atol=0)


def test_sums_of_many_parts():
    """More than a program adds in one turn, which few tokens do not leave."""
    step = Step(48).train()
    w = step.weights()
    x = draw(2, 1, 69, 48, seed=0)
    shared = shared_by("adapter_training_down", [*x], w, None, EPS, _launch.architecture(x.device))
    shared = shared._replace(constants=shared.constants | {"BLOCK_N": 16})
    D, found = 12, results(x[..., :12], 48, 2)

    def judged(launch, got: Tensor, expected: Tensor, rtol=1e-5):
        _launch.run([launch], x.device)
        expected = expected.to(got.dtype)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * expected.abs().max().item())

    h = 100 + draw(2, 250, 69, D, seed=1)
    blocks = [block.double() for block in h.split(16, 2)]
    parts = torch.stack([torch.stack([b.mean(2), b.var(2, correction=0) * b.shape[2]], 2) for b in blocks], 2).float()
    bn1 = torch.full((2, 2, D), float("nan"), device=DEVICE)
    variance = h.double().var((1, 2), correction=0)
    judged(bn1_launch(bn1, parts, shared), bn1[:, 1], variance, 1e-4)
    judged(bn1_launch(bn1, parts, shared), bn1[:, 0], h.double().mean((1, 2)), 1e-6)

    firsts, sums, grams = draw(2, D, seed=2), draw(2, 70, D, seed=3), draw(2, 70, 2, 6, 6, seed=4)
    mean, covariance = torch.empty(2, D, device=DEVICE), torch.empty(2, 2, 6, 6, device=DEVICE)
    delta = (sums.double().sum(1) / 4000).unflatten(1, (2, 6))
    expected = grams.double().sum(1) / 4000 - delta[..., None] * delta[..., None, :]
    given = covariance_launch(mean, covariance, firsts, sums, grams, 4000, shared)
    judged(given, covariance, expected)
    judged(given, mean, firsts + delta.flatten(1))

    rows, products = draw(2, 70, 3, 48, seed=5), draw(2, 70, 48, 6, seed=6)
    dgates = torch.empty(2, bwd_bn2_programs(shared, x), device=DEVICE)
    given = bwd_bn2_launch(found, dgates, rows, products, None, [v.gate for v in w], shared)
    judged(given, found["bn2.bias"], rows[:, :, 2].sum(1))
    scale = torch.stack([v.bn2.weight * (v.bn2.variance + EPS[2]).rsqrt() for v in w])
    judged(given, found["up"], products.sum(1) * scale[..., None])

    rows, table = draw(2, 140, 2, D, seed=7), torch.empty(2, 5, D, device=DEVICE)
    given = bwd_bn1_launch(found, table, rows, 4000, shared)
    judged(given, found["bn1.bias"], rows[:, :, 1].sum(1))
    judged(given, table[:, 2], rows[:, :, 0].sum(1) / 4000)

    products, gates = [draw(2 * 70, 6, 24, seed=8 + i) for i in range(2)], draw(2, 3000, seed=10)
    found |= {name: torch.empty(2, 1, device=DEVICE) for name in ("gate", "gate_av")}
    given = bwd_products_launch(found, products, torch.zeros(2, D, device=DEVICE), gates, gates, shared)
    whole = torch.cat([p.unflatten(0, (2, 70)).sum(1) for p in products], 1)
    weight = torch.stack([v.ln_before.weight for v in w]).view(2, 2, 1, 24).expand(-1, -1, 6, -1).flatten(1, 2)
    judged(given, found["down"], whole * weight)
    judged(given, found["gate"], gates.sum(1, keepdim=True))

    parts, ds = draw(2, 3, 19, 2, 48, seed=11), torch.empty(2, 3, 2, 48, device=DEVICE)
    judged(bwd_summaries_launch(ds, parts), ds, parts.sum(2))


@pytest.mark.parametrize("case", ["large mean", "sharp softmax", "silent branch", "zero"])
def test_extremes(case):
    step = Step(64, streams=1)
    xs, branches, summaries = step.inputs(1, 9)
    for i, x in enumerate(xs):
        if case == "large mean":
            x += 30.0
            branches[i] += 30.0
        if case == "sharp softmax":
            summaries[i] *= 100 / (x @ summaries[i].mT).abs().max()
        if case == "silent branch":
            branches[i][:] = 0.0
        if case == "zero":
            x[0, 0] = 0.0
    check(step, (xs, branches, summaries))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_equal(dtype):
    step = Step(48).to(dtype).train()
    inputs = step.inputs(1, 17, dtype=dtype)
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    for _ in range(2):
        for name, t in run(step, inputs, dout).items():
            assert torch.equal(t, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 768, 1536])
def test_many_repeats_are_equal(width):
    step = Step(width, reduction=8).to(torch.bfloat16).train()
    inputs = step.inputs(60, 36, dtype=torch.bfloat16)
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    for _ in range(250):
        for name, t in run(step, inputs, dout).items():
            assert torch.equal(t, expected[name]), name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    step = Step(192, streams=1, reduction=8).to(torch.bfloat16).eval()
    n, N, C = 4860, 2304, 192
    assert n * N * C > 2**31
    x, branch, dout = (torch.randn(n, N, C, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    summaries = torch.randn(1, n, 2, C, dtype=torch.bfloat16, device=DEVICE)
    whole = run(step, ([x], [branch], summaries), dout[None])
    for part in (slice(0, 5), slice(n - 5, n)):
        got = run(step, ([x[part]], [branch[part]], summaries[:, part]), dout[None, part])
        for name in ("xs.0", "branches.0"):
            assert torch.equal(got[name], whole[name][part])
        assert torch.equal(got["summaries"], whole["summaries"][:, part])


def test_only_some_gradients_are_wanted():
    step = Step().train()
    inputs = step.inputs()
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    step.adapters[0].up.requires_grad_()
    out, _ = fused(step, *inputs)
    (got,) = torch.autograd.grad(out, [step.adapters[0].up], dout)
    assert torch.equal(got, expected["adapters.0.up"])


def test_no_images():
    step = Step().eval()
    xs, branches, summaries = step.inputs(2, 3)
    inputs = [x[:0] for x in xs], [b[:0] for b in branches], summaries[:, :0]
    got = run(step, inputs, torch.zeros(2, 0, 3, 32, device=DEVICE))
    assert got["out"].shape == (2, 0, 3, 32)
    assert all((t == 0).all() for t in got.values())


def test_what_it_refuses():
    step = Step().train()
    xs, branches, summaries = step.inputs()
    weights, norm = step.weights(), Norm(step.post_norm.weight, step.post_norm.bias)
    w = weights[0]

    def refused(*expected: str, xs=xs, branches=branches, summaries=summaries, weights=weights, norm=norm, batch=True):
        found = reasons(xs, branches, summaries, weights, norm, batch)
        assert len(found) == len(expected), found
        for text, reason in zip(expected, found):
            assert text in reason
        with pytest.raises(ValueError, match="adapter_training: ") as error:
            adapter_training(xs, branches, summaries, weights, norm, eps=EPS, batch_statistics=batch)
        assert str(error.value) == "adapter_training: " + "; ".join(found)

    assert reasons(xs, branches, summaries, weights, norm, True) == []
    refused("of one type, got float16, float32", xs=[xs[0].half(), xs[1]])
    refused("xs[1] of shape (2, 5, 32), got (2, 4, 32)", xs=[xs[0], xs[1][:, :4]])
    refused("the same norms in both streams", weights=[w._replace(ln_after=None), weights[1]])
    one_type = "of one type, got float32, float64"
    refused(one_type, "down of float32, float16 or bfloat16", weights=[w._replace(down=w.down.double()), weights[1]])
    one = {"xs": [x[:1, :1] for x in xs], "branches": [b[:1, :1] for b in branches], "summaries": summaries[:, :1]}
    refused("more than one token for batch statistics, got 1", **one)
    none = [v._replace(bn1=v.bn1._replace(mean=None, variance=None)) for v in weights]
    assert reasons(xs, branches, summaries, none, norm, True) == []
    refused("running statistics of each BatchNorm", weights=none, batch=False)
    wanted = Norm(norm.weight.clone().requires_grad_(), norm.bias)
    refused("post_norm.weight: expected a frozen tensor, got one that requires a gradient", norm=wanted)
    narrow = weights[1]._replace(bn1=weights[1].bn1._replace(bias=weights[1].bn1.bias.half()))
    refused("bn1.bias of one type in both streams", weights=[weights[0], narrow])
    assert len(reasons([], [], None, [w], None, True)) == 1
    assert reasons(*[[x.requires_grad_() for x in t] for t in (xs, branches)], summaries, weights, norm, True) == []


@pytest.mark.parametrize("options", [{}, {"streams": 1, "latents": 0, "post_norm": False, "batch_norm": False}])
def test_opcheck(options):
    step = Step(16, groups=1, **options).train()
    forward, backward = [], []
    _, inputs = ready(step, step.inputs(2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lavish_fast.kernels.adapter_training._adapter_training",
            lambda *args: forward.append(args) or _adapter_training(*args),
        )
        patch.setattr(
            "lavish_fast.kernels.adapter_training._adapter_training_backward",
            lambda *args: backward.append(args) or _adapter_training_backward(*args),
        )
        out, _ = fused(step, *inputs)
        out.sum().backward()
    torch.library.opcheck(_adapter_training, forward[0])
    detached = pytree.tree_map_only(Tensor, Tensor.detach, backward[0])  # it has no backward of its own
    torch.library.opcheck(_adapter_training_backward, detached)


@pytest.mark.parametrize("batch", [True, False])
def test_compiles_whole_through_the_backward(batch):
    step = Step(16, streams=1).train(batch)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        inputs = step.inputs(n, 3, seed=n)
        dout = incoming(inputs)
        got, expected = run(step, inputs, dout, compiled), run(step, inputs, dout)
        for name, t in expected.items():
            assert torch.equal(got[name], t), name


def test_torch_and_the_kernel_agree_on_the_batch():
    # The statistics are of h as one kernel has it; the output comes from another, which makes its own.
    step = Step(32, ln_after=False, post_norm=False).train()
    inputs = step.inputs()
    out, _ = fused(step, *inputs)
    expected = copy.deepcopy(step).double()(*widened(inputs))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_autocast_changes_nothing():
    step = Step(32, streams=1).train()
    inputs = step.inputs(1, 9)
    dout = incoming(inputs)
    expected = run(step, inputs, dout)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(step, inputs, dout)
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


def test_build():
    # Without BN2, or by its running statistics, nothing comes back from them.
    without = "float16 384 groups 1 norms none", "bfloat16 768 statistics running"
    # Two registers: of _adapter_bwd_down with the paper's second setting; of _adapter_bwd_mid on sm_90, at any count.
    spills = {"bfloat16 768 reduction 4 latents 16": 8, "bfloat16 768 statistics running": 8}
    kernels = "_adapter_bwd_mid", "_adapter_bwd_bn2"
    assert_built("adapter_training", spills, *itertools.product(kernels, without))
