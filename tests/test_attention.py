"""Window attention by the kernels of PyTorch and xformers, against the reference in float64."""

import math
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

from lavish_fast import Model, attention, ops, reference
from parity import randomise, relative_error, tiny_config, tiny_inputs

BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
# q is multiplied by the scale and rounded before the product, and the bias, up to 16, is rounded too: logits are off
# by some 1e-2, the weights by as much. The worst of these cases: 9.1e-3 in bfloat16, 1.1e-3 in float16; the reference,
# which computes logits in float32, is at 2.2e-3 and 2.7e-4.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.0025}


def draw(dtype, *, window=6, heads=3, width=32, masked=True, scale=None, n=2, windows=4, device="cpu"):
    """q, k, v as views of one qkv inside NaN margins, scales 5..100, a bias of 0..16, a mask of 0 and -100."""
    generator, tokens = torch.Generator().manual_seed(0), window**2
    padded = torch.full((n, windows, tokens, 3 * heads * width + 16), float("nan"), dtype=dtype)
    padded[..., 8:-8] = torch.randn(*padded.shape[:-1], padded.shape[-1] - 16, generator=generator, dtype=torch.float64)
    q, k, v = padded.to(device)[..., 8:-8].unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind()
    wide = torch.promote_types(dtype, torch.float32)
    draws = torch.rand(heads, 1, 1, generator=generator, dtype=wide)
    scales = 5 + 95 * draws if scale is None else torch.full((heads, 1, 1), float(scale), dtype=wide)
    bias = 16 * torch.rand(heads, tokens, tokens, generator=generator, dtype=wide)
    regions = torch.randint(3, (windows, tokens), generator=generator)
    mask = torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0).to(wide)
    return q, k, v, scales.to(device), bias.to(device), mask.to(device) if masked else None


def images(q, k, v, scale, bias, mask):
    """The same tensors as `ops.window_attention` takes them: qkv in image order, two by two windows in an image."""
    n, _, heads, tokens, d = q.shape
    window = math.isqrt(tokens)
    parts = torch.stack((q, k, v)).view(3, n, 2, 2, heads, window, window, d)
    qkv = parts.permute(1, 2, 5, 3, 6, 0, 4, 7).reshape(n, 4 * tokens, 3 * heads * d)
    order = torch.arange(4 * tokens, device=q.device).view(2, window, 2, window).transpose(1, 2).flatten()
    table = bias.new_zeros(heads, (2 * window - 1) ** 2)
    return (qkv, scale, table, bias, mask, order), {"window": window, "shift": 0}


def windows(out, like):
    """Back again: (n, T, C) -> (n, windows, heads, N, d)."""
    n, _, heads, tokens, d = like.shape
    window = math.isqrt(tokens)
    return out.view(n, 2, window, 2, window, heads, d).permute(0, 1, 3, 5, 2, 4, 6).reshape(like.shape)


def truth(*tensors):
    return reference.cosine_attention(*(t if t is None else t.double() for t in tensors))


def assert_close(got, tensors, limit=None):
    expected, dtype = truth(*tensors), tensors[0].dtype
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= (limit or LIMITS[dtype])
    worst = (got.double() - expected).abs().max() / expected.abs().max()
    assert worst <= 5 * (limit or LIMITS[dtype])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_types_as_they_are(dtype, masked):
    tensors = draw(dtype, masked=masked)
    expected = attention.sdpa(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.sdpa(*tensors), expected)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("window", "heads", "width"), [(4, 1, 32), (4, 3, 16), (6, 3, 32)])
def test_sdpa_is_the_reference(window, heads, width, masked, dtype, backend):
    tensors = draw(dtype, window=window, heads=heads, width=width, masked=masked)
    assert_close(attention.sdpa(*tensors, backend=backend), tensors)


@pytest.mark.parametrize("dtype", LIMITS)
def test_sdpa_of_144_tokens(dtype):
    tensors = draw(dtype, window=12)
    assert_close(attention.sdpa(*tensors), tensors)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("scale", [10, 100])
