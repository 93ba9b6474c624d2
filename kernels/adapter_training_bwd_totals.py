"""What the programs of ..._bwd_up.py and ..._bwd_down.py leave is added up, as in ..._totals.py.

_adapter_bwd_bn2: with P the sums of dz1ᵀ (a - m), c = weight / σ: dweight = Σ_d up P / σ, dbias = Σ dz1, and
dup = c (P - dweight / σ · up K); where statistics are constants, P is the sum of dz1ᵀ a, dup = c P and
dweight = (Σ_d up P - mean dbias) / σ. LN_after's gradients, and parts of the gate's.
_adapter_bwd_mixing: what _adapter_bwd_mid takes, upᵀ diag(c dweight / σ R) up and upᵀ c dbias / R.
_adapter_bwd_bn1: BN1's gradients, and with them what _adapter_bwd_down takes.
_adapter_bwd_products: from dhᵀ x̂ and the sums of dh the gradients of down and LN_before; those of the gates.
_adapter_bwd_summaries: dS.

float32, the order of sums and bytes: as there; only dS is in the streams' type.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from lavish_fast.kernels._adapter_training import Shared, bound
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import chunk, gate_of, zeros
from lavish_fast.kernels.adapter_training_totals import (
    channels_of,
    channels_of_program,
    constants_of,
    factors,
    load,
    tile_of,
    tile_size,
    tiles_of_up,
    totals_of,
    up_covariance,
    widths,
)
from torch import Tensor

_NUMBERS = 4096  # of a program's sums, before they are one


@triton.jit(do_not_specialize=["programs"])
def _adapter_bwd_bn2(
    dup_ptr,  # (streams, C, D / G)
    dweight_ptr,  # (streams, C), as the next: of BN2
    dbias_ptr,
    dafter_weight_ptr,  # of LN_after
    dafter_bias_ptr,
    dgates_ptr,  # (streams, programs of this kernel), or None: of the gate
    rows_ptr,  # these as _adapter_bwd_sums leaves them
    products_ptr,
    covariance_ptr,  # (streams, G, D / G, D / G), or None where statistics are constants
    weights,
    gates,
    programs,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D_G: tl.constexpr = D // GROUPS
    stream = tl.program_id(1).to(tl.int64)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate = tl.where(stream == 0, gate_of(gates[0]), gate_of(gates[STREAMS - 1]))
    g, offs, mask_c = channels_of_program(C // GROUPS, BLOCK_C)
    column, mask = offs[:, None], mask_c[:, None]
    rows = rows_ptr + stream * programs * 3 * C + column
    tiles = ((rows, mask, 3 * C), (rows + C, mask, 3 * C), (rows + 2 * C, mask, 3 * C))
    up_tiles = tiles_of_up(offs, mask_c, D_G, BLOCK_D)
    products_ptr += stream * programs * C * D_G
    for part in tl.static_range(len(up_tiles)):
        tiles += ((products_ptr + up_tiles[part][0], up_tiles[part][1], C * D_G),)
    totals = totals_of(tiles, programs, BLOCK_P)
    dzhat, d, dz = totals[0], totals[1], totals[2]
    rstd, scale = factors(w.bn2, EPS.bn2, column, mask)

    # The sum of dz1 (z0 - mean): where a was centred, so is z0.
    slope, up = tl.zeros((BLOCK_C,), tl.float32), ()
    for part in tl.static_range(len(up_tiles)):
        up += (load(w.up, *up_tiles[part]),)
        slope += tl.sum(up[part] * totals[3 + part], 1)
    slope = slope[:, None]
    if EPS.bn2 is not None and covariance_ptr is None:
        slope -= load(w.bn2.mean, column, mask) * dz
    slope *= rstd
    dup_ptr += stream * C * D_G
    for part in tl.static_range(len(up_tiles)):
        dup = totals[3 + part]
        if covariance_ptr is not None:
            covariance = covariance_ptr + (stream * D + g * D_G) * D_G
            offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
            dup -= rstd * slope * up_covariance(up, covariance, offs_d, D_G, BLOCK_C, BLOCK_D)
        tl.store(dup_ptr + up_tiles[part][0], dup * scale, mask=up_tiles[part][1])
    if dgates_ptr is not None:
        v = dzhat
        if w.ln_after.weight is not None:
            v *= load(w.ln_after.weight, column, mask)
        if w.ln_after.bias is not None:
            v += d * load(w.ln_after.bias, column, mask)
        tl.store(dgates_ptr + stream * tl.num_programs(0) + tl.program_id(0), tl.sum(v))
    column += stream * C
    tl.store(dweight_ptr + column, slope, mask=mask)
    tl.store(dbias_ptr + column, dz, mask=mask)
    tl.store(dafter_weight_ptr + column, gate * dzhat, mask=mask)
    tl.store(dafter_bias_ptr + column, gate * d, mask=mask)


@triton.jit(do_not_specialize=["R"])
def _adapter_bwd_mixing(
    shifts_ptr,  # (streams, D)
    mixing_ptr,  # (streams, G, D / G, D / G)
    dweight_ptr,  # (streams, C), as the next: of BN2
    dbias_ptr,
    weights,
    R,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    stream = tl.program_id(1)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    g = tl.program_id(0) // (PARTS * PARTS)
    part_i = tl.program_id(0) // PARTS % PARTS
    part_j = tl.program_id(0) % PARTS
    offs_i, offs_j = part_i * BLOCK_D + tl.arange(0, BLOCK_D), part_j * BLOCK_D + tl.arange(0, BLOCK_D)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    mixing = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(0, C_G, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        offs, mask_c = g * C_G + offs_c, offs_c < C_G
        column, mask = offs[:, None], mask_c[:, None]
        rstd, scale = factors(w.bn2, EPS.bn2, column, mask)
        up_i = load(w.up, *tile_of(offs, mask_c, offs_i, D_G))
        up_j = load(w.up, *tile_of(offs, mask_c, offs_j, D_G))
        shift += tl.sum(up_i * (scale * load(dbias_ptr + stream * C, column, mask) / R), 0)
        up_j *= scale * rstd * load(dweight_ptr + stream * C, column, mask) / R
        mixing = tl.dot(up_i.T, up_j, mixing, input_precision="tf32x3")
    channel = stream * D + g * D_G
    matrix, mask = tile_of(channel + offs_i, offs_i < D_G, offs_j, D_G)
    tl.store(mixing_ptr + matrix, mixing, mask=mask)
    if part_j == 0:
        tl.store(shifts_ptr + channel + offs_i, shift, mask=offs_i < D_G)


@triton.jit(do_not_specialize=["R", "programs"])
def _adapter_bwd_bn1(
    dweight_ptr,  # (streams, D), as the next
    dbias_ptr,
    table_ptr,  # (streams, 5, D), as _adapter_bwd_down takes it
    rows_ptr,  # as _adapter_bwd_mid leaves it
    weights,
    R,  # None where statistics are constants
    programs,
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    stream = tl.program_id(1).to(tl.int64)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    offs = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = offs < D
    rows = rows_ptr + stream * programs * 2 * D + offs
    dweight, dbias = totals_of(((rows, mask, 2 * D), (rows + D, mask, 2 * D)), programs, BLOCK_P)
    tl.store(dweight_ptr + stream * D + offs, dweight, mask=mask)
    tl.store(dbias_ptr + stream * D + offs, dbias, mask=mask)
    rstd, scale = factors(w.bn1, EPS.bn1, offs, mask)
    table = table_ptr + stream * 5 * D + offs
    tl.store(table, scale, mask=mask)
    average, slope = zeros(2, 1, BLOCK_D)
    if R is not None:
        average, slope = dbias / R, dweight / R
    tl.store(table + D, average, mask=mask)
    tl.store(table + 2 * D, slope, mask=mask)
    tl.store(table + 3 * D, load(w.bn1.mean, offs, mask), mask=mask)
    tl.store(table + 4 * D, rstd, mask=mask)


@triton.jit
def _total(ptr, count):
    """The sum of `count` numbers."""
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, count, 1024):
        offs = start + tl.arange(0, 1024)
        total += tl.load(ptr + offs, mask=offs < count, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["parts", "tiles", "blocks"])
def _adapter_bwd_products(
    ddown_ptr,  # (streams, D, C / G)
    dweight_ptr,  # (streams, C), as the next: of LN_before
    dbias_ptr,
    dgate_ptr,  # (streams, 1), or None
    dgate_av_ptr,
    products,  # of each group (streams * parts, D / G, C / G): dhᵀ x̂
    sums_ptr,  # (streams, D): of dh
    dgates_ptr,  # (streams, tiles), or None
    dgates_av_ptr,  # (streams, blocks)
    weights,
    stride_p,
    stride_d,
    parts,
    tiles,
    blocks,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    stream = tl.program_id(1).to(tl.int64)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    g, offs, mask_c = channels_of_program(C_G, BLOCK_C)
    offs_c = offs - g * C_G
    product_ptr = products[0]
    for i in tl.static_range(1, GROUPS):
        product_ptr = tl.where(g == i, products[i], product_ptr)
    product_ptr += stream * parts * stride_p
    summands = ()
    for part in tl.static_range(PARTS):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (offs_d < D_G)[:, None] & mask_c[None, :]
        summands += ((product_ptr + offs_d[:, None] * stride_d + offs_c[None, :], mask, stride_p),)
    totals = totals_of(summands, parts, BLOCK_P)
    dweight, dbias = zeros(2, 1, BLOCK_C)
    for part in tl.static_range(PARTS):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D_G
        place, mask = (g * D_G + offs_d)[:, None] * C_G + offs_c[None, :], summands[part][1]
        down, product = load(w.down, place, mask), totals[part]
        total = load(sums_ptr + stream * D + g * D_G, offs_d, mask_d)[:, None]
        # Not matrix products, which might be taken in TF32.
        dweight += tl.sum(down * product, 0)[None, :]
        dbias += tl.sum(down * total, 0)[None, :]
        if w.ln_before.weight is not None:
            product *= load(w.ln_before.weight, offs, mask_c)[None, :]
        if w.ln_before.bias is not None:
            product += total * load(w.ln_before.bias, offs, mask_c)[None, :]
        tl.store(ddown_ptr + stream * D * C_G + place, product, mask=mask)
    tl.store(dweight_ptr + stream * C + offs[None, :], dweight, mask=mask_c[None, :])
    tl.store(dbias_ptr + stream * C + offs[None, :], dbias, mask=mask_c[None, :])
    if tl.program_id(0) == 0:
        if dgate_ptr is not None:
            tl.store(dgate_ptr + stream, _total(dgates_ptr + stream * tiles, tiles))
        if dgate_av_ptr is not None:
            tl.store(dgate_av_ptr + stream, _total(dgates_av_ptr + stream * blocks, blocks))


@triton.jit(do_not_specialize=["blocks"])
def _adapter_bwd_summaries(
    ds_ptr,  # (streams, n, SIZE)
    parts_ptr,  # (streams, n, blocks, SIZE)
    blocks,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    offs = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = offs < SIZE
    (ds,) = totals_of(((parts_ptr + image * blocks * SIZE + offs, mask, SIZE),), blocks, BLOCK_P)
    tl.store(ds_ptr + image * SIZE + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)


def _at_once(tile: int) -> int:
    """Parts that a program with a tile of so many numbers adds in one turn."""
    return max(1, triton.next_power_of_2(_NUMBERS // tile + 1) // 2)


def bwd_bn2_programs(shared: Shared, like: Tensor) -> int:
    """Of a stream."""
    return shared.constants["GROUPS"] * triton.cdiv(widths(shared)[0], channels_of(shared, like))


def bwd_bn2_launch(
    found: dict[str, Tensor],
    dgates: Tensor | None,
    rows: Tensor,
    products: Tensor,
    covariance: Tensor | None,
    gates: Sequence[Tensor | None],
    shared: Shared,
) -> Launch:
    """found: where the gradients of up, BN2 and LN_after go. dgates (streams, `bwd_bn2_programs`)."""
    _, width, block_d = widths(shared)
    constants = constants_of(shared, "C", "D", "GROUPS", "STREAMS", "EPS")
    constants |= {"BLOCK_C": channels_of(shared, rows), "BLOCK_D": block_d}
    constants["BLOCK_P"] = _at_once(constants["BLOCK_C"] * block_d * triton.cdiv(width, block_d))
    names = "up", "bn2.weight", "bn2.bias", "ln_after.weight", "ln_after.bias"
    args = *(found[name] for name in names), dgates, rows, products, covariance, shared.weights, tuple(gates)
    grid = bwd_bn2_programs(shared, rows), len(rows)
    return Launch(_adapter_bwd_bn2, grid, (*args, bound(rows.shape[1], rows)), constants)


def bwd_mixing_launch(shifts: Tensor, mixing: Tensor, found: dict[str, Tensor], R: int, shared: Shared) -> Launch:
    """found: with BN2's gradients."""
    channels, width, block_d = widths(shared, 32)
    constants = constants_of(shared, "C", "D", "GROUPS", "STREAMS", "EPS")
    constants |= {"BLOCK_C": chunk(channels, tile_size(channels, 64, mixing)), "BLOCK_D": block_d}
    grid = constants["GROUPS"] * triton.cdiv(width, block_d) ** 2, len(shifts)
    args = shifts, mixing, found["bn2.weight"], found["bn2.bias"], shared.weights, R
    return Launch(_adapter_bwd_mixing, grid, args, constants)


