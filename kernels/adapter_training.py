"""kernels/adapter.py's residual step in training, one or two streams: forward and, in ..._bwd.py, every gradient.

    X'  = X + g_av P S,  P = softmax(X Sᵀ);  u = LN_before(X');  h = down(u);  a = ReLU(BN1(h));  z0 = up(a)
    out = X + PostNorm(B) + g LN_after(z1),  z1 = BN2(z0)

Shapes as there; R = n N tokens of a stream. BatchNorms go by the mean and the biased variance of the stream's own R
tokens, or by the running ones, constants then. The post-norm is frozen and has no gradients.

Forward: `_adapter_down`, a program for BLOCK_N tokens of one image of one stream, walks C twice as the evaluation's
kernel does, and leaves h and the mean and squared deviations of its tokens' h, as float32 has them before rounding;
torch merges those (Chan et al.). BN2's statistics come without z0, which is linear in a: with m and K the mean and the
covariance of a, float32 and taken of differences to m, the mean of z0 is up m and its variance up_c K up_cᵀ for each
channel. Then the evaluation's kernel runs with these statistics: it has X to read for the sum anyway.

Saved for the backward: X, B where it has a post-norm, S, h and the statistics, 2 D bytes a token in 16 bits beside
what the caller has. float32: as in kernels/adapter.py; h is rounded to the streams' type.
Bytes a token in 16 bits: X once more than in evaluation, 2 C, 2 D for h, and some 45 D of torch's passes over width D.
FLOPs: 2 C D / G + 4 C m more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _checks, _launch, adapter
from lavish_fast.kernels._tiles import BatchNorm, Norm, attend, down_product, gate_of, place, token_rows
from lavish_fast.kernels._weights import NORMS, Weights, tensors, unflattened
from lavish_fast.kernels.adapter_training_bwd import Layout, block, down_launch, layout, ungated, up_launch
from torch import Tensor


class Statistics(NamedTuple):
    """Of BN1 (streams, 2, D) and BN2 (streams, 2, C): means and biased variances, float32; (streams, 2, 0) if not the
    batch's or if there is no such norm."""

    bn1: Tensor
    bn2: Tensor


