"""What the adapters' kernels do with rows of a stream that a program holds whole: statistics, norms, products by group.

A program owns BLOCK_N tokens. Their C channels are a tuple of tiles (BLOCK_N, CHUNK), CHUNK a power of two, the same
number of tiles for every group: 768 channels in 2 groups are 6 tiles of 128. So each stream is read from device memory
once, what comes again at the end comes from L2, and sums over channels are of differences to a mean that is known.
Products of float32 are three of TF32 each, which is nearly as exact.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Channels in 16 bits and in float32, and those of a group's bottleneck, above which registers are short: what a program
# holds is rounded, as the reference rounds it, some of it waits in a result's rows, and tiles are taken in turn.
WIDE, WIDE_FLOAT32, DEEP = tl.constexpr(1024), tl.constexpr(256), tl.constexpr(64)
# Latents up to which products with them are sums of multiples: a tile of 16 of them is mostly padding, and its products
# take each tile of the stream through shared memory.
FEW = tl.constexpr(2)


class Norm(NamedTuple):
    """A LayerNorm's parameters, (C,) each."""

    weight: Tensor | None = None
    bias: Tensor | None = None


class BatchNorm(NamedTuple):
    """A BatchNorm's buffers and parameters, (C,) or (D,) each; a bias alone where it is folded into its product."""

    mean: Tensor | None = None
    variance: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def block(size: int) -> int:
    """The power of two that holds `size`, at least what tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


def chunk(channels: int, most: int) -> int:
    """The width of a tile: a group's own up to `most`; else the fewest channels beyond it, then the fewest tiles."""
    if block(channels) <= most:
        return block(channels)
    widths = [1 << bit for bit in range(4, 10) if triton.cdiv(channels, 1 << bit) <= 16]
    widths = [width for width in widths if width <= most] or widths[:1]
    return min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))


@triton.jit
def token_rows(ptrs, strides, stream, image, offs_n, STREAMS: tl.constexpr):
    """Pointers to the rows of these tokens, (BLOCK_N, 1), in the program's stream and image."""
    ptr = tl.where(stream == 0, ptrs[0], ptrs[STREAMS - 1])
    stride_n = tl.where(stream == 0, strides[0][0], strides[STREAMS - 1][0])
    stride_t = tl.where(stream == 0, strides[0][1], strides[STREAMS - 1][1])
    return ptr + image * stride_n + offs_n.to(tl.int64)[:, None] * stride_t


@triton.jit
def gate_of(ptr):
    if ptr is None:
        return 1.0
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def row(ptr, offs, mask, other=0.0):
    return tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)[None, :]


