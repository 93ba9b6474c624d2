"""Swin-V2's cosine attention inside (shifted) windows, from the QKV product to the output, both in image order.

    O = softmax(s q kᵀ / (|q| |k|) + bias + mask) v, by window and head (Swin Transformer V2, eq. 2)

qkv (n, T, 3C) is [q | k | v], each (heads, d); out is (n, T, C). Rolling by -shift, cutting into windows and the way
back are indices of rows, which the output shares with q. bias is table[h, row offset, column offset]; the mask is -100
between tokens of which one, along an axis, was wrapped around by the roll and the other was not.

A program owns an image, a window, a head and every PARTS-th tile of its queries, with the keys and values of the
window in shared memory. 144 keys are tiled by 128 + 16. The softmax is corrected from tile to tile: to hold all logits
at once costs up to 60 registers more in a shifted window and spills where windows are larger, and the one correction
that 144 keys need costs 2 % of the instructions. One warp takes 16 queries: 144 are 9 tiles without a masked row, and
a program waits at no barrier. Heads come first in the grid, as neighbours share cache lines.

Tokens of a window are taken in square patches, keys from the far corner backwards. Offsets into the table then add,
and a thread's logits lie at constant distances from one address in it, so that a bias costs one load and no arithmetic.
Where patches are four by four and a program is one warp, keys lie in such an order that the thread that loads a bias is
the one that adds it (`_bias`).

float32: norms, logits, softmax, products. q and k enter their product as they are; only the weights are rounded, to v's
type. The output is rounded once.

Least work: 4 n T C elements moved, each once, which this reaches with PARTS = 1 (else k and v are read again, from L2),
and 4 n T N C operations. In 16 bits with N = 144 that is 72 operations a byte: HBM decides before tensor cores do. As
built for sm_90, a window's head of 32 channels takes 9,400 warp instructions (10,800 if shifted), 1.1 times as many as
an H200 can issue while it moves the head's 37 kB; with biases that went through shared memory it took 12,800.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _checks, _launch, _tuning
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels.window_attention_bwd import (
    LOG2E,
    inverse_norm,
    position,
    position_by,
    reasons_bwd,
    source,
    tiles,
    tuning_width,
    window_attention_bwd,
    window_of,
)
from torch import Tensor

_WINDOWS, _HEAD_WIDTHS = (2, 16), (16, 64)  # window and d, from and to
_MOST = 9216  # elements of a window's keys in one head, d as a power of two: what fits in 99 KiB in float32


@triton.jit
def _bias(
    first,
    places,
    start: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr,
    OWN: tl.constexpr,
):
    """The biases of NUMBER keys from `start` on, in the table at the rows' places and the keys' beyond.

    OWN: the keys lie by threads (`position_by`), the rows' places are those of four rows of keys, and a thread loads
    what is its own in the product. Else each number is loaded by another and goes through shared memory.
    """
    if not OWN:
        return tl.load(first + places[None, :])
    else:
        quad = start // 4 + tl.arange(0, NUMBER // 4)
        patch = quad // 4
        # A bound that holds anyway hides from the compiler that four lie in sequence: it would give each a thread.
        beyond = patch // (WINDOW // 4) * 4 * (2 * WINDOW - 1) + patch % (WINDOW // 4) * 4 + tl.minimum(quad % 4, 3)
        bias = tl.load(first + beyond[None, None, :])
        return bias.reshape([4, BLOCK_M, NUMBER // 16, 2, 2]).permute(1, 2, 3, 0, 4).reshape([BLOCK_M, NUMBER])


@triton.jit
def _window_attention_fwd(
    qkv_ptr,
    scale_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    stride_qkv_n,
    stride_qkv_t,
    heads,
    size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PATCH: tl.constexpr,
    KEYS: tl.constexpr,  # (first, number) of each tile of keys
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
    RELOAD: tl.constexpr,
    OWN: tl.constexpr,
):
    N: tl.constexpr = WINDOW * WINDOW
    SPAN: tl.constexpr = 2 * WINDOW - 1
    pid = tl.program_id(0)
    head = pid % heads
    pid //= heads
    part = pid % PARTS
    image, top, left = window_of(pid // PARTS, size, WINDOW, SHIFT)

    width = heads * D
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    qkv_ptr += image * stride_qkv_n + head * D
    out_ptr += image * size * size * width + head * D
    table_ptr += head * SPAN * SPAN
    scale = tl.load(scale_ptr + head)

    k, v, k_norm, k_place, k_down, k_right = (), (), (), (), (), ()
    for t in tl.static_range(len(KEYS)):
        k_slot = KEYS[t][0] + tl.arange(0, KEYS[t][1])
        if KEYS[t][0] + KEYS[t][1] > N:
            k_slot = tl.minimum(k_slot, N - 1)
        k_row, k_column = position_by(k_slot, WINDOW, PATCH, OWN)
        k_token, down, right = source(top + WINDOW - 1 - k_row, left + WINDOW - 1 - k_column, size)
        k_ptrs = qkv_ptr + k_token[:, None] * stride_qkv_t + (width + offs_d)[None, :]
        k_tile = tl.load(k_ptrs, mask=mask_d, other=0.0)
        k += (k_tile.T,)
        v += (tl.load(k_ptrs + width, mask=mask_d, other=0.0),)
        k_norm += (inverse_norm(k_tile),)
        k_place += ((k_row * SPAN + k_column).to(tl.int64),)
        k_down += (down,)
        k_right += (right,)

    for start in range(0, N, PARTS * BLOCK_M):
        slot = start + part * BLOCK_M + tl.arange(0, BLOCK_M)
        row, column = position(tl.minimum(slot, N - 1), WINDOW, PATCH)
        token, q_down, q_right = source(top + row, left + column, size)
        q = tl.load(qkv_ptr + token[:, None] * stride_qkv_t + offs_d[None, :], mask=mask_d, other=0.0)
        q_norm = inverse_norm(q)
        place = row * SPAN + column
        if OWN:
            bias_ptrs = table_ptr + ((tl.arange(0, 4) * SPAN)[:, None] + place[None, :]).to(tl.int64)[:, :, None]
        else:
            bias_ptrs = (table_ptr + place.to(tl.int64))[:, None]
        if RELOAD:
            # Else the compiler scales the keys' norms before the loop and holds N / 4 registers of them throughout it.
            scale = tl.load(scale_ptr + head)
        high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for t in tl.static_range(len(KEYS)):
            bias = _bias(bias_ptrs, k_place[t], KEYS[t][0], KEYS[t][1], BLOCK_M, WINDOW, OWN)
            if SHIFT > 0:
                # One mask an axis: rows and columns have few distinct ones, their product has many.
                bias += tl.minimum(
                    tl.where(q_down[:, None] == k_down[t][None, :], 0.0, -100.0),
                    tl.where(q_right[:, None] == k_right[t][None, :], 0.0, -100.0),
                )
            if KEYS[t][0] + KEYS[t][1] > N:
                bias = tl.where((KEYS[t][0] + tl.arange(0, KEYS[t][1]) < N)[None, :], bias, float("-inf"))
            logits = tl.dot(q, k[t], input_precision="ieee") * q_norm[:, None] * (k_norm[t] * scale)[None, :] + bias
            higher = tl.maximum(high, tl.max(logits, 1) * LOG2E)
            # One multiply-add, which is exact but for the maximum, the same for all keys.
            weights = tl.exp2(logits * LOG2E - higher[:, None])
            if t > 0:
                correction = tl.exp2(high - higher)
                total *= correction
                out *= correction[:, None]
            total += tl.sum(weights, 1)
            out = tl.dot(weights.to(v[t].dtype), v[t], out, input_precision="ieee")
            high = higher
        out *= (1.0 / total)[:, None]
        out_ptrs = out_ptr + token[:, None] * width + offs_d[None, :]
        if lse_ptr is not None:
            lse_ptrs = lse_ptr + (image * heads + head) * size * size + token
            tl.store(lse_ptrs, high + tl.log2(total), mask=slot < N)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d & (slot < N)[:, None])


def launches(
    qkv: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    window: int,
    shift: int,
    out: Tensor,
    architecture: int,
    lse: Tensor | None = None,
) -> list[Launch]:
    """What fills out (n, T, C) and, where the backward is to have it, lse (n, heads, T)."""
    (n, tokens, width), heads, N = out.shape, logit_scale.numel(), window**2
    d = width // heads
    block_d = triton.next_power_of_2(d)
    constants, _ = _tuning.row("window_attention", architecture, qkv.dtype, tuning_width(N, d))
    passes = triton.cdiv(N, constants["BLOCK_M"])
    owned = n * (tokens // N) * heads
    # Two tiles or more a program, lest the compiler undo the loop, and as few programs as still take no more than that.
    most = min(triton.cdiv(passes, 2), max(1, constants.pop("programs") // max(owned, 1)))
    parts = triton.cdiv(passes, triton.cdiv(passes, most))
    constants |= {
        "D": d,
        "BLOCK_D": block_d,
        "WINDOW": window,
        "SHIFT": shift,
        "PARTS": parts,
        "PATCH": math.gcd(window, 4),
        "KEYS": tiles(N, constants.pop("BLOCK_N")),
        "OWN": window % 4 == 0 and constants["num_warps"] == 1,
        "num_stages": 1,  # More would hold the biases of the next queries in shared memory, which the keys are to fill.
    }
    strides = (qkv.stride(0), qkv.stride(1))
    args = (qkv, logit_scale, table, out, lse, *strides, heads, math.isqrt(tokens))
    return [Launch(_window_attention_fwd, (owned * parts,), args, constants)]


def window_attention(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> Tensor:
    """Cosine attention of a square map of T tokens, rolled by -shift, in windows of window x window tokens.

    qkv (n, T, 3C) in image order; logit_scale (heads, 1, 1), exponentiated and clamped, and table
    (heads, (2 window - 1)²), the bias by relative row and column, in float32. Returns (n, T, C), in image order.
    Only qkv may require a gradient. Raises: ValueError with every reason why the kernel cannot take them.
    """
    if found := reasons(qkv, logit_scale, table, window, shift):
        raise ValueError("window_attention: " + "; ".join(found))
    if torch.is_grad_enabled() and qkv.requires_grad:
        return window_attention_saving(qkv, logit_scale, table, window, shift)[0]
    return window_attention_fwd(qkv, logit_scale, table, window, shift)


@torch.library.custom_op("lavish_fast::window_attention", mutates_args=())
def window_attention_fwd(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> Tensor:
    """`window_attention` for inference."""
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _launch.run(launches(qkv, logit_scale, table, window, shift, out, _launch.architecture(out.device)), out.device)
    return out


@window_attention_fwd.register_fake
def _(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op("lavish_fast::window_attention_saving", mutates_args=())
def window_attention_saving(
    qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    """`window_attention` for training, and what its backward needs: each row's log-sum-exp, in base 2."""
    out, lse = _outputs(qkv, logit_scale)
    architecture = _launch.architecture(out.device)
    _launch.run(launches(qkv, logit_scale, table, window, shift, out, architecture, lse), out.device)
    return out, lse


