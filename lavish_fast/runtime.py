"""torch.compile and CUDA graphs: nothing else knows of them.

`optimize` makes a model's fastest form for inference or training, `explain` says what each of its ops takes,
`TrainingStep` takes whole steps of training.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import groupby, zip_longest
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from lavish_fast import ops, tasks
from lavish_fast.adapter import BlockAdapters
from lavish_fast.backbones import DropPath
from lavish_fast.concatenated import Concatenated, sharing
from lavish_fast.config import Config
from lavish_fast.inference import Inference
from lavish_fast.model import Model, Network

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # clips
LOSS_SCALE = 2.0**16  # the first, of torch.amp.GradScaler, as the three below
_GROWTH, _BACKOFF, _GROWTH_STEPS = 2.0, 0.5, 2000
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
    sizes = _clips(batch_sizes)
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
        given = _inputs(self.config, self._device, self._dtype, args, kwargs)
        with torch.autocast(self._device.type, enabled=False):
            return _cast(self._run(*given), self._out_dtype)


def _clips(batch_sizes: Any) -> set[int] | None:
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


def _inputs(
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
        self._cuda_graphs = _captures(self, cuda_graphs)
        own = {id(buffer) for buffer in _Statistics(self).buffers}
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
        given = _inputs(self.config, next(self.parameters()).device, self.dtype, args, kwargs)
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
            statistics = _Statistics(self.network)
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


def _captures(network: Model | FastTraining, cuda_graphs: bool | None) -> bool:
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


class _Statistics:
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
        self._forward, self._statistics, self._random = block.forward, _Statistics(block), random

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
    statistics = _Statistics(network)
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


class Outcome(NamedTuple):
    """What a step did, over all ranks: 0-dim float64 tensors on the device. Reading one waits for the step.

    loss: the mean over the step's clips. failed: clips to blame for probabilities that are not finite; no step was
    taken then, and loss, segments and clips are 0. overflow: 1 where gradients are not finite and no step was taken.
    """

    loss: Tensor
    segments: Tensor
    clips: Tensor
    failed: Tensor
    overflow: Tensor


class TrainingStep:
    """Steps of training: forward, loss, backward, accumulation, loss scaling and fused Adam, as CUDA graphs.

        step = TrainingStep(optimize(model, training=True), ave.loss, optimizer)
        for audio, video, labels in loader:
            step.accumulate(audio, video, labels=labels)  # as often as a step has micro-batches
            outcome = step.finish()

    A micro-batch counts by its clips, so k of them are one batch k times as large, but for BatchNorm. A step in
    which a clip gives NaN or infinity, or in which gradients overflow, leaves parameters, Adam's state and BatchNorm's
    buffers as they were, without a word to the host; so does one in which an exception is raised, and the next
    micro-batch begins another. Where torch.distributed has several ranks their gradients are summed between the graphs,
    and each must call `finish` equally often.

    Captured: one graph for each shape of micro-batch that `batch_sizes` says, and one that finishes the step; each
    after three calls that run as they are. Not captured: micro-batches of other shapes (the same functions run), the
    sum over ranks, networks with SyncBatchNorm, and on a CPU anything. A graph keeps what it was captured with:
    requires_grad, the modes of single modules, the optimiser's settings but for learning rates; `reset` reads these and
    has all captured anew. The optimiser's own step and zero_grad are not to be called.

    Args:
        network: a `Model`, or what `optimize` made of it for training.
        loss: of the network's outputs and labels, their mean over the labels' entries (the segments), a scalar. It must
            not read tensors on the host. Rows of the first output that are not finite reach it as 1 / K, K columns.
        optimizer: torch.optim.Adam or AdamW with fused=True. Its learning rates may be changed at any time.
        loss_scale: the first factor of the loss, doubled after 2000 steps without an overflow and halved by one; by
            default 65536 for a network in float16 and none for others.
        cuda_graphs: whether to capture; by default on a CUDA device, if nothing stands against it.
        batch_sizes: in clips, what is captured; by default the first micro-batch's.

    Raises: ValueError naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        network: Model | FastTraining,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        loss_scale: float | None = None,
        cuda_graphs: bool | None = None,
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(network, (Model, FastTraining)):
            expected = "a Model or what optimize(model, training=True) returns"
            raise ValueError(f"network: expected {expected}, got {type(network).__name__}")
        adam = isinstance(optimizer, torch.optim.Adam)
        if not adam or not all(group["fused"] for group in optimizer.param_groups):
            got = type(optimizer).__name__ + (" without it" if adam else "")
            raise ValueError(f"optimizer: expected Adam or AdamW with fused=True, got {got}")
        if loss_scale is not None and not 0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale: expected a positive number, got {loss_scale}")
        self.network, self.optimizer, self._loss = network, optimizer, loss
        self._device = device = next(network.parameters()).device
        self._dtype = network.dtype if isinstance(network, FastTraining) else next(network.parameters()).dtype
        self._statistics = _Statistics(network)
        self._kept = self._statistics.flat()  # as they were before the step under way
        if loss_scale is None and getattr(network, "dtype", None) == torch.float16:
            loss_scale = LOSS_SCALE
        self._scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float32, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)  # steps without an overflow
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, segments, clips, clips that failed
        self._outcome = torch.zeros(len(Outcome._fields), dtype=torch.float64, device=device)
        self._begun = False
        self._graphs = _captures(network, cuda_graphs)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._graphs else None
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()
        self._sizes = _clips(batch_sizes)
        self.reset()
        # It replaces the tensors that a graph writes to.
        optimizer.register_load_state_dict_post_hook(lambda _: self.reset())

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled."""
        return self._scale is not None

    def reset(self) -> None:
        """Forgets the graphs, and the micro-batches of a step that is not finished."""
        self._abandon()
        groups, device = self.optimizer.param_groups, self._device
        parameters = [p for group in groups for p in group["params"]]
        self._parameters = [p for p in parameters if p.requires_grad]
        for frozen in (p for p in parameters if not p.requires_grad):
            frozen.grad = None  # or Adam would go on moving it
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        # Adam's kernel takes float32; a CPU takes a number, as it would from the optimiser.
        rate = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=rate, device=device) for _ in groups]
        self._micro: dict[tuple, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}
        self._last = self._recorded(self._take)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the loss scaling; empty without it. Model and optimiser have their own."""
        return {} if self._scale is None else {"scale": self._scale.clone(), "growth": self._growth.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave. Raises: ValueError naming what was expected and what came."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"loss scale: expected {sorted(self.state_dict())}, got {sorted(state)}")
        for name, own in (("scale", self._scale), ("growth", self._growth)):
            if name in state:
                own.copy_(state[name])

    def accumulate(self, *args: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        """Adds a micro-batch's gradients to the step's.

        Args:
            args, kwargs: as for `Model.forward`, on the model's device.
            labels: (B, ...), for event localisation a class for each segment.

        Returns: (B,) bool on the device, False for clips that are to blame for outputs that are not finite: those whose
            inputs are not, and if there are none, those whose outputs are not.

        Raises: ValueError naming the tensor, what was expected and what came.
        """
        inputs = _inputs(self.network.config, self._device, self._dtype, args, kwargs)
        clips = len(next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        if not isinstance(labels, Tensor) or labels.device != self._device or not labels.ndim or len(labels) != clips:
            got = f"{tuple(labels.shape)} on {labels.device}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels: expected a tensor ({clips}, ...) on {self._device}, got {got}")
        if not labels.numel():
            raise ValueError(f"labels: expected a segment, got {tuple(labels.shape)}")
        given = [*(x.detach() for x in inputs), labels]
        with self._on_stream(), self._whole():
            self._begin()
            if self._sizes is None:
                self._sizes = {clips}
            if not (self._graphs and clips in self._sizes):
                fine = torch.empty(clips, dtype=torch.bool, device=self._device)
                self._add(given, fine)
                return fine
            key = (self.network.training, *((x.shape, x.dtype) for x in given))
            if key not in self._micro:
                own, fine = [x.clone() for x in given], torch.empty(clips, dtype=torch.bool, device=self._device)
                self._micro[key] = own, fine, self._recorded(partial(self._add, own, fine))
            own, fine, run = self._micro[key]
            for static, x in zip(own, given):
                static.copy_(x, non_blocking=True)
            run()
            return fine.clone()

    @torch.no_grad()
    def finish(self) -> Outcome:
        """Takes the step, if no clip failed and no gradient overflowed. `grad` of the parameters is then their mean."""
        with self._on_stream(), self._whole():
            self._begin()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self._sums)
                flat = torch.cat([gradient.flatten() for gradient in self._gradients])
                dist.all_reduce(flat)
                parts = flat.split([gradient.numel() for gradient in self._gradients])
                torch._foreach_copy_(self._gradients, [x.view_as(g) for x, g in zip(parts, self._gradients)])
            for own, group in zip(self._rates, self.optimizer.param_groups):
                own.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else own.fill_(group["lr"])
            self._last()
            self._begun = False
            return Outcome(*self._outcome.clone().unbind())

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            for parameter, gradient in zip(self._parameters, self._gradients):
                parameter.grad = gradient
            torch._foreach_zero_(self._gradients)
            self._sums.zero_()
            for kept, now in zip(self._kept, self._statistics.flat()):
                kept.copy_(now)

    def _abandon(self) -> None:
        if self._begun:
            self._statistics.put(self._kept)
        self._begun = False

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """A step that is cut short, by an error or by the user, is none: the next micro-batch begins another."""
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _add(self, given: list[Tensor], fine: Tensor) -> None:
        *inputs, labels = given
        clips = len(labels)
        with torch.enable_grad():
            outputs = self.network.classify(*inputs)
            first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
            rows = first.detach().flatten(1).isfinite().all(1)
            # Binary cross-entropy of NaN ends the process on a GPU.
            usable = first.masked_fill(~rows.view(-1, *(1,) * (first.ndim - 1)), 1 / first.shape[-1])
            usable = (usable, *rest) if rest else usable
            loss = self._loss(usable, labels) * clips
            scaled = loss if self._scale is None else loss * self._scale
            found = torch.autograd.grad(scaled, self._parameters, allow_unused=True)
        # A launch for many parameters, where autograd's own sums are one each.
        owns = [own for own, gradient in zip(self._gradients, found) if gradient is not None]
        if owns:
            torch._foreach_add_(owns, [gradient for gradient in found if gradient is not None])
        # BatchNorm spreads one clip's NaN over its batch.
        finite = rows.view(clips, -1).all(-1)
        sound = torch.stack([x.reshape(clips, -1).isfinite().all(1) for x in inputs]).all(0)
        fine.copy_(torch.where(sound.all(), finite, sound) | finite.all())
        failed = clips - fine.sum()
        for total, value in zip(self._sums.unbind(), (loss.detach(), labels.numel(), clips, failed)):
            total += value

    @torch.no_grad()
    def _take(self) -> None:
        """From summed gradients to Adam's step, or to none."""
        loss, segments, clips, failed = self._sums.unbind()
        bad, one = torch.zeros(1, device=self._device), torch.ones(1, device=self._device)
        for kind in dict.fromkeys(gradient.dtype for gradient in self._gradients):
            of_kind = [gradient for gradient in self._gradients if gradient.dtype == kind]
            torch._amp_foreach_non_finite_check_and_unscale_(of_kind, bad, one)
        counts = (failed == 0) & (segments > 0)
        overflow = counts & (bad > 0).squeeze()
        refused = overflow | ~counts
        divisor = clips.float() if self._scale is None else clips.float() * self._scale
        with self._borrowed(grad_scale=divisor, found_inf=refused.float()):
            self.optimizer.step()
        if self._scale is not None:
            scale, growth = self._scale.clone(), self._growth.clone()
            torch._amp_update_scale_(scale, growth, bad, _GROWTH, _BACKOFF, _GROWTH_STEPS)
            self._scale.copy_(torch.where(counts, scale, self._scale))
            self._growth.copy_(torch.where(counts, growth, self._growth))
        pairs = zip(self._kept, self._statistics.flat())
        self._statistics.put([torch.where(refused, kept, now) for kept, now in pairs])
        zero = torch.zeros_like(loss)
        loss, segments, clips = (torch.where(counts, x, zero) for x in (loss / clips, segments, clips))
        self._outcome.copy_(torch.stack((loss, segments, clips, failed, overflow.double())))

    @contextlib.contextmanager
    def _borrowed(self, **attributes: Tensor) -> Iterator[None]:
        """The optimiser, set to be captured; afterwards as its owner had it."""
        groups = self.optimizer.param_groups
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        before = [(group["lr"], group["capturable"]) for group in groups]
        try:
            vars(self.optimizer).update(attributes)
            for group, rate in zip(groups, self._rates):
                group.update(lr=rate, capturable=capturing)
            yield
        finally:
            for name in attributes:
                delattr(self.optimizer, name)
            for group, (rate, capturable) in zip(groups, before):
                group.update(lr=rate, capturable=capturable)

    def _recorded(self, function: Callable[[], None]) -> Callable[[], None]:
        return _Recorded(function, self._stream, self._pool) if self._graphs else function

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work is on one stream, captured or not, as the nodes of autograd remember theirs."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                torch.cuda.current_stream().wait_stream(self._stream)


class _Recorded:
    """A function that reads and writes tensors in their places; a CUDA graph once it has run as often as is asked."""

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream | None, pool: Any) -> None:
        self._function, self._where = function, (stream, pool)
        self._left, self._graph = _WARM_UPS, None

    def __call__(self) -> None:
        if self._left:
            self._left -= 1
            return self._function()
        if self._graph is None:
            self._graph = _record(self._function, *self._where)
        self._graph.replay()


def _record(function: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
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
