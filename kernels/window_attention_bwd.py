"""The gradient of Swin-V2's cosine attention inside (shifted) windows, in image order, where weights are frozen.

    P = softmax(s q̂ k̂ᵀ + bias + mask), q̂ = q / max(|q|, 1e-12), k̂ likewise;  out = P v, by window and head

qkv (n, T, 3C) is [q | k | v], each (heads, d), as in window_attention.py; dout (n, T, C), of any strides; dqkv
(n, T, 3C). Only qkv has a gradient: a frozen table and scale need none, and so there is nothing to add up over windows.

A program owns an image, a window and a head and writes dq, dk and dv of that alone: no sum goes over programs, and
two runs are equal bit for bit. Keys and values of the window stay in shared memory, 144 of them as 128 + 16; dk
and dv stay in registers; queries pass in tiles of BLOCK_M. All products have keys as rows, (keys, queries), so that the
weights and their gradient enter dv and dk from the registers they are in.

Saved: qkv and each row's log-sum-exp (n, heads, T), 4 bytes, in base 2. Recomputed: norms, logits and weights, and the
rows' sums of P ∘ dP, over all keys of the window at once. As do·o these would cost saving and reading o, whose rounding
does not cancel in a row with one large weight, where that of dP does.

float32: norms, logits, weights, their gradient, all sums. Rounded to the type of qkv on the way into a product: P, dP's
share of the logits, q̂ and k̂ (which have no scale to overflow, as q / |q|² has). dqkv is rounded once.

Least work: 7 n T C elements moved and 4 bytes a row and head, each once, which this reaches, and 10 n T N C operations:
with N = 144 in 16 bits 103 a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _launch, _tuning
from lavish_fast.kernels._launch import Launch
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def position(slot, WINDOW: tl.constexpr, PATCH: tl.constexpr):
    """Row and column in the window of its slot-th token, PATCH x PATCH tokens after one another."""
    patch, inner = slot // (PATCH * PATCH), slot % (PATCH * PATCH)
    row = patch // (WINDOW // PATCH) * PATCH + inner // PATCH
    column = patch % (WINDOW // PATCH) * PATCH + inner % PATCH
    return row, column


@triton.jit
def source(row, column, size):
    """The token of the image at a row and column of the map, shift included, and along which axes that wrapped it."""
    down, right = row >= size, column >= size
    token = (row - tl.where(down, size, 0)) * size + column - tl.where(right, size, 0)
    return token.to(tl.int64), down, right


@triton.jit
def inverse_norm(x):
    """1 / max(|x|, 1e-12) of each row."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))


@triton.jit
def _unit_bwd(dunit, x):
    """dx, from the gradient of x / max(|x|, 1e-12), a row each."""
    x = x.to(tl.float32)
    square = tl.sum(x * x, 1)
    inverse = tl.rsqrt(tl.maximum(square, 1e-24))
    unit = x * inverse[:, None]
    # Where the bound has taken the norm's place, the norm has no gradient.
    along = tl.where(square < 1e-24, 0.0, tl.sum(unit * dunit, 1))
    return (dunit - unit * along[:, None]) * inverse[:, None]