@window_attention_saving.register_fake
def _(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, logit_scale)


def _outputs(qkv: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    n, tokens, channels = qkv.shape
    lse = qkv.new_empty(n, logit_scale.shape[0], tokens, dtype=torch.float32)
    return qkv.new_empty(n, tokens, channels // 3), lse


def _setup_context(ctx, inputs, output) -> None:
    qkv, logit_scale, table, ctx.window, ctx.shift = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, logit_scale, table, output[1])


def _backward(ctx, dout: Tensor | None, _) -> tuple[Tensor | None, None, None, None, None]:
    if dout is None:
        return None, None, None, None, None
    qkv, logit_scale, table, lse = ctx.saved_tensors
    dqkv = window_attention_bwd(qkv, logit_scale, table, ctx.window, ctx.shift, lse, dout)
    return dqkv, None, None, None, None


window_attention_saving.register_autograd(_backward, setup_context=_setup_context)


def reasons(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> list[str]:
    """Why the kernel cannot take these tensors; nothing if it can."""
    found = _checks.reasons(qkv, logit_scale, table, same_dtype=(qkv,), differentiable=True)
    found += _checks.trainable({"logit_scale": logit_scale, "table": table})
    for name, tensor in (("logit_scale", logit_scale), ("table", table)):
        if tensor.dtype != torch.float32:
            found.append(f"{name}: expected float32, got {str(tensor.dtype).removeprefix('torch.')}")
        if not tensor.is_contiguous():
            found.append(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    heads = logit_scale.numel()
    if logit_scale.shape != (heads, 1, 1) or not heads:
        found.append(f"logit_scale: expected (heads, 1, 1), got {tuple(logit_scale.shape)}")
    if table.shape != (heads, (2 * window - 1) ** 2):
        found.append(f"table: expected {(heads, (2 * window - 1) ** 2)}, got {tuple(table.shape)}")
    least, most = _WINDOWS
    if not least <= window <= most:
        found.append(f"window: expected {least} to {most}, got {window}")
    if not 0 <= shift < max(window, 1):
        found.append(f"shift: expected 0 to window - 1, got {shift} with window {window}")
    if qkv.ndim != 3:
        return [*found, f"qkv: expected (n, T, 3C), got {tuple(qkv.shape)}"]
    _, tokens, channels = qkv.shape
    if qkv.stride(2) != 1:
        found.append(f"qkv: expected contiguous channels, got strides {qkv.stride()}")
    size = math.isqrt(tokens)
    if not tokens or size**2 != tokens or (window > 0 and size % window):
        found.append(f"qkv: expected the tokens of a square map that windows of {window} divide, got {tokens}")
    if heads and channels % (3 * heads):
        found.append(f"qkv: expected 3 x {heads} heads of equal width, got {channels} channels")
    elif heads:
        d, (least, most) = channels // (3 * heads), _HEAD_WIDTHS
        if not least <= d <= most:
            found.append(f"qkv: expected heads of {least} to {most} channels, got {d}")
        elif window**2 * triton.next_power_of_2(d) > _MOST:
            found.append(
                f"qkv: expected {_MOST // triton.next_power_of_2(d)} tokens a window or fewer, got {window**2}"
            )
        elif torch.is_grad_enabled() and qkv.requires_grad:
            found += reasons_bwd(qkv, window**2, d)
    return found


def builds(architecture: int) -> Iterator[tuple[str, list[Launch]]]:
    """Every stage of the paper's preset; the other types; the largest windows and the widest heads."""
    stages = [(48, 6, 12, 0), (48, 6, 12, 6), (24, 12, 12, 0), (24, 12, 12, 6), (12, 24, 12, 0), (6, 48, 6, 0)]
    cases = [(torch.bfloat16, 32, *stage) for stage in stages]
    cases += [(torch.bfloat16, 32, 32, 6, 16, 8), (torch.bfloat16, 64, 24, 3, 12, 0), (torch.bfloat16, 64, 16, 3, 8, 4)]
    cases += [(torch.bfloat16, 24, 14, 4, 7, 3), (torch.float16, 32, 8, 6, 4, 2)]
    cases += [(torch.float32, 32, 48, 6, 12, 6), (torch.float32, 64, 24, 3, 12, 6)]
    for dtype, d, size, heads, window, shift in cases:
        qkv = torch.empty(20, size**2, 3 * heads * d, dtype=dtype, device="meta")
        logit_scale = torch.empty(heads, 1, 1, device="meta")
        table = torch.empty(heads, (2 * window - 1) ** 2, device="meta")
        out = torch.empty(20, size**2, heads * d, dtype=dtype, device="meta")
        lse = torch.empty(20, heads, size**2, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} d={d} window={window} shift={shift} heads={heads}"
        forms = (launches(qkv, logit_scale, table, window, shift, out, architecture, saved) for saved in (None, lse))
        yield name, list(chain(*forms))
