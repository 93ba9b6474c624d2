"""An adapter's parameters and buffers as the kernels take them, and as the flat list that a custom op takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from lavish_fast.kernels._tiles import BatchNorm, Norm
from torch import Tensor


class Weights(NamedTuple):
    """One stream's adapter; gates (1,), down (D, C / G), up (C, D / G)."""

    gate_av: Tensor | None
    ln_before: Norm | None
    down: Tensor
    bn1: BatchNorm | None
    up: Tensor
    bn2: BatchNorm | None
    ln_after: Norm | None
    gate: Tensor | None


class Eps(NamedTuple):
    """What each norm adds to its variance; the kernel gets None where there is no such norm."""

    ln_before: float | None
    bn1: float | None
    bn2: float | None
    ln_after: float | None
    post_norm: float | None


NORMS = {"ln_before": Norm, "bn1": BatchNorm, "bn2": BatchNorm, "ln_after": Norm}  # in the order of Eps


def tensors(w: Weights) -> Iterator[tuple[str, Tensor | None]]:
    """What one stream has, flat and by name, absent norms included."""
    for name in Weights._fields:
        if name in NORMS:
            norm = getattr(w, name) or NORMS[name]()
            yield from ((f"{name}.{part}", getattr(norm, part)) for part in norm._fields)
        else:
            yield name, getattr(w, name)


def mismatches(weights: Sequence[Weights]) -> list[str]:
    """Why one kernel cannot serve these streams' adapters together; nothing if it can."""
    found = []
    absent = [[getattr(w, name) is None for name in NORMS] for w in weights]
    absent = [a + [t is None for name, t in tensors(w) if "." in name] for a, w in zip(absent, weights)]
    if absent[0] != absent[-1]:
        found.append("expected the same norms in both streams, got others")
    for first, last in zip(tensors(weights[0]), tensors(weights[-1])):
        types = [t.dtype for name, t in (first, last) if "." in name and t is not None]
        if len(set(types)) > 1:
            found.append(f"expected {first[0]} of one type in both streams, got {types[0]} and {types[1]}")
    if any(norm and (norm.mean is None) != (norm.variance is None) for w in weights for norm in (w.bn1, w.bn2)):
        found.append("expected mean and variance of a BatchNorm, got one of them")
    return found


def unflattened(flat: Iterator[Tensor | None], present: Iterator[bool]) -> Weights:
    """One stream's, from the values of `tensors` and whether each of NORMS is there."""
    fields = {}
    for name in Weights._fields:
        if name in NORMS:
            norm = NORMS[name](*islice(flat, len(NORMS[name]._fields)))
            fields[name] = norm if next(present) else None
        else:
            fields[name] = next(flat)
    return Weights(**fields)
