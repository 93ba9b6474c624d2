"""The backward of kernels/adapter_training.py, whose docstring has the equation: every gradient of one residual step.

Five kernels. In the first two and the last a program owns BLOCK_N tokens of one image of one stream and holds their
rows whole (see _tiles.py), in the third CHUNK channels of some thousand tokens, in the fourth a group's bottleneck of
some hundred.

_adapter_bwd_branch: from the branch B and dout to dB, through the post-norm.
_adapter_bwd_up: from h and dout to dz1, the gradient of BN2's output, to dz1 V, V being up with BN2's factors in its
rows: what ReLU's output would get if BN2's statistics were constants; and each token's statistics in LN_after.
_adapter_bwd_sums: what is summed over tokens of rows of C: LN_after's gradients, dz1 and dz1ᵀ (a - m), which give the
gradients of up and BN2.
_adapter_bwd_mid: what BN2's statistics give back is a product of D / G x D / G with a; then ReLU, and the sums that
BN1's backward takes.
_adapter_bwd_down: from X, S and that gradient through BN1 and down to dX, dS, dh and X' whitened, x̂. dhᵀ x̂, a
product of torch's, and the sum of dh give the gradients of down and LN_before. What programs leave is added up by the
kernels of ..._totals.py.

float32: statistics, norms, softmax and its gradient's sums, the rows that programs leave to be added up, and all
of the bottleneck. Rounded to the streams' type: what goes into products, dz1, dh, a - m, x̂, dX, dB, dS.
Recomputed: a and z twice, P, X' and the statistics of its tokens; read: X, B, h and BatchNorms' statistics.

Bytes a token in 16 bits: X, B, dz1 and dout, four times, are read, dX, dB, dz1 and x̂ written, x̂ read by torch's
product: 24 C; in sums h is read for every 64 channels, D C / 32 G; 28 D of the bottleneck.
FLOPs: 12 C D / G, of which 4 C D / G recompute and 2 C D / G are torch's; 2 D² / G; 12 C m, of which 4 C m recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from lavish_fast.kernels import _launch
from lavish_fast.kernels._tiles import (
    DEEP,
    FEW,
    Norm,
    activated,
    batch_norm,
    block,
    bottleneck,
    by_latent,
    chunk,
    columns,
    down_tile,
    gate_of,
    held,
    hold,
    in_turn,
    is_wide,
    load_tiles,
    moments,
    of_latents,
    place,
    row,
    seen,
    softmax_of_latents,
    times_latents,
    token_rows,
    up_product,
    up_tile,
    zeros,
)
from lavish_fast.kernels._weights import Weights
from torch import Tensor

TOKENS = 64  # at least, of a program of those that share a stream's
SHARERS = 256  # programs at most that share a stream's tokens


@triton.jit
def _alone(tile):
    """The same tile, as a sum of one. Else what is made of it on its way into a product is made where every warp has
    all of a factor, and of parameters that go through shared memory one by one."""
    return tl.sum(tile[None, :, :], 0).to(tile.dtype)


@triton.jit
def load_bottleneck(rows, mask_n, GROUPS: tl.constexpr, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tensor with D numbers a token: for each group its tiles (BLOCK_N, BLOCK_D)."""
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    tiles = ()
    for i in tl.static_range(GROUPS * PARTS):
        offs_d = i % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        tile = tl.load(rows + i // PARTS * D_G + offs_d[None, :], mask=mask_n & (offs_d < D_G)[None, :], other=0.0)
        tiles += (_alone(tile),)
    return tiles


@triton.jit
def _of_dout(tiles, t: tl.constexpr, rows, stride_c, mask_n, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """Tile t of dout, float32. Where registers allow it, all are there: one by one, each would wait for memory."""
    if len(tiles) == 0:
        offs, mask_c = columns(t, C_G, CHUNK)
        return _load(rows, stride_c, mask_n, offs, mask_c)
    else:
        return tiles[t].to(tl.float32)


@triton.jit
def _load(rows, stride_c, mask_n, offs, mask_c):
    """One tile, float32."""
    return tl.load(rows + offs[None, :] * stride_c, mask=mask_n & mask_c[None, :], other=0.0).to(tl.float32)


# A LayerNorm y = w x̂ + b, x̂ = (x - mean) / s, over C channels: with v = w dy, dx = (v - avg(v) - x̂ avg(v x̂)) / s.
@triton.jit
def _layer_norm_bwd(v, xhat, rstd, average, slope):
    return rstd[:, None] * (v - average[:, None] - xhat * slope[:, None])


@triton.jit(do_not_specialize=["images"])
def _adapter_bwd_branch(
    db_ptr,  # (streams, n, N, C)
    dout_ptr,
    branches,
    post_norm,
    dout_strides,
    branch_strides,
    images,
    N,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    TILES: tl.constexpr = GROUPS * ((C_G + CHUNK - 1) // CHUNK)
    stream, image, offs_n = place(images, N, BLOCK_N)
    mask_n = (offs_n < N)[:, None]
    db_rows = db_ptr + ((stream * images + image) * N + offs_n)[:, None] * C
    dout_rows = dout_ptr + stream * dout_strides[0] + image * dout_strides[1]
    dout_rows += offs_n.to(tl.int64)[:, None] * dout_strides[2]
    branch_rows = token_rows(branches, branch_strides, stream, image, offs_n, STREAMS)
    dout = load_tiles(dout_rows, dout_strides[3], mask_n, TILES, C_G, CHUNK)
    branch = load_tiles(branch_rows, 1, mask_n, TILES, C_G, CHUNK)
    mean, rstd = moments(branch, None, mask_n, EPS.post_norm, C, C_G, BLOCK_N, CHUNK)
    v_sum, vb_sum = tl.zeros((BLOCK_N, CHUNK), tl.float32), tl.zeros((BLOCK_N, CHUNK), tl.float32)
    for t in tl.static_range(TILES):
        offs, mask_c = columns(t, C_G, CHUNK)
        v = dout[t].to(tl.float32)
        if post_norm.weight is not None:
            v *= row(post_norm.weight, offs, mask_c)
        v_sum += v
        vb_sum += v * (branch[t].to(tl.float32) - mean[:, None]) * rstd[:, None]
    average, slope = tl.sum(v_sum, 1) / C, tl.sum(vb_sum, 1) / C
    for t in tl.static_range(TILES):
        tl.debug_barrier()  # else all tiles are loaded ahead
        offs, mask_c = columns(t, C_G, CHUNK)
        v = _load(dout_rows, dout_strides[3], mask_n, offs, mask_c)
        if post_norm.weight is not None:
            v *= row(post_norm.weight, offs, mask_c)
        bhat = (branch[t].to(tl.float32) - mean[:, None]) * rstd[:, None]
        db = _layer_norm_bwd(v, bhat, rstd, average, slope)
        tl.store(db_rows + offs[None, :], db.to(db_ptr.dtype.element_ty), mask=mask_n & mask_c[None, :])


@triton.jit(do_not_specialize=["images"])
def _adapter_bwd_up(
    dz_ptr,  # (streams, n, N, C), of BN2's output
    da_ptr,  # (streams, n, N, D) float32: dz1 V
    after_ptr,  # (streams, n, N, 2) float32: LN_after's mean and 1 / deviation
    h_ptr,  # (streams, n, N, D)
    dout_ptr,
    weights,
    gates,
    dout_strides,
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
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    TRIPS: tl.constexpr = (C_G + CHUNK - 1) // CHUNK
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate = tl.where(stream == 0, gate_of(gates[0]), gate_of(gates[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    token = ((stream * images + image) * N + offs_n)[:, None]
    dout_rows = dout_ptr + stream * dout_strides[0] + image * dout_strides[1]
    dout_rows += offs_n.to(tl.int64)[:, None] * dout_strides[2]
    dz_rows = dz_ptr + token * C

    h = load_bottleneck(h_ptr + token * D, mask_n, GROUPS, D_G, BLOCK_D)
    dout = ()
    if not is_wide(C, dtype):
        dout = load_tiles(dout_rows, dout_strides[3], mask_n, GROUPS * TRIPS, C_G, CHUNK)
    hidden = bottleneck(h, w.bn1, EPS.bn1, GROUPS, D_G, BLOCK_D, dtype)
    tiles = ()
    total, squares, v_sum, vz_sum = zeros(4, BLOCK_N, CHUNK)
    for t in tl.static_range(GROUPS * TRIPS):
        in_turn(C, D_G, dtype)
        offs, mask_c = columns(t, C_G, CHUNK)
        z = up_product(hidden, w.up, t, GROUPS * TRIPS, GROUPS, C_G, D_G, BLOCK_N, CHUNK, BLOCK_D)
        z = tl.where(mask_c[None, :], batch_norm(z, w.bn2, EPS.bn2, offs, mask_c), 0.0)
        total += z
        tiles = hold(tiles, z, t, dz_rows, mask_n, C, C_G, CHUNK)

    mean = tl.zeros((BLOCK_N,), tl.float32)
    rstd = tl.full((BLOCK_N,), 1.0, tl.float32)
    average, slope = mean, mean
    if EPS.ln_after is not None:
        mean = tl.sum(total, 1) / C
        for t in tl.static_range(GROUPS * TRIPS):
            offs, mask_c = columns(t, C_G, CHUNK)
            z = tl.where(mask_c[None, :], held(tiles, t, dz_rows, mask_n, C_G, CHUNK) - mean[:, None], 0.0)
            v = _of_dout(dout, t, dout_rows, dout_strides[3], mask_n, C_G, CHUNK)
            if w.ln_after.weight is not None:
                v *= row(w.ln_after.weight, offs, mask_c)
            squares += z * z
            v_sum += v
            vz_sum += v * z
        rstd = tl.rsqrt(tl.sum(squares, 1) / C + EPS.ln_after)
        average, slope = tl.sum(v_sum, 1) / C, rstd * tl.sum(vz_sum, 1) / C
        tl.store(after_ptr + token * 2, mean[:, None], mask=mask_n)
        tl.store(after_ptr + token * 2 + 1, rstd[:, None], mask=mask_n)

    tl.debug_barrier()  # else the parameters that were read wait in registers
    for g in tl.static_range(GROUPS):
        das = zeros(PARTS, BLOCK_N, BLOCK_D)
        for k in tl.static_range(TRIPS):
            offs, mask_c = columns(g * TRIPS + k, C_G, CHUNK)
            dz = _of_dout(dout, g * TRIPS + k, dout_rows, dout_strides[3], mask_n, C_G, CHUNK)
            if EPS.ln_after is not None:
                z = (held(tiles, g * TRIPS + k, dz_rows, mask_n, C_G, CHUNK) - mean[:, None]) * rstd[:, None]
                if w.ln_after.weight is not None:
                    dz *= row(w.ln_after.weight, offs, mask_c)
                dz = _layer_norm_bwd(dz, z, rstd, average, slope)
            dz *= gate
            tl.store(dz_rows + offs[None, :], dz.to(dtype), mask=mask_n & mask_c[None, :])
            scaled = dz
            if EPS.bn2 is not None:
                scaled *= tl.rsqrt(row(w.bn2.variance, offs, mask_c, other=1.0) + EPS.bn2)
            if w.bn2.weight is not None:
                scaled *= row(w.bn2.weight, offs, mask_c)
            added = ()
            for part in tl.static_range(PARTS):
                up_ptrs, mask = up_tile(w.up, offs, mask_c, part, D_G, BLOCK_D)
                up = tl.load(up_ptrs, mask=mask, other=0.0)
                added += (tl.dot(scaled.to(dtype), up, das[part], input_precision="tf32x3"),)
            das = added
        for part in tl.static_range(PARTS):
            offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
            da_ptrs = da_ptr + token * D + g * D_G + offs_d[None, :]
            tl.store(da_ptrs, das[part], mask=mask_n & (offs_d < D_G)[None, :])


# In a program that holds rows, sums over tokens go through shared memory tile by tile. Here a token's place in a tile
# has its own, in a register, until all tokens are through.
@triton.jit(do_not_specialize=["N", "R", "tokens"])
def _adapter_bwd_sums(
    rows_ptr,  # (streams, programs, 3, C) float32: sums over a program's tokens of dout ẑ, ẑ LN_after's, dout and dz1
    products_ptr,  # (streams, programs, C, D / G) float32: dz1ᵀ (a - m) of a program's tokens
    dz_ptr,  # (streams, R, C)
    after_ptr,  # (streams, R, 2) float32
    h_ptr,  # (streams, R, D)
    dout_ptr,
    weights,
    means_ptr,  # (streams, D) float32: m, or None
    dout_strides,
    N,
    R,
    tokens,  # of a program
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    TRIPS: tl.constexpr = (C_G + CHUNK - 1) // CHUNK
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = dz_ptr.dtype.element_ty
    stream = tl.program_id(2).to(tl.int64)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    g = tl.program_id(1) // TRIPS
    offs_c = tl.program_id(1) % TRIPS * CHUNK + tl.arange(0, CHUNK)
    offs, mask_c = g * C_G + offs_c, offs_c < C_G
    dout_ptr += stream * dout_strides[0]
    if means_ptr is not None:
        means_ptr += stream * D
    dz_ptr += stream * R * C
    h_ptr += stream * R * D
    dzhat_sum, d_sum, dz_sum = zeros(3, BLOCK_R, CHUNK)
    products = zeros(PARTS, BLOCK_D, CHUNK)
    start = tl.program_id(0) * tokens
    for offset in range(0, tokens, BLOCK_R):
        offs_r = start + offset + tl.arange(0, BLOCK_R)
        mask_n = (offs_r < tl.minimum(start + tokens, R))[:, None]
        mask = mask_n & mask_c[None, :]
        token = offs_r.to(tl.int64)[:, None]
        # dout is loaded first, used last: the compiler loads ahead what goes into products alone.
        image, offs_n = (offs_r // N).to(tl.int64)[:, None], (offs_r % N).to(tl.int64)[:, None]
        dout_rows = dout_ptr + image * dout_strides[1] + offs_n * dout_strides[2]
        d = tl.load(dout_rows + offs[None, :] * dout_strides[3], mask=mask, other=0.0)
        mean, rstd = 0.0, 1.0
        if EPS.ln_after is not None:
            after = after_ptr + (stream * R + token) * 2
            mean, rstd = tl.load(after, mask=mask_n, other=0.0), tl.load(after + 1, mask=mask_n, other=0.0)
        dz = tl.load(dz_ptr + token * C + offs[None, :], mask=mask, other=0.0)
        z = tl.zeros((BLOCK_R, CHUNK), tl.float32)
        added = ()
        for part in tl.static_range(PARTS):
            offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
            channels, mask_d = g * D_G + offs_d, offs_d < D_G
            h = tl.load(h_ptr + token * D + channels[None, :], mask=mask_n & mask_d[None, :], other=0.0)
            a = activated(_alone(h), w.bn1, EPS.bn1, channels, mask_d, dtype)
            up_ptrs, mask_up = up_tile(w.up, offs, mask_c, part, D_G, BLOCK_D)
            z = tl.dot(a, tl.load(up_ptrs, mask=mask_up, other=0.0).T, z, input_precision="tf32x3")
            if means_ptr is not None:
                a = (a.to(tl.float32) - row(means_ptr, channels, mask_d)).to(dtype)
            added += (tl.dot(a.T, dz, products[part], input_precision="tf32x3"),)
        products = added
        z = (batch_norm(z, w.bn2, EPS.bn2, offs, mask_c) - mean) * rstd
        d_sum += d.to(tl.float32)
        dzhat_sum += d.to(tl.float32) * z
        dz_sum += dz.to(tl.float32)
    program = stream * tl.num_programs(0) + tl.program_id(0)
    sums = rows_ptr + program * 3 * C + offs
    tl.store(sums, tl.sum(dzhat_sum, 0), mask=mask_c)
    tl.store(sums + C, tl.sum(d_sum, 0), mask=mask_c)
    tl.store(sums + 2 * C, tl.sum(dz_sum, 0), mask=mask_c)
    for part in tl.static_range(PARTS):
        product_ptrs, mask = up_tile(products_ptr + program * C * D_G, offs, mask_c, part, D_G, BLOCK_D)
        tl.store(product_ptrs, products[part].T, mask=mask)


# BN2 gives dz0 = c (dz1 - s_b - ẑ s_g), c = weight / σ, s_b and s_g the means of dz1 and dz1 ẑ, ẑ = up (a - m) / σ.
# With V = up scaled by c, row by row: da = dz0 up = dz1 V - s_b V - (a - m) upᵀ diag(s_g / σ) V, where the last three
# factors are a matrix of D / G x D / G.
@triton.jit(do_not_specialize=["R", "tokens"])
def _adapter_bwd_mid(
    da_ptr,  # (streams, R, D) float32: dz1 V, and then the gradient of BN1's output
    rows_ptr,  # (streams, programs, 2, D) float32: sums over a program's tokens of da (h - mean) / deviation and da
    h_ptr,  # (streams, R, D)
    weights,
    means_ptr,  # (streams, D) float32: m, or None
    shifts_ptr,  # (streams, D): s_b V
    mixing_ptr,  # (streams, G, D / G, D / G): upᵀ diag(s_g / σ) V
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
    stream = tl.program_id(1).to(tl.int64)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    g = tl.program_id(2) // PARTS
    offs_d = tl.program_id(2) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    offs, mask_d = g * D_G + offs_d, offs_d < D_G
    h_ptr += stream * R * D
    da_ptr += stream * R * D
    mixing = ()
    if means_ptr is not None:
        shifts = row(shifts_ptr + stream * D, offs, mask_d)
        for i in tl.static_range(PARTS):
            offs_i = i * BLOCK_D + tl.arange(0, BLOCK_D)
            matrix = mixing_ptr + ((stream * GROUPS + g) * D_G + offs_i)[:, None] * D_G + offs_d[None, :]
            mixing += (tl.load(matrix, mask=(offs_i < D_G)[:, None] & mask_d[None, :], other=0.0),)
    dahhat_sum, da_sum = zeros(2, BLOCK_R, BLOCK_D)
    start = tl.program_id(0) * tokens
    for offset in range(0, tokens, BLOCK_R):
        offs_r = start + offset + tl.arange(0, BLOCK_R)
        mask_n = (offs_r < tl.minimum(start + tokens, R))[:, None]
        token, mask = offs_r.to(tl.int64)[:, None], mask_n & mask_d[None, :]
        da = tl.load(da_ptr + token * D + offs[None, :], mask=mask, other=0.0)
        h = tl.load(h_ptr + token * D + offs[None, :], mask=mask, other=0.0)
        if means_ptr is not None:
            mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for i in tl.static_range(PARTS):
                offs_i = i * BLOCK_D + tl.arange(0, BLOCK_D)
                channels, mask_i = g * D_G + offs_i, offs_i < D_G
                h_i = h
                if PARTS > 1:
                    h_i = tl.load(h_ptr + token * D + channels[None, :], mask=mask_n & mask_i[None, :], other=0.0)
                a = activated(_alone(h_i), w.bn1, EPS.bn1, channels, mask_i, dtype).to(tl.float32)
                centred = tl.where(mask_i[None, :], a - row(means_ptr + stream * D, channels, mask_i), 0.0)
                mixed = tl.dot(centred, mixing[i], mixed, input_precision="tf32x3")
            da -= shifts + mixed
        a = activated(h, w.bn1, EPS.bn1, offs, mask_d, dtype)
        da = tl.where(mask & (a > 0), da, 0.0)
        tl.store(da_ptr + token * D + offs[None, :], da, mask=mask)
        if EPS.bn1 is not None:
            dahhat_sum += da * (h.to(tl.float32) - row(w.bn1.mean, offs, mask_d))
            da_sum += da
    sums = rows_ptr + (stream * tl.num_programs(0) + tl.program_id(0)) * 2 * D + offs[None, :]
    dahhat = tl.sum(dahhat_sum, 0)[None, :]
    if EPS.bn1 is not None:
        dahhat *= tl.rsqrt(row(w.bn1.variance, offs, mask_d, other=1.0) + EPS.bn1)
    tl.store(sums, dahhat, mask=mask_d[None, :])
    tl.store(sums + D, tl.sum(da_sum, 0)[None, :], mask=mask_d[None, :])


@triton.jit
def _du(
    dh,
    w,
    g: tl.constexpr,
    k: tl.constexpr,
    C_G: tl.constexpr,
    D_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dh down: the gradient of LN_before's output, for tile k of group g."""
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    du = tl.zeros((BLOCK_N, CHUNK), tl.float32)
    for part in tl.static_range(PARTS):
        down_ptrs, mask = down_tile(w.down, g, part, k, C_G, CHUNK, D_G, BLOCK_D)
        down = tl.load(down_ptrs, mask=mask, other=0.0)
        du = tl.dot(dh[g * PARTS + part], down, du, input_precision="tf32x3")
    return du


@triton.jit
def _softmax_bwd(p, dp, gate, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """rowsum(P ∘ dP), and gate times the logits' gradient; p, dp: as `times_latents` gives them."""
    if M <= FEW:
        total, dlogits = tl.zeros((BLOCK_N,), tl.float32), ()
        for m in tl.static_range(M):
            total += p[m] * dp[m]
        for m in tl.static_range(M):
            dlogits += (gate * p[m] * (dp[m] - total),)
        return total, dlogits
    else:
        total = tl.sum(p * dp, 1)
        return total, gate * p * (dp - total[:, None])


# With r = X' and dr its gradient: r = X + g P S, P = softmax(L), L = X Sᵀ, so that
# dP = g dr Sᵀ; dL = P ∘ (dP - rowsum(P ∘ dP)); dX = dout + dr + dL S; dS = g Pᵀ dr + dLᵀ X; dg = sum(P ∘ (dr Sᵀ)).
@triton.jit(do_not_specialize=["images"])
def _adapter_bwd_down(
    dx_ptr,  # (streams, n, N, C)
    xhat_ptr,  # the same: X', whitened where it has a norm
    dh_ptr,  # (streams, n, N, D)
    ds_ptr,  # (programs, m, C) float32
    dgate_ptr,  # (programs,) float32, of gate_av
    da_ptr,  # (streams, n, N, D) float32, of BN1's output
    h_ptr,  # (streams, n, N, D)
    bn1_ptr,  # (streams, 5, D) float32, or None: BN1's factor, means of da and da ĥ, its mean and 1 / deviation
    dout_ptr,
    xs,
    summaries_ptr,
    gates_av,
    weights,
    dout_strides,
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
    TRIPS: tl.constexpr = (C_G + CHUNK - 1) // CHUNK
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    HELD: tl.constexpr = dtype if is_wide(C, dtype) else tl.float32
    program = tl.program_id(0).to(tl.int64)
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate_av = tl.where(stream == 0, gate_of(gates_av[0]), gate_of(gates_av[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    token = ((stream * images + image) * N + offs_n)[:, None]
    dout_rows = dout_ptr + stream * dout_strides[0] + image * dout_strides[1]
    dout_rows += offs_n.to(tl.int64)[:, None] * dout_strides[2]
    dx_rows = dx_ptr + token * C
    x_rows = token_rows(xs, x_strides, stream, image, offs_n, STREAMS)

    # 1. X', whitened where it has a norm.
    x_tiles = load_tiles(x_rows, 1, mask_n, GROUPS * TRIPS, C_G, CHUNK)
    s, p = None, None
    if summaries_ptr is not None:
        s = summaries_ptr + stream * stride_s_stream + image * stride_s_n, stride_s_m
        p = softmax_of_latents(x_tiles, s, M, C_G, BLOCK_N, BLOCK_M, CHUNK)
    x = seen(x_tiles, s, p, gate_av, M, C_G, BLOCK_M, CHUNK, HELD)
    mean, rstd = moments(x, None, mask_n, EPS.ln_before, C, C_G, BLOCK_N, CHUNK)
    xhat = ()
    for t in tl.static_range(GROUPS * TRIPS):
        offs, mask_c = columns(t, C_G, CHUNK)
        tile = x[t].to(tl.float32)
        if EPS.ln_before is not None:
            tile = tl.where(mask_c[None, :], (tile - mean[:, None]) * rstd[:, None], 0.0)
        xhat += (tile.to(dtype),)
        tl.store(xhat_ptr + token * C + offs[None, :], xhat[t], mask=mask_n & mask_c[None, :])

    # 2. Through BN1 and down.
    dh = ()
    for i in tl.static_range(GROUPS * PARTS):
        offs_d = i % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        offs, mask_d = i // PARTS * D_G + offs_d, offs_d < D_G
        mask = mask_n & mask_d[None, :]
        d = tl.load(da_ptr + token * D + offs[None, :], mask=mask, other=0.0)
        if bn1_ptr is not None:
            table = bn1_ptr + stream * 5 * D
            hhat = tl.load(h_ptr + token * D + offs[None, :], mask=mask, other=0.0).to(tl.float32)
            hhat = (hhat - row(table + 3 * D, offs, mask_d)) * row(table + 4 * D, offs, mask_d)
            d -= row(table + D, offs, mask_d) + hhat * row(table + 2 * D, offs, mask_d)
            d = tl.where(mask, d * row(table, offs, mask_d), 0.0)
        dh += (d.to(dtype),)
        tl.store(dh_ptr + token * D + offs[None, :], dh[i], mask=mask)
    dr = ()
    for t in tl.static_range(GROUPS * TRIPS):
        in_turn(C, D_G, dtype)
        du = _du(dh, w, t // TRIPS, t % TRIPS, C_G, D_G, BLOCK_N, CHUNK, BLOCK_D)
        dr = hold(dr, du, t, dx_rows, mask_n, C, C_G, CHUNK)

    # 3. Through LN_before.
    if EPS.ln_before is not None:
        v_sum, vx_sum = tl.zeros((BLOCK_N, CHUNK), tl.float32), tl.zeros((BLOCK_N, CHUNK), tl.float32)
        scaled = ()
        for t in tl.static_range(GROUPS * TRIPS):
            in_turn(C, D_G, dtype)
            offs, mask_c = columns(t, C_G, CHUNK)
            v, normed = held(dr, t, dx_rows, mask_n, C_G, CHUNK), xhat[t].to(tl.float32)
            if w.ln_before.weight is not None:
                v *= row(w.ln_before.weight, offs, mask_c)
            v_sum += v
            vx_sum += v * normed
            scaled = hold(scaled, v, t, dx_rows, mask_n, C, C_G, CHUNK)
        average, slope = tl.sum(v_sum, 1) / C, tl.sum(vx_sum, 1) / C
        dr = ()
        for t in tl.static_range(GROUPS * TRIPS):
            _, mask_c = columns(t, C_G, CHUNK)
            v = held(scaled, t, dx_rows, mask_n, C_G, CHUNK)
            d = _layer_norm_bwd(v, xhat[t].to(tl.float32), rstd, average, slope)
            dr = hold(dr, tl.where(mask_n & mask_c[None, :], d, 0.0), t, dx_rows, mask_n, C, C_G, CHUNK)

    dout = ()
    if not is_wide(C, dtype):
        dout = load_tiles(dout_rows, dout_strides[3], mask_n, GROUPS * TRIPS, C_G, CHUNK)

    # 4. Through the softmax.
    dlogits, p_matrix, dlogits_matrix = None, None, None
    if s is not None:
        dp = times_latents(dr, dx_rows, mask_n, s, M, C, C_G, BLOCK_N, BLOCK_M, CHUNK)
        total, dlogits = _softmax_bwd(p, dp, gate_av, M, BLOCK_N)
        tl.store(dgate_ptr + program, tl.sum(total))
        p_matrix = by_latent(p, M, BLOCK_N, BLOCK_M).to(dtype)
        dlogits_matrix = by_latent(dlogits, M, BLOCK_N, BLOCK_M).to(dtype)

    # 5. The sums.
    for t in tl.static_range(GROUPS * TRIPS):
        in_turn(C, D_G, dtype)
        offs, mask_c = columns(t, C_G, CHUNK)
        mask = mask_n & mask_c[None, :]
        d = held(dr, t, dx_rows, mask_n, C_G, CHUNK)
        dx = _of_dout(dout, t, dout_rows, dout_strides[3], mask_n, C_G, CHUNK) + d
        if s is not None:
            x_tile = x_tiles[t]
            if is_wide(C, dtype) or D_G > DEEP:  # where registers are short, it is read once more
                x_tile = tl.load(x_rows + offs[None, :], mask=mask, other=0.0)
            dx += of_latents(dlogits, s, offs, mask_c, M, BLOCK_M)
            ds = gate_av * tl.dot(p_matrix.T, d.to(dtype), input_precision="tf32x3")
            ds = tl.dot(dlogits_matrix.T, x_tile, ds, input_precision="tf32x3")
            offs_m = tl.arange(0, BLOCK_M)[:, None]
            ds_rows = ds_ptr + (program * M + offs_m) * C
            tl.store(ds_rows + offs[None, :], ds, mask=(offs_m < M) & mask_c[None, :])
        tl.store(dx_rows + offs[None, :], dx.to(dtype), mask=mask)


class Shared(NamedTuple):
    """What the launches of one step have in common. constants: as `adapter.tiling` has them, with STREAMS and EPS."""

    images: int
    N: int
    weights: tuple[Weights, ...]
    constants: dict[str, Any]

    @property
    def blocks(self) -> int:
        """Of tokens of an image."""
        return triton.cdiv(self.N, self.constants["BLOCK_N"])

    @property
    def programs(self) -> int:
        return self.constants["STREAMS"] * self.images * self.blocks

    def sharers(self, itemsize: int) -> int:
        """Programs that share a stream's tokens in `_adapter_bwd_sums`: with those for all channels and streams some
        thousand at most, which fills a card a few times."""
        groups, R = self.constants["GROUPS"], self.images * self.N
        tiles = groups * triton.cdiv(self.constants["C"] // groups, 128 // itemsize)
        return triton.cdiv(R, shared_out(R, 1024 // (tiles * self.constants["STREAMS"])))

    def launch(self, kernel: Any, args: tuple, **constants: int) -> _launch.Launch:
        """A program for each block of tokens."""
        return _launch.Launch(kernel, (self.programs,), args, self.constants | constants)


def branch_launch(
    db: Tensor, dout: Tensor, branches: Sequence[Tensor], post_norm: Norm, shared: Shared
) -> _launch.Launch:
    strides = dout.stride(), tuple(b.stride()[:2] for b in branches)
    args = db, dout, tuple(branches), post_norm, *strides, shared.images, shared.N
    constants = {name: value for name, value in shared.constants.items() if name not in ("D", "BLOCK_D")}
    return _launch.Launch(_adapter_bwd_branch, (shared.programs,), args, constants)


def up_launch(
    dz: Tensor,
    da: Tensor,
    after: Tensor | None,
    h: Tensor,
    dout: Tensor,
    gates: Sequence[Tensor | None],
    shared: Shared,
) -> _launch.Launch:
    args = dz, da, after, h, dout, shared.weights, tuple(gates), dout.stride(), shared.images, shared.N
    # Of products with as many rows as columns Triton gives a warp all columns of 16 rows, each row to several warps.
    constants = shared.constants
    block_d = max(constants["BLOCK_D"], 2 * constants["BLOCK_N"] if constants["BLOCK_N"] < 64 else 16)
    return shared.launch(_adapter_bwd_up, args, BLOCK_D=block_d)


def shared_out(R: int, sharers: int = SHARERS) -> int:
    """Tokens of a program of those, `sharers` at most, that share a stream's R."""
    return TOKENS * triton.cdiv(max(triton.cdiv(R, max(sharers, 1)), 1), TOKENS)


def bound(tokens: int, like: Tensor) -> int | tl.constexpr:
    """That of a kernel's loop. The interpreter, which runs on a CPU, takes none that it does not know."""
    return tl.constexpr(tokens) if like.is_cpu else tokens


def sums_launch(
    rows: Tensor,
    products: Tensor,
    dz: Tensor,
    after: Tensor | None,
    h: Tensor,
    dout: Tensor,
    means: Tensor | None,
    shared: Shared,
) -> _launch.Launch:
    """rows (streams, programs, 3, C), products (streams, programs, C, D / G), as many programs as `sharers`."""
    R = shared.images * shared.N
    constants = {name: shared.constants[name] for name in ("C", "D", "GROUPS", "STREAMS", "EPS")}
    channels, width = (constants[name] // constants["GROUPS"] for name in ("C", "D"))
    size, narrow = dz.element_size(), width <= 64
    # BLOCK_D below CHUNK: see `up_launch`. Products of float32 take three times the registers.
    constants |= {"BLOCK_R": 64 // size, "CHUNK": 128 // size, "BLOCK_D": 16 if width <= 16 or size == 4 else 32}
    if h.is_cpu:  # the interpreter, whose time goes by turns
        constants["BLOCK_R"] = TOKENS
    constants |= {"num_warps": 8, "num_stages": 1 if size == 4 else 3 if narrow else 2}
    constants["maxnreg"] = 128 if size == 2 and narrow else None
    grid = rows.shape[1], constants["GROUPS"] * triton.cdiv(channels, constants["CHUNK"]), len(rows)
    args = rows, products, dz, after, h, dout, shared.weights, means, dout.stride(), shared.N, R
    args += (bound(shared_out(R, rows.shape[1]), h),)
    return _launch.Launch(_adapter_bwd_sums, grid, args, constants)


def mid_launch(
    da: Tensor,
    rows: Tensor,
    h: Tensor,
    means: Tensor | None,
    shifts: Tensor | None,
    mixing: Tensor | None,
    shared: Shared,
) -> _launch.Launch:
    """da, h (streams, R, D); rows (streams, programs, 2, D), as many programs as `shared_out` gives."""
    R = h.shape[1]
    constants = {name: shared.constants[name] for name in ("D", "GROUPS", "STREAMS", "EPS")}
    width = constants["D"] // constants["GROUPS"]
    # Few warps with many registers, in float32 twice as many: most of a turn is waiting at barriers, which programs
    # beside this one fill.
    constants |= {"BLOCK_R": TOKENS if width <= 32 else TOKENS // 2, "num_warps": 2 * h.element_size()}
    constants |= {"num_stages": 3, "BLOCK_D": chunk(width, 64 if width <= 64 else 32)}
    grid = rows.shape[1], len(h), constants["GROUPS"] * triton.cdiv(width, constants["BLOCK_D"])
    args = da, rows, h, shared.weights, means, shifts, mixing, R, bound(shared_out(R), h)
    return _launch.Launch(_adapter_bwd_mid, grid, args, constants)


def down_launch(
    dx: Tensor,
    xhat: Tensor,
    dh: Tensor,
    ds: Tensor | None,
    dgate: Tensor | None,
    da: Tensor,
    h: Tensor,
    bn1: Tensor | None,
    dout: Tensor,
    xs: Sequence[Tensor],
    summaries: Tensor | None,
    gates_av: Sequence[Tensor | None],
    shared: Shared,
) -> _launch.Launch:
    latents = 0 if summaries is None else summaries.shape[2]
    args = (
        dx,
        xhat,
        dh,
        ds,
        dgate,
        da,
        h,
        bn1,
        dout,
        tuple(xs),
        summaries,
        tuple(gates_av),
        shared.weights,
        dout.stride(),
        tuple(x.stride()[:2] for x in xs),
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        shared.images,
        shared.N,
    )
    return shared.launch(_adapter_bwd_down, args, M=latents, BLOCK_M=block(latents))
