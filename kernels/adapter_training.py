"""kernels/adapter.py's residual step in training, one or two streams: forward and every gradient.

    X'  = X + g_av P S,  P = softmax(X Sᵀ);  u = LN_before(X');  h = down(u);  a = ReLU(BN1(h));  z0 = up(a)
    out = X + PostNorm(B) + g LN_after(z1),  z1 = BN2(z0)

Shapes as there; R = n N tokens of a stream. BatchNorms go by the mean and the biased variance of the stream's own R
tokens, or by the running ones, constants then. The post-norm is frozen and has no gradients.

BN2's statistics come without z0, which is linear in a: with a's mean m and covariance K the mean of z0 is up m and its
variance up_c K up_cᵀ for each channel. The order of kernels is in ..._passes.py, the kernels are in ..._fwd.py,
..._bwd_up.py and ..._bwd_down.py, what adds up what their programs leave in ..._totals.py and ..._bwd_totals.py.

Saved for the backward, bytes a token in 16 bits: X, 2 C; B where it has a post-norm, 2 C; h, 2 D. Beside them S, 2 C
bytes a latent, in float32 the batch's statistics, m and K, and the parameters. gather_latents saves the same X; B,
which a frozen product leaves and does not save, S and h are kept by this op alone.
Bytes a token in 16 bits: forward 8 C and 6 D, backward 24 C, 28 D and D C / 32 G. FLOPs: forward 4 C D / G, 4 C m and
2 D² / G, backward 12 C D / G, 12 C m and 2 D² / G, of which 4 C D / G and 4 C m recompute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from lavish_fast.kernels import _checks, _launch, adapter
from lavish_fast.kernels._tiles import Norm
from lavish_fast.kernels._weights import NORMS, Weights, tensors, unflattened
from lavish_fast.kernels.adapter_training_passes import STATISTICS, backward, build_launches, forward
from torch import Tensor


class Statistics(NamedTuple):
    """Of BN1 (streams, 2, D) and BN2 (streams, 2, C): means and biased variances, float32; (streams, 2, 0) if not the
    batch's or if there is no such norm."""

    bn1: Tensor
    bn2: Tensor


def reasons(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    batch_statistics: bool,
) -> list[str]:
    """Why the kernels cannot take these tensors; an empty list when they can."""
    # What evaluation asks for, of products in the streams' type, which is what the op makes of them; statistics are
    # asked for below.
    with torch.no_grad():
        like = [_like(w, xs[0].dtype if xs else torch.float32) for w in weights]
        found = adapter.reasons(xs, branches, summaries, like, post_norm)
    if not xs:
        return found
    frozen = {f"post_norm.{name}": t for name, t in (post_norm or Norm())._asdict().items()}
    frozen |= {f"weights[{i}].{name}": t for i, w in enumerate(weights) for name, t in tensors(w) if _is_running(name)}
    found += _checks.trainable({name: t for name, t in frozen.items() if t is not None})
    norms = [norm for w in weights for norm in (w.bn1, w.bn2) if norm is not None]
    if batch_statistics and norms and xs[0].shape[:-1].numel() < 2:
        found.append(f"expected more than one token for batch statistics, got {xs[0].shape[:-1].numel()}")
    if not batch_statistics and any(norm.mean is None for norm in norms):
        found.append("expected running statistics of each BatchNorm, got none")
    return list(dict.fromkeys(found))


def _like(w: Weights, dtype: torch.dtype) -> Weights:
    found = {}
    for name in ("down", "up"):
        product = getattr(w, name)
        if product.dtype in _checks.DTYPES:
            found[name] = torch.empty_like(product, dtype=dtype)
    for name in ("bn1", "bn2"):
        norm = getattr(w, name)
        if norm is not None and norm.mean is None and norm.variance is None:
            found[name] = norm._replace(mean=norm.weight, variance=norm.weight)
    return w._replace(**found)


def _is_running(name: str) -> bool:
    return name.endswith((".mean", ".variance"))


