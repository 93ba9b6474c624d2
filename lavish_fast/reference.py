"""The paper as pure functions: one per equation, in the paper's order, any floating dtype.

Streams are (n, N, C): n = B * T images of N tokens and C channels. Logits and softmax are computed in float32
when the inputs are narrower: the latent logits have no 1/sqrt(C) and reach several hundred.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def gather_latents(latents: Tensor, other: Tensor) -> Tensor:
    """S = L + softmax(L Yᵀ) Y: the latents gather from the other stream (paper, eq. 3).

    latents (m, C), other (n, N, C) -> (n, m, C). Without a 1/sqrt(C) scale.
    """
    with torch.autocast(other.device.type, enabled=False):
        logits = latents.to(_wide(latents)) @ other.to(_wide(other)).mT  # (n, m, N)
        weights = logits.softmax(-1).to(other.dtype)
        return latents.to(other.dtype) + weights @ other


def read_latents(x: Tensor, summary: Tensor, gate_av: Tensor) -> Tensor:
    """X' = X + g_av softmax(X Sᵀ) S: the stream reads the gathered latents (paper, eq. 4).

    x (n, N, C), summary (n, m, C), gate_av (1,) -> (n, N, C).
    """
    with torch.autocast(x.device.type, enabled=False):
        summary = summary.to(x.dtype)
        logits = x.to(_wide(x)) @ summary.to(_wide(x)).mT  # (n, N, m)
        return x + gate_av.to(x.dtype) * (logits.softmax(-1).to(x.dtype) @ summary)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution with groups and without bias, as a matrix product per group (paper, section 3.2).

    x (n, N, C), weight (D, C / G) -> (n, N, D); output group g sees input group g alone.
    """
    groups = x.shape[-1] // weight.shape[1]
    if groups == 1:
        return F.linear(x, weight)
    rows = x.reshape(-1, groups, weight.shape[1]).transpose(0, 1)  # (G, n N, C / G)
    out = rows @ weight.unflatten(0, (groups, -1)).mT  # (G, n N, D / G)
    return out.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v, the frozen ViT's attention: q, k, v (n, heads, N, d) -> (n, heads, N, d)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(_wide(q)) * scale) @ k.to(_wide(k)).mT
        return logits.softmax(-1).to(v.dtype) @ v


def cosine_attention(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Swin-V2's attention inside windows (Swin Transformer V2, eq. 2).

    q, k, v (n, windows, heads, N, d); logit_scale (heads, 1, 1), already exponentiated and clamped;
    bias (heads, N, N); mask (windows, N, N), -100 between regions that the shift brought together, or None.
    Returns (n, windows, heads, N, d).
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = _wide(q)
        q = F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide)
        logits = q @ F.normalize(k.to(wide), dim=-1).mT + bias.to(wide)
        if mask is not None:
            logits = logits + mask.to(wide).unsqueeze(1)
        return logits.softmax(-1).to(v.dtype) @ v


def window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    *,
    attend: Callable[..., Tensor] = cosine_attention,
) -> Tensor:
    """Cosine attention in the (shifted) windows of a map, the frozen part of every block.

    qkv (n, T, 3C), the map's tokens in image order, their channels as q, k and v of all heads;
    logit_scale, bias and mask as in `cosine_attention`, or in another function of the same arguments, `attend`;
    order (T,), the token at each place of each window, window by window, or None for one window that is the map.
    Returns (n, T, C).
    """
    n, tokens, channels = qkv.shape
    heads, window = bias.shape[:2]
    if order is not None:
        qkv = qkv.index_select(1, order)
    qkv = qkv.view(n, tokens // window, window, 3, heads, channels // (3 * heads))
    out = attend(*qkv.permute(3, 0, 1, 4, 2, 5).unbind(), logit_scale, bias, mask)
    out = out.transpose(2, 3).reshape(n, tokens, channels // 3)
    return out if order is None else out.index_select(1, order.argsort())
