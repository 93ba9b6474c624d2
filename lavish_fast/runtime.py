"""torch.compile and CUDA graphs: nothing else knows of them.

`optimize` makes a model's fastest form for inference, `explain` says what each of its ops takes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lavish_fast import ops
from lavish_fast.adapter import BlockAdapters
from lavish_fast.concatenated import Concatenated, sharing
from lavish_fast.inference import Inference
from lavish_fast.model import Model, images

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # clips
_WARM_UPS = 3


def optimize(
    model: Model,
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    path: str = "auto",
    compile: bool = True,
    cuda_graphs: bool | None = None,
    batch_sizes: Sequence[int] | None = None,
) -> Fast | FastTraining:
    """The model's fastest form for inference, or for training, called as the model is.

    On a Swin-V2 both streams run as one batch through each frozen block, biases are merged and constants made once; on
    a CPU the adapters' norms are folded into their products and the weights are laid out for oneDNN. A ViT keeps its
    order of operations. The model stays as it is, and what is made of it does not follow its later changes.

    For training the adapters and the head have the model's own parameters and buffers, in their type: an optimiser of
    the one trains the other. What is returned is a module in training mode, for any loop (see `FastTraining`).

    Args:
        model: on the device that it is to run on.
        training: whether it is to be trained.
        dtype: of weights and arithmetic, e.g. torch.bfloat16; that of the model without it. Inputs may be of any
            floating type, the probabilities come in the model's. In training it is the frozen weights' and the
            streams', and the trained parameters, where theirs is wider, run under autocast, as a ViT does as a whole.
        path: of every op: "auto", "fused" (an error where a kernel cannot be had) or "reference".
        compile: whether the blocks go through torch.compile, one of each kind and at the first call; the code
            serves every batch size.
        cuda_graphs: whether calls replay captured CUDA graphs; by default on a CUDA device.
        batch_sizes: in clips of the configuration's seconds, what graphs are captured for, each at its first use; by
            default 1, 2, 4 ... 32. Other batches are padded to the next of them, larger ones are cut. In training
            by default the first batch's, and others run without a graph: padding would change BatchNorm's statistics.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model: expected a lavish_fast.Model, got {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating type such as torch.bfloat16, got {dtype}")
    parameter = next(model.parameters())
    cuda = parameter.is_cuda
    if cuda_graphs and not cuda:
        raise ValueError(f"cuda_graphs: expected a model on a CUDA device, got one on {parameter.device}")
    sizes = BATCH_SIZES if batch_sizes is None else tuple(batch_sizes)
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes: expected clips, at least 1 each, got {batch_sizes}")
    if training:
        return FastTraining(model, dtype, path, compile, cuda and cuda_graphs is not False, batch_sizes)
    if model.config.backbone.kind == "swinv2":
        # The fused adapter applies the norms as they are; without a card they are folded.
        fold = path == "reference" or (path == "auto" and not cuda)
        network: nn.Module = Inference(model, dtype=dtype, fold=fold, path=path, pack=True)
        parts = network.blocks if cuda else [p for b in network.blocks for p in (b.attention, b.p1, b.p2)]
    else:
        network = copy.deepcopy(model).to(dtype).eval().requires_grad_(False).set_path(path)
        parts = network.adapters  # they run the frozen blocks too
    explain(network)  # raises where "fused" cannot be had
    if compile:
        _compile(parts)
    sizes = sorted({size * model.config.frames for size in sizes})
    return Fast(model, network, dtype or parameter.dtype, sizes if cuda and cuda_graphs is not False else None)


class Fast:
    """What `optimize` returns. Calls may come from several threads; each returns tensors of its own.

    network: the module that runs.
    """

    def __init__(self, model: Model, network: nn.Module, dtype: torch.dtype, sizes: list[int] | None) -> None:
        self.config, self.network = model.config, network
        self._dtype, self._out_dtype = dtype, next(model.parameters()).dtype
        self._device = next(model.parameters()).device
        self._run = network.classify if sizes is None else Graphs(network.classify, sizes)

    @torch.no_grad()
    def __call__(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """Class probabilities (B * T, K) of what `Model.forward` takes, on the model's device.

        Raises: ValueError naming the input, what was expected and what came.
        """
        streams = images(self.config, audio, video)
        for name, x in streams.items():
            if x.device != self._device:
                raise ValueError(f"{name}: expected a tensor on {self._device}, got one on {x.device}")
        return self._run(*(x.to(self._dtype) for x in streams.values())).to(self._out_dtype)


class FastTraining(nn.Module):
    """What `optimize` returns for training: a module that shares the model's adapters and head.

    `train()` and `eval()` are its own, not the model's. On CUDA the forward and the backward pass are a graph each,
    while in training and for the batch sizes that `optimize` says, with one backward for each forward; loss, optimiser,
    gradient accumulation and scaling stay the loop's. Under DistributedDataParallel or with SyncBatchNorm take
    `cuda_graphs=False`.

    network: the module that runs.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None,
        path: str,
        compile: bool,
        cuda_graphs: bool,
        batch_sizes: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.config = model.config
        self._out_dtype = next(model.parameters()).dtype
        if model.config.backbone.kind == "swinv2":
            self.network: nn.Module = Concatenated(model, dtype=dtype, path=path)
            self._autocast, parts = None, self.network.blocks  # it has its own
        else:
            self.network = sharing(model).set_path(path)
            self._autocast, parts = dtype, self.network.adapters
        explain(self)  # raises where "fused" cannot be had
        if compile:
            _compile(parts)
        self._graphed: dict[int, Callable[..., Tensor]] = {}
        self._sizes = None if batch_sizes is None else {size * model.config.frames for size in batch_sizes}
        self._cuda_graphs = cuda_graphs
        self.train()

    def forward(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """Class probabilities (B * T, K) of what `Model.forward` takes, on the model's device.

        Raises: ValueError naming the input, what was expected and what came.
        """
        streams = images(self.config, audio, video)
        device = next(self.network.parameters()).device
        for name, x in streams.items():
            if x.device != device:
                raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
        given = tuple(streams.values())
        return self._choose(given)(*given).to(self._out_dtype)

    def _choose(self, streams: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        classify = _Classify(self.network, self._autocast)
        if not (self._cuda_graphs and self.training and torch.is_grad_enabled()):
            return classify
        rows = len(streams[0])
        if self._sizes is None:
            self._sizes = {rows}
        if rows in self._sizes and rows not in self._graphed:
            buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
            samples = tuple(x.clone() for x in streams)
            self._graphed[rows] = torch.cuda.make_graphed_callables(classify, samples, allow_unused_input=True)
            for buffer, before in buffers:
                buffer.copy_(before)  # the runs before the capture are no steps
        if rows not in self._graphed:
            return classify
        # Autograd may have taken the graph's own gradients, which its next backward overwrites, for the parameters'.
        if held := [p for p in self.network.parameters() if p.grad is not None]:
            for p, gradient in zip(held, torch._foreach_mul([p.grad for p in held], 1)):
                p.grad = gradient
        return self._graphed[rows]


class _Classify(nn.Module):
    """A network's `classify`, under autocast to `dtype` if that is another than its weights'."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, *streams: Tensor) -> Tensor:
        if self.dtype in (None, next(self.network.parameters()).dtype):
            return self.network.classify(*streams)
        with torch.autocast(streams[0].device.type, self.dtype, cache_enabled=False):
            return self.network.classify(*streams)


def _compile(parts: Iterable[nn.Module]) -> None:
    """Sends the modules' forward through torch.compile: once for all that are alike, for images of any number."""
    compiled: dict[Any, Callable] = {}
    for part in parts:
        tensors = (*part.named_parameters(), *part.named_buffers())
        kind = type(part), *((name, t.shape, t.dtype) for name, t in tensors)
        if kind not in compiled:
            # Dynamo keeps what it compiles with the code object, a handful for each, and past that goes on uncompiled
            # and says nothing. A copy has room of its own, whatever else the process compiles, and goes with the model.
            forward = type(part).forward
            own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
            own.__defaults__, own.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
            compiled[kind] = torch.compile(own, dynamic=False)
        part.forward = partial(_call, compiled[kind], part)


def _call(compiled: Callable, part: nn.Module, *arguments: Any) -> Any:
    """Calls may differ in the number of images alone, n of (..., n, N, C)."""
    for x in tree_leaves(arguments):
        if isinstance(x, Tensor):
            torch._dynamo.maybe_mark_dynamic(x, x.ndim - 3)
    return compiled(part, *arguments)


class Explanation(list):
    """What each op of a model takes: rows of op, blocks, shape, path and why, as a table when printed."""

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("op", "blocks", "shape", "path", "why", box=box.SIMPLE_HEAD)
        for row in self:
            shape = " x ".join(map(str, row["shape"])) + f" {row['dtype']}"
            table.add_row(row["op"], row["blocks"], shape, row["path"], row["why"])
        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get()

    __repr__ = __str__


def explain(model: Model | Concatenated | Fast | FastTraining) -> Explanation:
    """Which path each op of a model takes, why, and which launch constants it uses.

    In inference, or in training for what `optimize` made for it.

    Runs every block's ops on one image of zeros, as they are chosen by the tensors' device, type and shape.

    Raises: ValueError where the model asks for "fused" and a kernel cannot be had, with all the reasons.
    """
    training = isinstance(model, FastTraining)
    network = model.network if isinstance(model, (Fast, FastTraining)) else model
    was, buffers = network.training, [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with torch.set_grad_enabled(training):
            found = list(_choices_by_block(network.train(training)))
    finally:
        network.train(was)
        for buffer, before in buffers:
            buffer.copy_(before)  # zeros are no step of training
    rows: dict[tuple, list[int]] = {}
    for i, choices in enumerate(found):
        for choice in choices:
            key = (
                choice.op,
                choice.shape[1:],
                choice.dtype,
                choice.path,
                choice.constants or "; ".join(choice.reasons),
            )
            blocks = rows.setdefault(key, [])
            blocks += [i] if i not in blocks else []
    return Explanation(
        {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "path": path, "why": why}
        | {"blocks": _ranges(blocks)}
        for (op, shape, dtype, path, why), blocks in rows.items()
    )


def _choices_by_block(network: nn.Module) -> Iterator[list[ops.Choice]]:
    """What the ops of each block choose for one image, without what may be compiled."""
    streams, first = len(network.config.streams), network.config.adapter.first_block
    if isinstance(network, Concatenated):
        for block in network.blocks:
            size, norm = block.attention.size, block.p1.norm
            x = norm.weight.new_zeros(streams, 1, size * size, len(norm.weight)).requires_grad_(network.training)
            with ops.recording() as choices:
                for part, given in ((block.attention, [x[0].repeat(1, 1, 3)]), (block.p1, [x, x]), (block.p2, [x, x])):
                    type(part).forward(part, *given)
            yield choices
        return
    backbone, side = network.backbone, network.config.backbone.img_size
    x = backbone.embed(next(network.parameters()).new_zeros(1, 3, side, side)).requires_grad_(network.training)
    for i, (block, adapters) in enumerate(zip(backbone.blocks[first:], network.adapters), first):
        x = backbone.enter(i, x)
        with ops.recording() as choices:
            BlockAdapters.forward(adapters, block, [x] * streams)
        yield choices


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[n for _, n in group] for _, group in groups]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


class Graphs:
    """`function` of tensors with one row per image, as a CUDA graph for each of `sizes` rows.

    A graph is captured when its size is first needed. Graphs share their memory and their inputs' buffers, so that one
    runs at a time, whichever thread and stream it is called from.
    """

    def __init__(self, function: Callable[..., Tensor], sizes: Sequence[int]) -> None:
        self._function, self._sizes = function, sorted(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._inputs: list[Tensor] = []
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """function(*inputs): the rows of any number, in parts of the largest size."""
        rows, most = len(inputs[0]), self._sizes[-1]
        with self._lock, torch.cuda.device(inputs[0].device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # the last call's graph may run on another stream still
            parts = [self._replay([x[i : i + most] for x in inputs]) for i in range(0, max(rows, 1), most)]
            self._done = stream.record_event()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, inputs: list[Tensor]) -> Tensor:
        rows = len(inputs[0])
        if not self._inputs:
            self._inputs = [x.new_zeros(self._sizes[-1], *x.shape[1:]) for x in inputs]
        size = next(size for size in self._sizes if size >= rows)
        if size not in self._graphs:
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            self._graphs[size] = _capture(self._function, [x[:size] for x in self._inputs], pool)
        for own, x in zip(self._inputs, inputs, strict=True):
            own[:rows].copy_(x)
        graph, output = self._graphs[size]
        graph.replay()
        return output[:rows].clone()


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
    with torch.cuda.graph(graph, pool=pool):
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