def _trained(weights: Sequence[Weights]) -> dict[str, Tensor]:
    """What has a gradient, by name, of the last stream that has it."""
    return {name: t for w in weights for name, t in tensors(w) if t is not None and not _is_running(name)}


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
        None if batch_statistics and _is_running(name) else t for w in weights for name, t in tensors(w)
    ]  # the caller writes to the running statistics before the backward
    present = [getattr(w, name) is not None for w in weights for name in NORMS] + [post_norm is not None]
    frozen = post_norm or Norm()
    out, _, bn1, bn2, *_ = _adapter_training(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, h (streams, n, N, D), the statistics of BN1 and BN2, a's mean and covariance."""
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(xs[0].device.type, enabled=False):  # which reaches into the op
        return forward(xs, branches, summaries, weights, norm, eps, batch_statistics)


@_adapter_training.register_fake
def _(xs, branches, summaries, parameters, post_norm, given, present, eps, batch_statistics):
    (w, *_), _ = _unflattened(parameters, post_norm, given, present)
    (n, N, C), (D, channels), streams = xs[0].shape, w.down.shape, len(xs)
    groups = C // channels
    full = (2, D), (2, C), (D,), (groups, D // groups, D // groups)
    there = [batch_statistics and norm is not None for norm in (w.bn1, w.bn2, w.bn2, w.bn2)]
    shapes = [shape if batch else empty for batch, shape, empty in zip(there, full, STATISTICS)]
    statistics = [xs[0].new_empty(streams, *shape, dtype=torch.float32) for shape in shapes]
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
    mean: Tensor,
    covariance: Tensor,
    given: list[bool],
    present: list[bool],
    eps: list[float],
    batch_statistics: bool,
) -> list[Tensor]:
    """The gradients of xs, of branches if there is a post-norm, of summaries if any, and those of `_trained`."""
    if dout.stride(-1) * (dout.shape[-1] - 1) >= 2**31:  # the kernels count along channels in 32 bits
        dout = dout.contiguous()
    weights, norm = _unflattened(parameters, post_norm, given, present)
    with torch.autocast(h.device.type, enabled=False):
        statistics = bn1, bn2, mean, covariance
        tensors_ = dout, xs, branches, summaries, weights, norm, h, *statistics
        dx, db, ds, found = backward(*tensors_, eps, batch_statistics)
    return [t for t in (dx, db, ds) if t is not None] + [found[name] for name in _trained(weights)]


@_adapter_training_backward.register_fake
def _(dout, xs, branches, summaries, parameters, post_norm, h, bn1, bn2, mean, covariance, given, present, *_):
    weights, norm = _unflattened(parameters, post_norm, given, present)
    found = [xs[0].new_empty(dout.shape) for _ in range(1 if norm is None else 2)]
    found += [] if summaries is None else [summaries.new_empty(summaries.shape)]
    return found + [t.new_empty(len(xs), *t.shape, dtype=torch.float32) for t in _trained(weights).values()]


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
    summaries, h, *statistics = saved
    given, present, *_ = ctx.options
    tensors_ = dout, xs, branches, summaries, parameters, post_norm, h, *statistics
    found = iter(_adapter_training_backward(*tensors_, *ctx.options))
    dxs = next(found).unbind()
    dbranches = next(found).unbind() if branches else dout.unbind()
    dsummaries = None if summaries is None else next(found)
    weights, _ = _unflattened(parameters, post_norm, given, present)
    of_streams = dict(zip(_trained(weights), found))
    every = [(i, name, t) for i, w in enumerate(weights) for name, t in tensors(w) if t is not None]
    dparameters = [of_streams[name][i].to(t.dtype) if name in of_streams else None for i, name, t in every]
    return list(dxs), list(dbranches), dsummaries, dparameters, [None] * len(post_norm), *[None] * len(ctx.options)


torch.library.register_autograd("lavish_fast::adapter_training", _backward_of_context, setup_context=_setup_context)


def builds(architecture: int) -> Iterator[tuple[str, list[_launch.Launch]]]:
    """What a machine without a card builds: the paper's stages, its second setting, running statistics, extremes."""
    cases = [(torch.bfloat16, 192, {}), (torch.bfloat16, 768, {}), (torch.bfloat16, 1536, {})]
    cases += [(torch.float16, 384, {"groups": 1, "norms": "none"}), (torch.float32, 768, {}), (torch.bfloat16, 384, {})]
    cases += [(torch.bfloat16, 768, {"reduction": 4, "latents": 16}), (torch.bfloat16, 768, {"statistics": "running"})]
    for dtype, width, options in cases:
        name = " ".join(str(part) for part in (dtype, width, *(f"{k} {v}" for k, v in options.items())))
        yield name.removeprefix("torch."), build_launches(dtype, width, architecture, **options)