@triton.jit
def place(images, N, BLOCK_N: tl.constexpr):
    """The stream, the image and the tokens of a program, in a grid of blocks of tokens."""
    blocks = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (tl.program_id(0) // blocks % images).to(tl.int64)
    return tl.program_id(0) // blocks // images, image, offs_n


@triton.jit
def columns(t: tl.constexpr, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """The channels of tile t, and which of them are its group's."""
    TRIPS: tl.constexpr = (C_G + CHUNK - 1) // CHUNK
    offs_c = t % TRIPS * CHUNK + tl.arange(0, CHUNK)
    return t // TRIPS * C_G + offs_c, offs_c < C_G


@triton.constexpr_function
def is_wide(C, dtype):
    """Whether registers are short for rows of C channels of this type."""
    widest = WIDE_FLOAT32 if dtype == tl.float32 else WIDE
    return widest.value < C


@triton.jit
def in_turn(C: tl.constexpr, D_G: tl.constexpr, dtype: tl.constexpr):
    """A barrier, which keeps the compiler from loading all tiles ahead, where registers are short."""
    if C > WIDE or D_G > DEEP or dtype == tl.float32:
        tl.debug_barrier()


@triton.jit
def load_tiles(rows, stride_c, mask_n, TILES: tl.constexpr, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """All channels of these rows, zero outside of tokens and channels."""
    tiles = ()
    for t in tl.static_range(TILES):
        offs, mask_c = columns(t, C_G, CHUNK)
        tiles += (tl.load(rows + offs[None, :] * stride_c, mask=mask_n & mask_c[None, :], other=0.0),)
    return tiles


@triton.jit
def hold(tiles, tile, t: tl.constexpr, rows, mask_n, C: tl.constexpr, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """One more tile of those that a program holds: of wide streams in rows of a result that is yet to be written."""
    if is_wide(C, rows.dtype.element_ty):
        offs, mask_c = columns(t, C_G, CHUNK)
        tl.store(rows + offs[None, :], tile.to(rows.dtype.element_ty), mask=mask_n & mask_c[None, :])
    else:
        tiles += (tile,)
    return tiles


@triton.jit
def held(tiles, t: tl.constexpr, rows, mask_n, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """Tile t of them, float32."""
    if len(tiles) == 0:
        tl.debug_barrier()
        offs, mask_c = columns(t, C_G, CHUNK)
        tile = tl.load(rows + offs[None, :], mask=mask_n & mask_c[None, :], other=0.0).to(tl.float32)
        tl.debug_barrier()  # what comes next in its place waits for it
        return tile
    else:
        return tiles[t].to(tl.float32)


@triton.jit
def affine(x, norm, offs, mask_c):
    """A LayerNorm's weight and bias, where it has them."""
    if norm.weight is not None:
        x *= row(norm.weight, offs, mask_c)
    if norm.bias is not None:
        x += row(norm.bias, offs, mask_c)
    return x


@triton.jit
def batch_norm(x, norm, EPS: tl.constexpr, offs, mask):
    if norm.mean is not None:
        scale = tl.rsqrt(row(norm.variance, offs, mask, other=1.0) + EPS)
        if norm.weight is not None:
            scale *= row(norm.weight, offs, mask)
        x = (x - row(norm.mean, offs, mask)) * scale
    if norm.bias is not None:
        x += row(norm.bias, offs, mask)
    return x


@triton.jit
def latent_rows(s, offs, mask_c, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile (BLOCK_M, CHUNK) of S. s: a pointer to the image's latents and the stride from one to the next."""
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    return tl.load(s[0] + offs_m * s[1] + offs[None, :], mask=(offs_m < M) & mask_c[None, :], other=0.0)


@triton.jit
def times_latents(
    tiles,
    rows,
    mask_n,
    s,
    M: tl.constexpr,
    C: tl.constexpr,
    C_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """X Sᵀ of what is `held`, float32: (BLOCK_N, BLOCK_M), or of FEW latents a tuple of columns (BLOCK_N,)."""
    TILES: tl.constexpr = C // C_G * ((C_G + CHUNK - 1) // CHUNK)
    if M <= FEW:
        sums = zeros(M, BLOCK_N, CHUNK)
        for t in tl.static_range(TILES):
            offs, mask_c = columns(t, C_G, CHUNK)
            x, added = held(tiles, t, rows, mask_n, C_G, CHUNK), ()
            for m in tl.static_range(M):
                added += (sums[m] + x * row(s[0] + m * s[1], offs, mask_c),)
            sums = added
        products = ()
        for m in tl.static_range(M):
            products += (tl.sum(sums[m], 1),)
        return products
    else:
        products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for t in tl.static_range(TILES):
            in_turn(C, 2 * BLOCK_M, s[0].dtype.element_ty)  # of S a row is whole, of down a group's
            offs, mask_c = columns(t, C_G, CHUNK)
            x = held(tiles, t, rows, mask_n, C_G, CHUNK).to(s[0].dtype.element_ty)
            products = tl.dot(x, latent_rows(s, offs, mask_c, M, BLOCK_M).T, products, input_precision="tf32x3")
        return products


@triton.jit
def of_latents(p, s, offs, mask_c, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of P S, float32. p: as `times_latents` gives it, rounded here to the type of S."""
    dtype: tl.constexpr = s[0].dtype.element_ty
    if M <= FEW:
        tile = p[0].to(dtype).to(tl.float32)[:, None] * row(s[0], offs, mask_c)
        for m in tl.static_range(1, M):
            tile += p[m].to(dtype).to(tl.float32)[:, None] * row(s[0] + m * s[1], offs, mask_c)
        return tile
    else:
        return tl.dot(p.to(dtype), latent_rows(s, offs, mask_c, M, BLOCK_M), input_precision="tf32x3")


@triton.jit
def by_latent(p, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_N, BLOCK_M), also of columns."""
    if M <= FEW:
        matrix = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for m in tl.static_range(M):
            matrix = tl.where((tl.arange(0, BLOCK_M) == m)[None, :], p[m][:, None], matrix)
        return matrix
    else:
        return p


@triton.jit
def softmax_of_latents(
    x,
    s,
    M: tl.constexpr,
    C_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """P = softmax(X Sᵀ), as `times_latents` gives it."""
    TRIPS: tl.constexpr = (C_G + CHUNK - 1) // CHUNK
    logits = times_latents(x, None, None, s, M, len(x) // TRIPS * C_G, C_G, BLOCK_N, BLOCK_M, CHUNK)
    if M <= FEW:
        high = logits[0]
        for m in tl.static_range(1, M):
            high = tl.maximum(high, logits[m])
        weights, total = (), tl.zeros((BLOCK_N,), tl.float32)
        for m in tl.static_range(M):
            weights += (tl.exp(logits[m] - high),)
            total += weights[m]
        p = ()
        for m in tl.static_range(M):
            p += (weights[m] / total,)
        return p
    else:
        logits = tl.where((tl.arange(0, BLOCK_M) < M)[None, :], logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, 1)[:, None])
        return p / tl.sum(p, 1)[:, None]


@triton.jit
def seen(
    x,
    s,
    p,
    gate_av,
    M: tl.constexpr,
    C_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
):
    """X' = X + g_av P S, of type HELD; X where there are no summaries."""
    if s is not None:
        tl.debug_barrier()  # else S, which the logits have read, waits in registers
    tiles = ()
    for t in tl.static_range(len(x)):
        tile = x[t].to(tl.float32)
        if s is not None:
            in_turn(len(x) * CHUNK, 2 * BLOCK_M, s[0].dtype.element_ty)
            offs, mask_c = columns(t, C_G, CHUNK)
            tile += gate_av * of_latents(p, s, offs, mask_c, M, BLOCK_M)
        tiles += (tile.to(HELD),)
    return tiles


@triton.jit
def moments(
    tiles,
    rows,
    mask_n,
    EPS: tl.constexpr,
    C: tl.constexpr,
    C_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each row's mean and 1 / deviation of what is `held`, zero outside of the channels; 0 and 1 where EPS is None."""
    TILES: tl.constexpr = C // C_G * ((C_G + CHUNK - 1) // CHUNK)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    rstd = tl.full((BLOCK_N,), 1.0, tl.float32)
    if EPS is not None:
        total, squares = zeros(2, BLOCK_N, CHUNK)
        for t in tl.static_range(TILES):
            total += held(tiles, t, rows, mask_n, C_G, CHUNK)
        mean = tl.sum(total, 1) / C
        for t in tl.static_range(TILES):
            _, mask_c = columns(t, C_G, CHUNK)
            delta = held(tiles, t, rows, mask_n, C_G, CHUNK) - mean[:, None]
            delta = tl.where(mask_c[None, :], delta, 0.0)
            squares += delta * delta
        rstd = tl.rsqrt(tl.sum(squares, 1) / C + EPS)
    return mean, rstd


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles to add to, float32."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((BLOCK_N, WIDTH), tl.float32),)
    return tiles


@triton.jit
def down_product(
    x,
    mean,
    rstd,
    w,
    EPS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    C_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    dtype: tl.constexpr,
):
    """down(LN_before(x)), float32: for each group its tiles (BLOCK_N, BLOCK_D)."""
    TRIPS: tl.constexpr = len(x) // GROUPS
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    products = ()
    for g in tl.static_range(GROUPS):
        sums = zeros(PARTS, BLOCK_N, BLOCK_D)
        for k in tl.static_range(TRIPS):
            offs, mask_c = columns(g * TRIPS + k, C_G, CHUNK)
            u = x[g * TRIPS + k].to(tl.float32)
            if EPS.ln_before is not None:
                u = affine((u - mean[:, None]) * rstd[:, None], w.ln_before, offs, mask_c)
            # Every warp has all of a factor, in many registers: all parts of one before the next.
            added = ()
            for part in tl.static_range(PARTS):
                in_turn(C_G * GROUPS, D_G, dtype)
                down_ptrs, mask = down_tile(w.down, g, part, k, C_G, CHUNK, D_G, BLOCK_D)
                down = tl.load(down_ptrs, mask=mask, other=0.0)
                added += (tl.dot(u.to(dtype), down.T, sums[part], input_precision="tf32x3"),)
            sums = added
        products += sums
    return products


@triton.jit
def down_tile(
    down_ptr,
    g: tl.constexpr,
    part: tl.constexpr,
    k: tl.constexpr,
    C_G: tl.constexpr,
    CHUNK: tl.constexpr,
    D_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pointers and mask (BLOCK_D, CHUNK) of one tile of down (D, C / G)."""
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = k * CHUNK + tl.arange(0, CHUNK)
    mask = (offs_d < D_G)[:, None] & (offs_c < C_G)[None, :]
    return down_ptr + (g * D_G + offs_d)[:, None] * C_G + offs_c[None, :], mask


@triton.jit
def up_tile(up_ptr, offs, mask_c, part: tl.constexpr, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers and mask (CHUNK, BLOCK_D) of one tile of up (C, D / G)."""
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = mask_c[:, None] & (offs_d < D_G)[None, :]
    return up_ptr + offs[:, None] * D_G + offs_d[None, :], mask


@triton.jit
def up_product(
    hidden,
    up_ptr,
    t: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    C_G: tl.constexpr,
    D_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tile t of up(hidden), float32; hidden: for each group its tiles, as `down_product` has them."""
    PARTS: tl.constexpr = len(hidden) // GROUPS
    offs, mask_c = columns(t, C_G, CHUNK)
    z = tl.zeros((BLOCK_N, CHUNK), tl.float32)
    for part in tl.static_range(PARTS):
        up_ptrs, mask = up_tile(up_ptr, offs, mask_c, part, D_G, BLOCK_D)
        up = tl.load(up_ptrs, mask=mask, other=0.0)
        z = tl.dot(hidden[t // (TILES // GROUPS) * PARTS + part], up.T, z, input_precision="tf32x3")
    return z


@triton.jit
def activated(h, norm, EPS: tl.constexpr, offs, mask, dtype: tl.constexpr):
    """a = ReLU(BN1(h)) for these of the bottleneck's channels, rounded."""
    a = batch_norm(h.to(tl.float32), norm, EPS, offs, mask)
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def bottleneck(
    h, norm, EPS: tl.constexpr, GROUPS: tl.constexpr, D_G: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr
):
    """a = ReLU(BN1(h)), rounded; h as `down_product` has it."""
    PARTS: tl.constexpr = len(h) // GROUPS
    hidden = ()
    for i in tl.static_range(len(h)):
        offs_d = i % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        hidden += (activated(h[i], norm, EPS, i // PARTS * D_G + offs_d, offs_d < D_G, dtype),)
    return hidden


@triton.jit
def finish(
    out_rows,
    x_rows,
    branch_rows,
    mask_n,
    hidden,
    w,
    gate,
    post_norm,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """X + PostNorm(B) + g LN_after(BN2(up(hidden))), written."""
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    dtype: tl.constexpr = out_rows.dtype.element_ty
    # X and B are read once more at the end, out of L1 or L2: held until then, they would not leave enough registers.
    b = load_tiles(branch_rows, 1, mask_n, TILES, C_G, CHUNK)
    b_mean, b_rstd = moments(b, None, mask_n, EPS.post_norm, C, C_G, BLOCK_N, CHUNK)
    in_turn(C, D_G, dtype)
    z = ()
    for t in tl.static_range(TILES):
        in_turn(C, D_G, dtype)
        offs, mask_c = columns(t, C_G, CHUNK)
        product = up_product(hidden, w.up, t, TILES, GROUPS, C_G, D_G, BLOCK_N, CHUNK, BLOCK_D)
        product = tl.where(mask_c[None, :], batch_norm(product, w.bn2, EPS.bn2, offs, mask_c), 0.0)
        z = hold(z, product, t, out_rows, mask_n, C, C_G, CHUNK)
    mean, rstd = moments(z, out_rows, mask_n, EPS.ln_after, C, C_G, BLOCK_N, CHUNK)
    for t in tl.static_range(TILES):
        in_turn(C, D_G, dtype)
        offs, mask_c = columns(t, C_G, CHUNK)
        mask = mask_n & mask_c[None, :]
        b = tl.load(branch_rows + offs[None, :], mask=mask, other=0.0).to(tl.float32)
        if EPS.post_norm is not None:
            b = affine((b - b_mean[:, None]) * b_rstd[:, None], post_norm, offs, mask_c)
        y = held(z, t, out_rows, mask_n, C_G, CHUNK)
        if EPS.ln_after is not None:
            y = affine((y - mean[:, None]) * rstd[:, None], w.ln_after, offs, mask_c)
        x = tl.load(x_rows + offs[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_rows + offs[None, :], (x + b + gate * y).to(dtype), mask=mask)
