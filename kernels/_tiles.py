"""What the kernels do with a tile of a stream: where its rows lie, LayerNorm and BatchNorm chunk by chunk, gates.

And the adapters' two products, down and up by group.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
def welford(mean, m2, x, start, END: tl.constexpr, BLOCK_C: tl.constexpr):
    """Every lane's mean and sum of squared deviations, over one more chunk, which begins at channel `start`."""
    delta = x - mean
    if END % BLOCK_C:
        delta = tl.where((start + tl.arange(0, BLOCK_C) < END)[None, :], delta, 0.0)
    mean += delta * (BLOCK_C / (start + BLOCK_C))
    return mean, m2 + delta * (x - mean)


@triton.jit
def across_lanes(mean, m2, END: tl.constexpr, BLOCK_C: tl.constexpr):
    """Those of each row, from those of its lanes, which have seen `count` channels each (Chan et al.)."""
    count = ((END + BLOCK_C - 1 - tl.arange(0, BLOCK_C)) // BLOCK_C).to(tl.float32)[None, :]
    row_mean = tl.sum(mean * count, 1) / END
    delta = mean - row_mean[:, None]
    return row_mean, tl.sum(m2 + delta * delta * count, 1)


@triton.jit
def layer_norm(x, mean, m2, norm, EPS: tl.constexpr, C: tl.constexpr, offs, mask):
    x = (x - mean[:, None]) * tl.rsqrt(m2 / C + EPS)[:, None]
    if norm.weight is not None:
        x *= row(norm.weight, offs, mask)
    if norm.bias is not None:
        x += row(norm.bias, offs, mask)
    return x


@triton.jit
def batch_norm(x, norm, EPS: tl.constexpr, offs, mask):
    if norm.mean is not None:
        scale = tl.rsqrt(row(norm.variance, offs, mask, other=1.0) + EPS)
        if norm.weight is not None:
            scale *= row(norm.weight, offs, mask)
        x = x * scale - scale * row(norm.mean, offs, mask)
    if norm.bias is not None:
        x += row(norm.bias, offs, mask)
    return x


@triton.jit
def seen(x_rows, mask_n, s_rows, mask_m, p, gate_av, offs, mask_c):
    """X' = X + g_av p S for the channels `offs`, float32; X where there are no summaries."""
    x = tl.load(x_rows + offs[None, :], mask=mask_n & mask_c[None, :], other=0.0).to(tl.float32)
    if s_rows is not None:
        s = tl.load(s_rows + offs[None, :], mask=mask_m & mask_c[None, :], other=0.0)
        x += gate_av * tl.dot(p, s, input_precision="ieee")
    return x


@triton.jit
def down_product(
    x_rows,
    mask_n,
    s_rows,
    mask_m,
    p,
    gate_av,
    mean,
    w,
    EPS: tl.constexpr,
    channels,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    num_stages: tl.constexpr,
):
    """h = down(LN_before(X')), float32: PARTS tiles (BLOCK_N, BLOCK_D) for each group; mean: of X', by token.

    All groups' products stay until the factor of each token is known.
    """
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    products, shifts = (), ()
    for g in tl.static_range(GROUPS):
        h, shift = (), ()
        for _part in tl.static_range(PARTS):
            h += (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
            shift += (tl.zeros((BLOCK_D,), tl.float32),)
        for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C_G
            offs = g * C_G + offs_c
            x = seen(x_rows, mask_n, s_rows, mask_m, p, gate_av, offs, mask_c)
            if EPS.ln_before is not None:
                x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
                squares += x * x
                if w.ln_before.weight is not None:
                    x *= row(w.ln_before.weight, offs, mask_c)
            x = x.to(w.down.dtype.element_ty)
            h_next, shift_next = (), ()
            for part in tl.static_range(PARTS):
                offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
                mask = (offs_d < D_G)[:, None] & mask_c[None, :]
                down = tl.load(w.down + (g * D_G + offs_d)[:, None] * C_G + offs_c[None, :], mask=mask, other=0.0)
                h_next += (tl.dot(x, down.T, h[part], input_precision="ieee"),)
                if w.ln_before.bias is not None:
                    shift_next += (shift[part] + tl.sum(down * row(w.ln_before.bias, offs, mask_c), 1),)
                else:
                    shift_next += (shift[part],)
            h, shift = h_next, shift_next
        products += h
        shifts += shift

    out = ()
    for part in tl.static_range(GROUPS * PARTS):
        h = products[part]
        if EPS.ln_before is not None:
            h = h * tl.rsqrt(tl.sum(squares, 1) / C + EPS.ln_before)[:, None] + shifts[part][None, :]
        out += (h,)
    return out


@triton.jit
def up_product(hidden, FIRST: tl.constexpr, up_ptr, offs, mask_c, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """up(hidden) for the channels `offs` of one group, whose tiles begin at hidden[FIRST]."""
    z = None
    for part in tl.static_range((D_G + BLOCK_D - 1) // BLOCK_D):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = mask_c[:, None] & (offs_d < D_G)[None, :]
        up = tl.load(up_ptr + offs[:, None] * D_G + offs_d[None, :], mask=mask, other=0.0)
        z = tl.dot(hidden[FIRST + part], up.T, z, input_precision="ieee")
    return z


@triton.jit
def place(images, N, BLOCK_N: tl.constexpr):
    """The stream, the image and the tokens of a program, in a grid of blocks of tokens."""
    blocks = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (tl.program_id(0) // blocks % images).to(tl.int64)
    return tl.program_id(0) // blocks // images, image, offs_n


@triton.jit
def attend(
    x_rows,
    mask_n,
    s_rows,
    mask_m,
    gate_av,
    channels,
    C: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    num_stages: tl.constexpr,
):
    """P = softmax(X Sᵀ) and the mean of X' = X + g_av P S by token, float32; channels: all C. Without S, P is zeros."""
    x_mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    s_mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    p = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
        offs_c = start + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(x_rows + offs_c, mask=mask_n & (offs_c < C), other=0.0)
        x_mean, _ = welford(x_mean, 0.0, x.to(tl.float32), start, C, BLOCK_C)
        if s_rows is not None:
            s = tl.load(s_rows + offs_c, mask=mask_m & (offs_c < C), other=0.0)
            s_mean, _ = welford(s_mean, 0.0, s.to(tl.float32), start, C, BLOCK_C)
            p = tl.dot(x, s.T, p, input_precision="ieee")
    mean, _ = across_lanes(x_mean, 0.0, C, BLOCK_C)
    if s_rows is not None:
        p = tl.where((tl.arange(0, BLOCK_M) < M)[None, :], p, float("-inf"))
        p = tl.exp(p - tl.max(p, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        s_mean, _ = across_lanes(s_mean, 0.0, C, BLOCK_C)
        rounded = p.to(x_rows.dtype.element_ty).to(tl.float32)
        mean += gate_av * tl.sum(rounded * s_mean[None, :], 1)
    return p, mean
