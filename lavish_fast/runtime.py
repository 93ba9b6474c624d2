"""A model's fastest form, by torch.compile and CUDA graphs.

`optimize` makes it, for inference or training; `explain` says what each of its ops takes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, zip_longest
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lavish_fast import ops, tasks
from lavish_fast.adapter import BlockAdapters
from lavish_fast.backbones import DropPath
from lavish_fast.concatenated import Concatenated, sharing
from lavish_fast.config import Config
from lavish_fast.graphs import Graphs
from lavish_fast.inference import Inference
from lavish_fast.model import Model, Network

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # clips


def optimize(
    model: Model,
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    path: str = "auto",
    compile: bool = True,
    cuda_graphs: bool | None = None,
    batch_sizes: Sequence[int] | None = None,
    checkpointing: bool = False,
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
            streams', and may be another than the trained parameters' only where these are float32 and it is bfloat16 or
            float16: they then run under autocast, and one around a call has no say.
        path: of every op: "auto", "fused" (an error where a kernel cannot be had) or "reference".
        compile: whether the blocks go through torch.compile, one of each kind and at the first call; the code
            serves every batch size.
        cuda_graphs: whether calls replay captured CUDA graphs; by default on a CUDA device.
        batch_sizes: in clips of the configuration's seconds, what graphs are captured for, each at its first use; by
            default 1, 2, 4 ... 32. Other batches are padded to the next of them, larger ones are cut. In training
            by default the first batch's, and others run without a graph: padding would change BatchNorm's statistics.
        checkpointing: in training, keep the blocks' inputs alone and run each block again in the backward pass: less
            memory, a forward pass more of time, the same gradients and buffers. With a drop path it has no graphs.

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
    sizes = checked_sizes(batch_sizes)
    if training:
        return FastTraining(model, dtype, path, compile, cuda_graphs, sizes, checkpointing)
    if checkpointing:
        raise ValueError("checkpointing: expected training=True, got a model for inference")
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
    sizes = sorted({size * model.config.images for size in sizes or BATCH_SIZES})
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
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for what `Model.forward` takes, on the model's device; under autocast the same.

        Raises: ValueError naming the input, what was expected and what came.
        """
        given = inputs_of(self.config, self._device, self._dtype, args, kwargs)
        with torch.autocast(self._device.type, enabled=False):
            return _cast(self._run(*given), self._out_dtype)


def checked_sizes(batch_sizes: Any) -> set[int] | None:
    """Batch sizes, or None for none. Raises: ValueError for anything but numbers of clips."""
    if batch_sizes is None:
        return None
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else ()
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes: expected clips, at least 1 each, got {batch_sizes}")
    return set(sizes)


