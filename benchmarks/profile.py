"""Where the time of a candidate goes on a card: its kernels by name, checked for parity first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a call. calls: in one call; us: microseconds, of all of them together."""

    name: str
    calls: float
    us: float


def kernels(call: Callable, repeats: int = 3) -> list[Kernel]:
    """What the card runs in one `call`, the mean of some, the longest first; copies and fills are kernels too."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    ran = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return total(((e.name, e.device_time_total) for e in ran), repeats)


def total(ran: Iterable[tuple[str, float]], repeats: int) -> list[Kernel]:
    """The kernels of (name, microseconds) pairs from `repeats` calls."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, us in ran:
        times[short(name)].append(us)
    found = [Kernel(name, len(each) / repeats, sum(each) / repeats) for name, each in times.items()]
    return sorted(found, key=lambda kernel: -kernel.us)


def short(name: str) -> str:
    """A kernel's name in 60 characters at most, without namespaces of torch, return type, template and arguments.

    A template that runs whatever it is given (elementwise_kernel, reduce_kernel ...) keeps the name of that.
    """
    name = re.sub(r"^void |\(anonymous namespace\)::|\bat::|\bnative::|\bc10::", "", name)
    name, rest = re.match(r"([^<(]*)(.*)", name, re.DOTALL).groups()
    if given := _GIVEN.findall(rest):
        name = f"{name}<{given[-1]}>"  # the innermost: BinaryFunctor<..., MulFunctor<float>>
    name = name.strip()
    return name if len(name) <= 60 else name[:57] + "..."


_GIVEN = re.compile(r"\b(?!gpu_kernel)\w*(?:[Ff]unctor|Ops|KernelImpl|_kernel_cuda|_kernel_impl|cutlass_)\w*")


def table(kernels: Iterable[Kernel], title: str, most: int = 40) -> Table:
    kernels = list(kernels)
    whole = sum(kernel.us for kernel in kernels)
    out = Table("kernel", box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("calls", "ms", "share"):
        out.add_column(column, justify="right")
    for kernel in kernels[:most]:
        out.add_row(kernel.name, f"{kernel.calls:g}", f"{kernel.us / 1e3:.3f}", f"{kernel.us / whole:.1%}")
    if rest := kernels[most:]:
        us = sum(kernel.us for kernel in rest)
        out.add_row(f"{len(rest)} more", f"{sum(k.calls for k in rest):g}", f"{us / 1e3:.3f}", f"{us / whole:.1%}")
    out.add_row("all", f"{sum(k.calls for k in kernels):g}", f"{whole / 1e3:.3f}", "")
    return out


def row(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    return [{"name": k.name, "calls": k.calls, "us": round(k.us, 2)} for k in kernels]