def test_sdpa_at_the_clamp_of_the_scale(scale, dtype):
    q, k, *rest = draw(dtype, scale=scale)
    q[:, :, :, ::2] = k[:, :, :, ::2]  # cosines of 1: logits up to 116
    tensors = q, k, *rest
    assert_close(attention.sdpa(*tensors), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_sdpa_survives_zero_vectors(dtype, backend):
    tensors = draw(dtype)
    tensors[0][0, 1, 2, 3] = 0
    tensors[1][1, 0, 0, 5] = 0
    assert_close(attention.sdpa(*tensors, backend=backend), tensors)


def test_sdpa_gradients():
    tensors = draw(torch.float64)
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    got, expected = (f(*leaves, *tensors[3:]) for f in (attention.sdpa, reference.cosine_attention))
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for a, b in zip(torch.autograd.grad(got, leaves, direction), torch.autograd.grad(expected, leaves, direction)):
        assert relative_error(a, b) < 1e-12


def test_sdpa_takes_the_backend_named_and_no_other():
    with pytest.raises(RuntimeError, match="No viable backend"):
        attention.sdpa(*draw(torch.float32), backend=SDPBackend.CUDNN_ATTENTION)


def test_the_op_takes_the_path():
    tensors = draw(torch.bfloat16)
    given, options = images(*tensors)
    got = windows(ops.window_attention(*given, **options, path="sdpa"), tensors[0])
    assert torch.equal(got, attention.sdpa(*tensors))
    assert torch.equal(
        windows(ops.window_attention(*given, **options, path="reference"), tensors[0]),
        reference.cosine_attention(*tensors),
    )


def test_auto_takes_the_fastest_in_inference(monkeypatch):
    monkeypatch.setattr(attention, "FASTEST", {"cpu": "sdpa"})
    given, options = images(*draw(torch.float32))
    by = {path: ops.window_attention(*given, **options, path=path) for path in ("sdpa", "reference")}
    assert not torch.equal(*by.values()), "the two round alike: the test could not tell them apart"
    assert torch.equal(ops.window_attention(*given, **options), by["reference"])
    with torch.no_grad():
        assert torch.equal(ops.window_attention(*given, **options), by["sdpa"])
        monkeypatch.setattr(attention, "FASTEST", {})
        assert torch.equal(ops.window_attention(*given, **options), by["reference"])


def test_an_image_alone_equals_the_image_in_a_batch():
    q, k, v, *rest = draw(torch.float64, n=3)
    together = attention.sdpa(q, k, v, *rest)
    torch.testing.assert_close(attention.sdpa(q[1:2], k[1:2], v[1:2], *rest), together[1:2], rtol=1e-12, atol=1e-12)
    assert attention.sdpa(q[:0], k[:0], v[:0], *rest).shape == (0, *q.shape[1:])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_model_by_sdpa(dtype, limit):
    model, inputs = randomise(Model(tiny_config())).to(dtype).eval(), tiny_inputs(dtype=dtype)
    with torch.no_grad():
        expected = model.set_path("reference").features(*inputs)
        for block in model.backbone.blocks:
            block.attn.path = "sdpa"
        got = model.features(*inputs)
    assert relative_error(got, expected) <= limit
    assert not torch.equal(got, expected), "another kernel rounds differently"


def pretend_xformers(monkeypatch, fmha):
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_refuses_a_cpu(monkeypatch):
    pretend_xformers(monkeypatch, None)
    given, options = images(*draw(torch.float32))
    for call in (
        lambda: attention.xformers(*draw(torch.float32)),
        lambda: ops.window_attention(*given, **options, path="xformers"),
    ):
        with pytest.raises(ValueError, match=r"^xformers: expected CUDA tensors, got cpu$"):
            call()


def test_xformers_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r"^xformers is missing: pip install 'xformers==[0-9.]+'"):
        attention.xformers(*draw(torch.float32))


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [4, 6])
def test_what_xformers_gives_pytorchs_kernel(monkeypatch, window, masked, trained):
    # Its layout is (n, N, heads, d); its bias covers every image and head, in rows that start at multiples of 8.
    fmha = pytest.importorskip("xformers.ops").fmha
    kernel, tokens, calls = fmha.cutlass.FwOp.OPERATOR, window**2, []
    assert kernel is torch.ops.aten._efficient_attention_forward

    def operator(query, key, value, bias, dropout_p, custom_mask_type, scale, compute_log_sumexp, **others):
        given = (query, key, value, bias)
        n, heads = (2, 4 * 3) if masked else (2 * 4, 3)  # a mask is of each window of an image
        assert query.shape == key.shape == value.shape == (n, tokens, heads, 32)
        assert bias.shape == (n, heads, tokens, tokens)
        assert {x.dtype for x in given} == {query.dtype}
        assert all(x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:-1]) for x in given)
        assert (dropout_p, custom_mask_type, scale, compute_log_sumexp) == (0, 0, 1, trained)
        # Its signature, and nothing beside a bias that would change what it computes.
        metas = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given]
        rest = {"dropout_p": 0.0, "custom_mask_type": 0, "compute_log_sumexp": trained, "scale": scale, **others}
        out, lse, *states = kernel(*metas, **rest)
        assert {name: x for name, x in others.items() if x not in (None, -1)} == {}
        assert out.shape == query.shape
        calls.append(others)
        logits = scale * torch.einsum("nihd,njhd->nhij", query, key) + bias
        return torch.einsum("nhij,njhd->nihd", logits.softmax(-1), value), lse, *states

    monkeypatch.setattr(fmha.cutlass.FwOp, "OPERATOR", operator)
    q, *rest = tensors = draw(torch.float32, window=window, masked=masked)
    leaf = q.detach().clone().requires_grad_(trained)
    got = attention.xformers(leaf.as_subclass(OnCuda), *rest).as_subclass(torch.Tensor)
    assert len(calls) == 1
    assert_close(got.detach(), tensors)
    if trained:
        dout = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
        expected = q.double().requires_grad_()
        truth(expected, *rest).backward(dout.double())
        assert relative_error(torch.autograd.grad(got, leaf, dout)[0], expected.grad) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [6, 12])
@pytest.mark.parametrize("path", ["sdpa", "xformers"])
def test_on_a_gpu(path, window, masked):
    if path == "xformers":
        pytest.importorskip("xformers")
    tensors = draw(torch.bfloat16, window=window, masked=masked, n=8, device="cuda")
    given, options = images(*tensors)
    assert_close(windows(ops.window_attention(*given, **options, path=path), tensors[0]), tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", ["sdpa", "xformers"])
def test_gradients_on_a_gpu(path, masked):
    if path == "xformers":
        pytest.importorskip("xformers")
    tensors = draw(torch.float32, window=12, masked=masked, device="cuda")
    found = []
    for attend, dtype in ((getattr(attention, path), torch.float32), (reference.cosine_attention, torch.float64)):
        given = [None if t is None else t.detach().to(dtype) for t in tensors]
        leaves = [t.requires_grad_() for t in given[:3]]
        out = attend(*given)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append(torch.autograd.grad(out, leaves, dout))
    for got, expected in zip(*found):
        assert relative_error(got, expected) < 1e-3
