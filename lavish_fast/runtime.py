"""CUDA-graph capture: nothing else knows of graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UPS = 3


@torch.no_grad()
def capture(function: Callable, *inputs: Tensor) -> Callable:
    """`function` of these inputs' shapes, types and device as one CUDA graph, for inference.

    The callable copies its inputs into the graph's own and returns the graph's own outputs: the next call overwrites
    them. What the function reads besides its inputs (weights) must stay where it is.

    Raises: ValueError for inputs that are not on a CUDA device, or of other shapes than the captured ones.
    """
    if not inputs or not all(x.is_cuda for x in inputs):
        raise ValueError(f"capture: expected CUDA tensors, got {', '.join(x.device.type for x in inputs) or 'none'}")
    static = [x.clone() for x in inputs]
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

    def replay(*inputs: Tensor) -> Tensor:
        for own, x in zip(static, inputs, strict=True):
            if own.shape != x.shape:
                raise ValueError(f"captured graph: expected shape {tuple(own.shape)}, got {tuple(x.shape)}")
            own.copy_(x)
        graph.replay()
        return outputs

    return replay
