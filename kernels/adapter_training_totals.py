"""What the programs of ..._fwd.py leave is added up, and what follows from the sums alone is computed.

Between two of the large kernels stands one of these, for both streams in one launch, as in the backward
(..._bwd_totals.py): as separate sums, products and copies they would be some 90 launches of 2 to 5 us for a step's
forward and backward. R tokens of a stream, G groups.

_adapter_narrow: down and up in the streams' type.
_adapter_bn1: BN1's mean and biased variance of R tokens, from those of blocks of tokens (Chan et al.).
_adapter_covariance: a's mean m = a₀ + d and covariance K = gram / R - d dᵀ, d the mean of a - a₀.
_adapter_bn2: BN2's, for each channel up_c m and up_c K up_cᵀ.

float32: everything, products of float32 as three of TF32 (see _tiles.py); only down and up are in narrower types.
Sums are in the same order each time, so that two runs are equal bit for bit.
Bytes: what the programs left, once, 4 each; of stage 3 with 20 images some MB. Time is a launch's and memory's latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from lavish_fast.kernels._adapter_training import Shared, bound
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import block, chunk, zeros
from lavish_fast.kernels._weights import Weights
from torch import Tensor


@triton.jit
def load(ptr, offs, mask, other=0.0):
    return tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)


@triton.jit
def totals_of(tiles, count, BLOCK_P: tl.constexpr):
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
def factors(norm, EPS: tl.constexpr, offs, mask):
    """A BatchNorm's 1 / deviation, and that times its weight; 1 where it is absent."""
    rstd = tl.full(offs.shape, 1.0, tl.float32)
    if EPS is not None:
        rstd = tl.rsqrt(load(norm.variance, offs, mask, 1.0) + EPS)
    scale = rstd
    if norm.weight is not None:
        scale = rstd * load(norm.weight, offs, mask)
    return rstd, scale