@triton.jit(do_not_specialize=["images"])
def _adapter_down(
    h_ptr,  # (streams, n, N, D)
    parts_ptr,  # (programs, 2, D) float32: mean and squared deviations of h over a program's tokens
    xs,
    summaries_ptr,
    gates_av,
    weights,
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
    D_G: tl.constexpr = D // GROUPS
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    dtype = h_ptr.dtype.element_ty
    stream, image, offs_n = place(images, N, BLOCK_N)
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate_av = tl.where(stream == 0, gate_of(gates_av[0]), gate_of(gates_av[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    x_rows = token_rows(xs, x_strides, stream, image, offs_n, STREAMS)
    h_rows = h_ptr + ((stream * images + image) * N + offs_n)[:, None] * D
    parts = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * D
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    s_rows = None
    if summaries_ptr is not None:
        s_rows = summaries_ptr + stream * stride_s_stream + image * stride_s_n + offs_m[:, None] * stride_s_m

    p, mean = attend(
        x_rows, mask_n, s_rows, mask_m, gate_av, GROUPS * channels, C, M, BLOCK_N, BLOCK_M, BLOCK_C, num_stages
    )
    products = down_product(
        x_rows,
        mask_n,
        s_rows,
        mask_m,
        p.to(dtype),
        gate_av,
        mean,
        w,
        EPS,
        channels,
        C,
        D,
        GROUPS,
        BLOCK_N,
        BLOCK_C,
        BLOCK_D,
        num_stages,
    )
    count = tl.sum(mask_n.to(tl.float32), 0)
    for part in tl.static_range(GROUPS * PARTS):
        offs_d = part % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        offs, mask_d = part // PARTS * D_G + offs_d, offs_d < D_G
        h = products[part]
        tl.store(h_rows + offs[None, :], h.to(dtype), mask=mask_n & mask_d[None, :])
        h_mean = tl.sum(tl.where(mask_n, h, 0.0), 0) / count
        delta = tl.where(mask_n, h - h_mean[None, :], 0.0)
        tl.store(parts + offs, h_mean, mask=mask_d)
        tl.store(parts + D + offs, tl.sum(delta * delta, 0), mask=mask_d)


def _down_launch(
    h: Tensor, parts: Tensor, xs: Sequence[Tensor], summaries: Tensor | None, shared: Layout
) -> _launch.Launch:
    latents = 0 if summaries is None else summaries.shape[2]
    args = (
        h,
        parts,
        tuple(xs),
        summaries,
        tuple(w.gate_av for w in shared.weights),
        ungated(shared.weights),
        tuple(x.stride()[:2] for x in xs),
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        shared.images,
        shared.N,
        shared.channels,
    )
    constants = shared.constants | {"M": latents, "BLOCK_M": block(latents)}
    return _launch.Launch(_adapter_down, (shared.programs,), args, constants)


def _merged(parts: Tensor, shared: Layout) -> Tensor:
    """Mean and biased variance (streams, 2, D) of all tokens, from those of programs (streams, n, blocks, 2, D)."""
    step = shared.constants["BLOCK_N"]
    counts = shared.N - step * torch.arange(shared.blocks, device=parts.device)
    counts = counts.clamp_max(step).float()[:, None]
    means, squares = parts.unbind(3)
    R = shared.images * shared.N
    mean = (means * counts).sum((1, 2)) / R
    deviation = means - mean[:, None, None]
    return torch.stack((mean, (squares + counts * deviation * deviation).sum((1, 2)) / R), 1)


def _hidden(h: Tensor, norm: BatchNorm | None, eps: float) -> Tensor:
    """a = ReLU(BN1(h)), float32 but as the kernels round it; h (R, D)."""
    scale, shift = _affine(norm, eps, h.shape[1], h.device)
    return (h * scale).add_(shift).relu_().to(h.dtype).float()


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(R, G w) as (G, R, w)."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products by group in float32, whatever the type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _centred(a: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean m (D,), a - m (G, R, D / G) and its covariance (G, D / G, D / G), float32."""
    mean = a.mean(0)
    a = _by_group(a - mean, groups)
    return mean, a, a.mT @ a / a.shape[1]


def _raised(a: Tensor, up: Tensor) -> Tensor:
    """Statistics (2, C) of up(a)."""
    groups = a.shape[1] // up.shape[1]
    mean, _, covariance = _centred(a, groups)
    up = up.float().unflatten(0, (groups, -1))
    # Not a matrix product, which might be taken in TF32.
    mean = (up * mean.view(groups, 1, -1)).sum(-1)
    variance = ((up @ covariance) * up).sum(-1).clamp_min(0)
    return torch.stack((mean, variance)).flatten(1)


def _narrowed(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    return [w._replace(down=w.down.to(dtype), up=w.up.to(dtype)) for w in weights]


def _with(weights: Sequence[Weights], name: str, statistics: Tensor) -> list[Weights]:
    """The weights with these statistics (streams, 2, width) in one of their BatchNorms; the running ones if empty."""
    if not statistics.shape[-1]:
        return list(weights)
    norms = [getattr(w, name)._replace(mean=s[0], variance=s[1]) for w, s in zip(weights, statistics)]
    return [w._replace(**{name: norm}) for w, norm in zip(weights, norms)]


def _forward(xs, branches, summaries, weights, post_norm, eps, batch_statistics):
    streams, (n, N, C) = len(xs), xs[0].shape
    weights = _narrowed(weights, xs[0].dtype)
    D = len(weights[0].down)
    out, h = xs[0].new_empty(streams, n, N, C), xs[0].new_empty(streams, n, N, D)
    architecture = _launch.architecture(out.device)
    shared = layout("adapter_training", xs, weights, post_norm, eps, architecture)
    parts = h.new_empty(streams, n, shared.blocks, 2, D, dtype=torch.float32)
    _launch.run([_down_launch(h, parts, xs, summaries, shared)], h.device)
    bn1, bn2 = (parts.new_empty(streams, 2, 0) for _ in range(2))
    if batch_statistics and weights[0].bn1 is not None:
        bn1 = _merged(parts, shared)
        weights = _with(weights, "bn1", bn1)
    if batch_statistics and weights[0].bn2 is not None:
        hidden = [_hidden(x.flatten(0, 1), w.bn1, eps[1]) for x, w in zip(h, weights)]
        bn2 = torch.stack([_raised(a, w.up) for a, w in zip(hidden, weights)])
        weights = _with(weights, "bn2", bn2)
    _launch.run(adapter.launches(out, xs, branches, summaries, weights, post_norm, eps, architecture), out.device)
    return out, h, bn1, bn2


def _averages(weights: Sequence[Weights], eps: float) -> Tensor:
    """The mean of z1 over channels is linear in a: each stream's D factors and its constant, (streams, D + 1)."""
    found = []
    for w in weights:
        scale, shift = _affine(w.bn2, eps, len(w.up), w.up.device)
        groups = len(w.down) // w.up.shape[1]
        factors = (w.up.float() * scale[:, None]).unflatten(0, (groups, -1)).sum(1) / len(scale)
        found.append(torch.cat((factors.flatten(), shift.mean()[None])))
    return torch.stack(found)


def _affine(norm: BatchNorm | None, eps: float, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A BatchNorm as a factor and a shift of each channel."""
    if norm is None:
        return torch.ones(width, device=device), torch.zeros(width, device=device)
    scale = (norm.variance.float() + eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.float()
    shift = -scale * norm.mean.float()
    return scale, shift if norm.bias is None else shift + norm.bias.float()


# BN2 gives dz0 = c (dz1 - s_b - ẑ s_g), c = weight / σ, s_b and s_g the means of dz1 and dz1 ẑ, ẑ = up (a - m) / σ.
# With V = up scaled by c, row by row: da = dz0 up = (dz1 - s_b) V - (a - m) upᵀ diag(s_g / σ) V, where the last three
# factors are a matrix of D / G x D / G; dup = dz0ᵀ a = dz0ᵀ (a - m), since dz0 sums to 0, = c (dz1ᵀ (a - m)
# - diag(s_g / σ) up R K), K the covariance of a. By running statistics, s_b = s_g = 0, and it is a that dup takes.
def _narrow_gradients(
    dz: Tensor, sums: Tensor, h: Tensor, w: Weights, eps: Sequence[float], batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dh in h's type, and float32: dup, BN1's gradients of weight and bias.

    dz (R, C) of z1, h (R, D); sums (2, C): of dz and dz ẑ over all tokens.
    """
    R, groups = len(h), h.shape[1] // w.up.shape[1]
    a = _hidden(h, w.bn1, eps[1])
    first, _ = _affine(w.bn1, eps[1], h.shape[1], h.device)
    dz, up = _by_group(dz, groups), w.up.float().unflatten(0, (groups, -1))
    scale = _affine(w.bn2, eps[2], len(w.up), h.device)[0].view(groups, -1, 1)
    scaled = (up * scale).to(h.dtype)
    da = _products(dz, scaled)
    if batch_statistics and w.bn2 is not None:
        _, centred, covariance = _centred(a, groups)
        shift, slope = (sums / R).view(2, groups, 1, -1)
        slope = slope.mT * (w.bn2.variance + eps[2]).rsqrt().view(groups, -1, 1)
        da.sub_(shift @ scaled.float()).baddbmm_(centred, up.mT @ (slope * scaled.float()), alpha=-1)
        dup = scale * (_products(dz.mT, centred.to(h.dtype)) - R * slope * (up @ covariance))
    else:
        dup = scale * _products(dz.mT, _by_group(a.to(h.dtype), groups))
    dh = torch.where(a > 0, da.transpose(0, 1).flatten(1), 0.0)
    if w.bn1 is None:
        return dh.to(h.dtype), dup.flatten(0, 1), None, None
    hhat = (h - w.bn1.mean.float()).mul_((w.bn1.variance.float() + eps[1]).rsqrt())
    dweight, dbias = (dh * hhat).sum(0), dh.sum(0)
    if batch_statistics:
        dh.sub_(dbias / R).sub_(hhat.mul_(dweight / R))
    dh.mul_(first)
    return dh.to(h.dtype), dup.flatten(0, 1), dweight, dbias


def _backward(dout, xs, branches, summaries, given, post_norm, h, bn1, bn2, eps, batch_statistics):
    """dxs (streams, n, N, C), dbranches, dsummaries, and each stream's gradients by name; None where there is none."""
    streams, (n, N, C) = len(xs), xs[0].shape
    weights = _with(_with(_narrowed(given, h.dtype), "bn1", bn1), "bn2", bn2)
    shared = layout("adapter_training_bwd", xs, weights, post_norm, eps, _launch.architecture(h.device))
    D, grid = h.shape[-1], (streams, n, shared.blocks)

    def rows(*shape: int) -> Tensor:
        return h.new_empty(*grid, *shape, dtype=torch.float32)

    dz, sums = h.new_empty(streams, n, N, C), rows(4, C)
    db = None if post_norm is None else torch.empty_like(dz)
    averages = None if weights[0].ln_after is None else _averages(weights, eps[2])
    _launch.run([up_launch(dz, db, sums, h, dout, branches, post_norm, averages, shared)], h.device)
    sums = sums.sum((1, 2))
    dh = torch.empty_like(h)
    found = []
    for i, w in enumerate(weights):
        of_stream = dz[i].flatten(0, 1), sums[i, 2:], h[i].flatten(0, 1), w
        narrow, dup, dweight, dbias = _narrow_gradients(*of_stream, eps, batch_statistics)
        dh[i] = narrow.view(n, N, D)
        after = w.ln_after or Norm()
        dgate = sums[i, 0] if after.weight is None else sums[i, 0] * after.weight.float()
        dgate = dgate if after.bias is None else dgate + sums[i, 1] * after.bias.float()
        gate = 1.0 if w.gate is None else w.gate.float()
        found.append(
            {"up": dup, "bn1.weight": dweight, "bn1.bias": dbias, "bn2.weight": sums[i, 3], "bn2.bias": sums[i, 2]}
            | {"ln_after.weight": gate * sums[i, 0], "ln_after.bias": gate * sums[i, 1], "gate": dgate.sum()[None]}
        )

    # dz has served: its memory takes LN_before(X').
    dx, u, sums, ds, dgate = torch.empty_like(dz), dz, rows(2, C), None, None
    if summaries is not None:
        ds, dgate = rows(summaries.shape[2], C), rows(1)
    _launch.run([down_launch(dx, u, sums, ds, dgate, dh, dout, xs, summaries, shared)], h.device)
    sums = sums.sum((1, 2))
    groups = C // weights[0].down.shape[1]
    for i, gradients in enumerate(found):
        narrow, wide = (_by_group(t[i].flatten(0, 1), groups) for t in (dh, u))
        gradients["down"] = _products(narrow.mT, wide).flatten(0, 1)
        gradients["ln_before.weight"], gradients["ln_before.bias"] = sums[i]
        if dgate is not None:
            gradients["gate_av"] = dgate[i].sum((0, 1))
    return dx, db, None if ds is None else ds.sum(2).to(h.dtype), found


def reasons(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    batch_statistics: bool,
) -> list[str]:
    """Why the kernels cannot take these tensors; an empty list when they can."""
    # What evaluation asks for, of products in the streams' type, which is what the op makes of them.
    with torch.no_grad():
        like = [w._replace(**{name: _like(getattr(w, name), xs[0].dtype) for name in ("down", "up")}) for w in weights]
        found = adapter.reasons(xs, branches, summaries, like, post_norm)
    frozen = [t for t in post_norm or () if t is not None]
    frozen += [t for w in weights for name, t in tensors(w) if t is not None and not _trained(name)]
    found += _checks.reasons(*frozen)
    norms = [norm for w in weights for norm in (w.bn1, w.bn2) if norm is not None]
    if batch_statistics and norms and xs[0].shape[:-1].numel() < 2:
        found.append(f"expected more than one token for batch statistics, got {xs[0].shape[:-1].numel()}")
    if not batch_statistics and any(norm.mean is None for norm in norms):
        found.append("expected running statistics of each BatchNorm, got none")
    return list(dict.fromkeys(found))


def _like(product: Tensor, dtype: torch.dtype) -> Tensor:
    return product if product.dtype not in _checks.DTYPES else torch.empty_like(product, dtype=dtype)


def _trained(name: str) -> bool:
    return not name.endswith((".mean", ".variance"))


def adapter_training(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    *,
    eps: Sequence[float],
    batch_statistics: bool,
) -> tuple[Tensor, Statistics]:
    """X + PostNorm(B) + g LN_after(...) of one or two streams, (streams, n, N, C), and what BatchNorms went by.

    Args: as of `kernels.adapter.adapter`, but that down and up may be float32 beside narrower streams, and that all but
    the post-norm and running statistics may require gradients. These come back in the types of what they belong to.
        batch_statistics: whether BatchNorms go by the batch's statistics, which are returned, or by the running ones,
            which are read only then.

    Returns: the streams, and the statistics, without gradients, for the caller to update the running ones with.

    Raises: ValueError with all the `reasons`.
    """
    # Here, and not in the custom op, which is called with gradients off.
    if found := reasons(xs, branches, summaries, weights, post_norm, batch_statistics):
        raise ValueError("adapter_training: " + "; ".join(found))
    flat = [
        None if batch_statistics and not _trained(name) else t for w in weights for name, t in tensors(w)
    ]  # the caller writes to the running statistics before the backward
    present = [getattr(w, name) is not None for w in weights for name in NORMS] + [post_norm is not None]
    frozen = post_norm or Norm()
    out, _, bn1, bn2 = _adapter_training(
        list(xs),
        list(branches),
        summaries,
        [t for t in flat if t is not None],
        [t for t in frozen if t is not None],
        [t is not None for t in (*flat, *frozen)],
        present,
        list(eps),
        batch_statistics,
    )
    return out, Statistics(bn1, bn2)


def _unflattened(
    parameters: Sequence[Tensor], post_norm: Sequence[Tensor], given: list[bool], present: list[bool]
) -> tuple[list[Weights], Norm | None]:
    """The weights and the post-norm, from the tensors that are there and from which they are."""
    flat, there = iter((*parameters, *post_norm)), iter(present)
    every = iter([next(flat) if is_given else None for is_given in given])
    weights = [unflattened(every, there) for _ in range(len(present) // len(NORMS))]
    norm = Norm(*every)
    return weights, norm if next(there) else None


@torch.library.custom_op("lavish_fast::adapter_training", mutates_args=())
def _adapter_training(
    xs: list[Tensor],
    branches: list[Tensor],
    summaries: Tensor | None,
    parameters: list[Tensor],
    post_norm: list[Tensor],
    given: list[bool],
    present: list[bool],
    eps: list[float],
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, h (streams, n, N, D), and the statistics of BN1 and BN2."""
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(xs[0].device.type, enabled=False):  # which reaches into the op
        return _forward(xs, branches, summaries, weights, norm, eps, batch_statistics)


@_adapter_training.register_fake
def _(xs, branches, summaries, parameters, post_norm, given, present, eps, batch_statistics):
    (w, *_), _ = _unflattened(parameters, post_norm, given, present)
    (n, N, C), D, streams = xs[0].shape, len(w.down), len(xs)
    widths = [0 if norm is None or not batch_statistics else width for norm, width in ((w.bn1, D), (w.bn2, C))]
    statistics = [xs[0].new_empty(streams, 2, width, dtype=torch.float32) for width in widths]
    return xs[0].new_empty(streams, n, N, C), xs[0].new_empty(streams, n, N, D), *statistics


@torch.library.custom_op("lavish_fast::adapter_training_backward", mutates_args=())
def _adapter_training_backward(
    dout: Tensor,
    xs: list[Tensor],
    branches: list[Tensor],
    summaries: Tensor | None,
    parameters: list[Tensor],
    post_norm: list[Tensor],
    h: Tensor,
    bn1: Tensor,
    bn2: Tensor,
    given: list[bool],
    present: list[bool],
    eps: list[float],
    batch_statistics: bool,
) -> list[Tensor]:
    """The gradients of xs, of branches if there is a post-norm, of summaries if any, and of the trained parameters."""
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(h.device.type, enabled=False):
        dx, db, ds, found = _backward(dout, xs, branches, summaries, weights, norm, h, bn1, bn2, eps, batch_statistics)
    gradients = [
        of_stream[name].to(t.dtype, copy=True)
        for w, of_stream in zip(weights, found)
        for name, t in tensors(w)
        if t is not None and _trained(name)
    ]
    return [t for t in (dx, db, ds) if t is not None] + gradients


@_adapter_training_backward.register_fake
def _(dout, xs, branches, summaries, parameters, post_norm, h, bn1, bn2, given, present, eps, batch_statistics):
    weights, norm = _unflattened(parameters, post_norm, given, present)
    streams = [xs[0].new_empty(dout.shape) for _ in range(1 if norm is None else 2)]
    rest = [t for w in weights for name, t in tensors(w) if t is not None and _trained(name)]
    return streams + [t.new_empty(t.shape) for t in ([] if summaries is None else [summaries]) + rest]


def _setup_context(ctx, inputs, output):
    xs, branches, summaries, parameters, post_norm, given, present, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    branches = branches if present[-1] else []
    saved = *xs, *branches, *parameters, *post_norm
    ctx.counts = [len(part) for part in (xs, branches, parameters, post_norm)]
    ctx.options = given, present, *options
    ctx.save_for_backward(*saved, summaries, *output[1:])


def _backward_of_context(ctx, dout, *_):
    saved = list(ctx.saved_tensors)
    xs, branches, parameters, post_norm = ([saved.pop(0) for _ in range(count)] for count in ctx.counts)
    summaries, h, bn1, bn2 = saved
    given, present, *_ = ctx.options
    found = iter(
        _adapter_training_backward(dout, xs, branches, summaries, parameters, post_norm, h, bn1, bn2, *ctx.options)
    )
    dxs = next(found).unbind()
    dbranches = next(found).unbind() if branches else dout.unbind()
    dsummaries = None if summaries is None else next(found)
    weights, _ = _unflattened(parameters, post_norm, given, present)
    names = [name for w in weights for name, t in tensors(w) if t is not None]
    dparameters = [next(found) if _trained(name) else None for name in names]
    return list(dxs), list(dbranches), dsummaries, dparameters, [None] * len(post_norm), *[None] * len(ctx.options)


torch.library.register_autograd("lavish_fast::adapter_training", _backward_of_context, setup_context=_setup_context)


def builds(architecture: int) -> Iterator[tuple[str, list[_launch.Launch]]]:
    """What a machine without a card builds: the paper's stages in its two settings, and the extremes."""
    cases = [(torch.bfloat16, 192, {}), (torch.bfloat16, 768, {}), (torch.bfloat16, 1536, {})]
    cases += [(torch.bfloat16, 1536, {"reduction": 4, "latents": 16}), (torch.float16, 384, {"groups": 1})]
    cases += [(torch.bfloat16, 768, {"groups": 4, "latents": 64}), (torch.bfloat16, 768, {"norms": "none"})]
    cases += [(torch.float32, 768, {}), (torch.float32, 1536, {"reduction": 4})]
    for dtype, width, options in cases:
        name = " ".join(str(part) for part in (dtype, width, *(f"{k} {v}" for k, v in options.items())))
        yield name.removeprefix("torch."), _build(dtype, width, architecture, **options)


def _build(
    dtype: torch.dtype,
    width: int,
    architecture: int,
    *,
    reduction: int = 8,
    latents: int = 2,
    groups: int = 2,
    norms: str = "all",
) -> list[_launch.Launch]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    n, N, D = 20, 110592 // width, width // reduction
    norm, batch_norm = Norm(wide(width), wide(width)), lambda size: BatchNorm(*(wide(size) for _ in range(4)))
    down, up, gate = empty(D, width // groups), empty(width, D // groups), wide(1)
    w = Weights(gate, norm, down, batch_norm(D), up, batch_norm(width), norm, gate)
    if norms == "none":
        w = w._replace(**dict.fromkeys(NORMS))
        norm = None
    xs, out, h = [empty(n, N, width)] * 2, empty(2, n, N, width), empty(2, n, N, D)
    summaries = empty(2, n, latents, width)
    ops = "adapter_training", "adapter_training_bwd"
    first, shared = (layout(op, xs, [w, w], norm, (1e-5,) * 5, architecture) for op in ops)
    grid = (2, n, shared.blocks)
    averages, dgate = None if norm is None else wide(2, D + 1), wide(*grid, 1)
    return [
        _down_launch(h, wide(2, n, first.blocks, 2, D), xs, summaries, first),
        up_launch(out, out, wide(*grid, 4, width), h, out, xs, norm, averages, shared),
        down_launch(out, out, wide(*grid, 2, width), wide(*grid, latents, width), dgate, h, out, xs, summaries, shared),
    ]
