"""The gradient of Swin-V2's cosine attention inside (shifted) windows, in image order, where weights are frozen.

    P = softmax(s q̂ k̂ᵀ + bias + mask), q̂ = q / max(|q|, 1e-12), k̂ likewise;  out = P v, by window and head

qkv (n, T, 3C) is [q | k | v], each (heads, d), as in window_attention.py; dout (n, T, C), of any strides; dqkv
(n, T, 3C). Only qkv has a gradient: a frozen table and scale need none, and so there is nothing to add up over windows.

Two kernels, of which a program owns an image, a window and a head: no sum goes over programs, and two runs are equal
bit for bit. In the first tiles of BLOCK_M queries meet all keys, which give dq and what a query's keys have in common;
k, k̂ and v are in shared memory. In the second tiles of keys meet all queries, which give dk and dv; q, q̂ and dout are
in its place. Nothing but a tile's own sums stays in registers.

Saved: qkv and each row's log-sum-exp (n, heads, T), 4 bytes, in base 2. Recomputed: norms, and twice, by the same
operations, logits and weights; the rows' sums of P ∘ dP, over all keys of the window at once. As do·o these would cost
saving and reading o, whose rounding does not cancel in a row with one large weight, where that of dP does.

float32: norms, logits, weights, their gradient, all sums. Rounded to the type of qkv on the way into a product: P, dP's
share of the logits, q̂ and k̂ (which have no scale to overflow, as q / |q|² has). dqkv is rounded once.

Least work: 7 n T C elements moved and 4 bytes a row and head, each once; the second kernel reads qkv and dout again,
and 20 bytes a row and head go from one to the other; 10 n T N C operations, here 14. On an H200 both walks in one
kernel of 2 warps, 8 of them an SM, took nine times the bytes' time, with L1 busy for 62 % of it: a bias was loaded by
one thread and went through shared memory to another. Where windows are patches of four by four and a tile is one of
them (`_bias`) a thread loads its own, four at once, and with one warp a program nothing waits at barriers: as built for
sm_90, a window of 144 tokens and a head of 32 channels takes 24,600 warp instructions instead of 33,000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
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
def position_by(slot, WINDOW: tl.constexpr, PATCH: tl.constexpr, THREADS: tl.constexpr):
    """The same; by threads, slot 8 a + 2 b + c of sixteen is the token in row b and column 2 a + c: see `_bias`."""
    if THREADS:
        slot = slot // 16 * 16 + slot // 2 % 4 * 4 + slot // 8 % 2 * 2 + slot % 2
    return position(slot, WINDOW, PATCH)


@triton.jit
def _first_biases(table_ptr, places, WINDOW: tl.constexpr, SHIFTED: tl.constexpr):
    """Where the biases of rows of a tile begin, as `_bias` takes it. places: the rows' in the table.

    SHIFTED: None, or the size of a table of which there are four, each without one more of its first numbers, so that
    any four of them in sequence begin at 16 bytes in one.
    """
    if SHIFTED is None:
        return table_ptr + places[:, None]
    else:
        first = (tl.arange(0, 4) * (2 * WINDOW - 1))[:, None] + places[None, :]
        return (table_ptr + first % 4 * SHIFTED + first // 4 * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]


@triton.jit
def _bias(first, others, t: tl.constexpr, BLOCK_M: tl.constexpr, WINDOW: tl.constexpr, SHIFTED: tl.constexpr):
    """The biases of tile t, in the table at the rows' places and `others` beyond.

    Of shifted tables the tile is patch t, four rows of four tokens, and a thread loads what of it is its own in the
    product, of a row of the tile 8 a + 2 b + c for one b. Else each number is loaded by another thread and goes through
    shared memory.
    """
    if SHIFTED is None:
        return tl.load(first + others[None, :])
    else:
        SIDE: tl.constexpr = WINDOW // 4
        tile = tl.load(first + (t // SIDE * 4 * (2 * WINDOW - 1) + t % SIDE * 4))
        return tile.reshape([4, BLOCK_M, 2, 2]).permute(1, 2, 0, 3).reshape([BLOCK_M, 16])


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


@triton.jit
def _clamped(slots, N: tl.constexpr, END: tl.constexpr):
    """Those past the last at the last, in a tile that has such."""
    return tl.minimum(slots, N - 1) if END > N else slots


@triton.jit
def _mask(down, right, others_down, others_right):
    """-100 between tokens of which the roll has wrapped one, along an axis, and not the other."""
    return tl.where((down == others_down) & (right == others_right), 0.0, -100.0)


@triton.jit
def window_of(number, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """The image of a window, counted over all images, and its first row and column."""
    side = size // WINDOW
    return (number // side // side).to(tl.int64), number // side % side * WINDOW + SHIFT, number % side * WINDOW + SHIFT


# With dP = do vᵀ and δ_i = Σ_j P_ij dP_ij, the logits have dS = P ∘ (dP - δ), and
#   dv = Pᵀ do,   dq̂ = s dS k̂,   dk̂ = s dSᵀ q̂,   dq = (dq̂ - q̂ (q̂·dq̂)) / |q|,   dk likewise.
@triton.jit
def _window_attention_bwd_q(
    qkv_ptr,
    scale_ptr,
    table_ptr,
    lse_ptr,
    dout_ptr,
    dqkv_ptr,
    rows_ptr,  # (programs, 5, ROWS) float32: 1 / |k|, and of each query s / |q|, lse, δ and Σ_j P_ij
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
    TILES: tl.constexpr,  # (first, number) of the keys of each tile
    ROWS: tl.constexpr,  # of all tiles
    SHIFTED: tl.constexpr,  # see `_bias`
    BLOCK_M: tl.constexpr,
):
    N: tl.constexpr = WINDOW * WINDOW
    END: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    SPAN: tl.constexpr = 2 * WINDOW - 1
    WIDE: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
    head = tl.program_id(0) % heads
    image, top, left = window_of(tl.program_id(0) // heads, size, WINDOW, SHIFT)
    width = heads * D
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    qkv_ptr += image * stride_qkv_n + head * D
    dqkv_ptr += image * size * size * 3 * width + head * D
    dout_ptrs = dout_ptr + image * stride_dout_n + (head * D + offs_d).to(tl.int64)[None, :] * stride_dout_c
    lse_ptr += (image * heads + head) * size * size
    table_ptr += head * (SPAN * SPAN if SHIFTED is None else 4 * SHIFTED)
    rows_ptr += tl.program_id(0).to(tl.int64) * 5 * ROWS
    scale = tl.load(scale_ptr + head)

    keys, values, k_units, k_places, k_downs, k_rights = (), (), (), (), (), ()
    for t in tl.static_range(len(TILES)):
        k_slots = TILES[t][0] + tl.arange(0, TILES[t][1])
        clamped = _clamped(k_slots, N, TILES[t][0] + TILES[t][1])
        k_rows, k_columns = position_by(clamped, WINDOW, PATCH, SHIFTED is not None)
        k_tokens, down, right = source(top + WINDOW - 1 - k_rows, left + WINDOW - 1 - k_columns, size)
        k_tile_ptrs = qkv_ptr + k_tokens[:, None] * stride_qkv_t + (width + offs_d)[None, :]
        k_tile = tl.load(k_tile_ptrs, mask=mask_d, other=0.0)
        norms = inverse_norm(k_tile)
        tl.store(rows_ptr + k_slots, norms)
        keys += (k_tile.T,)
        values += (tl.load(k_tile_ptrs + width, mask=mask_d, other=0.0).T,)
        k_units += ((k_tile.to(tl.float32) * norms[:, None]).to(dtype),)
        k_places += (k_rows * SPAN + k_columns,)
        k_downs += (down,)
        k_rights += (right,)
    tl.debug_barrier()
    for start in range(0, N, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        # A bound that holds anyway hides from the compiler how biases lie, for which it would take another layout.
        bounded = tl.minimum(slot, N - 1) if SHIFT == 0 else _clamped(slot, N, END)
        row, column = position_by(bounded, WINDOW, PATCH, SHIFTED is not None)
        token, q_down, q_right = source(top + row, left + column, size)
        mask = mask_d & (slot < N)[:, None]
        q = tl.load(qkv_ptr + token[:, None] * stride_qkv_t + offs_d[None, :], mask=mask_d, other=0.0)
        do = tl.load(dout_ptrs + token[:, None] * stride_dout_t, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + token)
        q_norm = inverse_norm(q) * scale
        first = _first_biases(table_ptr, row * SPAN + column, WINDOW, SHIFTED)
        delta, total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        weights, dweights = (), ()
        for t in tl.static_range(len(TILES)):
            bias = _bias(first, k_places[t], t, BLOCK_M, WINDOW, SHIFTED)
            if SHIFT > 0:
                bias += _mask(q_down[:, None], q_right[:, None], k_downs[t][None, :], k_rights[t][None, :])
            k_slots = TILES[t][0] + tl.arange(0, TILES[t][1])
            if TILES[t][0] + TILES[t][1] > N:
                bias = tl.where((k_slots < N)[None, :], bias, float("-inf"))
            k_norms = tl.load(rows_ptr + k_slots)
            logits = tl.dot(q, keys[t], input_precision="ieee") * q_norm[:, None] * k_norms[None, :] + bias
            p = tl.exp2(logits * LOG2E - lse[:, None])
            dp = tl.dot(do, values[t], input_precision="ieee")
            if t == 0:
                deltas = p * dp  # added up by tiles, and over a tile's keys only at the end
            elif TILES[t][1] == TILES[0][1]:
                deltas += p * dp
            else:
                delta += tl.sum(p * dp, 1)
            if WIDE:
                total += tl.sum(p, 1)
            weights += (p,)
            dweights += (dp,)
        delta += tl.sum(deltas, 1)
        row_ptrs = rows_ptr + ROWS + slot
        if WIDE:
            # Logits of 100 leave lse a rounding by which weights sum to 1 + 5e-6, where a large one's dP - δ cancels.
            delta /= total
            tl.store(row_ptrs + 3 * ROWS, total, mask=slot < ROWS)
        tl.store(row_ptrs, q_norm, mask=slot < ROWS)
        tl.store(row_ptrs + ROWS, lse, mask=slot < ROWS)
        tl.store(row_ptrs + 2 * ROWS, delta, mask=slot < ROWS)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for t in tl.static_range(len(TILES)):
            p = weights[t]
            if WIDE:
                p /= total[:, None]
            dlogits = (p * (dweights[t] - delta[:, None])).to(dtype)
            dq = tl.dot(dlogits, k_units[t], dq, input_precision="ieee")
        dq_ptrs = dqkv_ptr + token[:, None] * (3 * width) + offs_d[None, :]
        tl.store(dq_ptrs, _unit_bwd(dq * scale, q).to(dtype), mask=mask)


@triton.jit
def _window_attention_bwd_kv(
    qkv_ptr,
    scale_ptr,
    table_ptr,
    lse_ptr,
    dout_ptr,
    dqkv_ptr,
    rows_ptr,  # as the other kernel leaves it
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
    TILES: tl.constexpr,  # of queries
    ROWS: tl.constexpr,  # of all tiles
    SHIFTED: tl.constexpr,  # see `_bias`
    BLOCK_M: tl.constexpr,
):
    N: tl.constexpr = WINDOW * WINDOW
    END: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    SPAN: tl.constexpr = 2 * WINDOW - 1
    WIDE: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32
    dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
    head = tl.program_id(0) % heads
    image, top, left = window_of(tl.program_id(0) // heads, size, WINDOW, SHIFT)
    width = heads * D
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    qkv_ptr += image * stride_qkv_n + head * D
    dqkv_ptr += image * size * size * 3 * width + head * D
    dout_ptrs = dout_ptr + image * stride_dout_n + (head * D + offs_d).to(tl.int64)[None, :] * stride_dout_c
    table_ptr += head * (SPAN * SPAN if SHIFTED is None else 4 * SHIFTED)
    rows_ptr += tl.program_id(0).to(tl.int64) * 5 * ROWS
    scale = tl.load(scale_ptr + head)

    queries, douts, q_units, q_places, q_downs, q_rights = (), (), (), (), (), ()
    for t in tl.static_range(len(TILES)):
        q_slots = TILES[t][0] + tl.arange(0, TILES[t][1])
        clamped = _clamped(q_slots, N, TILES[t][0] + TILES[t][1])
        q_rows, q_columns = position_by(clamped, WINDOW, PATCH, SHIFTED is not None)
        q_tokens, down, right = source(top + q_rows, left + q_columns, size)
        q_tile = tl.load(qkv_ptr + q_tokens[:, None] * stride_qkv_t + offs_d[None, :], mask=mask_d, other=0.0)
        queries += (q_tile.T,)
        q_units += ((q_tile.to(tl.float32) * inverse_norm(q_tile)[:, None]).to(dtype),)
        # Zeros past the last query: whatever its weights, it adds nothing to dk and dv.
        q_mask = mask_d & (q_slots < N)[:, None]
        douts += (tl.load(dout_ptrs + q_tokens[:, None] * stride_dout_t, mask=q_mask, other=0.0),)
        q_places += (q_rows * SPAN + q_columns,)
        q_downs += (down,)
        q_rights += (right,)
    for start in range(0, N, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        row, column = position_by(_clamped(slot, N, END), WINDOW, PATCH, SHIFTED is not None)
        token, k_down, k_right = source(top + WINDOW - 1 - row, left + WINDOW - 1 - column, size)
        k_ptrs = qkv_ptr + token[:, None] * stride_qkv_t + (width + offs_d)[None, :]
        k = tl.load(k_ptrs, mask=mask_d, other=0.0)
        v = tl.load(k_ptrs + width, mask=mask_d, other=0.0)
        k_norm = inverse_norm(k)
        first = _first_biases(table_ptr, row * SPAN + column, WINDOW, SHIFTED)
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for t in tl.static_range(len(TILES)):
            row_ptrs = rows_ptr + ROWS + TILES[t][0] + tl.arange(0, TILES[t][1])
            q_norm, lse, delta = tl.load(row_ptrs), tl.load(row_ptrs + ROWS), tl.load(row_ptrs + 2 * ROWS)
            bias = _bias(first, q_places[t], t, BLOCK_M, WINDOW, SHIFTED)
            if SHIFT > 0:
                bias += _mask(k_down[:, None], k_right[:, None], q_downs[t][None, :], q_rights[t][None, :])
            logits = tl.dot(k, queries[t], input_precision="ieee") * q_norm[None, :] * k_norm[:, None] + bias
            p = tl.exp2(logits * LOG2E - lse[None, :])
            if WIDE:
                p /= tl.load(row_ptrs + 3 * ROWS)[None, :]
            dp = tl.dot(v, douts[t].T, input_precision="ieee")
            dv = tl.dot(p.to(dtype), douts[t], dv, input_precision="ieee")
            dlogits = (p * (dp - delta[None, :])).to(dtype)
            dk = tl.dot(dlogits, q_units[t], dk, input_precision="ieee")
        mask = mask_d & (slot < N)[:, None]
        dk_ptrs = dqkv_ptr + token[:, None] * (3 * width) + (width + offs_d)[None, :]
        tl.store(dk_ptrs, _unit_bwd(dk * scale, k).to(dtype), mask=mask)
        tl.store(dk_ptrs + width, dv.to(dtype), mask=mask)


def tiles(N: int, most: int) -> tuple[tuple[int, int], ...]:
    """The first token and the number of tokens of each tile: powers of two, largest first, for N rounded up to 16."""
    end, found = 16 * triton.cdiv(N, 16), []
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
    shifted = None
    if window % 4 == 0 and constants["BLOCK_N"] == 16:
        shifted = 4 * triton.cdiv(table.shape[1], 4)
        table = F.pad(table, (0, shifted + 3 - table.shape[1])).unfold(1, shifted, 1).contiguous()
    constants |= {
        "D": d,
        "BLOCK_D": triton.next_power_of_2(d),
        "WINDOW": window,
        "SHIFT": shift,
        "PATCH": math.gcd(window, 4),
        "TILES": tiles(N, constants.pop("BLOCK_N")),
        "ROWS": 16 * triton.cdiv(N, 16),
        "SHIFTED": shifted,
        "num_stages": 1,
    }
    programs = n * (tokens // N) * heads
    rows = lse.new_empty(programs, 5, constants["ROWS"])
    strides = (qkv.stride(0), qkv.stride(1), *dout.stride())
    args = (qkv, logit_scale, table, lse, dout, dqkv, rows, *strides, heads, math.isqrt(tokens))
    return [
        Launch(kernel, (programs,), args, constants) for kernel in (_window_attention_bwd_q, _window_attention_bwd_kv)
    ]


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
    cases += [(torch.float32, 32, 6, 48, 6, 0), (torch.float32, 32, 16, 6, 8, 4), (torch.float32, 32, 24, 12, 12, 6)]
    cases += [(torch.bfloat16, 64, 24, 3, 12, 6)]
    for dtype, d, size, heads, window, shift in cases:
        qkv = torch.empty(20, size**2, 3 * heads * d, dtype=dtype, device="meta")
        logit_scale = torch.empty(heads, 1, 1, device="meta")
        table = torch.empty(heads, (2 * window - 1) ** 2, device="meta")
        lse = torch.empty(20, heads, size**2, device="meta")
        dout = torch.empty(20, size**2, heads * d, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} d={d} window={window} shift={shift} heads={heads}"
        yield name, launches(qkv, logit_scale, table, window, shift, lse, dout, torch.empty_like(qkv), architecture)
