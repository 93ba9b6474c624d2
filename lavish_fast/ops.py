"""The public ops, each with its path: the only file that chooses between reference and fused.

path "reference" takes `lavish_fast.reference`; "fused" takes the kernel or raises with all the reasons why it cannot;
"auto" takes the kernel on a CUDA device when there is no such reason. The choice depends on the tensors' devices,
types and shapes and on whether gradients are wanted, on nothing else. `recording` writes down what was chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lavish_fast import attention as attention_kernels
from lavish_fast import reference
from lavish_fast.kernels import _checks, _tuning

try:
    from lavish_fast.kernels import adapter as adapter_kernel
    from lavish_fast.kernels import adapter_training as training_kernel
    from lavish_fast.kernels import gather_latents as gather_kernel
    from lavish_fast.kernels import window_attention as window_kernel
except ImportError:  # no triton: `_checks.reasons` says so
    adapter_kernel = training_kernel = gather_kernel = window_kernel = None

if TYPE_CHECKING:
    from lavish_fast.adapter import LavishAdapter

OPS = ("gather_latents", "adapter", "window_attention", "attention")


class Choice(NamedTuple):
    """What an op took: the path, why not the fused one (nothing if it is), and where its launch constants come from.

    shape, dtype: of the stream. width: what its launch constants go by, beside type and card.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str
    reasons: list[str]
    width: int
    constants: str = ""


class _Recordings(threading.local):
    """The lists of the recordings under way, each thread's own."""

    def __init__(self) -> None:
        self.lists: list[list[Choice]] = []


_recordings = _Recordings()


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """A list that every choice made inside, in the same thread, is appended to, in order."""
    found: list[Choice] = []
    _recordings.lists.append(found)
    try:
        yield found
    finally:
        # Lists of the same choices are equal, and two recordings need not end in the order in which they began.
        _recordings.lists = [other for other in _recordings.lists if other is not found]


def check_path(path: str) -> None:
    """Raises: ValueError for an unknown path."""
    if path not in ("auto", "fused", "reference"):
        raise ValueError(f"path: expected 'auto', 'fused' or 'reference', got {path!r}")


def choose(
    op: str,
    path: str,
    x: Tensor,
    width: int,
    reasons: Callable[[], list[str]],
    launched: Sequence[str] = (),
) -> bool:
    """Whether `op` takes its fused path for the stream `x`.

    width: as in `Choice`. reasons: why the kernel cannot, as a list of sentences. launched: the names that its launch
    constants go by, where they are not `op`.

    Raises: ValueError for an unknown path, or when "fused" is asked for and cannot be had.
    """
    check_path(path)
    if path == "reference":
        found = ["asked for"]
    elif path == "auto" and not x.is_cuda:
        found = [f"expected CUDA tensors, got {x.device}"]
    else:
        found = reasons()
    if path == "fused" and found:
        raise ValueError(f"{op}: expected tensors that the fused kernel takes, got: {'; '.join(found)}")
    _record(op, x, "reference" if found else "fused", found, width, launched or [op])
    return not found


def _record(op: str, x: Tensor, path: str, reasons: list[str], width: int, launched: Sequence[str] = ()) -> None:
    for found in _recordings.lists:
        constants = ""
        if path == "fused":
            from lavish_fast.kernels import _launch

            rows = [_tuning.row(name, _launch.architecture(x.device), x.dtype, width)[1] for name in launched]
            constants = rows[0] if len(set(rows)) == 1 else "; ".join(map(": ".join, zip(launched, rows)))
        found.append(Choice(op, tuple(x.shape), x.dtype, path, reasons, width, constants))


def _with_backward(op: str, *tensors: Tensor) -> list[str]:
    """The names of an op's launch constants, those of its backward too where there will be one."""
    return [op, f"{op}_bwd"] if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else [op]


def gather_latents(latents: Tensor, other: Tensor, *, path: str = "auto") -> Tensor:
    """S = L + softmax(L Yᵀ) Y. latents (m, C), other (n, N, C) -> (n, m, C)."""
    given = [latents.to(other.dtype)], [other]  # trained latents may be wider than the streams
    launched = _with_backward("gather_latents", latents, other)
    if choose("gather_latents", path, other, other.shape[-1], lambda: _reasons(gather_kernel, *given), launched):
        return gather_kernel.gather_latents(*given)[0]
    return reference.gather_latents(latents, other)


