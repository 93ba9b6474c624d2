"""What the kernels do with a tile of a stream: where its rows lie, LayerNorm and BatchNorm chunk by chunk, gates."""

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
