"""The backward of kernels/adapter_training.py, whose docstring has the equation: every gradient of one residual step.

Two kernels, of one program for BLOCK_N tokens of one image of one stream, and between them torch on what is narrow.

_adapter_bwd_up: from h, the branch B and dout to dz1, the gradient of BN2's output, and dB, through LN_after and the
post-norm. Walks over C: B's mean and deviation; the sums that the two LayerNorms' backwards take; the gradients.
torch (adapter_training.py): BN2 needs no walk of its own, since its input is up(a): what its batch statistics give back
is a product of D / G x D / G with a; then ReLU and BN1, float32 on (R, D), the gradients of their parameters and of up.
_adapter_bwd_down: from X, S and dh to dX, dS, and u = LN_before(X'), of which and of dh torch makes down's gradient.
Walks: the softmax and X's mean; the sums that LN_before's backward takes; dP; the gradients.

float32: statistics, norms, softmax and its gradient's sums, the rows that programs leave for torch to add up, and all
that is done to the narrow tensors. Rounded to the streams' type: what goes into products, dz1, dh, u, dX, dB, dS.
Recomputed: a, z, P, X' and the statistics of tokens; read: X, B, h and BatchNorms' statistics.

Bytes a token in 16 bits: the kernels read X, B, and dout twice, and write dX, dB, dz1 and u; torch's products read dz1
twice and u: 22 C, beside 4 C (6 + m) / BLOCK_N written for the rows and read again, and some 120 D of torch's passes.
FLOPs: 16 C D / G, of which 6 C D / G recompute, and 16 C m, of which 6 C m do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from lavish_fast.kernels import _launch, _tuning
from lavish_fast.kernels._tiles import (
    Norm,
    across_lanes,
    attend,
    batch_norm,
    gate_of,
    place,
    row,
    seen,
    token_rows,
    up_product,
    welford,
)
from lavish_fast.kernels._weights import NORMS, Eps, Weights
from torch import Tensor


@triton.jit
def _of_group(rows, mask_n, g, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Group g's tiles (BLOCK_N, BLOCK_D) of a tensor with D numbers a token."""
    tiles = ()
    for part in tl.static_range((D_G + BLOCK_D - 1) // BLOCK_D):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tiles += (tl.load(rows + g * D_G + offs_d, mask=mask_n & (offs_d < D_G), other=0.0),)
    return tiles


@triton.jit
def _hidden(h_rows, mask_n, w, EPS: tl.constexpr, g, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """a = ReLU(BN1(h)) of group g, as `_of_group`, rounded."""
    hidden = ()
    tiles = _of_group(h_rows, mask_n, g, D_G, BLOCK_D)
    for part in tl.static_range(len(tiles)):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        a = batch_norm(tiles[part].to(tl.float32), w.bn1, EPS.bn1, g * D_G + offs_d, offs_d < D_G)
        hidden += (tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tiles[part].dtype),)
    return hidden


@triton.jit
def _whitened(z0, bn2, EPS: tl.constexpr, offs, mask_c):
    """(z0 - mean) / deviation and z1 = BN2(z0); z0 and z0 where there is no BN2."""
    zhat = z0
    if EPS.bn2 is not None:
        rstd = tl.rsqrt(row(bn2.variance, offs, mask_c, other=1.0) + EPS.bn2)
        zhat = z0 * rstd - rstd * row(bn2.mean, offs, mask_c)
    z1 = zhat
    if bn2.weight is not None:
        z1 = z1 * row(bn2.weight, offs, mask_c)
    if bn2.bias is not None:
        z1 = z1 + row(bn2.bias, offs, mask_c)
    return zhat, z1


# A LayerNorm y = w x̂ + b, x̂ = (x - mean) / s, over C channels: with v = w dy, dx = (v - avg(v) - x̂ avg(v x̂)) / s.
# The averages are sums over all channels, which a walk gathers before the one that writes dx.
@triton.jit
def _layer_norm_bwd(v, xhat, rstd, average, slope):
    return rstd[:, None] * (v - average[:, None] - xhat * slope[:, None])


@triton.jit(do_not_specialize=["images"])
def _adapter_bwd_up(
    dz_ptr,  # (streams, n, N, C), of BN2's output
    db_ptr,  # the same shape, where there is a post-norm
    rows_ptr,  # (programs, 4, C) float32: sums over tokens of dout ẑ, dout, dz1 and dz1 (z0 - mean) / deviation
    h_ptr,  # (streams, n, N, D)
    dout_ptr,
    branches,
    weights,
    gates,
    post_norm,
    averages_ptr,  # (streams, D + 1) float32: the mean of z1 is linear in a, and these are its factors and its constant
    dout_strides,
    branch_strides,
    images,
    N,
    channels,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    num_stages: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    dtype = dz_ptr.dtype.element_ty
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate = tl.where(stream == 0, gate_of(gates[0]), gate_of(gates[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    token = ((stream * images + image) * N + offs_n)[:, None]
    h_rows = h_ptr + token * D
    dout_rows = dout_ptr + stream * dout_strides[0] + image * dout_strides[1]
    dout_rows += offs_n.to(tl.int64)[:, None] * dout_strides[2]
    stride_c = dout_strides[3]
    sums = rows_ptr + tl.program_id(0).to(tl.int64) * 4 * C
    if EPS.post_norm is not None:
        branch_rows = token_rows(branches, branch_strides, stream, image, offs_n, STREAMS)

    # 1. B's mean and deviation; z1's mean.
    zeros = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_mean, b_m2 = zeros, zeros
    if EPS.post_norm is not None:
        for start in tl.range(0, GROUPS * channels, BLOCK_C, num_stages=num_stages):
            offs_c = start + tl.arange(0, BLOCK_C)[None, :]
            b = tl.load(branch_rows + offs_c, mask=mask_n & (offs_c < C), other=0.0).to(tl.float32)
            b_mean, b_m2 = welford(b_mean, b_m2, b, start, C, BLOCK_C)
    b_mean, b_m2 = across_lanes(b_mean, b_m2, C, BLOCK_C)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    if EPS.ln_after is not None:
        averages = averages_ptr + stream * (D + 1)
        mean += tl.load(averages + D)
        for g in tl.static_range(GROUPS):
            hidden = _hidden(h_rows, mask_n, w, EPS, g, D_G, BLOCK_D)
            for part in tl.static_range(len(hidden)):
                offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
                mean += tl.sum(hidden[part].to(tl.float32) * row(averages + g * D_G, offs_d, offs_d < D_G), 1)

    # 2. The two LayerNorms' sums, of differences to the means.
    squares, v_sum, vz_sum, vb_sum, vbb_sum = zeros, zeros, zeros, zeros, zeros
    if EPS.ln_after is not None or EPS.post_norm is not None:
        for g in tl.static_range(GROUPS):
            hidden = _hidden(h_rows, mask_n, w, EPS, g, D_G, BLOCK_D)
            for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask_c = offs_c < C_G
                offs = g * C_G + offs_c
                mask = mask_n & mask_c[None, :]
                dout = tl.load(dout_rows + offs[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
                if EPS.ln_after is not None:
                    _, z1 = _whitened(up_product(hidden, 0, w.up, offs, mask_c, D_G, BLOCK_D), w.bn2, EPS, offs, mask_c)
                    z1 = tl.where(mask_c[None, :], z1 - mean[:, None], 0.0)
                    v = gate * dout
                    if w.ln_after.weight is not None:
                        v *= row(w.ln_after.weight, offs, mask_c)
                    squares += z1 * z1
                    v_sum += v
                    vz_sum += v * z1
                if EPS.post_norm is not None:
                    b = tl.load(branch_rows + offs[None, :], mask=mask, other=0.0).to(tl.float32) - b_mean[:, None]
                    if post_norm.weight is not None:
                        dout *= row(post_norm.weight, offs, mask_c)
                    vb_sum += dout
                    vbb_sum += dout * b
    rstd = tl.full((BLOCK_N,), 1.0, tl.float32)
    b_rstd = rstd
    if EPS.ln_after is not None:
        rstd = tl.rsqrt(tl.sum(squares, 1) / C + EPS.ln_after)
    if EPS.post_norm is not None:
        b_rstd = tl.rsqrt(b_m2 / C + EPS.post_norm)
    average, slope = tl.sum(v_sum, 1) / C, rstd * tl.sum(vz_sum, 1) / C
    b_average, b_slope = tl.sum(vb_sum, 1) / C, b_rstd * tl.sum(vbb_sum, 1) / C

    # 3. The gradients.
    for g in tl.static_range(GROUPS):
        hidden = _hidden(h_rows, mask_n, w, EPS, g, D_G, BLOCK_D)
        for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C_G
            offs = g * C_G + offs_c
            mask = mask_n & mask_c[None, :]
            dout = tl.load(dout_rows + offs[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
            z0 = up_product(hidden, 0, w.up, offs, mask_c, D_G, BLOCK_D)
            whitened, z = _whitened(z0, w.bn2, EPS, offs, mask_c)
            dz = gate * dout
            if EPS.ln_after is not None:
                z = (z - mean[:, None]) * rstd[:, None]
                if w.ln_after.weight is not None:
                    dz *= row(w.ln_after.weight, offs, mask_c)
                dz = _layer_norm_bwd(dz, z, rstd, average, slope)
            tl.store(dz_ptr + token * C + offs[None, :], dz.to(dtype), mask=mask)
            tl.store(sums + offs, tl.sum(dout * z, 0), mask=mask_c)
            tl.store(sums + C + offs, tl.sum(dout, 0), mask=mask_c)
            if EPS.bn2 is not None:
                tl.store(sums + 2 * C + offs, tl.sum(dz, 0), mask=mask_c)
                tl.store(sums + 3 * C + offs, tl.sum(dz * whitened, 0), mask=mask_c)
            if EPS.post_norm is not None:
                b = tl.load(branch_rows + offs[None, :], mask=mask, other=0.0).to(tl.float32) - b_mean[:, None]
                if post_norm.weight is not None:
                    dout *= row(post_norm.weight, offs, mask_c)
                db = _layer_norm_bwd(dout, b * b_rstd[:, None], b_rstd, b_average, b_slope)
                tl.store(db_ptr + token * C + offs[None, :], db.to(dtype), mask=mask)


@triton.jit
def _du(dh, w, g, offs_c, mask_c, C_G: tl.constexpr, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """dh down: the gradient of LN_before's output, for channels offs_c of group g."""
    du = None
    for part in tl.static_range(len(dh)):
        offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (offs_d < D_G)[:, None] & mask_c[None, :]
        down = tl.load(w.down + (g * D_G + offs_d)[:, None] * C_G + offs_c[None, :], mask=mask, other=0.0)
        du = tl.dot(dh[part], down, du, input_precision="ieee")
    return du


# With r = X' and dr its gradient: r = X + g P S, P = softmax(L), L = X Sᵀ, so that
# dP = g dr Sᵀ; dL = P ∘ (dP - rowsum(P ∘ dP)); dX = dout + dr + dL S; dS = g Pᵀ dr + dLᵀ X; dg = sum(P ∘ (dr Sᵀ)).
@triton.jit(do_not_specialize=["images"])
def _adapter_bwd_down(
    dx_ptr,  # (streams, n, N, C)
    u_ptr,  # the same: LN_before(X')
    rows_ptr,  # (programs, 2, C) float32: sums over tokens of du x̂ and du
    ds_ptr,  # (programs, m, C) float32
    dgate_ptr,  # (programs,) float32, of gate_av
    dh_ptr,  # (streams, n, N, D)
    dout_ptr,
    xs,
    summaries_ptr,
    gates_av,
    weights,
    dout_strides,
    x_strides,
    stride_s_stream,
    stride_s_n,
    stride_s_m,
    images,
    N,
    channels,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    num_stages: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    dtype = dx_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate_av = tl.where(stream == 0, gate_of(gates_av[0]), gate_of(gates_av[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    token = ((stream * images + image) * N + offs_n)[:, None]
    dh_rows = dh_ptr + token * D
    dout_rows = dout_ptr + stream * dout_strides[0] + image * dout_strides[1]
    dout_rows += offs_n.to(tl.int64)[:, None] * dout_strides[2]
    stride_c = dout_strides[3]
    x_rows = token_rows(xs, x_strides, stream, image, offs_n, STREAMS)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    s_rows = None
    if summaries_ptr is not None:
        s_rows = summaries_ptr + stream * stride_s_stream + image * stride_s_n + offs_m[:, None] * stride_s_m

    # 1. The softmax.
    weights_m, mean = attend(
        x_rows, mask_n, s_rows, mask_m, gate_av, GROUPS * channels, C, M, BLOCK_N, BLOCK_M, BLOCK_C, num_stages
    )
    p = weights_m.to(dtype)

    # 2. LN_before's sums.
    zeros = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    squares, v_sum, vx_sum = zeros, zeros, zeros
    rstd = tl.full((BLOCK_N,), 1.0, tl.float32)
    if EPS.ln_before is not None:
        for g in tl.static_range(GROUPS):
            dh = _of_group(dh_rows, mask_n, g, D_G, BLOCK_D)
            for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask_c = offs_c < C_G
                offs = g * C_G + offs_c
                x = seen(x_rows, mask_n, s_rows, mask_m, p, gate_av, offs, mask_c)
                x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
                v = _du(dh, w, g, offs_c, mask_c, C_G, D_G, BLOCK_D)
                if w.ln_before.weight is not None:
                    v *= row(w.ln_before.weight, offs, mask_c)
                squares += x * x
                v_sum += v
                vx_sum += v * x
        rstd = tl.rsqrt(tl.sum(squares, 1) / C + EPS.ln_before)
    average, slope = tl.sum(v_sum, 1) / C, rstd * tl.sum(vx_sum, 1) / C

    # 3. The softmax's gradient.
    dlogits = p
    if summaries_ptr is not None:
        dp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for g in tl.static_range(GROUPS):
            dh = _of_group(dh_rows, mask_n, g, D_G, BLOCK_D)
            for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask_c = offs_c < C_G
                offs = g * C_G + offs_c
                dr = _du(dh, w, g, offs_c, mask_c, C_G, D_G, BLOCK_D)
                if EPS.ln_before is not None:
                    x = seen(x_rows, mask_n, s_rows, mask_m, p, gate_av, offs, mask_c)
                    xhat = (x - mean[:, None]) * rstd[:, None]
                    if w.ln_before.weight is not None:
                        dr *= row(w.ln_before.weight, offs, mask_c)
                    dr = _layer_norm_bwd(dr, xhat, rstd, average, slope)
                s = tl.load(s_rows + offs[None, :], mask=mask_m & mask_c[None, :], other=0.0)
                dp = tl.dot(dr.to(dtype), s.T, dp, input_precision="ieee")
        total = tl.sum(weights_m * dp, 1)
        tl.store(dgate_ptr + program, tl.sum(total))
        dlogits = (gate_av * weights_m * (dp - total[:, None])).to(dtype)

    # 4. The gradients.
    for g in tl.static_range(GROUPS):
        dh = _of_group(dh_rows, mask_n, g, D_G, BLOCK_D)
        for start in tl.range(0, channels, BLOCK_C, num_stages=num_stages):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C_G
            offs = g * C_G + offs_c
            mask = mask_n & mask_c[None, :]
            u = seen(x_rows, mask_n, s_rows, mask_m, p, gate_av, offs, mask_c)
            dr = _du(dh, w, g, offs_c, mask_c, C_G, D_G, BLOCK_D)
            if EPS.ln_before is not None:
                u = (u - mean[:, None]) * rstd[:, None]
                tl.store(rows_ptr + program * 2 * C + offs, tl.sum(dr * u, 0), mask=mask_c)
                tl.store(rows_ptr + program * 2 * C + C + offs, tl.sum(dr, 0), mask=mask_c)
                if w.ln_before.weight is not None:
                    dr *= row(w.ln_before.weight, offs, mask_c)
                dr = _layer_norm_bwd(dr, u, rstd, average, slope)
                if w.ln_before.weight is not None:
                    u *= row(w.ln_before.weight, offs, mask_c)
                if w.ln_before.bias is not None:
                    u += row(w.ln_before.bias, offs, mask_c)
            tl.store(u_ptr + token * C + offs[None, :], u.to(dtype), mask=mask)
            dx = tl.load(dout_rows + offs[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32) + dr
            if summaries_ptr is not None:
                x = tl.load(x_rows + offs[None, :], mask=mask, other=0.0)
                s = tl.load(s_rows + offs[None, :], mask=mask_m & mask_c[None, :], other=0.0)
                dx += tl.dot(dlogits, s, input_precision="ieee")
                ds = gate_av * tl.dot(p.T, dr.to(dtype), input_precision="ieee")
                ds = tl.dot(dlogits.T, x, ds, input_precision="ieee")
                ds_rows = ds_ptr + (program * M + offs_m)[:, None] * C
                tl.store(ds_rows + offs[None, :], ds, mask=mask_m & mask_c[None, :])
            tl.store(dx_ptr + token * C + offs[None, :], dx.to(dtype), mask=mask)


class Layout(NamedTuple):
    """What the launches of an op have in common; constants as the tuning rows have them, by the bottleneck's width."""

    images: int
    N: int
    channels: Any
    programs: int
    blocks: int
    constants: dict[str, Any]
    weights: tuple[Weights, ...]


def layout(
    op: str,
    xs: Sequence[Tensor],
    weights: Sequence[Weights],
    post_norm: Norm | None,
    eps: Sequence[float],
    architecture: int,
) -> Layout:
    """op: whose tuning rows."""
    n, N, C = xs[0].shape
    D, channels = weights[0].down.shape
    constants, _ = _tuning.row(op, architecture, xs[0].dtype, D)
    for name, size in {"BLOCK_N": N, "BLOCK_C": channels, "BLOCK_D": D * channels // C}.items():
        constants[name] = min(constants[name], block(size))
    norms = *(getattr(weights[0], name) for name in NORMS), post_norm
    constants |= {"C": C, "D": D, "GROUPS": C // channels, "STREAMS": len(xs)}
    constants["EPS"] = Eps(*(None if norm is None else value for norm, value in zip(norms, eps)))
    blocks = triton.cdiv(N, constants["BLOCK_N"])
    filled = tuple(w._replace(**{name: getattr(w, name) or kind() for name, kind in NORMS.items()}) for w in weights)
    # As in kernels/adapter.py: a bound that the compiler does not know, which the interpreter cannot take.
    bound = channels if architecture else tl.constexpr(channels)
    return Layout(n, N, bound, len(xs) * n * blocks, blocks, constants, filled)


def block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # tl.dot takes no less


def ungated(weights: Sequence[Weights]) -> tuple[Weights, ...]:
    return tuple(w._replace(gate_av=None, gate=None) for w in weights)


def up_launch(
    dz: Tensor,
    db: Tensor | None,
    rows: Tensor,
    h: Tensor,
    dout: Tensor,
    branches: Sequence[Tensor],
    post_norm: Norm | None,
    averages: Tensor | None,
    shared: Layout,
) -> _launch.Launch:
    args = (
        dz,
        db,
        rows,
        h,
        dout,
        tuple(branches),
        ungated(shared.weights),
        tuple(w.gate for w in shared.weights),
        post_norm or Norm(),
        averages,
        dout.stride(),
        tuple(b.stride()[:2] for b in branches),
        shared.images,
        shared.N,
        shared.channels,
    )
    return _launch.Launch(_adapter_bwd_up, (shared.programs,), args, shared.constants)


def down_launch(
    dx: Tensor,
    u: Tensor,
    rows: Tensor,
    ds: Tensor | None,
    dgate: Tensor | None,
    dh: Tensor,
    dout: Tensor,
    xs: Sequence[Tensor],
    summaries: Tensor | None,
    shared: Layout,
) -> _launch.Launch:
    latents = 0 if summaries is None else summaries.shape[2]
    args = (
        dx,
        u,
        rows,
        ds,
        dgate,
        dh,
        dout,
        tuple(xs),
        summaries,
        tuple(w.gate_av for w in shared.weights),
        ungated(shared.weights),
        dout.stride(),
        tuple(x.stride()[:2] for x in xs),
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        shared.images,
        shared.N,
        shared.channels,
    )
    constants = shared.constants | {"M": latents, "BLOCK_M": block(latents)}
    return _launch.Launch(_adapter_bwd_down, (shared.programs,), args, constants)
