"""The passes of kernels/adapter_training.py: which kernels run, in order, and the memory between them.

dhᵀ x̂ is a product of torch's, of the streams' type into float32, and so is the sum of dh; all else is kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from lavish_fast.kernels import _launch, _tuning
from lavish_fast.kernels._adapter_training import Shared, shared_by, shared_out
from lavish_fast.kernels._tiles import BatchNorm, Norm
from lavish_fast.kernels._weights import NORMS, Weights
from lavish_fast.kernels.adapter_training_bwd_down import bwd_down_launch, bwd_mid_launch
from lavish_fast.kernels.adapter_training_bwd_totals import (
    bwd_bn1_launch,
    bwd_bn2_launch,
    bwd_bn2_programs,
    bwd_mixing_launch,
    bwd_products_launch,
    bwd_summaries_launch,
)
from lavish_fast.kernels.adapter_training_bwd_up import bwd_branch_launch, bwd_sums_launch, bwd_up_launch
from lavish_fast.kernels.adapter_training_fwd import down_launch, gram_launch, up_launch
from lavish_fast.kernels.adapter_training_totals import bn1_launch, bn2_launch, covariance_launch, narrow_launch
from torch import Tensor

_FEWEST = 2048  # tokens of one part among those that a weight's gradient is the sum of
STATISTICS = (2, 0), (2, 0), (0,), (0, 0, 0)  # of each stream, where they are not the batch's


def _weight_gradients(d: Tensor, x: Tensor, groups: int) -> list[Tensor]:
    """dᵀ x over tokens, d (streams, n, N, G p), x (streams, n, N, G q): of each group (streams * parts, p, q), float32.

    The sum is long and the result small, so that its tokens are split into products of some thousand, yet to be added
    up: one product would have a few programs of a card walk through all of them. Groups that do not begin at 16 bytes,
    which slows every load, are multiplied with one another too, and what they have in common is left out.
    """
    streams, n, N = x.shape[:3]
    parts = _parts(n, N)
    d, x = (t.reshape(streams * parts, n // parts * N, t.shape[3]) for t in (d, x))
    if any(t.shape[2] // groups % 8 for t in (d, x)):
        whole = _products(d.mT, x).unflatten(2, (groups, -1)).unflatten(1, (groups, -1))  # (parts, G, p, G, q)
        return [whole[:, g, :, g] for g in range(groups)]
    return [_products(p.mT, q) for p, q in zip(d.chunk(groups, 2), x.chunk(groups, 2))]


def _parts(n: int, N: int) -> int:
    """Into how many equal parts n images of N tokens are split: as many as have `_FEWEST` tokens each, or one."""
    return next((n // images for images in range(1, n + 1) if n % images == 0 and images * N >= _FEWEST), 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever the type; of three dimensions each."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _narrowed(weights: Sequence[Weights], dtype: torch.dtype) -> list[Weights]:
    if all(product.dtype == dtype for w in weights for product in (w.down, w.up)):
        return list(weights)
    narrow = weights[0].down.new_empty(len(weights), 2, weights[0].down.numel(), dtype=dtype)
    _launch.run([narrow_launch(narrow, weights)], narrow.device)
    return [w._replace(down=n[0].view_as(w.down), up=n[1].view_as(w.up)) for w, n in zip(weights, narrow)]


def _with(weights: Sequence[Weights], name: str, statistics: Tensor) -> list[Weights]:
    """The weights with these statistics (streams, 2, width) in one of their BatchNorms; the running ones if empty."""
    if not statistics.shape[-1]:
        return list(weights)
    norms = [getattr(w, name)._replace(mean=s[0], variance=s[1]) for w, s in zip(weights, statistics)]
    return [w._replace(**{name: norm}) for w, norm in zip(weights, norms)]


def _bn2(h: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
    """BN2's statistics (streams, 2, C), and a's mean (streams, D) and covariance (streams, G, D / G, D / G), float32.

    h (streams, R, D).
    """
    R, C, D, groups = h.shape[1], *(shared.constants[name] for name in ("C", "D", "GROUPS"))
    programs = triton.cdiv(R, shared_out(R))
    square = groups, D // groups, D // groups
    bn2, mean, covariance, firsts, sums, grams = (
        h.new_empty(len(h), *shape, dtype=torch.float32)
        for shape in ((2, C), (D,), square, (D,), (programs, D), (programs, *square))
    )
    launches = [
        gram_launch(firsts, sums, grams, h, shared),
        covariance_launch(mean, covariance, firsts, sums, grams, R, shared),
        bn2_launch(bn2, mean, covariance, shared),
    ]
    _launch.run(launches, h.device)
    return bn2, mean, covariance


def forward(xs, branches, summaries, given, post_norm, eps, batch_statistics):
    streams, (n, N, C) = len(xs), xs[0].shape
    weights = _narrowed(given, xs[0].dtype)
    D = len(weights[0].down)
    out, h = xs[0].new_empty(streams, n, N, C), xs[0].new_empty(streams, n, N, D)
    architecture = _launch.architecture(out.device)
    norms = post_norm, eps, architecture
    shared = shared_by("adapter_training_down", xs, weights, *norms)
    parts = h.new_empty(streams, n, shared.blocks, 2, D, dtype=torch.float32)
    _launch.run([down_launch(h, parts, xs, summaries, [w.gate_av for w in weights], shared)], h.device)
    bn1, bn2, mean, covariance = (parts.new_empty(streams, *shape) for shape in STATISTICS)
    if batch_statistics and weights[0].bn1 is not None:
        bn1 = parts.new_empty(streams, 2, D)
        _launch.run([bn1_launch(bn1, parts, shared)], h.device)
        weights = _with(weights, "bn1", bn1)
    if batch_statistics and weights[0].bn2 is not None:
        shared = shared_by("adapter_training_down", xs, weights, *norms)
        bn2, mean, covariance = _bn2(h.flatten(1, 2), shared)
        weights = _with(weights, "bn2", bn2)
    shared = shared_by("adapter_training_up", xs, weights, *norms)
    _launch.run([up_launch(out, h, xs, branches, [w.gate for w in weights], post_norm, shared)], h.device)
    return out, h, bn1, bn2, mean, covariance


def results(h: Tensor, C: int, groups: int) -> dict[str, Tensor]:
    """Where the gradients of products and norms go, of all streams, by name, those of absent norms too."""
    D = h.shape[-1]
    shapes = {"down": (D, C // groups), "up": (C, D // groups)}
    shapes |= {f"{name}.{part}": (D if name == "bn1" else C,) for name in NORMS for part in Norm._fields}
    return {name: h.new_empty(len(h), *shape, dtype=torch.float32) for name, shape in shapes.items()}


def backward(dout, xs, branches, summaries, given, post_norm, h, bn1, bn2, mean, covariance, eps, batch_statistics):
    """dxs (streams, n, N, C), dbranches, dsummaries, None where there is none; by name the others', of all streams."""
    streams, (n, N, C) = len(xs), xs[0].shape
    R, D, groups = n * N, h.shape[-1], C // given[0].down.shape[1]
    weights = _with(_with(_narrowed(given, h.dtype), "bn1", bn1), "bn2", bn2)
    norms = post_norm, eps, _launch.architecture(h.device)
    shared = shared_by("adapter_training_bwd_up", xs, weights, *norms)
    flat = h.flatten(1, 2)
    by_batch = batch_statistics and weights[0].bn2 is not None

    def rows(*shape: int) -> Tensor:
        return h.new_empty(*shape, dtype=torch.float32)

    found = results(h, C, groups)
    dz, da = h.new_empty(streams, n, N, C), rows(*h.shape)
    after = None if weights[0].ln_after is None else rows(streams, n, N, 2)
    db = None if post_norm is None else torch.empty_like(dz)
    gates, dgates = [w.gate for w in weights], None
    if any(gate is not None for gate in gates):
        found["gate"], dgates = rows(streams, 1), rows(streams, bwd_bn2_programs(shared, h))
    programs = shared.sharers(h.element_size())
    sums, products = rows(streams, programs, 3, C), rows(streams, programs, C, D // groups)
    means, matrix, shifts, mixing = None, None, None, None
    if by_batch:
        means, matrix, shifts, mixing = mean, covariance, torch.empty_like(mean), torch.empty_like(covariance)
    narrow = rows(streams, triton.cdiv(R, shared_out(R)), 2, D)
    table = None if weights[0].bn1 is None else rows(streams, 5, D)
    launches = [
        *([] if post_norm is None else [bwd_branch_launch(db, dout, branches, post_norm, shared)]),
        bwd_up_launch(dz, da, after, h, dout, gates, shared),
        bwd_sums_launch(sums, products, dz, after, h, dout, means, shared),
        bwd_bn2_launch(found, dgates, sums, products, matrix, gates, shared),
        *([bwd_mixing_launch(shifts, mixing, found, R, shared)] if by_batch else []),
        bwd_mid_launch(da.flatten(1, 2), narrow, flat, means, shifts, mixing, shared),
        *([] if table is None else [bwd_bn1_launch(found, table, narrow, R if batch_statistics else None, shared)]),
    ]
    _launch.run(launches, h.device)

    # dz has served: its memory takes X', whitened.
    dx, xhat, dh, ds, parts, dgates_av = torch.empty_like(dz), dz, torch.empty_like(h), None, None, None
    down_shared = shared_by("adapter_training_bwd_down", xs, weights, *norms)
    if summaries is not None:
        grid = streams, n, down_shared.blocks
        ds, parts, dgates_av = h.new_empty(summaries.shape), rows(*grid, summaries.shape[2], C), rows(*grid, 1)
        found["gate_av"] = rows(streams, 1)
    gates_av = [w.gate_av for w in weights]
    tensors_ = dx, xhat, dh, parts, dgates_av, da, h, table, dout, xs, summaries, gates_av
    _launch.run([bwd_down_launch(*tensors_, down_shared)], h.device)
    of_down = _weight_gradients(dh, xhat, groups), dh.sum((1, 2), dtype=torch.float32)
    launches = [] if ds is None else [bwd_summaries_launch(ds, parts)]
    _launch.run([*launches, bwd_products_launch(found, *of_down, dgates, dgates_av, shared)], h.device)
    return dx, db, ds, found


def build_launches(
    dtype: torch.dtype,
    width: int,
    architecture: int,
    *,
    reduction: int = 8,
    latents: int = 2,
    groups: int = 2,
    norms: str = "all",
    statistics: str = "batch",
) -> list[_launch.Launch]:
    """Every launch of both passes, of tensors without memory, in their order."""

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
    in_float32 = [w._replace(down=wide(*down.shape), up=wide(*up.shape))] * 2
    xs, out, h = [empty(n, N, width)] * 2, empty(2, n, N, width), empty(2, n, N, D)
    summaries, square = empty(2, n, latents, width), (groups, D // groups, D // groups)
    given = xs, [w, w], norm, (1e-5,) * 5, architecture
    first, second, shared, last = (shared_by(op, *given) for op in _tuning.ADAPTER_TRAINING)
    gates, flat, found = [gate] * 2, h.flatten(1, 2), results(h, width, groups)
    found |= {"gate": wide(2, 1), "gate_av": wide(2, 1)}
    after, table = (None, None) if norm is None else (wide(2, n, N, 2), wide(2, 5, D))
    mean, covariance = wide(2, D), wide(2, *square)
    by_batch = norm is not None and statistics == "batch"
    of_batch = (mean, wide(2, D), covariance) if by_batch else (None,) * 3
    R, grams = n * N, (wide(2, D), wide(2, 8, D), wide(2, 8, *square))
    parts, sums, narrow = wide(2, n, first.blocks, 2, D), wide(2, 4, 3, width), wide(2, 8, 2, D)
    products, dgates = wide(2, 4, width, D // groups), wide(2, bwd_bn2_programs(shared, h))
    ds, dgates_av = wide(2, n, last.blocks, latents, width), wide(2, n, last.blocks, 1)
    of_down = [wide(8, D // groups, width // groups)] * groups
    return [
        *([] if dtype == torch.float32 else [narrow_launch(empty(2, 2, down.numel()), in_float32)]),
        down_launch(h, parts, xs, summaries, gates, first),
        gram_launch(*grams, flat, first),
        *([bn1_launch(wide(2, 2, D), parts, first)] if by_batch else []),
        *([covariance_launch(mean, covariance, *grams, R, first)] if by_batch else []),
        *([bn2_launch(wide(2, 2, width), mean, covariance, first)] if by_batch else []),
        up_launch(out, h, xs, xs, gates, norm, second),
        *([] if norm is None else [bwd_branch_launch(out, out, xs, norm, shared)]),
        bwd_up_launch(out, wide(*h.shape), after, h, out, gates, shared),
        bwd_sums_launch(sums, products, out, after, h, out, of_batch[0], shared),
        bwd_bn2_launch(found, dgates, sums, products, of_batch[2], gates, shared),
        *([bwd_mixing_launch(of_batch[1], covariance, found, R, shared)] if by_batch else []),
        bwd_mid_launch(wide(*flat.shape), narrow, flat, *of_batch, shared),
        *([] if norm is None else [bwd_bn1_launch(found, table, narrow, R if by_batch else None, shared)]),
        bwd_down_launch(out, out, h, ds, dgates_av, wide(*h.shape), h, table, out, xs, summaries, gates, last),
        bwd_summaries_launch(summaries, ds),
        bwd_products_launch(found, of_down, mean, dgates, dgates_av, shared),
    ]
