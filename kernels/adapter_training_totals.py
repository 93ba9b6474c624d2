"""What kernels/adapter_training.py's programs leave is added up, and what follows from the sums alone is computed.

Between two of the large kernels stands one of these, for both streams in one launch: as separate sums, products and
copies it would be some 90 launches of 2 to 5 us for a step's forward and backward. R tokens of a stream, G groups.

_adapter_narrow: down and up in the streams' type.
_adapter_bn1: BN1's mean and biased variance of R tokens, from those of blocks of tokens (Chan et al.).
_adapter_covariance: a's mean m = a₀ + d and covariance K = gram / R - d dᵀ, d the mean of a - a₀.
_adapter_bn2: BN2's, for each channel up_c m and up_c K up_cᵀ.
_adapter_bwd_bn2: with P the sums of dz1ᵀ (a - m), c = weight / σ: dweight = Σ_d up P / σ, dbias = Σ dz1, and
dup = c (P - dweight / σ · up K); where statistics are constants, P is the sum of dz1ᵀ a, dup = c P and
dweight = (Σ_d up P - mean dbias) / σ. LN_after's gradients, and parts of the gate's.
_adapter_bwd_mixing: what _adapter_bwd_mid takes, upᵀ diag(c dweight / σ R) up and upᵀ c dbias / R.
_adapter_bwd_bn1: BN1's gradients, and with them what _adapter_bwd_down takes.
_adapter_bwd_products: from dhᵀ x̂ and the sums of dh the gradients of down and LN_before; those of the gates.
_adapter_bwd_summaries: dS.

float32: everything, products of float32 as three of TF32 (see _tiles.py); only down, up and dS are in narrower types.
Sums are in the same order each time, so that two runs are equal bit for bit.
Bytes: what the programs left, once, 4 each; of stage 3 with 20 images some MB. Time is a launch's and memory's latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import block, chunk, gate_of, zeros
from lavish_fast.kernels._weights import Weights
from lavish_fast.kernels.adapter_training_bwd import Shared, bound
from torch import Tensor

_NUMBERS = 4096  # of a program's sums, before they are one


@triton.jit
def _load(ptr, offs, mask, other=0.0):
    return tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)


@triton.jit
def _totals(tiles, count, BLOCK_P: tl.constexpr):
    """Sums over `count` parts. tiles: of each the first part's pointers and mask, of two axes, and the stride of parts.

    All are loaded in one turn, since time is what the loads wait.
    """
    sums = ()
    for t in tl.static_range(len(tiles)):
        sums += (tl.zeros((BLOCK_P, tiles[t][1].shape[0], tiles[t][1].shape[1]), tl.float32),)
    for start in range(0, count, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None, None]
        mask_p = offs_p < count
        added = ()
        for t in tl.static_range(len(tiles)):
            ptrs, mask, stride = tiles[t]
            added += (sums[t] + tl.load(ptrs[None, :, :] + offs_p * stride, mask=mask[None, :, :] & mask_p, other=0.0),)
        sums = added
    totals = ()
    for t in tl.static_range(len(tiles)):
        totals += (tl.sum(sums[t], 0),)
    return totals


@triton.jit
def _factors(norm, EPS: tl.constexpr, offs, mask):
    """A BatchNorm's 1 / deviation, and that times its weight; 1 where it is absent."""
    rstd = tl.full(offs.shape, 1.0, tl.float32)
    if EPS is not None:
        rstd = tl.rsqrt(_load(norm.variance, offs, mask, 1.0) + EPS)
    scale = rstd
    if norm.weight is not None:
        scale = rstd * _load(norm.weight, offs, mask)
    return rstd, scale


