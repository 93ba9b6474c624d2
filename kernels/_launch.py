"""One launch of a kernel as a value, so that what runs on a card and what a machine without one builds are the same."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """args: the kernel's tensors and sizes, in order. constants: its constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs them in order on `device`, whichever device is the current one; launches of nothing are left out."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for kernel, grid, args, constants in launches:
            if all(grid):
                kernel[grid](*args, **constants)


def architecture(device: torch.device) -> int:
    """The compute capability as major * 10 + minor; 0 where there is none (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
