"""CUDA-graph capture: nothing else knows of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3


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
        # As PyTorch asks: on a stream of its own, after runs that allocate, compile and load what they need.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*static)

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
