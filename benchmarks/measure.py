"""How a candidate is prepared, checked and timed: precision, execution, parity, clocks, memory, launches."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler import profile as autograd_profile
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from benchmarks.roofline import Op


@dataclass(frozen=True)
class Precision:
    """weights: the type of weights and inputs. limit: whose matrix products bound it, by roofline's names.

    cap, gradient_cap: the largest relative error of outputs and of gradients that gets a time, whatever the reference
    does in this precision.
    """

    weights: torch.dtype
    limit: str
    cap: float
    gradient_cap: float
    autocast: bool = False

    @property
    def eps(self) -> float:
        """The spacing of the numbers that the arithmetic rounds to, relative to 1."""
        if self.limit == "tf32":
            return 2**-10
        return torch.finfo(torch.bfloat16 if self.autocast else self.weights).eps


PRECISIONS = {
    "float64": Precision(torch.float64, "float64", 1e-10, 1e-8),
    "float32": Precision(torch.float32, "float32", 1e-5, 5e-2),
    "tf32": Precision(torch.float32, "tf32", 2e-2, 0.3),
    "bfloat16-autocast": Precision(torch.float32, "bfloat16", 0.1, 0.5, autocast=True),
    "bfloat16": Precision(torch.bfloat16, "bfloat16", 0.1, 0.5),
    "float16": Precision(torch.float16, "float16", 2e-2, 0.3),
}
EXECUTIONS = {
    "eager": "as written",
    "compile": "torch.compile of the whole, its default mode",
    "max-autotune": "torch.compile of the whole, mode max-autotune without CUDA graphs",
    "reduce-overhead": "torch.compile of the whole with CUDA graphs",
    "freezing": "torch.compile of the whole with weights as constants (inference)",
    "blocks": "torch.compile of each block by itself",
    "graph": "eager, captured as one CUDA graph (inference)",
    "blocks+graph": "each block compiled, the whole captured as one CUDA graph (inference)",
}


class Unavailable(Exception):
    """Why something cannot be measured here: it becomes a row that says so."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Runs what is inside with this arithmetic: TF32 on or off everywhere, autocast if asked for."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [s.allow_tf32 for s in settings]
    with ExitStack() as stack:
        for s, value in zip(settings, before):
            stack.callback(setattr, s, "allow_tf32", value)
            s.allow_tf32 = name == "tf32"
        if PRECISIONS[name].autocast:
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        yield


def execute(function: Callable, execution: str, inputs: Sequence[Tensor], *, training: bool) -> Callable:
    """`function` as it is to be run. Raises: Unavailable where that cannot be had."""
    if execution == "eager":
        return function
    options = {"dynamic": False}
    if execution in ("blocks", "blocks+graph"):
        blocks = getattr(function, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise Unavailable("it has no list of blocks to compile one by one")
        for block in blocks:
            block.compile(**options)
    elif execution in ("max-autotune", "reduce-overhead"):
        mode = "max-autotune-no-cudagraphs" if execution == "max-autotune" else execution
        function = torch.compile(function, mode=mode, **options)
    elif execution != "graph":
        function = torch.compile(function, options={"freezing": execution == "freezing"}, **options)
    if execution in ("graph", "blocks+graph", "reduce-overhead") and not inputs[0].is_cuda:
        raise Unavailable("CUDA graphs take a CUDA device")
    if execution in ("graph", "blocks+graph", "freezing") and training:
        raise Unavailable("for inference alone")
    if execution in ("graph", "blocks+graph"):
        from lavish_fast.runtime import capture

        function = capture(function, *inputs)
    return function


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where anything is not finite or the shapes differ."""
    got, expected = got.detach().double().flatten(), expected.detach().double().flatten()
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got - expected.to(got.device)).norm() / expected.norm()).item()


def time_rounds(calls: Sequence[Callable], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of single calls, of each of `calls` for about `seconds`: at least 5 (3 if slow), at most 200.

    On a CPU the calls take turns, so that a slow spell of the machine falls on all of them. On a GPU each is timed by
    events, after a write that empties the L2 cache; call by call, because there memory matters more than drift.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return [do_bench(call, warmup=100, rep=int(seconds * 1e3), return_mode="all")[:200] for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    longest = []
    for call in calls:
        start = time.perf_counter()
        call()
        longest.append(time.perf_counter() - start)
    rounds = [max(5 if taken < 0.1 else 3, min(200, int(seconds / taken))) for taken in longest]
    for turn in range(max(rounds)):
        for call, least, measured in zip(calls, rounds, times):
            if turn < least:
                start = time.perf_counter()
                call()
                measured.append((time.perf_counter() - start) * 1e3)
    return times


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


class Memory:
    """The most memory that a step holds, weights, inputs and all: MiB. Begin before the weights are on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self, step: Callable, *holders: nn.Module | Tensor) -> float:
        """Of one `step`. On a CPU what `holders` hold and the most that the step allocates, by the profiler."""
        if self.device == "cuda":
            step()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - self.before) / 2**20
        with autograd_profile(profile_memory=True) as profiler:
            step()
        held = most = 0
        for event in profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        tensors = {}
        for holder in holders:
            for x in holder.state_dict().values() if isinstance(holder, nn.Module) else [holder]:
                if isinstance(x, Tensor):
                    tensors[x.data_ptr()] = x.nbytes
        return (most + sum(tensors.values())) / 2**20


def launches(call: Callable, device: str) -> dict[str, int] | None:
    """What one call asks of a card: launches (of kernels and graphs) and kernels (that ran); None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    asked = sum(e.device_type == DeviceType.CPU and bool(re.search("Launch", e.name)) for e in events)
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not re.match("Mem(cpy|set)", e.name)]
    return {"launches": asked, "kernels": len(ran)}


class MatrixWork(TorchDispatchMode):
    """Counts the matrix products and convolutions that run inside, each with FLOPs and the elements it touches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            tensors = (x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor))
            self.found[function._overloadpacket.__name__, flops, sum(x.numel() for x in tensors)] += 1
        return out

    def ops(self, itemsize: int, clips: float) -> list[Op]:
        """The work as roofline's ops, for `clips` times what ran."""
        return [
            Op(name, 0, calls, int(flops * clips), int(elements * clips * itemsize))
            for (name, flops, elements), calls in self.found.items()
        ]