@triton.jit
def _channels(C_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """The group and the channels of a program, in a grid of a group's tiles, and which of them are the group's."""
    TRIPS: tl.constexpr = (C_G + BLOCK_C - 1) // BLOCK_C
    offs_c = tl.program_id(0) % TRIPS * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.program_id(0) // TRIPS
    return g, g * C_G + offs_c, offs_c < C_G


@triton.jit
def _tile(rows, mask, columns, WIDTH: tl.constexpr):
    """Offsets and mask of a tile of a matrix of WIDTH columns."""
    return rows[:, None] * WIDTH + columns[None, :], mask[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _tiles_of_up(offs, mask_c, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of each tile of these rows."""
    tiles = ()
    for part in tl.static_range((D_G + BLOCK_D - 1) // BLOCK_D):
        tiles += (_tile(offs, mask_c, part * BLOCK_D + tl.arange(0, BLOCK_D), D_G),)
    return tiles


@triton.jit
def _up_covariance(up, covariance_ptr, offs_j, D_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of up K. up: tiles of rows of one group, whose K it is."""
    product = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for part in tl.static_range(len(up)):
        offs_i = part * BLOCK_D + tl.arange(0, BLOCK_D)
        covariance = _load(covariance_ptr, *_tile(offs_i, offs_i < D_G, offs_j, D_G))
        product = tl.dot(up[part], covariance, product, input_precision="tf32x3")
    return product


@triton.jit
def _adapter_narrow(narrow_ptr, products, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """products: of each stream down and up, of SIZE numbers each -> (streams, 2, SIZE)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(products)):
        if tl.program_id(1) == i:
            tile = tl.load(products[i] + offs, mask=offs < SIZE)
            tl.store(narrow_ptr + i * SIZE + offs, tile.to(narrow_ptr.dtype.element_ty), mask=offs < SIZE)


# Of two sets of tokens, q and p of them, with means a and b: the mean is a + (b - a) p / (q + p), and to their squared
# deviations comes (b - a)² q p / (q + p). Every place of a tile is such a set, to which parts are added one by one.
@triton.jit(do_not_specialize=["N", "parts"])
def _adapter_bn1(
    bn1_ptr,  # (streams, 2, D)
    parts_ptr,  # (streams, parts, 2, D): mean and squared deviations of blocks of tokens
    N,
    parts,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    stream = tl.program_id(1).to(tl.int64)
    offs = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    parts_ptr += stream * parts * 2 * D
    count = tl.zeros((BLOCK_P, 1), tl.float32)
    mean, squares = zeros(2, BLOCK_P, BLOCK_D)
    for start in range(0, parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)[:, None]
        first = offs_p % tl.cdiv(N, BLOCK_N) * BLOCK_N  # token of an image
        tokens = tl.where(offs_p < parts, tl.minimum(N - first, BLOCK_N), 0).to(tl.float32)
        mask = (offs_p < parts) & (offs < D)
        delta = _load(parts_ptr, offs_p * 2 * D + offs, mask) - mean
        share = tokens / tl.maximum(count + tokens, 1.0)
        squares += _load(parts_ptr, offs_p * 2 * D + D + offs, mask) + delta * delta * (count * share)
        mean += delta * share
        count += tokens
    R = tl.sum(count, 0)[None, :]
    whole = tl.sum(mean * (count / R), 0)[None, :]
    delta = mean - whole
    bn1_ptr += stream * 2 * D
    tl.store(bn1_ptr + offs, whole, mask=offs < D)
    tl.store(bn1_ptr + D + offs, tl.sum(squares + count * delta * delta, 0)[None, :] / R, mask=offs < D)


@triton.jit(do_not_specialize=["R", "programs"])
def _adapter_covariance(
    mean_ptr,  # (streams, D)
    covariance_ptr,  # (streams, G, D / G, D / G)
    firsts_ptr,  # these as _adapter_gram leaves them
    sums_ptr,
    grams_ptr,
    R,
    programs,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    D_G: tl.constexpr = D // GROUPS
    stream = tl.program_id(1).to(tl.int64)
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = offs < D * D_G
    i = offs // D_G
    j = i // D_G * D_G + offs % D_G
    sums_ptr += stream * programs * D
    grams_ptr += stream * programs * D * D_G
    tiles = ((sums_ptr + i, mask, D), (sums_ptr + j, mask, D), (grams_ptr + offs, mask, D * D_G))
    d_i, d_j, gram = _totals(tiles, programs, BLOCK_P)
    d_i, d_j = d_i / R, d_j / R
    tl.store(covariance_ptr + stream * D * D_G + offs, gram / R - d_i * d_j, mask=mask)
    once = mask & (offs % D_G == 0)
    tl.store(mean_ptr + stream * D + i, _load(firsts_ptr + stream * D, i, once) + d_i, mask=once)


@triton.jit
def _adapter_bn2(
    bn2_ptr,  # (streams, 2, C)
    mean_ptr,  # (streams, D)
    covariance_ptr,  # (streams, G, D / G, D / G)
    weights,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D_G: tl.constexpr = D // GROUPS
    stream = tl.program_id(1)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    g, offs, mask_c = _channels(C // GROUPS, BLOCK_C)
    channel = stream * D + g * D_G
    up, tiles = (), _tiles_of_up(offs, mask_c, D_G, BLOCK_D)
    for part in tl.static_range(len(tiles)):
        up += (_load(w.up, *tiles[part]),)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    variance = tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.static_range(len(up)):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mean += tl.sum(up[part] * _load(mean_ptr + channel, offs_d, offs_d < D_G)[None, :], 1)
        product = _up_covariance(up, covariance_ptr + channel * D_G, offs_d, D_G, BLOCK_C, BLOCK_D)
        variance += tl.sum(product * up[part], 1)
    bn2_ptr += stream * 2 * C
    tl.store(bn2_ptr + offs, mean, mask=mask_c)
    tl.store(bn2_ptr + C + offs, tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=mask_c)


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
    g, offs, mask_c = _channels(C // GROUPS, BLOCK_C)
    column, mask = offs[:, None], mask_c[:, None]
    rows = rows_ptr + stream * programs * 3 * C + column
    tiles = ((rows, mask, 3 * C), (rows + C, mask, 3 * C), (rows + 2 * C, mask, 3 * C))
    up_tiles = _tiles_of_up(offs, mask_c, D_G, BLOCK_D)
    products_ptr += stream * programs * C * D_G
    for part in tl.static_range(len(up_tiles)):
        tiles += ((products_ptr + up_tiles[part][0], up_tiles[part][1], C * D_G),)
    totals = _totals(tiles, programs, BLOCK_P)
    dzhat, d, dz = totals[0], totals[1], totals[2]
    rstd, scale = _factors(w.bn2, EPS.bn2, column, mask)

    # The sum of dz1 (z0 - mean): where a was centred, so is z0.
    slope, up = tl.zeros((BLOCK_C,), tl.float32), ()
    for part in tl.static_range(len(up_tiles)):
        up += (_load(w.up, *up_tiles[part]),)
        slope += tl.sum(up[part] * totals[3 + part], 1)
    slope = slope[:, None]
    if EPS.bn2 is not None and covariance_ptr is None:
        slope -= _load(w.bn2.mean, column, mask) * dz
    slope *= rstd
    dup_ptr += stream * C * D_G
    for part in tl.static_range(len(up_tiles)):
        dup = totals[3 + part]
        if covariance_ptr is not None:
            covariance = covariance_ptr + (stream * D + g * D_G) * D_G
            offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
            dup -= rstd * slope * _up_covariance(up, covariance, offs_d, D_G, BLOCK_C, BLOCK_D)
        tl.store(dup_ptr + up_tiles[part][0], dup * scale, mask=up_tiles[part][1])
    if dgates_ptr is not None:
        v = dzhat
        if w.ln_after.weight is not None:
            v *= _load(w.ln_after.weight, column, mask)
        if w.ln_after.bias is not None:
            v += d * _load(w.ln_after.bias, column, mask)
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
        rstd, scale = _factors(w.bn2, EPS.bn2, column, mask)
        up_i = _load(w.up, *_tile(offs, mask_c, offs_i, D_G))
        up_j = _load(w.up, *_tile(offs, mask_c, offs_j, D_G))
        shift += tl.sum(up_i * (scale * _load(dbias_ptr + stream * C, column, mask) / R), 0)
        up_j *= scale * rstd * _load(dweight_ptr + stream * C, column, mask) / R
        mixing = tl.dot(up_i.T, up_j, mixing, input_precision="tf32x3")
    channel = stream * D + g * D_G
    matrix, mask = _tile(channel + offs_i, offs_i < D_G, offs_j, D_G)
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
    dweight, dbias = _totals(((rows, mask, 2 * D), (rows + D, mask, 2 * D)), programs, BLOCK_P)
    tl.store(dweight_ptr + stream * D + offs, dweight, mask=mask)
    tl.store(dbias_ptr + stream * D + offs, dbias, mask=mask)
    rstd, scale = _factors(w.bn1, EPS.bn1, offs, mask)
    table = table_ptr + stream * 5 * D + offs
    tl.store(table, scale, mask=mask)
    average, slope = zeros(2, 1, BLOCK_D)
    if R is not None:
        average, slope = dbias / R, dweight / R
    tl.store(table + D, average, mask=mask)
    tl.store(table + 2 * D, slope, mask=mask)
    tl.store(table + 3 * D, _load(w.bn1.mean, offs, mask), mask=mask)
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
    g, offs, mask_c = _channels(C_G, BLOCK_C)
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
    totals = _totals(summands, parts, BLOCK_P)
    dweight, dbias = zeros(2, 1, BLOCK_C)
    for part in tl.static_range(PARTS):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D_G
        place, mask = (g * D_G + offs_d)[:, None] * C_G + offs_c[None, :], summands[part][1]
        down, product = _load(w.down, place, mask), totals[part]
        total = _load(sums_ptr + stream * D + g * D_G, offs_d, mask_d)[:, None]
        # Not matrix products, which might be taken in TF32.
        dweight += tl.sum(down * product, 0)[None, :]
        dbias += tl.sum(down * total, 0)[None, :]
        if w.ln_before.weight is not None:
            product *= _load(w.ln_before.weight, offs, mask_c)[None, :]
        if w.ln_before.bias is not None:
            product += total * _load(w.ln_before.bias, offs, mask_c)[None, :]
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
    (ds,) = _totals(((parts_ptr + image * blocks * SIZE + offs, mask, SIZE),), blocks, BLOCK_P)
    tl.store(ds_ptr + image * SIZE + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)


def _constants(shared: Shared, *names: str) -> dict[str, Any]:
    return {name: shared.constants[name] for name in names}


def _widths(shared: Shared, most: int = 64) -> tuple[int, int, int]:
    """A group's channels and those of its bottleneck, and the width of the latter's tiles."""
    width = shared.constants["D"] // shared.constants["GROUPS"]
    return shared.constants["C"] // shared.constants["GROUPS"], width, chunk(width, most)


def _most(numbers: int, size: int, like: Tensor) -> int:
    """`size`, of a program's tile, or in the interpreter, whose time goes by programs, all numbers up to 8 `size`."""
    return min(block(numbers), 8 * size) if like.is_cpu else size


def _channels_of(shared: Shared, like: Tensor) -> int:
    """Of a program that has whole rows of up."""
    return _most(_widths(shared)[0], 16, like)


def _at_once(tile: int) -> int:
    """Parts that a program with a tile of so many numbers adds in one turn."""
    return max(1, triton.next_power_of_2(_NUMBERS // tile + 1) // 2)


def narrow_launch(narrow: Tensor, weights: Sequence[Weights]) -> Launch:
    """narrow (streams, 2, C D / G): down and up."""
    size, constants = narrow.shape[2], {"BLOCK": 1024}
    products = tuple(product for w in weights for product in (w.down, w.up))
    grid = triton.cdiv(size, constants["BLOCK"]), len(products)
    return Launch(_adapter_narrow, grid, (narrow, products), constants | {"SIZE": size})


def bn1_launch(bn1: Tensor, parts: Tensor, shared: Shared) -> Launch:
    """parts (streams, n, blocks, 2, D)."""
    constants = _constants(shared, "D", "BLOCK_N") | {"BLOCK_P": 512, "num_warps": 8}
    constants["BLOCK_D"] = _most(constants["D"], 8, bn1)
    grid = triton.cdiv(constants["D"], constants["BLOCK_D"]), len(bn1)
    args = bn1, parts, shared.N, bound(parts.shape[1] * parts.shape[2], parts)
    return Launch(_adapter_bn1, grid, args, constants)


def covariance_launch(
    mean: Tensor, covariance: Tensor, firsts: Tensor, sums: Tensor, grams: Tensor, R: int, shared: Shared
) -> Launch:
    size, constants = covariance[0].numel(), _constants(shared, "D", "GROUPS") | {"BLOCK_P": 32, "num_warps": 8}
    constants["BLOCK"] = _most(size, 128, mean)
    grid = triton.cdiv(size, constants["BLOCK"]), len(mean)
    args = mean, covariance, firsts, sums, grams, R, bound(sums.shape[1], sums)
    return Launch(_adapter_covariance, grid, args, constants)


def bn2_launch(bn2: Tensor, mean: Tensor, covariance: Tensor, shared: Shared) -> Launch:
    channels, _, block_d = _widths(shared)
    block_c = _channels_of(shared, bn2)
    constants = _constants(shared, "C", "D", "GROUPS", "STREAMS") | {"BLOCK_C": block_c, "BLOCK_D": block_d}
    grid = constants["GROUPS"] * triton.cdiv(channels, block_c), len(bn2)
    return Launch(_adapter_bn2, grid, (bn2, mean, covariance, shared.weights), constants)


def bwd_bn2_programs(shared: Shared, like: Tensor) -> int:
    """Of a stream."""
    return shared.constants["GROUPS"] * triton.cdiv(_widths(shared)[0], _channels_of(shared, like))


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
    _, width, block_d = _widths(shared)
    constants = _constants(shared, "C", "D", "GROUPS", "STREAMS", "EPS")
    constants |= {"BLOCK_C": _channels_of(shared, rows), "BLOCK_D": block_d}
    constants["BLOCK_P"] = _at_once(constants["BLOCK_C"] * block_d * triton.cdiv(width, block_d))
    names = "up", "bn2.weight", "bn2.bias", "ln_after.weight", "ln_after.bias"
    args = *(found[name] for name in names), dgates, rows, products, covariance, shared.weights, tuple(gates)
    grid = bwd_bn2_programs(shared, rows), len(rows)
    return Launch(_adapter_bwd_bn2, grid, (*args, bound(rows.shape[1], rows)), constants)


def mixing_launch(shifts: Tensor, mixing: Tensor, found: dict[str, Tensor], R: int, shared: Shared) -> Launch:
    """found: with BN2's gradients."""
    channels, width, block_d = _widths(shared, 32)
    constants = _constants(shared, "C", "D", "GROUPS", "STREAMS", "EPS")
    constants |= {"BLOCK_C": chunk(channels, _most(channels, 64, mixing)), "BLOCK_D": block_d}
    grid = constants["GROUPS"] * triton.cdiv(width, block_d) ** 2, len(shifts)
    args = shifts, mixing, found["bn2.weight"], found["bn2.bias"], shared.weights, R
    return Launch(_adapter_bwd_mixing, grid, args, constants)


def bwd_bn1_launch(found: dict[str, Tensor], table: Tensor, rows: Tensor, R: int | None, shared: Shared) -> Launch:
    """found: where BN1's gradients go. R: None where statistics are constants."""
    constants = _constants(shared, "D", "STREAMS", "EPS") | {"BLOCK_P": 64}
    constants["BLOCK_D"] = _most(constants["D"], 16, rows)
    grid = triton.cdiv(constants["D"], constants["BLOCK_D"]), len(rows)
    args = found["bn1.weight"], found["bn1.bias"], table, rows, shared.weights, R, bound(rows.shape[1], rows)
    return Launch(_adapter_bwd_bn1, grid, args, constants)


def products_launch(
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
    channels, width, block_d = _widths(shared, 32)
    constants = _constants(shared, "C", "D", "GROUPS", "STREAMS")
    constants |= {"BLOCK_C": chunk(channels, _most(channels, 32, sums)), "BLOCK_D": block_d}
    constants["BLOCK_P"] = _at_once(constants["BLOCK_C"] * block_d * triton.cdiv(width, block_d))
    grid = constants["GROUPS"] * triton.cdiv(channels, constants["BLOCK_C"]), len(sums)
    counts = (bound(0 if t is None else t[0].numel(), sums) for t in (dgates, dgates_av))
    names = "down", "ln_before.weight", "ln_before.bias", "gate", "gate_av"
    args = *(found.get(name) for name in names), tuple(products), sums, dgates, dgates_av, shared.weights
    args += *products[0].stride()[:2], bound(len(products[0]) // len(sums), sums), *counts
    return Launch(_adapter_bwd_products, grid, args, constants)


def summaries_launch(ds: Tensor, parts: Tensor) -> Launch:
    """ds (streams, n, m, C), parts (streams, n, blocks, m, C) float32."""
    streams, n, blocks, *_ = parts.shape
    size = parts.shape[3:].numel()
    constants = {"SIZE": size, "BLOCK_P": 8, "BLOCK": _most(size, 256, ds)}
    grid = streams * n, triton.cdiv(size, constants["BLOCK"])
    return Launch(_adapter_bwd_summaries, grid, (ds, parts, bound(blocks, parts)), constants)
