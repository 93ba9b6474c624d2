"""How a candidate is prepared, checked and timed: precision, execution, parity, clocks, memory, launches."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
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
    does in this precision; in training a hundred times `cap`, for BatchNorm's statistics of few values.
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
    "own": "as lavish_fast.optimize compiles and captures it",
    "step": "the same, in whole steps of lavish_fast.TrainingStep (training)",
}


class Unavailable(Exception):
    """Why something cannot be measured here: it becomes a row that says so."""


def is_out_of_memory(error: BaseException) -> bool:
    # A driver that cannot make a graph, and a compiler that ran out, say so in a RuntimeError.
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


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
            # Without the cache of narrow weights: a graph would go on to read them after they were freed.
            stack.enter_context(torch.autocast(device, torch.bfloat16, cache_enabled=False))
        yield


def execute(function: Callable, execution: str, inputs: Sequence[Tensor], *, training: bool) -> Callable:
    """`function` as it is to be run. Raises: Unavailable where that cannot be had."""
    if execution == "step" and not training:
        raise Unavailable("for training alone")
    if execution in ("eager", "own", "step"):
        return function
    if execution in ("graph", "blocks+graph", "reduce-overhead") and not inputs[0].is_cuda:
        raise Unavailable("CUDA graphs take a CUDA device")
    if execution in ("graph", "blocks+graph", "freezing") and training:
        raise Unavailable("for inference alone")
    # Past its limit dynamo would go on uncompiled, and say nothing.
    torch._dynamo.config.recompile_limit = 64
    options = {"dynamic": False}
    if execution in ("blocks", "blocks+graph"):
        if not (blocks := _blocks(function)):
            raise Unavailable("it has no list of blocks to compile one by one")
        for block in blocks:
            block.compile(**options)
    elif execution in ("max-autotune", "reduce-overhead"):
        mode = "max-autotune-no-cudagraphs" if execution == "max-autotune" else execution
        function = torch.compile(function, mode=mode, **options)
    elif execution != "graph":
        function = torch.compile(function, options={"freezing": execution == "freezing"}, **options)
    if execution in ("graph", "blocks+graph"):
        from lavish_fast.graphs import capture

        function = capture(function, *inputs)
    return function


def _blocks(network: Callable) -> list[nn.Module]:
    """The blocks of a network, or of its stages, as far as they are called as modules."""
    kinds = (nn.ModuleList, nn.Sequential)
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, kinds):
        stages = getattr(network, "layers", None)
        blocks = [b for stage in stages for b in getattr(stage, "blocks", ())] if isinstance(stages, kinds) else []
    return [block for block in blocks if type(block).forward is not nn.Module.forward]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where anything is not finite or the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().double(), expected.detach().double().to(got.device)
    error = ((got - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else float("inf")


def time_rounds(calls: Sequence[Callable], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of single calls, of each of `calls` for about `seconds`: at least 5 (3 if slow), at most 200.

    On a CPU the calls take turns, so that a slow spell of the machine falls on all of them. On a GPU each is timed by
    events, after a write that empties the L2 cache; call by call, because there memory matters more than drift.
    """
    if device == "cuda":
        return [_time_on_card(call, seconds) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    rounds = [_rounds(_milliseconds(call), seconds) for call in calls]
    for turn in range(max(rounds)):
        for call, wanted, measured in zip(calls, rounds, times):
            if turn < wanted:
                measured.append(_milliseconds(call))
    return times


_SLOW = 100  # milliseconds


def _rounds(taken: float, seconds: float) -> int:
    """taken: milliseconds of one."""
    return max(5 if taken < _SLOW else 3, min(200, int(seconds * 1e3 / taken)))


def _milliseconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _time_on_card(call: Callable, seconds: float) -> list[float]:
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # several times any card's L2

    def rounds(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            cache.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    (taken,) = rounds(1)
    if taken < _SLOW:
        rounds(2)  # clocks rise under load
        taken = statistics.median(rounds(3))
    return rounds(_rounds(taken, seconds))


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
        self.captured = 0

    def note_built(self) -> None:
        """What building alone took, wider weights say, does not count."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()

    def note_capture(self) -> None:
        """The peak so far counts: what a CUDA graph holds shows while it is captured, not while it runs."""
        if self.device == "cuda":
            self.captured = torch.cuda.max_memory_allocated()

    def peak(self, step: Callable, *holders: nn.Module | Tensor) -> float:
        """Of one `step`. On a CPU what `holders` hold and the most that the step allocates, by the profiler."""
        if self.device == "cuda":
            # Not what parity took.
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return (max(self.captured, torch.cuda.max_memory_allocated()) - self.before) / 2**20
        with autograd_profile(profile_memory=True) as profiler:
            step()
        held, most, mine = 0, 0, set()
        for address, size in _allocations(profiler):
            if size > 0:
                mine.add(address)
            elif address not in mine:
                continue  # freed here, allocated before: the profiler knows those of earlier profiles
            held += size
            most = max(most, held)
        tensors = {}
        for holder in holders:
            for x in (*holder.parameters(), *holder.buffers()) if isinstance(holder, nn.Module) else [holder]:
                # oneDNN's own layouts have no address.
                tensors[id(x) if x.is_mkldnn else x.data_ptr()] = x.numel() * x.element_size()
        return (most + sum(tensors.values())) / 2**20


def _allocations(profiler: autograd_profile) -> list[tuple[int, int]]:
    """Address and bytes, negative where they were freed, in order of time."""
    found, events = [], list(profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # Of one nanosecond in the order of the tree, which `pop` has reversed.
    return [(address, size) for _, address, size in sorted(reversed(found), key=lambda entry: entry[0])]


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
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {"launches": asked, "kernels": sum(not re.match("Mem(cpy|set)", e.name) for e in ran)}


class MatrixWork(TorchDispatchMode):
    """Counts the matrix products and convolutions that run inside, each with FLOPs and the elements it touches.

    weights: what is read once however many clips there are.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.weights = {_storage(x) for x in weights}
        self.found: Counter[tuple[str, int, int, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            elements = [0, 0]  # of clips, of weights
            for x in tree_flatten((args, kwargs, out))[0]:
                if isinstance(x, Tensor):
                    elements[_storage(x) in self.weights] += x.numel()
            self.found[(function._overloadpacket.__name__, flops, *elements)] += 1
        return out

    def ops(self, itemsize: int, clips: float) -> list[Op]:
        """The work as roofline's ops, for `clips` times what ran."""
        return [
            Op(name, 0, calls, int(flops * clips), int((elements * clips + weights) * itemsize))
            for (name, flops, elements, weights), calls in self.found.items()
        ]


def _storage(x: Tensor) -> int:
    """Whose memory it is, also of a part."""
    return x.untyped_storage().data_ptr()