# With dP = do vᵀ and δ_i = Σ_j P_ij dP_ij, the logits have dS = P ∘ (dP - δ), and
#   dv = Pᵀ do,   dq̂ = s dS k̂,   dk̂ = s dSᵀ q̂,   dq = (dq̂ - q̂ (q̂·dq̂)) / |q|,   dk likewise.
@triton.jit
def _window_attention_bwd(
    qkv_ptr,
    scale_ptr,
    table_ptr,
    lse_ptr,
    dout_ptr,
    dqkv_ptr,
    stride_qkv_n,
    stride_qkv_t,
    stride_dout_n,
    stride_dout_t,
    stride_dout_c,
    heads,
    size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PATCH: tl.constexpr,
    KEYS: tl.constexpr,  # (first, number) of each tile of keys
    BLOCK_M: tl.constexpr,
):
    N: tl.constexpr = WINDOW * WINDOW
    SPAN: tl.constexpr = 2 * WINDOW - 1
    WIDE: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    head = pid % heads
    pid //= heads
    side = size // WINDOW
    left = pid % side * WINDOW + SHIFT
    pid //= side
    top = pid % side * WINDOW + SHIFT
    image = (pid // side).to(tl.int64)

    width = heads * D
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    qkv_ptr += image * stride_qkv_n + head * D
    dqkv_ptr += image * size * size * 3 * width + head * D
    lse_ptr += (image * heads + head) * size * size
    dout_ptr += image * stride_dout_n
    dout_ptrs = dout_ptr + (head * D + offs_d).to(tl.int64)[None, :] * stride_dout_c
    table_ptr += head * SPAN * SPAN
    scale = tl.load(scale_ptr + head)

    k, v, k_unit, k_norm, k_place, k_down, k_right, dk, dv = (), (), (), (), (), (), (), (), ()
    for t in tl.static_range(len(KEYS)):
        k_slot = tl.minimum(KEYS[t][0] + tl.arange(0, KEYS[t][1]), N - 1)
        k_row, k_column = position(k_slot, WINDOW, PATCH)
        k_token, down, right = source(top + WINDOW - 1 - k_row, left + WINDOW - 1 - k_column, size)
        k_ptrs = qkv_ptr + k_token[:, None] * stride_qkv_t + (width + offs_d)[None, :]
        k_tile = tl.load(k_ptrs, mask=mask_d, other=0.0)
        norm = inverse_norm(k_tile)
        k += (k_tile,)
        v += (tl.load(k_ptrs + width, mask=mask_d, other=0.0),)
        k_unit += ((k_tile.to(tl.float32) * norm[:, None]).to(k_tile.dtype),)
        k_norm += (norm * scale,)
        k_place += ((k_row * SPAN + k_column).to(tl.int64),)
        k_down += (down,)
        k_right += (right,)
        dk += (tl.zeros_like(k_tile).to(tl.float32),)
        dv += (tl.zeros_like(k_tile).to(tl.float32),)

    for start in range(0, N, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        mask_m = slot < N
        row, column = position(tl.minimum(slot, N - 1), WINDOW, PATCH)
        token, q_down, q_right = source(top + row, left + column, size)
        q_ptrs = qkv_ptr + token[:, None] * stride_qkv_t + offs_d[None, :]
        q = tl.load(q_ptrs, mask=mask_d, other=0.0)
        # Zeros past the last query: whatever its weights, it adds nothing to dk and dv.
        do = tl.load(dout_ptrs + token[:, None] * stride_dout_t, mask=mask_d & mask_m[:, None], other=0.0)
        lse = tl.load(lse_ptr + token)
        q_norm = inverse_norm(q)
        q_unit = (q.to(tl.float32) * q_norm[:, None]).to(q.dtype)
        bias_ptrs = table_ptr + (row * SPAN + column).to(tl.int64)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        weights, dweights, dk_next, dv_next = (), (), (), ()
        for t in tl.static_range(len(KEYS)):
            bias = tl.load(k_place[t][:, None] + bias_ptrs[None, :])
            if SHIFT > 0:
                bias += tl.minimum(
                    tl.where(k_down[t][:, None] == q_down[None, :], 0.0, -100.0),
                    tl.where(k_right[t][:, None] == q_right[None, :], 0.0, -100.0),
                )
            if KEYS[t][0] + KEYS[t][1] > N:
                bias = tl.where((KEYS[t][0] + tl.arange(0, KEYS[t][1]) < N)[:, None], bias, float("-inf"))
            logits = tl.dot(k[t], q.T, input_precision="ieee") * q_norm[None, :] * k_norm[t][:, None] + bias
            p = tl.exp2(logits * LOG2E - lse[None, :])
            dp = tl.dot(v[t], do.T, input_precision="ieee")
            delta += tl.sum(p * dp, 0)
            if WIDE:
                total += tl.sum(p, 0)
            weights += (p,)
            dweights += (dp,)
        if WIDE:
            # Logits of 100 leave lse a rounding by which weights sum to 1 + 5e-6, where a large one's dP - δ cancels.
            delta /= total
        dq = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
        for t in tl.static_range(len(KEYS)):
            p = weights[t]
            if WIDE:
                p /= total[None, :]
            dv_next += (tl.dot(p.to(do.dtype), do, dv[t], input_precision="ieee"),)
            dlogits = (p * (dweights[t] - delta[None, :])).to(q.dtype)
            dk_next += (tl.dot(dlogits, q_unit, dk[t], input_precision="ieee"),)
            dq = tl.dot(k_unit[t].T, dlogits, dq, input_precision="ieee")
        dk, dv = dk_next, dv_next
        # Volatile, to be read again: what would keep q in registers until here makes the largest windows spill.
        q = tl.load(q_ptrs, mask=mask_d, other=0.0, volatile=True)
        dq = _unit_bwd(dq.T * scale, q)
        dq_ptrs = dqkv_ptr + token[:, None] * (3 * width) + offs_d[None, :]
        tl.store(dq_ptrs, dq.to(dqkv_ptr.dtype.element_ty), mask=mask_d & mask_m[:, None])

    for t in tl.static_range(len(KEYS)):
        k_slot = KEYS[t][0] + tl.arange(0, KEYS[t][1])
        k_row, k_column = position(tl.minimum(k_slot, N - 1), WINDOW, PATCH)
        k_token, _, _ = source(top + WINDOW - 1 - k_row, left + WINDOW - 1 - k_column, size)
        offs_k = (width + offs_d)[None, :]
        # Read again: to hold it in registers throughout costs more than L2 does.
        k_tile = tl.load(qkv_ptr + k_token[:, None] * stride_qkv_t + offs_k, mask=mask_d, other=0.0)
        dk_ptrs = dqkv_ptr + k_token[:, None] * (3 * width) + offs_k
        mask = mask_d & (k_slot < N)[:, None]
        tl.store(dk_ptrs, _unit_bwd(dk[t] * scale, k_tile).to(dqkv_ptr.dtype.element_ty), mask=mask)
        tl.store(dk_ptrs + width, dv[t].to(dqkv_ptr.dtype.element_ty), mask=mask)


def tiles(N: int, most: int, fewest: int = 16) -> tuple[tuple[int, int], ...]:
    """The first key and the number of keys of each tile: powers of two, largest first, for N rounded up to `fewest`."""
    end, found = fewest * triton.cdiv(N, fewest), []
    while left := end - sum(number for _, number in found):
        found.append((end - left, min(most, 1 << left.bit_length() - 1)))
    return tuple(found)


def tuning_width(N: int, d: int) -> int:
    """What launch constants go by: the tokens of a window, twice as many for heads wider than 32."""
    return N * max(triton.next_power_of_2(d), 32) // 32


def launches(
    qkv: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    window: int,
    shift: int,
    lse: Tensor,
    dout: Tensor,
    dqkv: Tensor,
    architecture: int,
) -> list[Launch]:
    """What fills dqkv (n, T, 3C)."""
    (n, tokens, width), heads, N = dout.shape, logit_scale.numel(), window**2
    d = width // heads
    constants, _ = _tuning.row("window_attention_bwd", architecture, qkv.dtype, tuning_width(N, d))
    constants |= {
        "D": d,
        "BLOCK_D": triton.next_power_of_2(d),
        "WINDOW": window,
        "SHIFT": shift,
        "PATCH": math.gcd(window, 4),
        "KEYS": tiles(N, constants.pop("BLOCK_N"), constants.pop("fewest")),
        "num_stages": 1,
    }
    strides = (qkv.stride(0), qkv.stride(1), *dout.stride())
    args = (qkv, logit_scale, table, lse, dout, dqkv, *strides, heads, math.isqrt(tokens))
    return [Launch(_window_attention_bwd, (n * (tokens // N) * heads,), args, constants)]


@torch.library.custom_op("lavish_fast::window_attention_bwd", mutates_args=())
def window_attention_bwd(
    qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int, lse: Tensor, dout: Tensor
) -> Tensor:
    """dqkv (n, T, 3C), of the type of qkv, in image order, from dout (n, T, C).

    The rest as `window_attention` has it; lse (n, heads, T) is the rows' log-sum-exp in base 2, float32.
    """
    dqkv = qkv.new_empty(qkv.shape)
    architecture = _launch.architecture(dqkv.device)
    _launch.run(launches(qkv, logit_scale, table, window, shift, lse, dout, dqkv, architecture), dqkv.device)
    return dqkv


@window_attention_bwd.register_fake
def _(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int, lse: Tensor, dout: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def reasons_bwd(qkv: Tensor, N: int, d: int) -> list[str]:
    """Why windows of N tokens and heads of d channels have no backward here; nothing if they have one."""
    width = tuning_width(N, d)
    most = max(row["width"] for row in _tuning.DEFAULTS["window_attention_bwd"] if row["bytes"] >= qkv.element_size())
    if width > most:
        return [f"qkv: expected {most * N // width} tokens a window or fewer where it requires a gradient, got {N}"]
    return []


def builds(architecture: int) -> Iterator[tuple[str, list[Launch]]]:
    """Every stage of the paper's preset; the other types; the largest windows and the widest heads."""
    stages = [(48, 6, 12, 0), (48, 6, 12, 6), (24, 12, 12, 0), (24, 12, 12, 6), (12, 24, 12, 0), (6, 48, 6, 0)]
    cases = [(dtype, 32, *stage) for dtype in (torch.bfloat16, torch.float16) for stage in stages[1::2]]
    cases += [(torch.bfloat16, 32, *stage) for stage in stages[::4]]
    cases += [(torch.bfloat16, 32, 16, 6, 8, 4), (torch.float16, 32, 16, 6, 8, 4), (torch.bfloat16, 32, 12, 48, 6, 3)]
    cases += [(torch.bfloat16, 32, 32, 6, 16, 8), (torch.bfloat16, 64, 16, 3, 8, 4), (torch.float32, 64, 16, 3, 8, 4)]
    cases += [(torch.bfloat16, 24, 14, 4, 7, 3), (torch.float16, 32, 8, 6, 4, 2)]
    cases += [(torch.float32, 32, 6, 48, 6, 0), (torch.float32, 32, 16, 6, 8, 4), (torch.float32, 32, 22, 6, 11, 5)]
    for dtype, d, size, heads, window, shift in cases:
        qkv = torch.empty(20, size**2, 3 * heads * d, dtype=dtype, device="meta")
        logit_scale = torch.empty(heads, 1, 1, device="meta")
        table = torch.empty(heads, (2 * window - 1) ** 2, device="meta")
        lse = torch.empty(20, heads, size**2, device="meta")
        dout = torch.empty(20, size**2, heads * d, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} d={d} window={window} shift={shift} heads={heads}"
        yield name, launches(qkv, logit_scale, table, window, shift, lse, dout, torch.empty_like(qkv), architecture)
