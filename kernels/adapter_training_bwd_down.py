"""The backward of kernels/adapter_training.py through its beginning: ReLU, BN1, down, LN_before and the latents.

_adapter_bwd_mid: what BN2's statistics give back is a product of D / G x D / G with a; then ReLU, and the sums that
BN1's backward takes. A program owns a group's bottleneck of some hundred tokens.
_adapter_bwd_down: from X, S and that gradient through BN1 and down to dX, dS, dh and X' whitened, x̂; a program holds
the rows of BLOCK_N tokens of one image of one stream whole (see _tiles.py). dhᵀ x̂, a product of torch's, and the sum
of dh give the gradients of down and LN_before (..._bwd_totals.py).

float32: statistics, norms, softmax and its gradient's sums, the rows that programs leave to be added up, and all of
the bottleneck. Rounded to the streams' type: what goes into products, dh and x̂, and dX, dS.
Recomputed: a, P, X' and the statistics of its tokens. Bytes a token in 16 bits: X and dout are read, dX and x̂ written,
8 C; 18 D of the bottleneck. FLOPs: 2 C D / G, 2 D² / G; 12 C m, of which 4 C m recompute. Torch's product: 2 C and 4 D
bytes, 2 C D / G.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from lavish_fast.kernels._adapter_training import (
    TOKENS,
    Shared,
    alone,
    bound,
    layer_norm_bwd,
    of_dout,
    shared_out,
)
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import (
    DEEP,
    FEW,
    activated,
    block,
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
    zeros,
)
from torch import Tensor


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
                a = activated(alone(h_i), w.bn1, EPS.bn1, channels, mask_i, dtype).to(tl.float32)
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
            d = layer_norm_bwd(v, xhat[t].to(tl.float32), rstd, average, slope)
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
        dx = of_dout(dout, t, dout_rows, dout_strides[3], mask_n, C_G, CHUNK) + d
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


def bwd_mid_launch(
    da: Tensor,
    rows: Tensor,
    h: Tensor,
    means: Tensor | None,
    shifts: Tensor | None,
    mixing: Tensor | None,
    shared: Shared,
) -> Launch:
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
    return Launch(_adapter_bwd_mid, grid, args, constants)


def bwd_down_launch(
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
) -> Launch:
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