def _cast(tensors: Any, dtype: torch.dtype) -> Any:
    """A tensor or a structure of them with the floating ones in another type."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tensors)


def inputs_of(
    config: Config, device: torch.device, dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """What `Model.classify` takes of the arguments of `Model.forward`, once all of it is on the device, in a type."""
    given = tasks.load(config.task).inputs(config, *args, **kwargs)
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    return _cast(tuple(given.values()), dtype)


class FastTraining(nn.Module):
    """What `optimize` returns for training: a module that shares the model's adapters and head.

    `train()` and `eval()` are its own, not the model's. On CUDA its forward and its backward pass are a graph each,
    while in training and for the batch sizes that `optimize` says, with one backward for each forward; loss, optimiser,
    gradient accumulation and scaling stay the loop's. `TrainingStep` has all of these in its graphs.

    Nothing is captured with SyncBatchNorm, or where checkpointing meets a drop path. Under DistributedDataParallel take
    `cuda_graphs=False`; it then broadcasts BatchNorm's buffers, not the frozen weights, of which each rank has its own.

    It stays on its device and in its types: after the model has moved, call `optimize` on it anew.

    network: the module that runs. dtype: of its arithmetic, and what inputs are cast to.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None,
        path: str,
        compile: bool,
        cuda_graphs: bool | None,
        batch_sizes: set[int] | None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        trained = next(model.head.parameters()).dtype
        if dtype not in (None, trained) and (dtype.itemsize, trained) != (2, torch.float32):
            expected = f"{trained}, the trained parameters'"
            expected += ", or beside it torch.bfloat16 or torch.float16" if trained == torch.float32 else ""
            raise ValueError(f"dtype: expected {expected}, got {dtype}")
        self.config, self.checkpointing = model.config, checkpointing
        self._out_dtype = next(model.parameters()).dtype
        self.dtype = dtype or self._out_dtype
        if model.config.backbone.kind == "swinv2":
            self.network: nn.Module = Concatenated(model, dtype=dtype, path=path)
            parts = frozen = self.network.blocks
        else:
            self.network = sharing(model).set_path(path)
            if self.dtype != self._out_dtype:
                self.network.backbone = copy.deepcopy(model.backbone).to(self.dtype)
                self.network.vggish = None if model.vggish is None else copy.deepcopy(model.vggish).to(self.dtype)
            parts, frozen = self.network.adapters, self.network.backbone.blocks[-len(self.network.adapters) :]
        self.train()
        explain(self)  # raises where "fused" cannot be had
        if compile:
            _compile(parts, frozen)
        if checkpointing:
            for part in parts:
                part.forward = _Checkpointed(part, _drops(self.config))
        self._graphed: dict[tuple, Callable[..., Any]] = {}
        self._sizes = None if batch_sizes is None else {size * model.config.images for size in batch_sizes}
        self._cuda_graphs = captures(self, cuda_graphs)
        own = {id(buffer) for buffer in Statistics(self).buffers}
        # Read by DistributedDataParallel, which would broadcast every buffer before each forward pass.
        self._ddp_params_and_buffers_to_ignore = [n for n, buffer in self.named_buffers() if id(buffer) not in own]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastTraining:
        # Other buffers would no longer be the model's, nor those that graphs and checkpointing know.
        if any(fn(t) is not t for t in (*self.parameters(), *self.buffers())):
            raise ValueError(
                "network: expected to keep its device and types, got others: call optimize on the moved model"
            )
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs for what `Model.forward` takes, on the model's device.

        Raises: ValueError naming the input, what was expected and what came.
        """
        given = inputs_of(self.config, next(self.parameters()).device, self.dtype, args, kwargs)
        with self._arithmetic():
            return _cast(self._choose(given)(*given), self._out_dtype)

    def classify(self, *inputs: Tensor) -> Any:
        """As `Model.classify`, without a graph."""
        with self._arithmetic():
            return _cast(self.network.classify(*inputs), self._out_dtype)

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        """Without a caller's autocast, where the network has its own."""
        if self.dtype == self._out_dtype:
            return contextlib.nullcontext()
        return torch.autocast(next(self.parameters()).device.type, enabled=False)

    def _choose(self, given: tuple[Tensor, ...]) -> Callable[..., Any]:
        if not (self._cuda_graphs and self.training and torch.is_grad_enabled()):
            return self.network.classify
        # A graph's backward pass is that of the parameters and modes that it was captured with.
        parameters = list(self.network.parameters())
        trained = tuple(p.requires_grad for p in parameters)
        modes = tuple(module.training for module in self.network.modules())
        rows, key = len(given[0]), (*((x.shape, x.dtype) for x in given), trained, modes)
        if self._sizes is None:
            self._sizes = {rows}
        if rows in self._sizes and key not in self._graphed:
            statistics = Statistics(self.network)
            before = statistics.flat()
            samples = tuple(x.clone() for x in given)
            flat = _Flat(self.network)
            try:
                graphed = torch.cuda.make_graphed_callables(flat, samples, allow_unused_input=True)
            finally:
                statistics.put(before)  # the runs before the capture are no steps
            # Copies: the next call writes over the graph's own outputs.
            self._graphed[key] = lambda *inputs: flat.restored(tuple(x.clone() for x in graphed(*inputs)))
        if key not in self._graphed:
            return self.network.classify
        # Autograd may have taken the graph's own gradients, which its next backward overwrites, for the parameters'.
        if held := [p for p in parameters if p.grad is not None]:
            for p, gradient in zip(held, torch._foreach_mul([p.grad for p in held], 1)):
                p.grad = gradient
        return self._graphed[key]


def _drops(config: Config) -> bool:
    return getattr(config.backbone, "drop_path_rate", 0) > 0


def captures(network: Model | FastTraining, cuda_graphs: bool | None) -> bool:
    """Whether a network's passes are captured. Raises: ValueError where they are to be and cannot."""
    device = next(network.parameters()).device
    if device.type != "cuda":
        why = f"a model on a CUDA device, got one on {device}"
    elif any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()):
        why = "BatchNorm of one process, got SyncBatchNorm"
    elif getattr(network, "checkpointing", False) and _drops(network.config):
        why = "no drop path where blocks run again, got one"  # its random state would have to be read and set
    else:
        return cuda_graphs is not False
    if cuda_graphs:
        raise ValueError(f"cuda_graphs: expected {why}")
    return False


