"""kernels/adapter.py's residual step in training, one or two streams: forward and, in ..._bwd.py, every gradient.

    X'  = X + g_av P S,  P = softmax(X Sᵀ);  u = LN_before(X');  h = down(u);  a = ReLU(BN1(h));  z0 = up(a)
    out = X + PostNorm(B) + g LN_after(z1),  z1 = BN2(z0)

Shapes as there; R = n N tokens of a stream. BatchNorms go by the mean and the biased variance of the stream's own R
tokens, or by the running ones, constants then. The post-norm is frozen and has no gradients.

Forward: `_adapter_down`, a program for BLOCK_N tokens of one image of one stream, holds their rows whole as the
evaluation's kernel does, and leaves h and the mean and squared deviations of its tokens' h, as float32 has them before
rounding. BN2's statistics come without z0, which is linear in a: `_adapter_gram` sums the products of a - a₀, a₀ the
first token's, which give a's mean m and covariance K; the mean of z0 is up m and its variance up_c K up_cᵀ for each
channel. `_adapter_up` goes on from h: up, BN2, LN_after and the sum. Small kernels of ..._totals.py add up what the
programs leave and make the statistics of it.

Saved for the backward, bytes a token in 16 bits: X, 2 C; B where it has a post-norm, 2 C; h, 2 D. Beside them S, 2 C
bytes a latent, in float32 the batch's statistics, m and K, and the parameters. gather_latents saves the same X; B,
which a frozen product leaves and does not save, S and h are kept by this op alone.
float32: as in kernels/adapter.py; h is rounded to the streams' type.
Bytes a token in 16 bits: X twice, B, out: 8 C, and 6 D for h. FLOPs: 4 C D / G + 4 C m + 2 D² / G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _checks, _launch, _tuning, adapter
from lavish_fast.kernels._tiles import (
    BatchNorm,
    Norm,
    activated,
    block,
    bottleneck,
    chunk,
    down_product,
    finish,
    gate_of,
    is_wide,
    load_tiles,
    moments,
    place,
    seen,
    softmax_of_latents,
    token_rows,
)
from lavish_fast.kernels._weights import NORMS, Eps, Weights, tensors, unflattened
from lavish_fast.kernels.adapter_training_bwd import (
    TOKENS,
    Shared,
    bound,
    branch_launch,
    down_launch,
    load_bottleneck,
    mid_launch,
    shared_out,
    sums_launch,
    up_launch,
)
from lavish_fast.kernels.adapter_training_totals import (
    bn1_launch,
    bn2_launch,
    bwd_bn1_launch,
    bwd_bn2_launch,
    bwd_bn2_programs,
    covariance_launch,
    mixing_launch,
    narrow_launch,
    products_launch,
    summaries_launch,
)
from torch import Tensor

_FEWEST = 2048  # tokens of one part among those that a weight's gradient is the sum of


class Statistics(NamedTuple):
    """Of BN1 (streams, 2, D) and BN2 (streams, 2, C): means and biased variances, float32; (streams, 2, 0) if not the
    batch's or if there is no such norm."""

    bn1: Tensor
    bn2: Tensor


