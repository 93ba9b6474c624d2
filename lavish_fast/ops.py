"""The public ops, each with its path: the only file that chooses between reference and fused.

path "reference" takes `lavish_fast.reference`; "fused" takes the kernel or raises with all the reasons why it cannot;
"auto" takes the kernel when there is no such reason. The choice depends on the tensors alone.
"""

from __future__ import annotations

from torch import Tensor

from lavish_fast import attention as attention_kernels
from lavish_fast import reference
from lavish_fast.kernels import _checks

OPS = ("gather_latents", "read_latents", "grouped_linear", "attention", "window_attention")


def choose(op: str, path: str, *tensors: Tensor) -> tuple[str, list[str]]:
    """The path that `op` takes for these tensors, "fused" or "reference", and the reasons against the fused one.

    Raises: ValueError for an unknown path, or when "fused" is asked for and cannot be had.
    """
    if path not in ("auto", "fused", "reference"):
        raise ValueError(f"path: expected 'auto', 'fused' or 'reference', got {path!r}")
    if path == "reference":
        return "reference", ["asked for"]
    reasons = _checks.reasons(op, *tensors)
    if path == "fused" and reasons:
        raise ValueError(f"{op}: expected tensors that the fused kernel takes, got: {'; '.join(reasons)}")
    return ("reference" if reasons else "fused"), reasons


def gather_latents(latents: Tensor, other: Tensor, *, path: str = "auto") -> Tensor:
    """S = L + softmax(L Yᵀ) Y. latents (m, C), other (n, N, C) -> (n, m, C)."""
    choose("gather_latents", path, latents, other)
    return reference.gather_latents(latents, other)


def read_latents(x: Tensor, summary: Tensor, gate_av: Tensor, *, path: str = "auto") -> Tensor:
    """X' = X + g_av softmax(X Sᵀ) S. x (n, N, C), summary (n, m, C), gate_av (1,) -> (n, N, C)."""
    choose("read_latents", path, x, summary)
    return reference.read_latents(x, summary, gate_av)


def grouped_linear(x: Tensor, weight: Tensor, *, path: str = "auto") -> Tensor:
    """A 1x1 convolution in groups. x (n, N, C), weight (D, C / G) -> (n, N, D)."""
    choose("grouped_linear", path, x, weight)
    return reference.grouped_linear(x, weight)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, path: str = "auto") -> Tensor:
    """softmax(scale q kᵀ) v. q, k, v (n, heads, N, d) -> (n, heads, N, d)."""
    choose("attention", path, q, k, v)
    return reference.attention(q, k, v, scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, mask: Tensor | None, *, path: str = "auto"
) -> Tensor:
    """Swin-V2's cosine attention. q, k, v (n, windows, heads, N, d) -> the same; bias (heads, N, N).

    path: also "sdpa" and "xformers", the kernels of those libraries (`lavish_fast.attention`).
    """
    if path in ("sdpa", "xformers"):
        return getattr(attention_kernels, path)(q, k, v, logit_scale, bias, mask)
    choose("window_attention", path, q, k, v)
    return reference.window_attention(q, k, v, logit_scale, bias, mask)
