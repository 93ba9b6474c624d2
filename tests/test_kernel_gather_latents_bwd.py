"""The gradients of kernels/gather_latents.py against the reference's in float64, and what else must hold of them."""

import pytest
import torch
from lavish_fast.kernels import _launch, _tuning
from lavish_fast.kernels import gather_latents as kernels
from lavish_fast.kernels.gather_latents import gather_latents
from torch import Tensor

from kernel_parity import (
    DEVICE,
    DTYPES,
    assert_within_budget,
    draw,
    every_second,
    guarded,
    misaligned,
    padded_rows,
    poisoned,  # noqa: F401
    tokens_outside,
)
from lavish_fast import reference

WIDTH = 96 if DEVICE == "cpu" else 192  # the kernel takes no fewer channels on a card
STAGES = [(2304, 192), (576, 384), (144, 768), (36, 1536)]


def inputs(m: int, N: int | tuple[int, int], C: int, n: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Two directions whose logits spread by about 3, and the gradients of their sums."""
    sizes = N if isinstance(N, tuple) else (N, N)
    latents = [draw(m, C, seed=10 * seed + i, dtype=dtype, scale=3 * C**-0.5) for i in range(2)]
    others = [draw(n, size, C, seed=10 * seed + 2 + i, dtype=dtype) for i, size in enumerate(sizes)]
    return latents, others, draw(2, n, m, C, seed=10 * seed + 4, dtype=dtype)


def hard(m: int, N: int, C: int, dtype: torch.dtype):
    """Logits of 300, two tokens of each latent that share its weight.

    All are small multiples of powers of two, so that logits have no rounding: that of float32, at 300, outweighs every
    other and falls on the reference as it does on the kernel, by chance. The two tokens differ where latents are 0.
    """
    latents, others, ds = inputs(m, N, C, seed=1)
    latents = [(C**0.5 * l).round() / 8 for l in latents]
    others = [(4 * y).round() / 4 for y in others]
    half = C // 2
    for l, y in zip(latents, others):
        l[:, half:] = 0
        for j in range(m):
            first, second = (5 * j + 1) % N, (N - 7 * j - 2) % N
            channel = (l[j, :half].abs() - 0.5).abs().argmin()
            for token in (first, second):
                y[:, token, :half] = (4 * l[j, :half] * 300 / l[j].square().sum()).round() / 4
            y[:, second, channel] -= 2 * l[j, channel].sign()
    return [l.to(dtype) for l in latents], [y.to(dtype) for y in others], ds.to(dtype)


def of_reference(latents: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [reference.gather_latents(l, y) for l, y in zip(latents, others)]


def gradients(gather, latents: list[Tensor], others: list[Tensor], ds: Tensor) -> tuple[Tensor, ...]:
    """dL of each direction, then dY of each."""
    leaves = [t.detach().requires_grad_() for t in (*latents, *others)]
    s = gather(leaves[: len(latents)], leaves[len(latents) :])
    return torch.autograd.grad(tuple(s), leaves, tuple(ds))


def by_kind(latents: list[Tensor], others: list[Tensor], ds: Tensor):
    """dL and dY: each of the kernel, of the reference in the same type, and in float64, of all directions, flat.

    A few roundings of large logits make most of an error: of one direction alone the reference's may be small by luck.
    """
    got = gradients(gather_latents, latents, others, ds)
    same = gradients(of_reference, latents, others, ds)
    doubles = [l.double() for l in latents], [y.double() for y in others], ds.double()
    truth, count = gradients(of_reference, *doubles), len(latents)
    for kind in (slice(count), slice(count, None)):
        yield tuple(torch.cat([t.flatten() for t in found[kind]]) for found in (got, same, truth))


def assert_parity(latents: list[Tensor], others: list[Tensor], ds: Tensor) -> None:
    for got, same, truth in by_kind(latents, others, ds):
        assert_within_budget(got, same, truth, cap=0.008)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3, 36, 97, 144, 300])
@pytest.mark.parametrize("m", [1, 2, 16, 64])
def test_parity(m, N, dtype):
    assert_parity(*inputs(m, N, WIDTH, n=max(1, 4 // m), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "N", "C"),
    [
        (2, 577, 192), (2, 97, 384), (2, 31, 768), (2, 36, 1536), (3, 300, 101), (5, 49, 2048), (32, 260, 384),
        (2, 36, 48), (3, 97, 64),
    ],
)  # fmt: skip
def test_parity_of_stages_and_other_widths(m, N, C, dtype):
    if DEVICE == "cuda" and dtype.itemsize == 2 and C < WIDTH:
        pytest.skip("refused on a card")
    assert_parity(*inputs(m, N, C, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_where_the_backwards_row_asks_for_more_blocks(dtype, monkeypatch):
    architecture = _launch.architecture(torch.empty(0, device=DEVICE).device)
    constants = _tuning.row("gather_latents_bwd", architecture, dtype, 192)[0] | {"most_tokens": 64}
    key = "gather_latents_bwd", architecture, str(dtype).removeprefix("torch."), 192
    given = inputs(2, 144, 192, dtype=dtype)
    assert not kernels._is_split(given[1][0], 2)
    monkeypatch.setitem(_tuning.ROWS, key, constants)
    assert kernels._is_split(given[1][0], 2)
    assert_parity(*given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_directions_of_two_lengths(dtype):
    assert_parity(*inputs(2, (300, 36), WIDTH, dtype=dtype, seed=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "N", "C"), [(2, 36, 192), (2, 144, WIDTH), (16, 144, WIDTH), (2, 600, WIDTH), (16, 300, 384)]
)
def test_parity_of_logits_of_several_hundred(m, N, C, dtype):
    latents, others, ds = hard(m, N, C, dtype)
    logits = latents[0].double() @ others[0].double().mT
    assert logits.max() > 250
    assert 0.5 < logits.softmax(-1).amax(-1).min() < 0.95
    if dtype != torch.float32:
        return assert_parity(latents, others, ds)
    # The reference, too, is further from the truth than float32's cap. Where an image is split, δ is rounded apart
    # from dP, which costs up to 32 ulp of the largest value.
    allowed = 4 if N < 192 else 32
    for got, same, truth in by_kind(latents, others, ds):
        worst, reference_worst = ((g.double() - truth).abs().max().item() for g in (got, same))
        ulp = torch.finfo(dtype).eps * truth.abs().max().item()
        assert worst <= 2 * reference_worst + allowed * ulp


@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("scale", [1e-5, 3e3])
def test_parity_of_small_and_large_gradients(scale, N):
    """In float16 dP and dlogits of these gradients lie below or above what it can hold; dL and dY do not."""
    latents, others, ds = inputs(2, N, WIDTH, seed=5)
    # Latents eight times as large as streams: dlogits are smaller than dY where gradients are small.
    latents, others = [(8 * l).half() for l in latents], [(y / 8).half() for y in others]
    ds = (scale * ds).half()
    doubles = [l.double() for l in latents], [y.double() for y in others], ds.double()
    got = gradients(gather_latents, latents, others, ds)
    for g, truth in zip(got, gradients(of_reference, *doubles), strict=True):
        error = (g.double() - truth).abs().max().item()
        assert error <= 2e-3 * truth.abs().max().item() + 6e-8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 16, 64])
@pytest.mark.parametrize(("N", "C"), [*STAGES, (197, 768), (4096, 2048)])
def test_parity_in_full_size(N, C, m, dtype):
    assert_parity(*inputs(m, N, C, n=20, dtype=dtype, seed=7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "N"), [(2, 36), (2, 400), (64, 300)])
def test_weights_of_the_backward_sum_to_one(m, N, dtype):
    """One token has all of a latent's weight, at logits of several hundred: its dY is that latent's dS.

    dS is in a channel that streams leave at zero, where dP, and with it the other term of dY, is exactly zero.
    """
    latents, others, ds = inputs(m, N, WIDTH, n=2, dtype=dtype, seed=8)
    latents = [10 * l for l in latents]
    ds[..., 1:] = 0
    for l, y in zip(latents, others):
        y /= 4
        y[:, torch.arange(m) * 3] = (400 * l.float() / l.float().square().sum(-1, keepdim=True)).to(dtype)
        y[..., 0] = 0
    assert all((l.double() @ y.double().mT).softmax(-1).amax(-1).min() > 1 - 1e-12 for l, y in zip(latents, others))
    for y, dy, d in zip(others, gradients(gather_latents, latents, others, ds)[2:], ds):
        torch.testing.assert_close(dy[:, : 3 * m : 3], d, rtol=4 * torch.finfo(y.dtype).eps, atol=1e-12)


@pytest.mark.parametrize("N", [36, 300])
def test_a_shift_of_all_tokens_shifts_the_sums(N):
    """Its gradient, the sum of dY over tokens, is the sum of dS over latents."""
    latents, others, ds = inputs(3, N, WIDTH, seed=9)
    for dy, d in zip(gradients(gather_latents, latents, others, ds)[2:], ds):
        torch.testing.assert_close(dy.sum(1), d.sum(1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("layout", [guarded, every_second, padded_rows, tokens_outside, misaligned])
def test_any_layout_amid_nan_gives_the_same_bits(layout, N, dtype):
    latents, others, ds = inputs(2, N, WIDTH, dtype=dtype)
    got = gradients(gather_latents, [padded_rows(l) for l in latents], [layout(y) for y in others], ds)
    for one, other in zip(got, gradients(gather_latents, latents, others, ds), strict=True):
        assert torch.equal(one, other)


def of_stacked(latents: list[Tensor], others: list[Tensor], ds: Tensor) -> tuple[Tensor, ...]:
    """The gradients with `ds` handed to the kernel as it lies in memory."""
    leaves = [t.detach().requires_grad_() for t in (*latents, *others)]
    return torch.autograd.grad(gather_latents(leaves[: len(latents)], leaves[len(latents) :]), leaves, ds)


@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (3, 2, 1, 0)])
def test_any_layout_of_the_incoming_gradient(order, N):
    latents, others, ds = inputs(2, N, WIDTH, n=3)
    # Its dimensions in another order in memory, every second element of rows too wide.
    inverse = [order.index(i) for i in range(4)]
    laid = guarded(padded_rows(ds.permute(order).contiguous()).repeat_interleave(2, -1)[..., ::2]).permute(inverse)
    assert laid.stride(order[-1]) == 2
    for one, other in zip(of_stacked(latents, others, laid), of_stacked(latents, others, ds), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("kept", [(), (3,), (0,), (1, 2)])
def test_an_expanded_incoming_gradient(kept, N):
    latents, others, ds = inputs(2, N, WIDTH, n=3)
    expanded = ds[tuple(slice(None) if i in kept else slice(0, 1) for i in range(4))].expand_as(ds)
    assert 0 in expanded.stride()
    whole = of_stacked(latents, others, expanded.clone(memory_format=torch.contiguous_format))
    for one, other in zip(of_stacked(latents, others, expanded), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [36, 300, (300, 36)])
def test_only_what_is_asked_for(N, dtype, monkeypatch):
    """Every choice of tensors that require gradients; what the others' would take is not even allocated."""
    latents, others, ds = inputs(2, N, WIDTH, dtype=dtype)
    every, made = gradients(gather_latents, latents, others, ds), []
    launch = kernels.backward.launch

    def count(directions, ds, saved, dothers, summed, *rest):
        made.append((len(directions), dothers is not None, summed))
        return launch(directions, ds, saved, dothers, summed, *rest)

    monkeypatch.setattr(kernels.backward, "launch", count)
    for bits in range(1, 16):
        wanted = [bool(bits >> i & 1) for i in range(4)]
        leaves = [t.detach().requires_grad_(want) for t, want in zip((*latents, *others), wanted)]
        made.clear()
        gather_latents(leaves[:2], leaves[2:]).backward(ds)
        assert sum(k * dy for k, dy, _ in made) == sum(wanted[2:])
        assert sum(k * dl for k, _, dl in made) == sum(wanted[:2])
        for leaf, want, expected in zip(leaves, wanted, every):
            assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "N"), [(2, 36), (16, 144), (16, 300), (2, (300, 36))])
