"""kernels/window_attention_bwd.py: the gradient of qkv against the reference's in float64, and what else must hold."""

import gc

import pytest
import torch
from lavish_fast.kernels import window_attention as kernels
from lavish_fast.kernels.window_attention import window_attention, window_attention_fwd, window_attention_saving
from lavish_fast.kernels.window_attention_bwd import window_attention_bwd
from torch import Tensor

from kernel_parity import (
    DEVICE,
    DTYPES,
    assert_built,
    assert_within_budget,
    built,
    draw,
    every_second,
    guarded,
    misaligned,
    padded_rows,
    poisoned,  # noqa: F401
    tokens_outside,
)
from lavish_fast import reference
from test_kernel_window_attention import STAGES, assert_same_numbers, inputs

LAYOUTS = [guarded, every_second, padded_rows, tokens_outside, misaligned]
FULL_SIZE = [(dtype, *stage) for dtype in (torch.float16, torch.bfloat16, torch.float32) for stage in STAGES]


def constants(table: Tensor, size: int, window: int, shift: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the reference takes in place of a table, a window and a shift: bias, mask and order."""
    place = torch.arange(window, device=table.device)
    place = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).view(-1, 2)
    offset = place[:, None] - place + window - 1
    bias = table[:, offset[..., 0] * (2 * window - 1) + offset[..., 1]]

    def cut(x: Tensor) -> Tensor:
        side = size // window
        return x.roll((-shift, -shift), (0, 1)).view(side, window, side, window).transpose(1, 2).reshape(side**2, -1)

    order = cut(torch.arange(size**2, device=table.device).view(size, size))
    if not shift:
        return bias, None, order.flatten()
    wrapped = torch.arange(size, device=table.device) < shift  # by the roll, to the far side
    region = cut(2 * wrapped[:, None] + 1 * wrapped)
    return bias, -100.0 * (region[:, :, None] != region[:, None]).to(table.dtype), order.flatten()


def expected(qkv: Tensor, scale: Tensor, table: Tensor, window: int, shift: int, dout: Tensor) -> Tensor:
    """dqkv of the reference, in the type of qkv."""
    bias, mask, order = constants(table.to(torch.promote_types(qkv.dtype, torch.float32)), *sizes(qkv, window, shift))
    qkv = qkv.detach().contiguous().requires_grad_()
    (dqkv,) = torch.autograd.grad(reference.window_attention(qkv, scale.to(bias.dtype), bias, mask, order), qkv, dout)
    return dqkv


def sizes(qkv: Tensor, window: int, shift: int) -> tuple[int, int, int]:
    return round(qkv.shape[1] ** 0.5), window, shift


def gradient(qkv: Tensor, scale: Tensor, table: Tensor, window: int, shift: int, dout: Tensor) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    (dqkv,) = torch.autograd.grad(window_attention(qkv, scale, table, window, shift), qkv, dout)
    return dqkv


def incoming(qkv: Tensor, seed: int = 99) -> Tensor:
    n, tokens, channels = qkv.shape
    return draw(n, tokens, channels // 3, seed=seed, dtype=qkv.dtype)


def assert_parity(qkv: Tensor, scale: Tensor, table: Tensor, window: int, shift: int, dout: Tensor | None = None):
    """dq, dk and dv each, as they are of different magnitudes."""
    dout = incoming(qkv) if dout is None else dout
    got = gradient(qkv, scale, table, window, shift, dout)
    plain = expected(qkv, scale, table, window, shift, dout)
    truth = expected(qkv.double(), scale.double(), table.double(), window, shift, dout.double())
    assert got.is_contiguous()
    for parts in zip(got.chunk(3, -1), plain.chunk(3, -1), truth.chunk(3, -1)):
        assert_within_budget(*parts, cap=0.008)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "window", "shift", "d"),
    [
        (4, 4, 0, 32), (8, 4, 2, 16), (6, 6, 0, 32), (12, 6, 3, 24), (7, 7, 3, 64), (14, 7, 2, 32), (8, 8, 4, 32),
        (8, 8, 3, 64), (11, 11, 5, 32), (3, 3, 1, 17),
    ],
)  # fmt: skip
def test_parity(size, window, shift, d, dtype):
    qkv, *rest = inputs(size, 2, window, d, dtype=dtype)
    assert_parity(qkv, *rest, window, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 6])
def test_parity_of_the_papers_windows(shift, dtype):
    qkv, *rest = inputs(12, 2, 12, dtype=dtype)
    assert_parity(qkv, *rest, 12, shift)


@pytest.mark.parametrize(("window", "d"), [(12, 64), (16, 32)])
def test_parity_of_the_largest(window, d):
    assert_parity(*inputs(window, 1, window, d, dtype=torch.float16), window, window // 2)


@pytest.mark.parametrize("window", [2, 5, 9, 10, 11])
def test_parity_of_other_windows(window):
    """Without a shift for windows of two, where it would leave every token alone, and no gradient to q and k."""
    assert_parity(*inputs(window, 1, window, n=max(1, 100 // window**2)), window, window // 2 * (window > 2))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("shift", [0, 1, 3, 5])
def test_parity_of_shifts_and_batches(shift, n):
    assert_parity(*inputs(12, 1, 6, n=n, seed=n), 6, shift)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size", "heads", "window", "shift"), FULL_SIZE)
def test_parity_in_full_size(size, heads, window, shift, dtype):
    for n in (1, 7):
        assert_parity(*inputs(size, heads, window, n=n, dtype=dtype, seed=7), window, shift)


def test_the_forward_is_the_same_where_a_gradient_is_wanted():
    qkv, scale, table = inputs(12, 2, 6)
    trained = window_attention(qkv.requires_grad_(), scale, table, 6, 3)
    assert trained.requires_grad
    with torch.no_grad():
        plain = window_attention(qkv, scale, table, 6, 3)
    assert not plain.requires_grad
    assert torch.equal(trained, plain)


@pytest.mark.parametrize(("window", "shift"), [(6, 3), (12, 0)])
def test_what_is_saved(window, shift):
    """lse by row in base 2, in image order."""
    qkv, scale, table = inputs(12, 2, window)
    _, lse = window_attention_saving(qkv, scale, table, window, shift)
    bias, mask, order = constants(table.double(), 12, window, shift)
    q, k, _ = qkv.double()[:, order].view(1, -1, window**2, 3, 2, 32).permute(3, 0, 1, 4, 2, 5)
    normalize = torch.nn.functional.normalize
    logits = scale.double() * normalize(q, dim=-1) @ normalize(k, dim=-1).mT + bias
    logits = logits if mask is None else logits + mask.unsqueeze(1)
    rows = logits.logsumexp(-1).transpose(1, 2).reshape(1, 2, -1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(lse[..., order].double(), rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("window", "d"), [(4, 32), (7, 24)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_amid_nan_gives_the_same_bits(layout, window, d, dtype):
    qkv, scale, table = inputs(window, 1, window, d, n=2, dtype=dtype)
    dout = incoming(qkv)
    got = gradient(layout(qkv), guarded(scale), guarded(table), window, window // 2, layout(dout))
    assert_same_numbers(got, gradient(qkv, scale, table, window, window // 2, dout), layout, d)


@pytest.mark.parametrize("window", [4, 6])
def test_incoming_gradients_of_any_stride(window):
    qkv, scale, table = inputs(window, 2, window, n=2)
    for dout in (
        incoming(qkv)[:1].expand(2, -1, -1),
        incoming(qkv)[..., :1].expand(-1, -1, 64),
        torch.ones((), device=DEVICE).expand(2, window**2, 64),
        incoming(qkv).mT.contiguous().mT,
        incoming(qkv).repeat_interleave(2, -1)[..., ::2],
    ):
        got = gradient(qkv, scale, table, window, 1, dout)
        assert torch.equal(got, gradient(qkv, scale, table, window, 1, dout.contiguous()))


def test_one_image_expanded_over_the_batch():
    qkv, scale, table = inputs(4, 2, 4)
    dout = incoming(qkv.expand(3, -1, -1))
    got = gradient(qkv.expand(3, -1, -1), scale, table, 4, 2, dout)
    assert torch.equal(got, gradient(qkv.repeat(3, 1, 1), scale, table, 4, 2, dout))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_length(dtype, factor):
    """q and k of a thousandth have gradients of a thousandfold, and of a thousandfold, a thousandth."""
    qkv, scale, table = inputs(6, 2, 6, dtype=dtype)
    qkv[..., :128] *= factor
    dout = incoming(qkv)
    assert_parity(qkv, scale, table, 6, 3, dout if factor > 1 else dout / 16)


@pytest.mark.parametrize("part", [0, 1])
def test_zero_vectors_have_the_gradient_of_the_bound(part):
    """Of zeros, 1e12 times that of the direction; the others' gradients are held to a budget of their own."""
    qkv, scale, table = inputs(6, 2, 6)
    qkv[:, ::5, 64 * part : 64 * part + 64] = 0
    dout = incoming(qkv)
    assert_parity(qkv, scale, table, 6, 0, dout)
    got = gradient(qkv, scale, table, 6, 0, dout)
    truth = expected(qkv.double(), scale.double(), table.double(), 6, 0, dout.double())
    assert truth[:, ::5, 64 * part : 64 * part + 64].abs().max() > 1e11
    rest = torch.arange(36) % 5 != 0
    plain = expected(qkv, scale, table, 6, 0, dout)
    assert_within_budget(got[:, rest], plain[:, rest], truth[:, rest])


@pytest.mark.parametrize("part", [0, 1])
def test_tiny_vectors_are_projected_or_not_as_the_reference_does(part):
    """Lengths about 1e-12, where the bound takes over; each token's error by its own magnitude."""
    qkv, scale, table = inputs(6, 2, 6)
    length = torch.logspace(-13.5, -10.5, 36, device=DEVICE)[:, None]
    span = slice(64 * part, 64 * part + 64)
    qkv[..., span] = length * torch.nn.functional.normalize(qkv[..., span].unflatten(-1, (2, 32)), dim=-1).flatten(-2)
    dout = incoming(qkv)
    got = gradient(qkv, scale, table, 6, 0, dout)[..., span].double()
    truth = expected(qkv.double(), scale.double(), table.double(), 6, 0, dout.double())[..., span]
    assert ((got - truth).norm(dim=-1) <= 1e-4 * truth.norm(dim=-1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(dtype):
    """Every token sees itself alone: dv is dout, and nothing moves the weights."""
    qkv, scale, table = inputs(6, 2, 6, dtype=dtype)
    table.fill_(-1e4)
    table[:, 60] = 1e4
    dout = incoming(qkv)
    got = gradient(qkv, scale, table, 6, 0, dout)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[..., 128:], dout, rtol=max(2e-3, eps), atol=0)
    assert got[..., :128].abs().max() < 100 * 5e-3  # scale times what float32 leaves of 1 - P at logits of 1e4


def test_regions_do_not_mix():
    """What the others' gradients are does not reach a region, at exp(-100)."""
    qkv, scale, table = inputs(8, 1, 4)
    dout = incoming(qkv).view(1, 8, 8, 32)
    loud = dout.clone()
    loud[:, :2] = 1e20
    first, second = (gradient(qkv, scale / 100, table, 4, 2, x.view(1, 64, 32)).view(8, 8, 96) for x in (dout, loud))
    torch.testing.assert_close(second[2:], first[2:], rtol=1e-6, atol=1e-6)
    assert second[:2].abs().max() > 1e15


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("into", ["qkv", "dout"])
def test_a_nan_stays_in_its_image(into):
    qkv, scale, table = inputs(6, 1, 6, n=3)
    dout = incoming(qkv)
    clean = gradient(qkv, scale, table, 6, 0, dout)
    (qkv if into == "qkv" else dout)[1, 7, 5] = float("nan")
    got = gradient(qkv, scale, table, 6, 0, dout)
    assert got[1].isnan().any()
    assert torch.equal(got[::2], clean[::2])


def test_an_image_is_the_same_alone_and_in_any_batch():
    qkv, scale, table = inputs(6, 1, 6, n=3)
    dout = incoming(qkv)
    batch = gradient(qkv, scale, table, 6, 3, dout)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], gradient(qkv[i : i + 1], scale, table, 6, 3, dout[i : i + 1]))


