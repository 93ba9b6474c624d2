"""Why a fused kernel cannot take these tensors, as a list of sentences; an empty list means that it can."""

from __future__ import annotations

from torch import Tensor


def reasons(op: str, *tensors: Tensor) -> list[str]:
    """All the reasons why `op` has to take its reference path for these tensors."""
    found = [f"{op} has no fused kernel yet"]
    found += [f"expected CUDA tensors, got {device}" for device in sorted({t.device.type for t in tensors} - {"cuda"})]
    return found
