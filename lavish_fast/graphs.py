"""CUDA graphs of functions: `capture` for one shape, `Graphs` for many sizes, `Recorded` for work in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

_WARM_UPS = 3


class Recorded:
    """A function that reads and writes tensors in their places; a CUDA graph once it has run as often as is asked."""

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream | None, pool: Any) -> None:
        self._function, self._where = function, (stream, pool)
        self._left, self._graph = _WARM_UPS, None

    def __call__(self) -> None:
        if self._left:
            self._left -= 1
            return self._function()
        if self._graph is None:
            self._graph = record(self._function, *self._where)
        self._graph.replay()


def record(function: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what a function does in place."""
    graph = torch.cuda.CUDAGraph()
    # A loader's threads may pin memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph


class Graphs:
    """`function` of tensors with a row per image, or one per so many, as a CUDA graph for each of `sizes` images.

    A graph is captured when its size is first needed, and another for inputs of another shape, type or number of images
    to a row. Graphs share their memory and their inputs' buffers, so that one runs at a time, whichever thread and
    stream it is called from. Where no size is whole rows, the function runs as it is.
    """

    def __init__(self, function: Callable[..., Any], sizes: Sequence[int]) -> None:
        self._function, self._sizes = function, sorted(sizes)
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Any]] = {}  # by size and kinds of input
        self._inputs: dict[tuple, Tensor] = {}  # by place and kind
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """function(*inputs): of any number of images, in parts of the largest size. The first input's rows are images.

        Outputs have as many rows as images, or a fixed share of them.
        """
        rows = len(inputs[0])
        kinds = [(Fraction(len(x), rows or 1), x.shape[1:], x.dtype) for x in inputs]
        sizes = [size for size in self._sizes if all(size % share.denominator == 0 for share, *_ in kinds)]
        if not rows or not sizes:
            return self._function(*inputs)
        with self._lock, torch.cuda.device(inputs[0].device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # the last call's graph may run on another stream still
            parts = []
            for first in range(0, rows, sizes[-1]):
                last = min(first + sizes[-1], rows)
                size = next(size for size in sizes if size >= last - first)
                part = [x[int(first * share) : int(last * share)] for x, (share, *_) in zip(inputs, kinds)]
                parts.append(self._replay(part, kinds, size))
            self._done = stream.record_event()
        if len(parts) == 1:
            return parts[0]
        return tree_map(lambda *outputs: None if outputs[0] is None else torch.cat(outputs), *parts)

    def _replay(self, inputs: list[Tensor], kinds: list[tuple], size: int) -> Any:
        rows, own = len(inputs[0]), []
        for place, (x, kind) in enumerate(zip(inputs, kinds)):
            if (place, kind) not in self._inputs:
                self._inputs[place, kind] = x.new_zeros(int(self._sizes[-1] * kind[0]), *x.shape[1:])
            own.append(self._inputs[place, kind][: int(size * kind[0])])
        key = size, *kinds
        if key not in self._graphs:
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            self._graphs[key] = _capture(self._function, own, pool)
        for static, x in zip(own, inputs):
            static[: len(x)].copy_(x)
        graph, outputs = self._graphs[key]
        graph.replay()
        return tree_map_only(Tensor, lambda x: x[: len(x) * rows // size].clone(), outputs)


def _capture(function: Callable, inputs: Sequence[Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of function(*inputs), which reads the inputs where they lie, and its outputs."""
    # As PyTorch asks: on a stream of its own, after runs that allocate, compile and load what they need.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on working meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph, outputs


@torch.no_grad()
def capture(function: Callable, *inputs: Tensor) -> Callable:
    """`function` of these inputs' shapes, types and device as one CUDA graph, for inference.

    The callable copies its inputs into the graph's own and returns the graph's own outputs: the next call overwrites
    them. What the function reads besides its inputs (weights) must stay where it is.

    Raises: ValueError for inputs that are not on one CUDA device; the callable's too, for inputs of other shapes or
        types than the captured ones.
    """
    if not inputs or not all(isinstance(x, Tensor) and x.is_cuda and x.device == inputs[0].device for x in inputs):
        raise ValueError(
            f"capture: expected tensors on one CUDA device, got {', '.join(map(_place, inputs)) or 'none'}"
        )
    static = [x.clone() for x in inputs]
    with torch.cuda.device(inputs[0].device):
        graph, outputs = _capture(function, static)

    @torch.no_grad()
    def replay(*inputs: Tensor) -> Any:
        if _kinds(inputs) != (expected := _kinds(static)):
            raise ValueError(f"captured graph: expected {_text(expected)}, got {_text(_kinds(inputs))}")
        for own, x in zip(static, inputs):
            own.copy_(x)
        graph.replay()
        return outputs

    replay.function = function  # the graph reads its weights at their addresses: they must live as long
    return replay


def _place(x: Any) -> str:
    return str(x.device) if isinstance(x, Tensor) else type(x).__name__


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape), x.dtype) for x in tensors]


def _text(kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in kinds) or "none"