def test_an_empty_batch_has_an_empty_gradient():
    qkv, scale, table = inputs(6, 2, 6, n=0)
    assert gradient(qkv, scale, table, 6, 3, incoming(qkv)).shape == qkv.shape


def test_repeats_are_equal():
    qkv, scale, table = inputs(6, 2, 6, n=2)
    given = (qkv, scale, table, 6, 3, incoming(qkv))
    first = gradient(*given)
    assert all(torch.equal(first, gradient(*given)) for _ in range(2))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size", "heads", "window", "shift"), FULL_SIZE)
def test_250_repeats_are_equal(size, heads, window, shift, dtype):
    qkv, scale, table = inputs(size, heads, window, n=20, dtype=dtype)
    given = (qkv, scale, table, window, shift, incoming(qkv))
    first = gradient(*given)
    assert all(torch.equal(first, gradient(*given)) for _ in range(250))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    _, scale, table = inputs(48, 6, 12)
    qkv = torch.randn(1700, 2304, 576, dtype=torch.bfloat16, device=DEVICE)
    dout = torch.randn(1700, 2304, 192, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    got = gradient(qkv, scale, table, 12, 6, dout)
    assert torch.equal(got[-20:], gradient(qkv[-20:], scale, table, 12, 6, dout[-20:]))
    assert not got.isnan().any()
    del qkv, dout, got
    gc.collect()
    torch.cuda.empty_cache()


def test_qkv_alone_has_a_gradient():
    qkv, scale, table = inputs(4, 2, 4)
    qkv.requires_grad_()
    assert kernels.reasons(qkv, scale, table, 4, 0) == []
    window_attention(qkv, scale, table, 4, 0).sum().backward()
    assert qkv.grad.shape == qkv.shape
    for name, frozen in (("logit_scale", scale), ("table", table)):
        frozen.requires_grad_()
        (reason,) = kernels.reasons(qkv, scale, table, 4, 0)
        assert reason == f"{name}: expected a frozen tensor, got one that requires a gradient"
        with pytest.raises(ValueError, match="expected a frozen tensor"):
            window_attention(qkv, scale, table, 4, 0)
        with torch.no_grad():
            assert kernels.reasons(qkv, scale, table, 4, 0) == []
        frozen.requires_grad_(False)


def test_a_second_gradient_is_refused():
    qkv, scale, table = inputs(4, 2, 4)
    qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(window_attention(qkv, scale, table, 4, 0).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        dqkv.sum().backward()


@pytest.mark.parametrize(
    ("window", "d", "dtype", "most"),
    [
        (12, 48, torch.float32, 72),
        (13, 32, torch.float32, 144),
        (9, 64, torch.float32, 72),
    ],
)
def test_windows_too_large_for_the_backward_are_refused_where_it_is_wanted(window, d, dtype, most):
    qkv, scale, table = inputs(window, 1, window, d, dtype=dtype)
    assert kernels.reasons(qkv, scale, table, window, 0) == []
    (reason,) = kernels.reasons(qkv.requires_grad_(), scale, table, window, 0)
    expected = f"qkv: expected {most} tokens a window or fewer where it requires a gradient, got {window**2}"
    assert reason == expected
    with pytest.raises(ValueError, match=expected):
        window_attention(qkv, scale, table, window, 0)
    with torch.no_grad():
        assert kernels.reasons(qkv, scale, table, window, 0) == []
    for small, wide, kind in (
        (12, 32, dtype),
        (8, 64, dtype),
        (16, 32, torch.float16),
        (12, 64, torch.float16),
    ):
        qkv, scale, table = inputs(small, 1, small, wide, dtype=kind)
        assert kernels.reasons(qkv.requires_grad_(), scale, table, small, 0) == []


def test_opcheck():
    qkv, scale, table = inputs(8, 2, 4)
    _, lse = window_attention_saving(qkv, scale, table, 4, 2)
    torch.library.opcheck(window_attention_fwd, (qkv, scale, table, 4, 2))
    torch.library.opcheck(window_attention_bwd, (qkv, scale, table, 4, 2, lse, incoming(qkv)))
    torch.library.opcheck(window_attention_saving, (qkv.requires_grad_(), scale, table, 4, 2))


def test_compiles_without_a_break_through_the_backward():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(qkv, scale, table):
        return window_attention(qkv * 2, scale, table, 4, 2) * 3

    for n in (1, 2, 3, 7):
        qkv, scale, table = inputs(4, 1, 4, n=n)
        dout = incoming(qkv)
        x = qkv.requires_grad_()
        (got,) = torch.autograd.grad(compiled(x, scale, table), x, dout)
        assert torch.equal(got, 2 * gradient(2 * qkv, scale, table, 4, 2, 3 * dout))


def test_a_thread_loads_the_biases_that_are_its_own():
    found = built(
        "window_attention_bwd",
        r"""
for case, launch in cases:
    if case == "bfloat16 d=32 window=12 shift=0 heads=24":
        code = build(launch)["ptx"]
        print(json.dumps([len(re.findall(text, code)) for text in (r"\bld\.shared", r"\bshfl\.sync")]))
""",
    )
    # From other threads: 72 more shuffles for 16 queries, or as many loads from shared memory.
    assert len(found) == 2
    for loads, shuffles in found:
        assert loads == 0
        assert shuffles < 100


def test_builds_for_each_card_within_its_limits():
    # In float32 six registers of the largest windows and four of the widest heads; of one warp that has the weights of
    # a window's rows and their gradients, a few that it needs outside of them.
    spills = {"float32 d=32 window=12 shift=6 heads=12": 24, "float32 d=64 window=8 shift=4 heads=3": 16}
    windows = [("bfloat16", 6, 6), ("bfloat16", 6, 12), ("bfloat16", 0, 6), ("bfloat16", 0, 24)]
    windows += [("float16", 6, 6), ("float16", 6, 12)]
    spills |= {f"{dtype} d=32 window=12 shift={shift} heads={heads}": 40 for dtype, shift, heads in windows}
    spills |= {"bfloat16 d=32 window=16 shift=8 heads=6": 16, "float16 d=32 window=8 shift=4 heads=6": 8}
    assert_built("window_attention_bwd", spills)