def adapter(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    adapters: Sequence[LavishAdapter],
    norm: nn.LayerNorm | None,
    drop_path: nn.Module,
    *,
    path: str = "auto",
) -> Sequence[Tensor]:
    """X + norm(B) + LAV(X, Y) of one stream, or of two that read each other.

    Args:
        xs: (n, N, C) each.
        branches: the frozen branch's output of each, before `norm`.
        adapters: of each; LAV as `LavishAdapter.forward`.
        norm: the block's post-norm, where it has one. drop_path: of the frozen branch, in training.

    Returns: the streams; of one length from the kernel as one tensor (streams, n, N, C).
    """
    xs = list(xs)
    # A caller's autocast leaves streams wide beside branches, which are products: their sum is of the wider type.
    branches = [b.to(torch.promote_types(b.dtype, x.dtype)) for b, x in zip(branches, xs, strict=True)]
    others = xs[::-1] if len(xs) == 2 else [None]
    batch = any(n.training for n in _batch_norms(adapters))
    trained = (p for a in adapters for p in a.parameters())
    training = batch or (torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, *branches, *trained)))
    # Trained latents may be wider than the streams.
    latents = [None if a.latents is None else a.latents.to(x.dtype) for a, x in zip(adapters, xs, strict=True)]
    reasons = partial(_adapter_reasons, xs, branches, adapters, latents, norm, drop_path, training, batch)
    launched = _tuning.ADAPTER_TRAINING if training else ["adapter"]
    if choose("adapter", path, xs[0], xs[0].shape[-1], reasons, launched):
        summaries = None if latents[0] is None else gather_kernel.gather_latents(latents, others)
        eps, outs = _eps(adapters, norm), []
        for part in _launches(xs):
            own = adapters[part]
            given = xs[part], branches[part], None if summaries is None else summaries[part], *_weights(own, norm)
            if not training:
                outs.append(adapter_kernel.adapter(*given, eps=eps))
                continue
            out, statistics = training_kernel.adapter_training(*given, eps=eps, batch_statistics=batch)
            if batch:
                _track(own, statistics, given[0][0].shape[:-1].numel())
            outs.append(out)
        return outs[0] if len(outs) == 1 else [out[0] for out in outs]
    branches = [drop_path(b if norm is None else norm(b)) for b in branches]
    return [x + b + adapt(x, other, path) for x, b, adapt, other in zip(xs, branches, adapters, others, strict=True)]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, path: str = "auto") -> Tensor:
    """softmax(scale q kᵀ) v. q, k, v (n, heads, N, d) -> (n, heads, N, d). "auto" is PyTorch's kernel."""
    if path == "auto":
        _record("attention", q, "sdpa", ["PyTorch's kernel"], q.shape[-1])
        return attention_kernels.attention(q, k, v, scale)
    choose("attention", path, q, q.shape[-1], lambda: ["there is no fused kernel for it"])
    return reference.attention(q, k, v, scale)


def window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    *,
    window: int,
    shift: int,
    path: str = "auto",
) -> Tensor:
    """Swin-V2's cosine attention. qkv (n, T, 3C) in image order -> (n, T, C).

    Args:
        logit_scale: (heads, 1, 1), exponentiated and clamped.
        table: (heads, (2 window - 1)²), the position bias by offset; bias: (heads, N, N), the same by pair of tokens.
        mask: (windows, N, N), where windows are shifted. order: (T,), the token at each place of each window, where
            there are several.
        path: also "sdpa" and "xformers", the kernels of those libraries (`lavish_fast.attention`).
    """
    attend, given = reference.cosine_attention, (qkv, logit_scale, table, window, shift)
    tokens, d = window * window, qkv.shape[-1] // (3 * len(logit_scale))
    width = tokens if window_kernel is None else window_kernel.tuning_width(tokens, d)
    why, reasons = "asked for", partial(_reasons, window_kernel, *given)
    if path == "auto" and not torch.is_grad_enabled():
        path, why = attention_kernels.fastest(qkv), f"the fastest on {qkv.device.type}"
    if path in ("sdpa", "xformers"):
        attend = getattr(attention_kernels, path)
        _record("window_attention", qkv, path, [why], width)
    elif choose("window_attention", path, qkv, width, reasons, _with_backward("window_attention", qkv)):
        return window_kernel.window_attention(*given)
    return reference.window_attention(qkv, logit_scale, bias, mask, order, attend=attend)