def bwd_bn1_launch(found: dict[str, Tensor], table: Tensor, rows: Tensor, R: int | None, shared: Shared) -> Launch:
    """found: where BN1's gradients go. R: None where statistics are constants."""
    constants = constants_of(shared, "D", "STREAMS", "EPS") | {"BLOCK_P": 64}
    constants["BLOCK_D"] = tile_size(constants["D"], 16, rows)
    grid = triton.cdiv(constants["D"], constants["BLOCK_D"]), len(rows)
    args = found["bn1.weight"], found["bn1.bias"], table, rows, shared.weights, R, bound(rows.shape[1], rows)
    return Launch(_adapter_bwd_bn1, grid, args, constants)


def bwd_products_launch(
    found: dict[str, Tensor],
    products: Sequence[Tensor],
    sums: Tensor,
    dgates: Tensor | None,
    dgates_av: Tensor | None,
    shared: Shared,
) -> Launch:
    """found: where the gradients of down, LN_before and the gates go. products: as the kernel has them, of one layout.

    dgates (streams, ...), dgates_av (streams, ...): what programs left of the gates' gradients.
    """
    channels, width, block_d = widths(shared, 32)
    constants = constants_of(shared, "C", "D", "GROUPS", "STREAMS")
    constants |= {"BLOCK_C": chunk(channels, tile_size(channels, 32, sums)), "BLOCK_D": block_d}
    constants["BLOCK_P"] = _at_once(constants["BLOCK_C"] * block_d * triton.cdiv(width, block_d))
    grid = constants["GROUPS"] * triton.cdiv(channels, constants["BLOCK_C"]), len(sums)
    counts = (bound(0 if t is None else t[0].numel(), sums) for t in (dgates, dgates_av))
    names = "down", "ln_before.weight", "ln_before.bias", "gate", "gate_av"
    args = *(found.get(name) for name in names), tuple(products), sums, dgates, dgates_av, shared.weights
    args += *products[0].stride()[:2], bound(len(products[0]) // len(sums), sums), *counts
    return Launch(_adapter_bwd_products, grid, args, constants)


def bwd_summaries_launch(ds: Tensor, parts: Tensor) -> Launch:
    """ds (streams, n, m, C), parts (streams, n, blocks, m, C) float32."""
    streams, n, blocks, *_ = parts.shape
    size = parts.shape[3:].numel()
    constants = {"SIZE": size, "BLOCK_P": 8, "BLOCK": tile_size(size, 256, ds)}
    grid = streams * n, triton.cdiv(size, constants["BLOCK"])
    return Launch(_adapter_bwd_summaries, grid, (ds, parts, bound(blocks, parts)), constants)
