"""The backward of the gathering, S = L + softmax(L Yᵀ) Y, for one direction or both in one launch.

    P = softmax(L Yᵀ), dP = dS Yᵀ, dlogits = P ∘ (dP - δ), δ = rowsum(P ∘ dP) = rowsum(dS ∘ (P Y))
    dY = Pᵀ dS + dlogitsᵀ L, (n, N, C), and dL = sum over images of dS + dlogits Y, (m, C)

A program owns one direction, one image and one block of its tokens, tiled as in the forward, and goes over the channels
twice: for the block's L Yᵀ and dS Yᵀ, then, backwards, for its rows of dY and its part of dL, with Y out of L2.

δ cannot come from the stored S - L: in 16 bits its rounding, times dS and summed over C, exceeds what is left of
dP - δ where one token has nearly all the weight. If one block covers N, P, its normaliser and δ are all the program's
own and the forward saves nothing but its inputs. Otherwise it saves each latent's largest logit and sum of weights,
which at logits of several hundred are closer than one log-sum-exp, and P Y, (directions, n, m, C): all float32.

In float32, that δ is rounded apart from dP, which at logits of several hundred costs up to 32 ulp of the largest value.

float32: logits, softmax, dP, δ, dlogits and sums; P and dlogits are rounded to Y's type where they are multiplied, in
float16 with dlogits scaled to at most 1, lest small gradients vanish. Tensors of float32 are summed by `accumulate`.

Least work: n N C elements read once and as many written, 10 m n N C operations, of which 4 recompute the logits and dP.
Parts of dL are float32, one a block, and torch sums them: of B tokens in 16 bits they are 2 m / B of Y's bytes, written
and read: 2 % in stage 1 with m = 2, 3 % with 144 tokens, 22 % with those and m = 16, and as much as Y with m = 64 and
blocks of 128. P Y is as much, of an image and not of a block. Without the gradient of Y or of L, its half of the second
walk is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _tuning
from lavish_fast.kernels._launch import Launch
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def accumulate(a, b, total, mask):
    """total + a b. Where mask is false, a b is zero or the sum is of no use.

    A product of float32 is a chain of fused multiply-adds over its terms. As one chain over all channels, of several
    products, it errs 4 to 8 times as much as cuBLAS; chains of their own, added up, do not. Without the mask between
    them Triton would make a sum and a product one chain again.
    """
    if a.dtype == tl.float32:
        return total + tl.where(mask, tl.dot(a, b, input_precision="ieee"), 0.0)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _gather_latents_bwd(
    directions,  # of each: L, its stride, Y, its strides of images and tokens
    dothers,  # (n, N, C) of each, or None
    ds_ptr,  # (directions, n, m, C) with these strides
    strides_ds,
    saved,  # largest logits and sums (directions, n, m), P Y (directions, n, m, C); None where one block covers N
    parts_ptr,  # (directions, n, blocks, m, C) float32, or None
    m,
    N,
    C: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dY of a block of tokens and what they add to dL."""
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    direction = tl.program_id(2)
    latents_ptr, stride_l_m, other_ptr, stride_y_n, stride_y_t = directions[0]
    if len(directions) == 2:
        latents_ptr = tl.where(direction == 0, latents_ptr, directions[1][0])
        stride_l_m = tl.where(direction == 0, stride_l_m, directions[1][1])
        other_ptr = tl.where(direction == 0, other_ptr, directions[1][2])
        stride_y_n = tl.where(direction == 0, stride_y_n, directions[1][3])
        stride_y_t = tl.where(direction == 0, stride_y_t, directions[1][4])
    place = direction * tl.num_programs(0).to(tl.int64) + image
    other_ptr += image * stride_y_n
    ds_ptr += direction.to(tl.int64) * strides_ds[0] + image * strides_ds[1]
    dtype = other_ptr.dtype.element_ty

    offs_m = tl.arange(0, M)[None, :]
    mask_m = offs_m < m
    offs_c = tl.arange(0, BLOCK_C)
    latents_ptrs = latents_ptr + offs_m.to(tl.int64) * stride_l_m + offs_c[:, None]
    tokens, masks, logits, dweights = (), (), (), ()
    start = block * BLOCK_N
    for i in tl.static_range(len(TILES)):
        offs_n = start + tl.arange(0, TILES[i])
        tokens += (offs_n.to(tl.int64)[:, None],)
        masks += ((offs_n < N)[:, None],)
        zeros = tl.zeros([offs_n.shape[0], M], tl.float32)
        # Tokens beyond N are read as zeros, so their logits stay what they are here.
        logits += (tl.where(masks[i], zeros, float("-inf")),)
        dweights += (zeros,)
        start += TILES[i]

    delta = tl.zeros([M], tl.float32)
    for c in range(0, C, BLOCK_C):
        mask_c = c + offs_c < C
        mask_cm = mask_c[:, None] & mask_m
        latents = tl.load(latents_ptrs + c, mask=mask_cm, other=0.0)
        ds_ptrs = ds_ptr + offs_m.to(tl.int64) * strides_ds[2] + (c + offs_c).to(tl.int64)[:, None] * strides_ds[3]
        ds = tl.load(ds_ptrs, mask=mask_cm, other=0.0)
        if saved is not None:
            # A load of its own: of one that goes into a product and into this sum, Triton 3.6 fills the only copy anew
            # while the product may still read it.
            again = tl.load(ds_ptrs, mask=mask_cm, other=0.0, cache_modifier=".ca")
            gathered_ptrs = saved[2] + (place * m + offs_m) * C + c + offs_c[:, None]
            delta += tl.sum(again * tl.load(gathered_ptrs, mask=mask_cm, other=0.0), 0)
        added, dadded = (), ()
        for i in tl.static_range(len(TILES)):
            y_ptrs = other_ptr + tokens[i] * stride_y_t + (c + offs_c)[None, :]
            y = tl.load(y_ptrs, mask=masks[i] & mask_c[None, :], other=0.0)
            added += (accumulate(y, latents, logits[i], masks[i]),)
            dadded += (accumulate(y, ds, dweights[i], masks[i]),)
        logits, dweights = added, dadded

    if saved is not None:
        rows = place * m + tl.arange(0, M)
        high = tl.load(saved[0] + rows, mask=tl.arange(0, M) < m, other=0.0)
        total = tl.load(saved[1] + rows, mask=tl.arange(0, M) < m, other=1.0)
    else:
        high = tl.full([M], float("-inf"), tl.float32)
        for i in tl.static_range(len(TILES)):
            high = tl.maximum(high, tl.max(logits[i], 0))
        total = tl.zeros([M], tl.float32)
        for i in tl.static_range(len(TILES)):
            total += tl.sum(tl.exp2((logits[i] - high[None, :]) * _LOG2E), 0)
    weights = ()
    for i in tl.static_range(len(TILES)):
        weights += (tl.exp2((logits[i] - high[None, :]) * _LOG2E) / total[None, :],)
    if saved is None:
        for i in tl.static_range(len(TILES)):
            delta += tl.sum(weights[i] * dweights[i], 0)
    dlogits = ()
    scale = 1.0
    for i in tl.static_range(len(TILES)):
        dlogits += (weights[i] * (dweights[i] - delta[None, :]),)
    if dtype == tl.float16:
        largest = 0.0
        for i in tl.static_range(len(TILES)):
            largest = tl.maximum(largest, tl.max(tl.abs(dlogits[i])))
        scale = tl.where(largest > 0, largest, 1.0)
    p, dl = (), ()
    rest = tl.zeros([M], tl.float32)
    for i in tl.static_range(len(TILES)):
        p += (weights[i].to(dtype),)
        dl += ((dlogits[i] / scale).to(dtype),)
        rest += tl.sum(dl[i].to(tl.float32), 0)

    offs_d = tl.arange(0, BLOCK_D)
    rows_m = tl.arange(0, M).to(tl.int64)[:, None]
    for back in range(0, C, BLOCK_D):
        c = (C - 1) // BLOCK_D * BLOCK_D - back
        mask_d = c + offs_d < C
        if parts_ptr is not None:
            # dS belongs to an image and not to its tokens: to its first block.
            mask_dm = mask_d[:, None] & mask_m
            own = mask_dm & (block == 0)
            ds_ptrs = ds_ptr + offs_m.to(tl.int64) * strides_ds[2] + (c + offs_d).to(tl.int64)[:, None] * strides_ds[3]
            part = tl.zeros([BLOCK_D, M], tl.float32)
            for i in tl.static_range(len(TILES)):
                y_ptrs = other_ptr + tl.trans(tokens[i]) * stride_y_t + (c + offs_d)[:, None]
                y = tl.load(y_ptrs, mask=mask_d[:, None] & tl.trans(masks[i]), other=0.0)
                part = accumulate(y, dl[i], part, mask_dm)
            if saved is not None:
                # Over an image dlogits sum to 0 but for δ's rounding, which must not meet what all tokens share.
                gathered_ptrs = saved[2] + (place * m + offs_m) * C + (c + offs_d)[:, None]
                part -= rest[None, :] * tl.load(gathered_ptrs, mask=mask_dm, other=0.0)
            part = part * scale + tl.load(ds_ptrs, mask=own, other=0.0)
            part_rows = (place * tl.num_programs(1) + block) * m + offs_m
            tl.store(parts_ptr + part_rows * C + (c + offs_d)[:, None], part, mask=mask_dm)
        if dothers is not None:
            dother_ptr = tl.where(direction == 0, dothers[0], dothers[len(dothers) - 1]) + image * N * C
            mask_md = (rows_m < m) & mask_d[None, :]
            latents = tl.load(latents_ptr + rows_m * stride_l_m + (c + offs_d)[None, :], mask=mask_md, other=0.0)
            ds_ptrs = ds_ptr + rows_m * strides_ds[2] + (c + offs_d).to(tl.int64)[None, :] * strides_ds[3]
            ds = tl.load(ds_ptrs, mask=mask_md, other=0.0)
            for i in tl.static_range(len(TILES)):
                dy = tl.zeros([dl[i].shape[0], BLOCK_D], tl.float32)
                dy = accumulate(dl[i], latents, dy, masks[i]) * scale
                dy = accumulate(p[i], ds, dy, masks[i])
                dy_ptrs = dother_ptr + tokens[i] * C + (c + offs_d)[None, :]
                tl.store(dy_ptrs, dy.to(dtype), mask=masks[i] & mask_d[None, :])


