"""Whole steps of training: forward, loss, backward, accumulation, loss scaling and Adam, as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lavish_fast.graphs import Recorded
from lavish_fast.model import Model
from lavish_fast.runtime import FastTraining, Statistics, captures, checked_sizes, inputs_of

LOSS_SCALE = 2.0**16  # the first, of torch.amp.GradScaler, as the three below
_GROWTH, _BACKOFF, _GROWTH_STEPS = 2.0, 0.5, 2000


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
        self._statistics = Statistics(network)
        self._kept = self._statistics.flat()  # as they were before the step under way
        if loss_scale is None and getattr(network, "dtype", None) == torch.float16:
            loss_scale = LOSS_SCALE
        self._scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float32, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)  # steps without an overflow
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, segments, clips, clips that failed
        self._outcome = torch.zeros(len(Outcome._fields), dtype=torch.float64, device=device)
        self._begun = False
        self._graphs = captures(network, cuda_graphs)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._graphs else None
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()
        self._sizes = checked_sizes(batch_sizes)
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
        inputs = inputs_of(self.network.config, self._device, self._dtype, args, kwargs)
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
        return Recorded(function, self._stream, self._pool) if self._graphs else function

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
