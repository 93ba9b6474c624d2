"""The forward of kernels/adapter_training.py, whose docstring has the equation.

_adapter_down: a program for BLOCK_N tokens of one image of one stream holds their rows whole, as the evaluation's
kernel does, and leaves h and the mean and squared deviations of its tokens' h, as float32 has them before rounding.
_adapter_gram: sums over some thousand tokens of a - a₀ and of its products, a₀ the first token's a, which give a's mean
and covariance (..._totals.py).
_adapter_up: from h on with up, BN2, LN_after and the sum, whole rows again.

float32: as in kernels/adapter.py; h is rounded to the streams' type.
Bytes a token in 16 bits: X twice, B, out: 8 C, and 6 D for h. FLOPs: 4 C D / G + 4 C m + 2 D² / G.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from lavish_fast.kernels._adapter_training import TOKENS, Shared, bound, load_bottleneck, shared_out
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import (
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
from torch import Tensor


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


def down_launch(
    h: Tensor,
    parts: Tensor,
    xs: Sequence[Tensor],
    summaries: Tensor | None,
    gates_av: Sequence[Tensor | None],
    shared: Shared,
) -> Launch:
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


def gram_launch(firsts: Tensor, sums: Tensor, grams: Tensor, h: Tensor, shared: Shared) -> Launch:
    """h (streams, R, D); the rest as the kernel has them."""
    programs, R = sums.shape[1], h.shape[1]
    constants = {name: shared.constants[name] for name in ("D", "GROUPS", "STREAMS", "EPS", "BLOCK_D")}
    width = constants["D"] // constants["GROUPS"]
    constants["BLOCK_D"] = chunk(width, min(constants["BLOCK_D"], 64))
    constants |= {"BLOCK_R": TOKENS if width <= 32 else TOKENS // 2, "num_warps": 4}
    parts = triton.cdiv(width, constants["BLOCK_D"])
    grid = programs, constants["GROUPS"] * parts * parts, len(h)
    args = firsts, sums, grams, h, shared.weights, R, bound(shared_out(R), h)
    return Launch(_adapter_gram, grid, args, constants)


def up_launch(
    out: Tensor,
    h: Tensor,
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    post_norm: Norm | None,
    shared: Shared,
) -> Launch:
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