def test_the_form_for_training_has_the_same_sums(m, N, dtype):
    latents, others, _ = inputs(m, N, WIDTH, dtype=dtype)
    trained = gather_latents([l.requires_grad_() for l in latents], others)
    with torch.no_grad():
        inferred = gather_latents(latents, others)
    if dtype == torch.float32:
        # Padded to 16 latents, which the interpreter multiplies in another order.
        torch.testing.assert_close(trained, inferred, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(trained, inferred)
    assert trained.requires_grad
    assert not inferred.requires_grad


@pytest.mark.parametrize(("m", "N"), [(2, 36), (16, 300)])
def test_one_direction_alone(m, N):
    latents, others, ds = inputs(m, N, WIDTH)
    both = gradients(gather_latents, latents, others, ds)
    for i in range(2):
        alone = gradients(gather_latents, latents[i : i + 1], others[i : i + 1], ds[i : i + 1])
        assert torch.equal(alone[0], both[i])
        assert torch.equal(alone[1], both[2 + i])


@pytest.mark.parametrize("N", [144, 300])
def test_an_image_has_the_same_gradient_alone_and_in_any_batch(N):
    latents, others, ds = inputs(2, N, WIDTH, n=4)
    batch = gradients(gather_latents, latents, others, ds)[2:]
    for i in (0, 3):
        alone = gradients(gather_latents, latents, [y[i : i + 1] for y in others], ds[:, i : i + 1])[2:]
        for one, whole in zip(alone, batch):
            assert torch.equal(one, whole[i : i + 1])


def test_an_empty_batch_gives_zeros():
    for N in (36, 300):
        got = gradients(gather_latents, *inputs(2, N, WIDTH, n=0))
        assert all(torch.equal(g, torch.zeros(2, WIDTH, device=DEVICE)) for g in got[:2])
        assert all(g.shape == (0, N, WIDTH) for g in got[2:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("of", ["other", "ds"])
def test_a_nan_stays_in_its_image(of, N, dtype):
    latents, others, ds = inputs(2, N, WIDTH, n=3, dtype=dtype)
    clean = gradients(gather_latents, latents, others, ds)
    (others[0][1, 7] if of == "other" else ds[0, 1, 1]).fill_(float("nan"))
    got = gradients(gather_latents, latents, others, ds)
    assert got[2][1].isnan().all()
    assert got[0].isnan().any()
    assert torch.equal(got[2][::2], clean[2][::2])
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[3], clean[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [144, 300])
def test_repeats_are_equal(N, dtype):
    given = inputs(16, N, WIDTH, dtype=dtype)
    first = gradients(gather_latents, *given)
    for _ in range(2):
        assert all(map(torch.equal, first, gradients(gather_latents, *given)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C"), STAGES)
def test_250_repeats_are_equal(N, C, dtype):
    given = inputs(16, N, C, n=60, dtype=dtype)
    first = gradients(gather_latents, *given)
    for _ in range(250):
        assert all(map(torch.equal, first, gradients(gather_latents, *given)))


def test_gradients_are_differentiable_once():
    latents, others, ds = inputs(2, 36, WIDTH)
    leaf = latents[0].requires_grad_()
    s = gather_latents(latents, others)
    (dlatents,) = torch.autograd.grad(s, [leaf], ds, create_graph=True)
    with pytest.raises(RuntimeError):
        dlatents.sum().backward()


@pytest.mark.parametrize("N", [36, (36, 300)])
def test_opcheck(N):
    latents, others, ds = inputs(2, N, WIDTH)
    saved = kernels._train(latents, others)[1:]
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(kernels._backward, (latents, others, ds, list(saved), wanted, [True, True]))
    leaves = [t.requires_grad_() for t in (*latents, *others)]
    # Bits of what is saved are not part of a gradient.
    torch.library.opcheck(
        kernels._train,
        (leaves[:2], leaves[2:]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("N", [36, 300])
def test_compiles_without_a_break_through_the_backward(N):
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(latents, others):
        return gather_latents(latents, others) * 2

    for n in (2, 3):
        latents, others, ds = inputs(2, N, WIDTH, n=n)
        got = gradients(compiled, latents, others, ds)
        expected = gradients(lambda l, y: gather_latents(l, y) * 2, latents, others, ds)
        assert all(map(torch.equal, got, expected))
