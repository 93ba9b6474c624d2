"""The equations against their definitions, written out element by element."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavish_fast import reference
from lavish_fast.adapter import LavishAdapter
from lavish_fast.backbones.swin_v2 import WindowAttention
from lavish_fast.config import AdapterConfig
from parity import randomise, relative_error


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@settings(max_examples=25)
@given(n=st.integers(1, 3), tokens=st.integers(1, 37), m=st.integers(1, 17), width=st.sampled_from([8, 24]))
def test_gather_latents_is_the_equation(n, tokens, m, width):
    latents, other = draw(m, width, seed=1), draw(n, tokens, width, seed=2)
    got = reference.gather_latents(latents, other)
    for i in range(n):
        for j in range(m):
            logits = torch.tensor([sum(latents[j] * other[i, t]) for t in range(tokens)], dtype=torch.float64)
            weights = (logits - logits.max()).exp()
            expected = latents[j] + sum(w * y for w, y in zip(weights / weights.sum(), other[i]))
            torch.testing.assert_close(got[i, j], expected)


@settings(max_examples=25)
@given(n=st.integers(1, 3), tokens=st.integers(1, 19), m=st.integers(1, 17))
def test_read_latents_is_the_equation(n, tokens, m):
    x, summary, gate = draw(n, tokens, 8, seed=1), draw(n, m, 8, seed=2), torch.tensor([0.4], dtype=torch.float64)
    got = reference.read_latents(x, summary, gate)
    for i in range(n):
        for t in range(tokens):
            weights = torch.stack([(x[i, t] * s).sum() for s in summary[i]]).exp()
            expected = x[i, t] + 0.4 * sum(w * s for w, s in zip(weights / weights.sum(), summary[i]))
            torch.testing.assert_close(got[i, t], expected)


def test_read_latents_with_a_closed_gate_is_the_identity():
    x = draw(2, 5, 8)
    assert torch.equal(reference.read_latents(x, draw(2, 3, 8, seed=1), torch.zeros(1, dtype=torch.float64)), x)


def test_latents_permuted_give_the_same_stream():
    latents, other, x = draw(6, 16), draw(2, 30, 16, seed=1), draw(2, 11, 16, seed=2)
    gate, order = torch.tensor([0.7], dtype=torch.float64), torch.tensor([3, 1, 5, 0, 2, 4])
    a = reference.read_latents(x, reference.gather_latents(latents, other), gate)
    b = reference.read_latents(x, reference.gather_latents(latents[order], other), gate)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_linear_is_a_grouped_convolution(groups):
    x, weight = draw(3, 7, 16), draw(8, 16 // groups, seed=1)
    expected = F.conv2d(x.mT[..., None], weight[:, :, None, None], groups=groups).squeeze(-1).mT
    torch.testing.assert_close(reference.grouped_linear(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_large_latent_logits_are_not_rounded(dtype, autocast):
    # Latent logits reach hundreds, where bfloat16 is spaced 2 apart: rounding them would change weights by e^±1.
    latents, other = torch.rand(2, 768, generator=torch.Generator().manual_seed(0)), draw(4, 100, 768, seed=1) + 0.3
    latents, other = latents.to(dtype), other.to(dtype)
    expected = reference.gather_latents(latents.double(), other.double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        inputs = (latents.float(), other.float()) if autocast else (latents, other)
        got = reference.gather_latents(*inputs)
    assert relative_error(got, expected) < (1e-5 if autocast else 0.005)


@pytest.mark.parametrize("masked", [False, True])
def test_cosine_attention_is_the_equation(masked):
    heads, tokens = 2, 9
    q, k, v = (draw(2, 4, heads, tokens, 8, seed=s) for s in range(3))
    scale, bias = draw(heads, 1, 1, seed=4).exp() * 10, draw(heads, tokens, tokens, seed=5)
    mask = torch.where(draw(4, tokens, tokens, seed=6) > 0, 0.0, -100.0).double() if masked else None
    got = reference.cosine_attention(q, k, v, scale, bias, mask)
    for window in range(4):
        for head in range(heads):
            for i in range(tokens):
                row = q[1, window, head, i]
                logits = []
                for j in range(tokens):
                    cosine = row @ k[1, window, head, j] / row.norm() / k[1, window, head, j].norm()
                    shift = mask[window, i, j] if masked else 0.0
                    logits.append(cosine * scale[head, 0, 0] + bias[head, i, j] + shift)
                expected = torch.stack(logits).softmax(0) @ v[1, window, head]
                torch.testing.assert_close(got[1, window, head, i], expected)


def test_cosine_attention_survives_zero_vectors():
    q = torch.zeros(1, 1, 1, 4, 8)
    out = reference.cosine_attention(
        q, q, torch.ones(1, 1, 1, 4, 8), torch.full((1, 1, 1), 100.0), q[0, 0, 0, :, :4], None
    )
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_window_attention_is_cosine_attention_in_shifted_windows(shift):
    # By hand: the token at (row, column) of the rolled map belongs to window (row // 3, column // 3).
    heads, window, size = 2, 3, 6
    qkv = draw(2, size * size, 3 * heads * 4, seed=0)
    scale, bias = draw(heads, 1, 1, seed=1).exp(), draw(heads, 9, 9, seed=2)
    mask = draw(4, 9, 9, seed=3)
    order = WindowAttention(heads * 4, heads, size, window, shift, 0).order
    got = reference.window_attention(qkv, scale, bias, mask, order)
    assert got.shape == (2, size * size, heads * 4)
    for number in range(4):
        rows, columns = ([3 * start + i for i in range(3)] for start in divmod(number, 2))
        tokens = [(r + shift) % size * size + (c + shift) % size for r in rows for c in columns]
        q, k, v = qkv[:, tokens].view(2, 9, 3, heads, 4).permute(2, 0, 3, 1, 4).unsqueeze(2)
        expected = reference.cosine_attention(q, k, v, scale, bias, mask[number : number + 1])
        torch.testing.assert_close(got[:, tokens], expected[:, 0].transpose(1, 2).flatten(2))


def test_attention_is_scaled_dot_product_attention():
    q, k, v = (draw(2, 3, 11, 8, seed=s) for s in range(3))
    torch.testing.assert_close(
        reference.attention(q, k, v, 1 / math.sqrt(8)), F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=1e-12
    )


def leaf(*shape, seed, scale=1.0):
    return draw(*shape, seed=seed, scale=scale).requires_grad_()


@pytest.mark.parametrize(("n", "N", "m", "C"), [(1, 1, 1, 3), (2, 5, 2, 4), (1, 7, 3, 2), (3, 2, 1, 4), (2, 3, 4, 3)])
def test_gradients_of_latents(n, N, m, C):
    assert torch.autograd.gradcheck(reference.gather_latents, (leaf(m, C, seed=0), leaf(n, N, C, seed=1)))
    given = leaf(n, N, C, seed=0), leaf(n, m, C, seed=1), leaf(1, seed=2)
    assert torch.autograd.gradcheck(reference.read_latents, given)


@pytest.mark.parametrize(
    ("n", "N", "C", "D", "groups"),
    [(1, 1, 2, 2, 1), (2, 3, 4, 6, 2), (1, 2, 8, 4, 4), (2, 1, 3, 5, 1), (1, 4, 6, 3, 3)],
)
def test_gradients_of_grouped_linear(n, N, C, D, groups):
    given = leaf(n, N, C, seed=0), leaf(D, C // groups, seed=1)
    assert torch.autograd.gradcheck(reference.grouped_linear, given)


@pytest.mark.parametrize(
    ("n", "heads", "N", "d"), [(1, 1, 1, 2), (2, 1, 3, 4), (1, 2, 5, 3), (1, 3, 4, 1), (2, 2, 2, 2)]
)
def test_gradients_of_attention(n, heads, N, d):
    given = (leaf(n, heads, N, d, seed=seed) for seed in range(3))
    assert torch.autograd.gradcheck(lambda *qkv: reference.attention(*qkv, 0.7), tuple(given))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("n", "heads", "window", "size"), [(1, 1, 2, 2), (2, 1, 2, 4), (1, 2, 2, 4), (1, 2, 3, 3), (1, 3, 1, 2)]
)
def test_gradients_of_window_attention(n, heads, window, size, masked):
    """Those of the constants, too; in windows and in maps that are cut into them, shifted where there are several."""
    N, windows, d = window**2, (size // window) ** 2, 2
    scale, bias = (draw(heads, 1, 1, seed=0).exp() + 2).requires_grad_(), leaf(heads, N, N, seed=1)
    mask = leaf(windows, N, N, seed=2, scale=3.0) if masked else None
    q, k, v = (leaf(n, windows, heads, N, d, seed=seed) for seed in (3, 4, 5))
    assert torch.autograd.gradcheck(reference.cosine_attention, (q, k, v, scale, bias, mask))
    order = WindowAttention(heads * d, heads, size, window, window // 2, 0).order
    assert (order is None) == (windows == 1)
    qkv = leaf(n, size**2, 3 * heads * d, seed=6)
    assert torch.autograd.gradcheck(reference.window_attention, (qkv, scale, bias, mask, order))


ADAPTERS = {
    "paper": AdapterConfig(reduction=2, groups=2),
    "no norms": AdapterConfig(latents=3, reduction=2, groups=1, batch_norm=False, ln_before=False, ln_after=False),
    "no LN_before": AdapterConfig(latents=1, reduction=4, groups=1, ln_before=False),
    "no LN_after": AdapterConfig(reduction=2, groups=4, ln_after=False),
    "one stream": AdapterConfig(reduction=2, groups=2, cross_modal=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("options", ADAPTERS)
def test_gradients_of_an_adapter(options, gate, training):
    """Those of every parameter and of both streams."""
    config = ADAPTERS[options]
    adapter = randomise(LavishAdapter(8, config, gate=gate, cross_modal=config.cross_modal)).double().train(training)
    parameters = dict(adapter.named_parameters())
    x, other = leaf(2, 3, 8, seed=0), leaf(2, 2, 8, seed=1) if config.cross_modal else None

    def forward(x, other, *values):
        state = dict(zip(parameters, values)) | {name: b.clone() for name, b in adapter.named_buffers()}
        return torch.func.functional_call(adapter, state, (x, other))

    assert torch.autograd.gradcheck(forward, (x, other, *parameters.values()))