@triton.jit(do_not_specialize=["images"])
def _adapter_down(
    h_ptr,  # (streams, n, N, D)
    parts_ptr,  # (programs, 2, D) float32: mean and squared deviations of h over a program's tokens
    xs,
    summaries_ptr,
    gates_av,
    weights,
    x_strides,
    stride_s_stream,
    stride_s_n,
    stride_s_m,
    images,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    TILES: tl.constexpr = GROUPS * ((C_G + CHUNK - 1) // CHUNK)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate_av = tl.where(stream == 0, gate_of(gates_av[0]), gate_of(gates_av[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    h_rows = h_ptr + ((stream * images + image) * N + offs_n)[:, None] * D
    parts = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * D

    x = load_tiles(token_rows(xs, x_strides, stream, image, offs_n, STREAMS), 1, mask_n, TILES, C_G, CHUNK)
    s, p = None, None
    if summaries_ptr is not None:
        s = summaries_ptr + stream * stride_s_stream + image * stride_s_n, stride_s_m
        p = softmax_of_latents(x, s, M, C_G, BLOCK_N, BLOCK_M, CHUNK)
    x = seen(x, s, p, gate_av, M, C_G, BLOCK_M, CHUNK, dtype if is_wide(C, dtype) else tl.float32)
    mean, rstd = moments(x, None, mask_n, EPS.ln_before, C, C_G, BLOCK_N, CHUNK)
    products = down_product(x, mean, rstd, w, EPS, D, GROUPS, C_G, BLOCK_N, CHUNK, BLOCK_D, dtype)
    count = tl.sum(mask_n.to(tl.float32), 0)
    for i in tl.static_range(GROUPS * PARTS):
        offs_d = i % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        offs, mask_d = i // PARTS * D_G + offs_d, offs_d < D_G
        h = products[i]
        tl.store(h_rows + offs[None, :], h.to(dtype), mask=mask_n & mask_d[None, :])
        h_mean = tl.sum(tl.where(mask_n, h, 0.0), 0) / count
        delta = tl.where(mask_n, h - h_mean[None, :], 0.0)
        tl.store(parts + offs, h_mean, mask=mask_d)
        tl.store(parts + D + offs, tl.sum(delta * delta, 0), mask=mask_d)


@triton.jit
def _difference(h_rows, mask_n, first, bn1, EPS: tl.constexpr, offs, mask_d, dtype: tl.constexpr):
    """a - a₀ of these rows, float32, zero outside."""
    mask = mask_n & mask_d[None, :]
    a = activated(tl.load(h_rows + offs[None, :], mask=mask, other=0.0), bn1, EPS, offs, mask_d, dtype)
    return tl.where(mask, a.to(tl.float32) - first, 0.0)


@triton.jit(do_not_specialize=["R", "tokens"])
def _adapter_gram(
    firsts_ptr,  # (streams, D) float32: a₀
    sums_ptr,  # (streams, programs, D) float32: of a - a₀ over a program's tokens
    grams_ptr,  # (streams, programs, G, D / G, D / G) float32: of their products
    h_ptr,  # (streams, R, D)
    weights,
    R,
    tokens,  # of a program
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    stream = tl.program_id(2)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    group = tl.program_id(1) // (PARTS * PARTS)
    part_i = tl.program_id(1) // PARTS % PARTS
    part_j = tl.program_id(1) % PARTS
    offs_i = part_i * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_j = part_j * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_i, mask_j = offs_i < D_G, offs_j < D_G
    channels_i, channels_j = group * D_G + offs_i, group * D_G + offs_j
    h_ptr += stream.to(tl.int64) * R * D
    first_i = tl.load(h_ptr + channels_i[None, :], mask=mask_i[None, :], other=0.0)
    first_i = activated(first_i, w.bn1, EPS.bn1, channels_i, mask_i, dtype).to(tl.float32)
    first_j = tl.load(h_ptr + channels_j[None, :], mask=mask_j[None, :], other=0.0)
    first_j = activated(first_j, w.bn1, EPS.bn1, channels_j, mask_j, dtype).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    gram = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    start = tl.program_id(0) * tokens
    for offset in range(0, tokens, BLOCK_R):
        offs_r = start + offset + tl.arange(0, BLOCK_R)
        mask_n = (offs_r < tl.minimum(start + tokens, R))[:, None]
        h_rows = h_ptr + offs_r.to(tl.int64)[:, None] * D
        a_i = _difference(h_rows, mask_n, first_i, w.bn1, EPS.bn1, channels_i, mask_i, dtype)
        a_j = _difference(h_rows, mask_n, first_j, w.bn1, EPS.bn1, channels_j, mask_j, dtype)
        total += tl.sum(a_i, 0)
        gram = tl.dot(a_i.T, a_j, gram, input_precision="tf32x3")
    place = stream.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if part_j == 0:
        tl.store(sums_ptr + place * D + channels_i, total, mask=mask_i)
        if tl.program_id(0) == 0:
            tl.store(firsts_ptr + stream * D + channels_i[None, :], first_i, mask=mask_i[None, :])
    gram_rows = grams_ptr + ((place * GROUPS + group) * D_G + offs_i)[:, None] * D_G
    tl.store(gram_rows + offs_j[None, :], gram, mask=mask_i[:, None] & mask_j[None, :])


@triton.jit(do_not_specialize=["images"])
def _adapter_up(
    out_ptr,
    h_ptr,
    xs,
    branches,
    weights,
    gates,
    post_norm,
    x_strides,
    branch_strides,
    images,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D_G: tl.constexpr = D // GROUPS
    TILES: tl.constexpr = GROUPS * ((C // GROUPS + CHUNK - 1) // CHUNK)
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate = tl.where(stream == 0, gate_of(gates[0]), gate_of(gates[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    token = ((stream * images + image) * N + offs_n)[:, None]
    x_rows = token_rows(xs, x_strides, stream, image, offs_n, STREAMS)
    branch_rows = token_rows(branches, branch_strides, stream, image, offs_n, STREAMS)
    h = load_bottleneck(h_ptr + token * D, mask_n, GROUPS, D_G, BLOCK_D)
    hidden = bottleneck(h, w.bn1, EPS.bn1, GROUPS, D_G, BLOCK_D, out_ptr.dtype.element_ty)
    rows = out_ptr + token * C, x_rows, branch_rows, mask_n
    finish(*rows, hidden, w, gate, post_norm, EPS, TILES, GROUPS, C, D, BLOCK_N, CHUNK, BLOCK_D)


def _shared(
    op: str,
    xs: Sequence[Tensor],
    weights: Sequence[Weights],
    post_norm: Norm | None,
    eps: Sequence[float],
    architecture: int,
) -> Shared:
    """op: whose tuning rows."""
    n, N, C = xs[0].shape
    D, channels = weights[0].down.shape
    norms = *(getattr(weights[0], name) for name in NORMS), post_norm
    constants = adapter.tiling(op, architecture, xs[0].dtype, N, C, D, C // channels) | {"STREAMS": len(xs)}
    constants["EPS"] = Eps(*(None if norm is None else value for norm, value in zip(norms, eps)))
    filled = (w._replace(**{name: getattr(w, name) or kind() for name, kind in NORMS.items()}) for w in weights)
    return Shared(n, N, tuple(w._replace(gate_av=None, gate=None) for w in filled), constants)


def _down_launch(
    h: Tensor,
    parts: Tensor,
    xs: Sequence[Tensor],
    summaries: Tensor | None,
    gates_av: Sequence[Tensor | None],
    shared: Shared,
) -> _launch.Launch:
    latents = 0 if summaries is None else summaries.shape[2]
    args = (
        h,
        parts,
        tuple(xs),
        summaries,
        tuple(gates_av),
        shared.weights,
        tuple(x.stride()[:2] for x in xs),
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        shared.images,
        shared.N,
    )
    return shared.launch(_adapter_down, args, M=latents, BLOCK_M=block(latents))


def _gram_launch(firsts: Tensor, sums: Tensor, grams: Tensor, h: Tensor, shared: Shared) -> _launch.Launch:
    """h (streams, R, D); the rest as the kernel has them."""
    programs, R = sums.shape[1], h.shape[1]
    constants = {name: shared.constants[name] for name in ("D", "GROUPS", "STREAMS", "EPS", "BLOCK_D")}
    width = constants["D"] // constants["GROUPS"]
    constants["BLOCK_D"] = chunk(width, min(constants["BLOCK_D"], 64))
    constants |= {"BLOCK_R": TOKENS if width <= 32 else TOKENS // 2, "num_warps": 4}
    parts = triton.cdiv(width, constants["BLOCK_D"])
    grid = programs, constants["GROUPS"] * parts * parts, len(h)
    args = firsts, sums, grams, h, shared.weights, R, bound(shared_out(R), h)
    return _launch.Launch(_adapter_gram, grid, args, constants)


def _up_launch(
    out: Tensor,
    h: Tensor,
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    post_norm: Norm | None,
    shared: Shared,
) -> _launch.Launch:
    args = (
        out,
        h,
        tuple(xs),
        tuple(branches),
        shared.weights,
        tuple(gates),
        post_norm or Norm(),
        tuple(x.stride()[:2] for x in xs),
        tuple(b.stride()[:2] for b in branches),
        shared.images,
        shared.N,
    )
    return shared.launch(_adapter_up, args)


def _weight_gradients(d: Tensor, x: Tensor, groups: int) -> list[Tensor]:
    """dᵀ x over tokens, d (streams, n, N, G p), x (streams, n, N, G q): of each group (streams * parts, p, q), float32.

    The sum is long and the result small, so that its tokens are split into products of some thousand, yet to be added
    up: one product would have a few programs of a card walk through all of them. Groups that do not begin at 16 bytes,
    which slows every load, are multiplied with one another too, and what they have in common is left out.
    """
    streams, n, N = x.shape[:3]
    parts = _parts(n, N)
    d, x = (t.reshape(streams * parts, n // parts * N, t.shape[3]) for t in (d, x))
    if any(t.shape[2] // groups % 8 for t in (d, x)):
        whole = _products(d.mT, x).unflatten(2, (groups, -1)).unflatten(1, (groups, -1))  # (parts, G, p, G, q)
        return [whole[:, g, :, g] for g in range(groups)]
    return [_products(p.mT, q) for p, q in zip(d.chunk(groups, 2), x.chunk(groups, 2))]


def _parts(n: int, N: int) -> int:
    """Into how many equal parts n images of N tokens are split: as many as have `_FEWEST` tokens each, or one."""
    return next((n // images for images in range(1, n + 1) if n % images == 0 and images * N >= _FEWEST), 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever the type; of three dimensions each."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _narrowed(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    if all(product.dtype == dtype for w in weights for product in (w.down, w.up)):
        return list(weights)
    narrow = weights[0].down.new_empty(len(weights), 2, weights[0].down.numel(), dtype=dtype)
    _launch.run([narrow_launch(narrow, weights)], narrow.device)
    return [w._replace(down=n[0].view_as(w.down), up=n[1].view_as(w.up)) for w, n in zip(weights, narrow)]


def _with(weights: Sequence[Weights], name: str, statistics: Tensor) -> list[Weights]:
    """The weights with these statistics (streams, 2, width) in one of their BatchNorms; the running ones if empty."""
    if not statistics.shape[-1]:
        return list(weights)
    norms = [getattr(w, name)._replace(mean=s[0], variance=s[1]) for w, s in zip(weights, statistics)]
    return [w._replace(**{name: norm}) for w, norm in zip(weights, norms)]


def _bn2(h: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
    """BN2's statistics (streams, 2, C), and a's mean (streams, D) and covariance (streams, G, D / G, D / G), float32.

    h (streams, R, D).
    """
    R, C, D, groups = h.shape[1], *(shared.constants[name] for name in ("C", "D", "GROUPS"))
    programs = triton.cdiv(R, shared_out(R))
    square = groups, D // groups, D // groups
    bn2, mean, covariance, firsts, sums, grams = (
        h.new_empty(len(h), *shape, dtype=torch.float32)
        for shape in ((2, C), (D,), square, (D,), (programs, D), (programs, *square))
    )
    launches = [
        _gram_launch(firsts, sums, grams, h, shared),
        covariance_launch(mean, covariance, firsts, sums, grams, R, shared),
        bn2_launch(bn2, mean, covariance, shared),
    ]
    _launch.run(launches, h.device)
    return bn2, mean, covariance


def _forward(xs, branches, summaries, given, post_norm, eps, batch_statistics):
    streams, (n, N, C) = len(xs), xs[0].shape
    weights = _narrowed(given, xs[0].dtype)
    D = len(weights[0].down)
    out, h = xs[0].new_empty(streams, n, N, C), xs[0].new_empty(streams, n, N, D)
    architecture = _launch.architecture(out.device)
    norms = post_norm, eps, architecture
    shared = _shared("adapter_training_down", xs, weights, *norms)
    parts = h.new_empty(streams, n, shared.blocks, 2, D, dtype=torch.float32)
    _launch.run([_down_launch(h, parts, xs, summaries, [w.gate_av for w in weights], shared)], h.device)
    bn1, bn2, mean, covariance = (parts.new_empty(streams, *shape) for shape in _STATISTICS)
    if batch_statistics and weights[0].bn1 is not None:
        bn1 = parts.new_empty(streams, 2, D)
        _launch.run([bn1_launch(bn1, parts, shared)], h.device)
        weights = _with(weights, "bn1", bn1)
    if batch_statistics and weights[0].bn2 is not None:
        shared = _shared("adapter_training_down", xs, weights, *norms)
        bn2, mean, covariance = _bn2(h.flatten(1, 2), shared)
        weights = _with(weights, "bn2", bn2)
    shared = _shared("adapter_training_up", xs, weights, *norms)
    _launch.run([_up_launch(out, h, xs, branches, [w.gate for w in weights], post_norm, shared)], h.device)
    return out, h, bn1, bn2, mean, covariance


_STATISTICS = (2, 0), (2, 0), (0,), (0, 0, 0)  # of each stream, where they are not the batch's


def _results(h: Tensor, C: int, groups: int) -> dict[str, Tensor]:
    """Where the gradients of products and norms go, of all streams, by name, those of absent norms too."""
    D = h.shape[-1]
    shapes = {"down": (D, C // groups), "up": (C, D // groups)}
    shapes |= {f"{name}.{part}": (D if name == "bn1" else C,) for name in NORMS for part in Norm._fields}
    return {name: h.new_empty(len(h), *shape, dtype=torch.float32) for name, shape in shapes.items()}


def _backward(dout, xs, branches, summaries, given, post_norm, h, bn1, bn2, mean, covariance, eps, batch_statistics):
    """dxs (streams, n, N, C), dbranches, dsummaries, None where there is none; by name the others', of all streams."""
    streams, (n, N, C) = len(xs), xs[0].shape
    R, D, groups = n * N, h.shape[-1], C // given[0].down.shape[1]
    weights = _with(_with(_narrowed(given, h.dtype), "bn1", bn1), "bn2", bn2)
    norms = post_norm, eps, _launch.architecture(h.device)
    shared = _shared("adapter_training_bwd_up", xs, weights, *norms)
    flat = h.flatten(1, 2)
    by_batch = batch_statistics and weights[0].bn2 is not None

    def rows(*shape: int) -> Tensor:
        return h.new_empty(*shape, dtype=torch.float32)

    found = _results(h, C, groups)
    dz, da = h.new_empty(streams, n, N, C), rows(*h.shape)
    after = None if weights[0].ln_after is None else rows(streams, n, N, 2)
    db = None if post_norm is None else torch.empty_like(dz)
    gates, dgates = [w.gate for w in weights], None
    if any(gate is not None for gate in gates):
        found["gate"], dgates = rows(streams, 1), rows(streams, bwd_bn2_programs(shared, h))
    programs = shared.sharers(h.element_size())
    sums, products = rows(streams, programs, 3, C), rows(streams, programs, C, D // groups)
    means, matrix, shifts, mixing = None, None, None, None
    if by_batch:
        means, matrix, shifts, mixing = mean, covariance, torch.empty_like(mean), torch.empty_like(covariance)
    narrow = rows(streams, triton.cdiv(R, shared_out(R)), 2, D)
    table = None if weights[0].bn1 is None else rows(streams, 5, D)
    launches = [
        *([] if post_norm is None else [branch_launch(db, dout, branches, post_norm, shared)]),
        up_launch(dz, da, after, h, dout, gates, shared),
        sums_launch(sums, products, dz, after, h, dout, means, shared),
        bwd_bn2_launch(found, dgates, sums, products, matrix, gates, shared),
        *([mixing_launch(shifts, mixing, found, R, shared)] if by_batch else []),
        mid_launch(da.flatten(1, 2), narrow, flat, means, shifts, mixing, shared),
        *([] if table is None else [bwd_bn1_launch(found, table, narrow, R if batch_statistics else None, shared)]),
    ]
    _launch.run(launches, h.device)

    # dz has served: its memory takes X', whitened.
    dx, xhat, dh, ds, parts, dgates_av = torch.empty_like(dz), dz, torch.empty_like(h), None, None, None
    down_shared = _shared("adapter_training_bwd_down", xs, weights, *norms)
    if summaries is not None:
        grid = streams, n, down_shared.blocks
        ds, parts, dgates_av = h.new_empty(summaries.shape), rows(*grid, summaries.shape[2], C), rows(*grid, 1)
        found["gate_av"] = rows(streams, 1)
    gates_av = [w.gate_av for w in weights]
    tensors_ = dx, xhat, dh, parts, dgates_av, da, h, table, dout, xs, summaries, gates_av
    _launch.run([down_launch(*tensors_, down_shared)], h.device)
    of_down = _weight_gradients(dh, xhat, groups), dh.sum((1, 2), dtype=torch.float32)
    launches = [] if ds is None else [summaries_launch(ds, parts)]
    _launch.run([*launches, products_launch(found, *of_down, dgates, dgates_av, shared)], h.device)
    return dx, db, ds, found


def reasons(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    batch_statistics: bool,
) -> list[str]:
    """Why the kernels cannot take these tensors; an empty list when they can."""
    # What evaluation asks for, of products in the streams' type, which is what the op makes of them; statistics are
    # asked for below.
    with torch.no_grad():
        like = [_like(w, xs[0].dtype if xs else torch.float32) for w in weights]
        found = adapter.reasons(xs, branches, summaries, like, post_norm)
    if not xs:
        return found
    frozen = {f"post_norm.{name}": t for name, t in (post_norm or Norm())._asdict().items()}
    frozen |= {f"weights[{i}].{name}": t for i, w in enumerate(weights) for name, t in tensors(w) if _is_running(name)}
    found += _checks.trainable({name: t for name, t in frozen.items() if t is not None})
    norms = [norm for w in weights for norm in (w.bn1, w.bn2) if norm is not None]
    if batch_statistics and norms and xs[0].shape[:-1].numel() < 2:
        found.append(f"expected more than one token for batch statistics, got {xs[0].shape[:-1].numel()}")
    if not batch_statistics and any(norm.mean is None for norm in norms):
        found.append("expected running statistics of each BatchNorm, got none")
    return list(dict.fromkeys(found))


def _like(w: Weights, dtype: torch.dtype) -> Weights:
    found = {}
    for name in ("down", "up"):
        product = getattr(w, name)
        if product.dtype in _checks.DTYPES:
            found[name] = torch.empty_like(product, dtype=dtype)
    for name in ("bn1", "bn2"):
        norm = getattr(w, name)
        if norm is not None and norm.mean is None and norm.variance is None:
            found[name] = norm._replace(mean=norm.weight, variance=norm.weight)
    return w._replace(**found)


def _is_running(name: str) -> bool:
    return name.endswith((".mean", ".variance"))


def _trained(weights: Sequence[Weights]) -> dict[str, Tensor]:
    """What has a gradient, by name, of the last stream that has it."""
    return {name: t for w in weights for name, t in tensors(w) if t is not None and not _is_running(name)}


def adapter_training(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    *,
    eps: Sequence[float],
    batch_statistics: bool,
) -> tuple[Tensor, Statistics]:
    """X + PostNorm(B) + g LN_after(...) of one or two streams, (streams, n, N, C), and what BatchNorms went by.

    Args: as of `kernels.adapter.adapter`, but that down and up may be float32 beside narrower streams, and that all but
    the post-norm and running statistics may require gradients. These come back in the types of what they belong to.
        batch_statistics: whether BatchNorms go by the batch's statistics, which are returned, or by the running ones,
            which are read only then.

    Returns: the streams, and the statistics, without gradients, for the caller to update the running ones with.

    Raises: ValueError with all the `reasons`.
    """
    # Here, and not in the custom op, which is called with gradients off.
    if found := reasons(xs, branches, summaries, weights, post_norm, batch_statistics):
        raise ValueError("adapter_training: " + "; ".join(found))
    flat = [
        None if batch_statistics and _is_running(name) else t for w in weights for name, t in tensors(w)
    ]  # the caller writes to the running statistics before the backward
    present = [getattr(w, name) is not None for w in weights for name in NORMS] + [post_norm is not None]
    frozen = post_norm or Norm()
    out, _, bn1, bn2, *_ = _adapter_training(
        list(xs),
        list(branches),
        summaries,
        [t for t in flat if t is not None],
        [t for t in frozen if t is not None],
        [t is not None for t in (*flat, *frozen)],
        present,
        list(eps),
        batch_statistics,
    )
    return out, Statistics(bn1, bn2)


def _unflattened(
    parameters: Sequence[Tensor], post_norm: Sequence[Tensor], given: list[bool], present: list[bool]
) -> tuple[list[Weights], Norm | None]:
    """The weights and the post-norm, from the tensors that are there and from which they are."""
    flat, there = iter((*parameters, *post_norm)), iter(present)
    every = iter([next(flat) if is_given else None for is_given in given])
    weights = [unflattened(every, there) for _ in range(len(present) // len(NORMS))]
    norm = Norm(*every)
    return weights, norm if next(there) else None


@torch.library.custom_op("lavish_fast::adapter_training", mutates_args=())
def _adapter_training(
    xs: list[Tensor],
    branches: list[Tensor],
    summaries: Tensor | None,
    parameters: list[Tensor],
    post_norm: list[Tensor],
    given: list[bool],
    present: list[bool],
    eps: list[float],
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, h (streams, n, N, D), the statistics of BN1 and BN2, a's mean and covariance."""
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(xs[0].device.type, enabled=False):  # which reaches into the op
        return _forward(xs, branches, summaries, weights, norm, eps, batch_statistics)


@_adapter_training.register_fake
def _(xs, branches, summaries, parameters, post_norm, given, present, eps, batch_statistics):
    (w, *_), _ = _unflattened(parameters, post_norm, given, present)
    (n, N, C), (D, channels), streams = xs[0].shape, w.down.shape, len(xs)
    groups = C // channels
    full = (2, D), (2, C), (D,), (groups, D // groups, D // groups)
    there = [batch_statistics and norm is not None for norm in (w.bn1, w.bn2, w.bn2, w.bn2)]
    shapes = [shape if batch else empty for batch, shape, empty in zip(there, full, _STATISTICS)]
    statistics = [xs[0].new_empty(streams, *shape, dtype=torch.float32) for shape in shapes]
    return xs[0].new_empty(streams, n, N, C), xs[0].new_empty(streams, n, N, D), *statistics


@torch.library.custom_op("lavish_fast::adapter_training_backward", mutates_args=())
def _adapter_training_backward(
    dout: Tensor,
    xs: list[Tensor],
    branches: list[Tensor],
    summaries: Tensor | None,
    parameters: list[Tensor],
    post_norm: list[Tensor],
    h: Tensor,
    bn1: Tensor,
    bn2: Tensor,
    mean: Tensor,
    covariance: Tensor,
    given: list[bool],
    present: list[bool],
    eps: list[float],
    batch_statistics: bool,
) -> list[Tensor]:
    """The gradients of xs, of branches if there is a post-norm, of summaries if any, and those of `_trained`."""
    if dout.stride(-1) * (dout.shape[-1] - 1) >= 2**31:  # the kernels count along channels in 32 bits
        dout = dout.contiguous()
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(h.device.type, enabled=False):
        statistics = bn1, bn2, mean, covariance
        tensors_ = dout, xs, branches, summaries, weights, norm, h, *statistics
        dx, db, ds, found = _backward(*tensors_, eps, batch_statistics)
    return [t for t in (dx, db, ds) if t is not None] + [found[name] for name in _trained(weights)]


@_adapter_training_backward.register_fake
def _(dout, xs, branches, summaries, parameters, post_norm, h, bn1, bn2, mean, covariance, given, present, *_):
    weights, norm = _unflattened(parameters, post_norm, given, present)
    found = [xs[0].new_empty(dout.shape) for _ in range(1 if norm is None else 2)]
    found += [] if summaries is None else [summaries.new_empty(summaries.shape)]
    return found + [t.new_empty(len(xs), *t.shape, dtype=torch.float32) for t in _trained(weights).values()]


def _setup_context(ctx, inputs, output):
    xs, branches, summaries, parameters, post_norm, given, present, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    branches = branches if present[-1] else []
    saved = *xs, *branches, *parameters, *post_norm
    ctx.counts = [len(part) for part in (xs, branches, parameters, post_norm)]
    ctx.options = given, present, *options
    ctx.save_for_backward(*saved, summaries, *output[1:])


def _backward_of_context(ctx, dout, *_):
    saved = list(ctx.saved_tensors)
    xs, branches, parameters, post_norm = ([saved.pop(0) for _ in range(count)] for count in ctx.counts)
    summaries, h, *statistics = saved
    given, present, *_ = ctx.options
    tensors_ = dout, xs, branches, summaries, parameters, post_norm, h, *statistics
    found = iter(_adapter_training_backward(*tensors_, *ctx.options))
    dxs = next(found).unbind()
    dbranches = next(found).unbind() if branches else dout.unbind()
    dsummaries = None if summaries is None else next(found)
    weights, _ = _unflattened(parameters, post_norm, given, present)
    of_streams = dict(zip(_trained(weights), found))
    every = [(i, name, t) for i, w in enumerate(weights) for name, t in tensors(w) if t is not None]
    dparameters = [of_streams[name][i].to(t.dtype) if name in of_streams else None for i, name, t in every]
    return list(dxs), list(dbranches), dsummaries, dparameters, [None] * len(post_norm), *[None] * len(ctx.options)


torch.library.register_autograd("lavish_fast::adapter_training", _backward_of_context, setup_context=_setup_context)


def builds(architecture: int) -> Iterator[tuple[str, list[_launch.Launch]]]:
    """What a machine without a card builds: the paper's stages, its second setting, running statistics, extremes."""
    cases = [(torch.bfloat16, 192, {}), (torch.bfloat16, 768, {}), (torch.bfloat16, 1536, {})]
    cases += [(torch.float16, 384, {"groups": 1, "norms": "none"}), (torch.float32, 768, {}), (torch.bfloat16, 384, {})]
    cases += [(torch.bfloat16, 768, {"reduction": 4, "latents": 16}), (torch.bfloat16, 768, {"statistics": "running"})]
    for dtype, width, options in cases:
        name = " ".join(str(part) for part in (dtype, width, *(f"{k} {v}" for k, v in options.items())))
        yield name.removeprefix("torch."), _build(dtype, width, architecture, **options)


def _build(
    dtype: torch.dtype,
    width: int,
    architecture: int,
    *,
    reduction: int = 8,
    latents: int = 2,
    groups: int = 2,
    norms: str = "all",
    statistics: str = "batch",
) -> list[_launch.Launch]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    n, N, D = 20, 110592 // width, width // reduction
    norm, batch_norm = Norm(wide(width), wide(width)), lambda size: BatchNorm(*(wide(size) for _ in range(4)))
    down, up, gate = empty(D, width // groups), empty(width, D // groups), wide(1)
    w = Weights(gate, norm, down, batch_norm(D), up, batch_norm(width), norm, gate)
    if norms == "none":
        w = w._replace(**dict.fromkeys(NORMS))
        norm = None
    in_float32 = [w._replace(down=wide(*down.shape), up=wide(*up.shape))] * 2
    xs, out, h = [empty(n, N, width)] * 2, empty(2, n, N, width), empty(2, n, N, D)
    summaries, square = empty(2, n, latents, width), (groups, D // groups, D // groups)
    given = xs, [w, w], norm, (1e-5,) * 5, architecture
    first, second, shared, last = (_shared(op, *given) for op in _tuning.ADAPTER_TRAINING)
    gates, flat, found = [gate] * 2, h.flatten(1, 2), _results(h, width, groups)
    found |= {"gate": wide(2, 1), "gate_av": wide(2, 1)}
    after, table = (None, None) if norm is None else (wide(2, n, N, 2), wide(2, 5, D))
    mean, covariance = wide(2, D), wide(2, *square)
    by_batch = norm is not None and statistics == "batch"
    of_batch = (mean, wide(2, D), covariance) if by_batch else (None,) * 3
    R, grams = n * N, (wide(2, D), wide(2, 8, D), wide(2, 8, *square))
    parts, sums, narrow = wide(2, n, first.blocks, 2, D), wide(2, 4, 3, width), wide(2, 8, 2, D)
    products, dgates = wide(2, 4, width, D // groups), wide(2, bwd_bn2_programs(shared, h))
    ds, dgates_av = wide(2, n, last.blocks, latents, width), wide(2, n, last.blocks, 1)
    of_down = [wide(8, D // groups, width // groups)] * groups
    return [
        *([] if dtype == torch.float32 else [narrow_launch(empty(2, 2, down.numel()), in_float32)]),
        _down_launch(h, parts, xs, summaries, gates, first),
        _gram_launch(*grams, flat, first),
        *([bn1_launch(wide(2, 2, D), parts, first)] if by_batch else []),
        *([covariance_launch(mean, covariance, *grams, R, first)] if by_batch else []),
        *([bn2_launch(wide(2, 2, width), mean, covariance, first)] if by_batch else []),
        _up_launch(out, h, xs, xs, gates, norm, second),
        *([] if norm is None else [branch_launch(out, out, xs, norm, shared)]),
        up_launch(out, wide(*h.shape), after, h, out, gates, shared),
        sums_launch(sums, products, out, after, h, out, of_batch[0], shared),
        bwd_bn2_launch(found, dgates, sums, products, of_batch[2], gates, shared),
        *([mixing_launch(of_batch[1], covariance, found, R, shared)] if by_batch else []),
        mid_launch(wide(*flat.shape), narrow, flat, *of_batch, shared),
        *([] if norm is None else [bwd_bn1_launch(found, table, narrow, R if by_batch else None, shared)]),
        down_launch(out, out, h, ds, dgates_av, wide(*h.shape), h, table, out, xs, summaries, gates, last),
        summaries_launch(summaries, ds),
        products_launch(found, of_down, mean, dgates, dgates_av, shared),
    ]