@triton.jit
def channels_of_program(C_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """The group and the channels of a program, in a grid of a group's tiles, and which of them are the group's."""
    TRIPS: tl.constexpr = (C_G + BLOCK_C - 1) // BLOCK_C
    offs_c = tl.program_id(0) % TRIPS * BLOCK_C + tl.arange(0, BLOCK_C)
    g = tl.program_id(0) // TRIPS
    return g, g * C_G + offs_c, offs_c < C_G


@triton.jit
def tile_of(rows, mask, columns, WIDTH: tl.constexpr):
    """Offsets and mask of a tile of a matrix of WIDTH columns."""
    return rows[:, None] * WIDTH + columns[None, :], mask[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def tiles_of_up(offs, mask_c, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of each tile of these rows."""
    tiles = ()
    for part in tl.static_range((D_G + BLOCK_D - 1) // BLOCK_D):
        tiles += (tile_of(offs, mask_c, part * BLOCK_D + tl.arange(0, BLOCK_D), D_G),)
    return tiles


@triton.jit
def up_covariance(up, covariance_ptr, offs_j, D_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of up K. up: tiles of rows of one group, whose K it is."""
    product = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for part in tl.static_range(len(up)):
        offs_i = part * BLOCK_D + tl.arange(0, BLOCK_D)
        covariance = load(covariance_ptr, *tile_of(offs_i, offs_i < D_G, offs_j, D_G))
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
        delta = load(parts_ptr, offs_p * 2 * D + offs, mask) - mean
        share = tokens / tl.maximum(count + tokens, 1.0)
        squares += load(parts_ptr, offs_p * 2 * D + D + offs, mask) + delta * delta * (count * share)
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
    d_i, d_j, gram = totals_of(tiles, programs, BLOCK_P)
    d_i, d_j = d_i / R, d_j / R
    tl.store(covariance_ptr + stream * D * D_G + offs, gram / R - d_i * d_j, mask=mask)
    once = mask & (offs % D_G == 0)
    tl.store(mean_ptr + stream * D + i, load(firsts_ptr + stream * D, i, once) + d_i, mask=once)


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
    g, offs, mask_c = channels_of_program(C // GROUPS, BLOCK_C)
    channel = stream * D + g * D_G
    up, tiles = (), tiles_of_up(offs, mask_c, D_G, BLOCK_D)
    for part in tl.static_range(len(tiles)):
        up += (load(w.up, *tiles[part]),)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    variance = tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.static_range(len(up)):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mean += tl.sum(up[part] * load(mean_ptr + channel, offs_d, offs_d < D_G)[None, :], 1)
        product = up_covariance(up, covariance_ptr + channel * D_G, offs_d, D_G, BLOCK_C, BLOCK_D)
        variance += tl.sum(product * up[part], 1)
    bn2_ptr += stream * 2 * C
    tl.store(bn2_ptr + offs, mean, mask=mask_c)
    tl.store(bn2_ptr + C + offs, tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=mask_c)


def constants_of(shared: Shared, *names: str) -> dict[str, Any]:
    return {name: shared.constants[name] for name in names}


def widths(shared: Shared, most: int = 64) -> tuple[int, int, int]:
    """A group's channels and those of its bottleneck, and the width of the latter's tiles."""
    width = shared.constants["D"] // shared.constants["GROUPS"]
    return shared.constants["C"] // shared.constants["GROUPS"], width, chunk(width, most)


def tile_size(numbers: int, size: int, like: Tensor) -> int:
    """`size`, of a program's tile, or in the interpreter, whose time goes by programs, all numbers up to 8 `size`."""
    return min(block(numbers), 8 * size) if like.is_cpu else size


def channels_of(shared: Shared, like: Tensor) -> int:
    """Of a program that has whole rows of up."""
    return tile_size(widths(shared)[0], 16, like)


def narrow_launch(narrow: Tensor, weights: Sequence[Weights]) -> Launch:
    """narrow (streams, 2, C D / G): down and up."""
    size, constants = narrow.shape[2], {"BLOCK": 1024}
    products = tuple(product for w in weights for product in (w.down, w.up))
    grid = triton.cdiv(size, constants["BLOCK"]), len(products)
    return Launch(_adapter_narrow, grid, (narrow, products), constants | {"SIZE": size})


def bn1_launch(bn1: Tensor, parts: Tensor, shared: Shared) -> Launch:
    """parts (streams, n, blocks, 2, D)."""
    constants = constants_of(shared, "D", "BLOCK_N") | {"BLOCK_P": 512, "num_warps": 8}
    constants["BLOCK_D"] = tile_size(constants["D"], 8, bn1)
    grid = triton.cdiv(constants["D"], constants["BLOCK_D"]), len(bn1)
    args = bn1, parts, shared.N, bound(parts.shape[1] * parts.shape[2], parts)
    return Launch(_adapter_bn1, grid, args, constants)


def covariance_launch(
    mean: Tensor, covariance: Tensor, firsts: Tensor, sums: Tensor, grams: Tensor, R: int, shared: Shared
) -> Launch:
    size, constants = covariance[0].numel(), constants_of(shared, "D", "GROUPS") | {"BLOCK_P": 32, "num_warps": 8}
    constants["BLOCK"] = tile_size(size, 128, mean)
    grid = triton.cdiv(size, constants["BLOCK"]), len(mean)
    args = mean, covariance, firsts, sums, grams, R, bound(sums.shape[1], sums)
    return Launch(_adapter_covariance, grid, args, constants)


def bn2_launch(bn2: Tensor, mean: Tensor, covariance: Tensor, shared: Shared) -> Launch:
    channels, _, block_d = widths(shared)
    block_c = channels_of(shared, bn2)
    constants = constants_of(shared, "C", "D", "GROUPS", "STREAMS") | {"BLOCK_C": block_c, "BLOCK_D": block_d}
    grid = constants["GROUPS"] * triton.cdiv(channels, block_c), len(bn2)
    return Launch(_adapter_bn2, grid, (bn2, mean, covariance, shared.weights), constants)