class Statistics:
    """The buffers of a module's BatchNorms, as one flat tensor of each type: few launches for many of them."""

    def __init__(self, module: nn.Module) -> None:
        norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        kinds = dict.fromkeys(buffer.dtype for buffer in self.buffers)
        self._groups = [[buffer for buffer in self.buffers if buffer.dtype == kind] for kind in kinds]

    def flat(self) -> list[Tensor]:
        """A copy of them."""
        return [torch.cat([buffer.flatten() for buffer in group]) for group in self._groups]

    @torch.no_grad()
    def put(self, flat: list[Tensor]) -> None:
        """Sets them, also between a forward pass that read them and its backward pass."""
        for group, values in zip(self._groups, flat):
            parts = values.split([buffer.numel() for buffer in group])
            torch._foreach_copy_([b.data for b in group], [x.view_as(b) for x, b in zip(parts, group)])


class _Checkpointed:
    """A block's forward, run again in the backward pass, where it leaves BatchNorm's buffers as they are.

    random: whether it draws random numbers.
    """

    def __init__(self, block: nn.Module, random: bool) -> None:
        self._forward, self._statistics, self._random = block.forward, Statistics(block), random

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*arguments)
        return torch.utils.checkpoint.checkpoint(
            self._forward,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=self._random,
            context_fn=lambda: (contextlib.nullcontext(), self._again()),
        )

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        before = self._statistics.flat()
        try:
            yield
        finally:
            self._statistics.put(before)


class _Flat(nn.Module):
    """What `classify` returns as a tuple of tensors and of nothing else, which is what PyTorch makes graphs of."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, self._structure = tree_flatten(self.network.classify(*inputs))
        self._tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def restored(self, outputs: tuple[Tensor, ...]) -> Any:
        """What it returned, of such a tuple; where there was no tensor there is None."""
        given = iter(outputs)
        return tree_unflatten([next(given) if tensor else None for tensor in self._tensors], self._structure)


def _compile(parts: Iterable[nn.Module], frozen: Iterable[nn.Module] = ()) -> None:
    """Sends the modules' forward through torch.compile: once for all that are alike, for images of any number.

    frozen: in training, what of the backbone each of them runs.
    """
    compiled: dict[Any, Callable] = {}
    for part, block in zip_longest(parts, frozen):
        tensors = (*part.named_parameters(), *part.named_buffers())
        drops = [m.rate for m in block.modules() if isinstance(m, DropPath)] if block is not None else []
        kind = type(part), *((name, t.shape, t.dtype) for name, t in tensors), *drops
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

    Runs every block's ops on two images of zeros, as they are chosen by the tensors' device, type and shape.

    Raises: ValueError for another module, or where the model asks for "fused" and a kernel cannot be had, with all the
        reasons.
    """
    training = isinstance(model, FastTraining)
    network = model.network if isinstance(model, (Fast, FastTraining)) else model
    if not isinstance(network, Network):
        raise ValueError(f"model: expected a lavish_fast.Model or what optimize returns, got {type(model).__name__}")
    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    statistics = Statistics(network)
    before = statistics.flat()
    try:
        # Drop path draws random numbers, which nobody shall miss.
        rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.set_grad_enabled(training), rng:
            if network.training != training:
                network.train(training)
            found = list(_choices_by_block(network))
    finally:
        for module, was in modes:
            module.training = was
        statistics.put(before)  # zeros are no step of training
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
    """What the ops of each block choose for two images, without what may be compiled."""
    streams, first = len(network.config.streams), network.config.adapter.first_block
    if isinstance(network, Concatenated):
        for block in network.blocks:
            size, norm = block.attention.size, block.p1.norm
            x = norm.weight.new_zeros(streams, 2, size * size, len(norm.weight)).requires_grad_(network.training)
            with ops.recording() as choices:
                for part, given in ((block.attention, [x[0].repeat(1, 1, 3)]), (block.p1, [x, x]), (block.p2, [x, x])):
                    type(part).forward(part, *given)
            yield choices
        return
    backbone, config = network.backbone, network.config
    side, sound = config.backbone.img_size, config.spectrogram
    shapes = {"audio": (3, sound.frames, sound.mel_bins), "video": (3, side, side)}
    if config.images == 1 < config.frames:
        shapes["video"] = (3, config.frames, side, side)
    zeros = [next(network.parameters()).new_zeros(2, *shapes[stream]) for stream in config.streams]
    xs = [backbone.embed(x).requires_grad_(network.training) for x in zeros]
    for i, (block, adapters) in enumerate(zip(backbone.blocks[first:], network.adapters), first):
        xs = [backbone.enter(i, x) for x in xs]
        with ops.recording() as choices:
            BlockAdapters.forward(adapters, block, xs)
        yield choices


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[n for _, n in group] for _, group in groups]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