def launch(
    directions: Sequence[tuple[Tensor, int, Tensor, int, int]],
    ds: Tensor,
    saved: Sequence[Tensor],
    dothers: Sequence[Tensor] | None,
    summed: bool,
    tiling: dict[str, Any],
    architecture: int,
) -> tuple[Launch, Tensor | None]:
    """What fills dothers and, if `summed`, parts of dL (directions, n, blocks, m, C), of directions of one N.

    tiling: the forward's, so that the logits are the same.
    """
    m = directions[0][0].shape[0]
    n, N, C = directions[0][2].shape
    block = sum(tiling["TILES"])
    blocks = triton.cdiv(N, block)
    parts = None
    if summed:
        parts = torch.empty(len(directions), n, blocks, m, C, dtype=torch.float32, device=ds.device)
    constants, _ = _tuning.row("gather_latents_bwd", architecture, ds.dtype, C)
    del constants["most_tokens"]
    constants |= tiling | {"BLOCK_N": block, "BLOCK_D": min(constants["BLOCK_D"], tiling["BLOCK_C"])}
    if block * tiling["M"] <= 1024:
        constants["num_warps"] //= 2
    kept = tuple(saved) if blocks > 1 else None
    args = (tuple(directions), dothers and tuple(dothers), ds, ds.stride(), kept, parts, m, N)
    return Launch(_gather_latents_bwd, (n, blocks, len(directions)), args, constants), parts