def _reasons(kernel, *arguments) -> list[str]:
    return _checks.reasons() if kernel is None else kernel.reasons(*arguments)


def _adapter_reasons(xs, branches, adapters, latents, norm, drop_path, training, batch) -> list[str]:
    """Why the kernels of a fused adapter cannot take these."""
    if adapter_kernel is None:
        return _checks.reasons()
    found = []
    if drop_path.training and getattr(drop_path, "rate", 0):
        found.append("expected no drop path, got one in training")
    norms = _batch_norms(adapters)
    if batch and any(type(n) is not nn.BatchNorm1d or n.momentum is None or n.running_mean is None for n in norms):
        found.append("expected BatchNorm1d with momentum and running statistics, got another BatchNorm")
    if not batch and any(n.running_mean is None for n in norms):
        found.append("expected running statistics of each BatchNorm, got none")
    if len({tuple(_eps([adapter], norm)) for adapter in adapters}) > 1:
        found.append("expected norms of the same eps in both streams, got others")
    if len({n.training for n in norms}) > 1:
        found.append("expected all BatchNorms in training or all in evaluation, got some of each")
    if latents[0] is not None:
        found += gather_kernel.reasons(latents, xs[::-1])
    for part in _launches(xs):
        given = xs[part], branches[part], None, *_weights(adapters[part], norm)
        found += training_kernel.reasons(*given, batch) if training else adapter_kernel.reasons(*given)
    return list(dict.fromkeys(found))


def _batch_norms(adapters) -> list[nn.Module]:
    return [norm for a in adapters for norm in (a.bn1, a.bn2) if norm is not None]


def _launches(xs: Sequence[Tensor]) -> list[slice]:
    """The streams of each launch of the adapter's kernel: all at once, or one by one where their lengths differ."""
    if all(x.shape == xs[0].shape for x in xs):
        return [slice(0, len(xs))]
    return [slice(i, i + 1) for i in range(len(xs))]


@torch.no_grad()
def _track(adapters, statistics, tokens: int) -> None:
    """Updates running statistics as BatchNorm1d does, those of all norms in one launch."""
    norms = [[getattr(adapter, name) for adapter in adapters] for name in ("bn1", "bn2")]
    running, found = [], []
    for of_streams, (mean, variance) in zip(norms, (of_norm.unbind(1) for of_norm in statistics)):
        unbiased = variance * (tokens / (tokens - 1))
        running += [t for norm in of_streams for t in (norm.running_mean, norm.running_var)]
        found += [t for of_stream in zip(mean, unbiased) for t in of_stream]
    every = [norm for of_streams in norms for norm in of_streams]
    found = [new.to(old.dtype) for new, old in zip(found, running)]
    torch._foreach_lerp_(running, found, [norm.momentum for norm in every for _ in range(2)])
    torch._foreach_add_([norm.num_batches_tracked for norm in every], 1)


def _weights(adapters, norm) -> tuple:
    """The adapters' parameters and the post-norm as the kernel takes them."""

    def layer_norm(module: nn.LayerNorm | None):
        return None if module is None else adapter_kernel.Norm(module.weight, module.bias)

    def batch_norm(module: nn.BatchNorm1d | None):
        if module is None:
            return None
        return adapter_kernel.BatchNorm(module.running_mean, module.running_var, module.weight, module.bias)

    def weights(a: LavishAdapter):
        up, gate = a.up, a.gate
        norms = layer_norm(a.ln_before), batch_norm(a.bn1), batch_norm(a.bn2), layer_norm(a.ln_after)
        if gate is not None and a.gate_first:  # the kernels' gate comes last; what is before LN_after takes it in
            before, bn1, bn2, after = norms
            if bn2 is None:
                up = up * gate
            else:
                norms = before, bn1, bn2._replace(weight=bn2.weight * gate, bias=bn2.bias * gate), after
            gate = None
        return adapter_kernel.Weights(a.gate_av, norms[0], a.down, norms[1], up, norms[2], norms[3], gate)

    return [weights(a) for a in adapters], layer_norm(norm)


def _eps(adapters, norm) -> list[float]:
    first = adapters[0]
    norms = first.ln_before, first.bn1, first.bn2, first.ln_after, norm
    return [0.0 if module is None else module.eps for module in norms]
