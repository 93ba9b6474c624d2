"""The backward of kernels/adapter_training.py through its end: post-norm, gate, LN_after, BN2 and up.

_adapter_bwd_branch: from the branch B and dout to dB, through the post-norm.
_adapter_bwd_up: from h and dout to dz1, the gradient of BN2's output, to dz1 V, V being up with BN2's factors in its
rows: what ReLU's output would get if BN2's statistics were constants; and each token's statistics in LN_after.
_adapter_bwd_sums: what is summed over tokens of rows of C: LN_after's gradients, dz1 and dz1ᵀ (a - m), which give the
gradients of up and BN2 (..._bwd_totals.py).

In the first two a program owns BLOCK_N tokens of one image of one stream and holds their rows whole (see _tiles.py), in
the third CHUNK channels of some thousand tokens.
float32: statistics, norms, and the rows that programs leave to be added up. Rounded to the streams' type: what goes
into products, dz1 and a - m, and dB.
Recomputed: a and z twice. Bytes a token in 16 bits: B, dz1 and dout, three times, are read, dB and dz1 written: 14 C;
6 D, and h for every 64 channels in sums, D C / 32 G. FLOPs: 8 C D / G, of which 4 C D / G recompute.
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
    load,
    load_bottleneck,
    of_dout,
    shared_out,
)
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import (
    Norm,
    activated,
    batch_norm,
    bottleneck,
    columns,
    gate_of,
    held,
    hold,
    in_turn,
    is_wide,
    load_tiles,
    moments,
    place,
    row,
    token_rows,
    up_product,
    up_tile,
    zeros,
)
from torch import Tensor


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
        v = load(dout_rows, dout_strides[3], mask_n, offs, mask_c)
        if post_norm.weight is not None:
            v *= row(post_norm.weight, offs, mask_c)
        bhat = (branch[t].to(tl.float32) - mean[:, None]) * rstd[:, None]
        db = layer_norm_bwd(v, bhat, rstd, average, slope)
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
            v = of_dout(dout, t, dout_rows, dout_strides[3], mask_n, C_G, CHUNK)
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
            dz = of_dout(dout, g * TRIPS + k, dout_rows, dout_strides[3], mask_n, C_G, CHUNK)
            if EPS.ln_after is not None:
                z = (held(tiles, g * TRIPS + k, dz_rows, mask_n, C_G, CHUNK) - mean[:, None]) * rstd[:, None]
                if w.ln_after.weight is not None:
                    dz *= row(w.ln_after.weight, offs, mask_c)
                dz = layer_norm_bwd(dz, z, rstd, average, slope)
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
            a = activated(alone(h), w.bn1, EPS.bn1, channels, mask_d, dtype)
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


def bwd_branch_launch(db: Tensor, dout: Tensor, branches: Sequence[Tensor], post_norm: Norm, shared: Shared) -> Launch:
    strides = dout.stride(), tuple(b.stride()[:2] for b in branches)
    args = db, dout, tuple(branches), post_norm, *strides, shared.images, shared.N
    constants = {name: value for name, value in shared.constants.items() if name not in ("D", "BLOCK_D")}
    return Launch(_adapter_bwd_branch, (shared.programs,), args, constants)


def bwd_up_launch(
    dz: Tensor,
    da: Tensor,
    after: Tensor | None,
    h: Tensor,
    dout: Tensor,
    gates: Sequence[Tensor | None],
    shared: Shared,
) -> Launch:
    args = dz, da, after, h, dout, shared.weights, tuple(gates), dout.stride(), shared.images, shared.N
    # Of products with as many rows as columns Triton gives a warp all columns of 16 rows, each row to several warps.
    constants = shared.constants
    block_d = max(constants["BLOCK_D"], 2 * constants["BLOCK_N"] if constants["BLOCK_N"] < 64 else 16)
    return shared.launch(_adapter_bwd_up, args, BLOCK_D=block_d)


def bwd_sums_launch(
    rows: Tensor,
    products: Tensor,
    dz: Tensor,
    after: Tensor | None,
    h: Tensor,
    dout: Tensor,
    means: Tensor | None,
    shared: Shared,
) -> Launch:
    """rows (streams, programs, 3, C), products (streams, programs, C, D / G), as many programs as `sharers`."""
    R = shared.images * shared.N
    constants = {name: shared.constants[name] for name in ("C", "D", "GROUPS", "STREAMS", "EPS")}
    channels, width = (constants[name] // constants["GROUPS"] for name in ("C", "D"))
    size, narrow = dz.element_size(), width <= 64
    # BLOCK_D below CHUNK: see `bwd_up_launch`. Products of float32 take three times the registers.
    constants |= {"BLOCK_R": 64 // size, "CHUNK": 128 // size, "BLOCK_D": 16 if width <= 16 or size == 4 else 32}
    if h.is_cpu:  # the interpreter, whose time goes by turns
        constants["BLOCK_R"] = TOKENS
    constants |= {"num_warps": 8, "num_stages": 1 if size == 4 else 3 if narrow else 2}
    constants["maxnreg"] = 128 if size == 2 and narrow else None
    grid = rows.shape[1], constants["GROUPS"] * triton.cdiv(channels, constants["CHUNK"]), len(rows)
    args = rows, products, dz, after, h, dout, shared.weights, means, dout.stride(), shared.N, R
    args += (bound(shared_out(R, rows.shape[1]), h),)
    return Launch(_adapter_bwd_sums, grid, args, constants)
