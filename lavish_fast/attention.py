"""Attention by the kernels of PyTorch and xformers: the ViTs', and Swin-V2's cosine attention in windows.

The latter's take the normalised q and k, and position bias and shift mask as one additive bias in the type of q, which
serves every entry of the batch by a stride of zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_ALIGNMENT = 8  # elements: what xformers' kernel asks of a bias's rows

# Where another library's kernel is faster than ours, by kind of device; measured, see benchmarks/results.
FASTEST = {"cpu": "sdpa"}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`reference.attention` by `scaled_dot_product_attention`, which keeps no logits; on a CPU in at least float32."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(wide if q.device.type == "cpu" else dtype) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).to(dtype)


def fastest(x: Tensor) -> str:
    """The path of window attention for a tensor like `x` in inference: "auto" unless another kernel is faster."""
    return FASTEST.get(x.device.type, "auto")


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    backend: SDPBackend | None = None,
) -> Tensor:
    """`reference.window_attention` by `scaled_dot_product_attention`, on the backend named and no other.

    Without a name it is the memory-efficient kernel on CUDA, and on a CPU PyTorch's choice (its flash kernel) in at
    least float32, which there is both faster and more accurate than in narrower types. Left to itself on Hopper
    PyTorch may take cuDNN, which reads a float32 bias beside a bfloat16 q wrongly. A backend is chosen for the whole
    process while it runs: on CUDA one thread at a time.

    Raises: RuntimeError where this backend does not take these tensors.
    """
    with torch.autocast(q.device.type, enabled=False):
        if backend is None and not q.is_cuda:
            return _sdpa_on_cpu(q, k, v, logit_scale, bias, mask)
        shape = v.shape
        q, k, v, bias = _prepare(q, k, v, logit_scale, bias, mask)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if backend is None else backend):
            return F.scaled_dot_product_attention(q, k, v, bias.unsqueeze(0), scale=1.0).view(shape)


def _sdpa_on_cpu(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    # Windows that are masked differently go one after another: as more heads they would have to be copied together.
    shape, dtype = v.shape, v.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q = F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide)
    k, v, bias = F.normalize(k.to(wide), dim=-1), v.to(wide), bias.to(wide)
    # No sdpa_kernel here: it sets the whole process, so threads would leave each other's choice behind.
    if mask is None:
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), bias.unsqueeze(0), scale=1.0)
        return out.to(dtype).view(shape)
    windows = zip(*(x.unbind(1) for x in (q, k, v)), mask.to(wide), strict=True)
    out = [F.scaled_dot_product_attention(*x, (bias + m).unsqueeze(0), scale=1.0) for *x, m in windows]
    return torch.stack(out, 1).to(dtype)


def xformers(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.window_attention` by xformers' cutlass op, which takes a bias.

    The op is called by itself: `memory_efficient_attention` refuses it where xformers' own extension does not load
    (0.0.35 is built for torch 2.10 and CUDA 12.8), though what it runs, and differentiates by, is PyTorch's kernel.
    The bias's rows lie in a buffer whose width is a multiple of 8 (36 tokens in 40), as that kernel requires.

    Raises: ImportError without xformers, ValueError for CPU tensors.
    """
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(f"xformers is missing: pip install 'xformers==0.0.35' ({error})") from error
    if not q.is_cuda:
        raise ValueError(f"xformers: expected CUDA tensors, got {q.device.type}")
    shape, tokens = v.shape, v.shape[-2]
    q, k, v, bias = _prepare(q, k, v, logit_scale, bias, mask)
    padded = bias.new_empty(*bias.shape[:-1], -(-tokens // _ALIGNMENT) * _ALIGNMENT)
    padded[..., :tokens] = bias
    bias = padded[..., :tokens].unsqueeze(0).expand(len(q), -1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias, scale=1.0)
    out, _ = fmha.cutlass.FwOp.apply(inputs, needs_gradient=trained)
    return out.transpose(1, 2).reshape(shape)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (n, windows, heads, N, d) -> 4-D, and the bias that serves them all: (heads, N, N) of one batch entry.

    Without a mask a batch entry is a window; with one it is an image, whose windows are joined to its heads.
    """
    wide, dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    q = (F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide)).to(dtype)
    k = F.normalize(k.to(wide), dim=-1).to(dtype)
    if mask is None:
        return *(x.flatten(0, 1) for x in (q, k, v)), bias.to(dtype)
    bias = (bias + mask.unsqueeze(1)).flatten(0, 1).to(dtype)
    return *(x.flatten(1, 2) for x in (q, k, v)), bias
