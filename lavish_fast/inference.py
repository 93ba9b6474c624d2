"""A trained model rearranged for inference: both streams in one batch through the frozen blocks, constants folded."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops
from lavish_fast.adapter import LavishAdapter
from lavish_fast.model import Model


class FoldedAdapter(nn.Module):
    """`LavishAdapter` in evaluation: what only scales and shifts is part of the two products or of LN_after.

    LN_before's weights and BN1 go into down, BN2 into up; the outer gate into LN_after's weights, or, without LN_after,
    into up.
    """

    def __init__(self, adapter: LavishAdapter) -> None:
        super().__init__()
        self.path = adapter.path
        self.eps = [norm.eps if norm is not None else None for norm in (adapter.ln_before, adapter.ln_after)]
        width, bottleneck = len(adapter.up), len(adapter.down)
        down, up = adapter.down.double(), adapter.up.double()
        down_bias, up_bias = down.new_zeros(bottleneck), up.new_zeros(width)
        gate = 1.0 if adapter.gate is None else adapter.gate.double()
        if adapter.ln_before is not None:
            groups = width // down.shape[1]
            rows = bottleneck // groups
            scale, shift = (
                p.double().view(groups, 1, -1).expand(-1, rows, -1).reshape(bottleneck, -1)
                for p in (adapter.ln_before.weight, adapter.ln_before.bias)
            )
            down_bias = (down * shift).sum(1)
            down = down * scale
        down, down_bias = _fold_batch_norm(adapter.bn1, down, down_bias)
        up, up_bias = _fold_batch_norm(adapter.bn2, up, up_bias)
        ln_weight = ln_bias = None
        if adapter.ln_after is not None:
            ln_weight, ln_bias = adapter.ln_after.weight * gate, adapter.ln_after.bias * gate
        else:
            up, up_bias = up * gate, up_bias * gate
        tensors = {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias}
        tensors |= {"ln_weight": ln_weight, "ln_bias": ln_bias, "latents": adapter.latents, "gate_av": adapter.gate_av}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(adapter.down.dtype))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x (n, N, C), other (n, M, C) -> (n, N, C)."""
        if self.latents is not None:
            summary = ops.gather_latents(self.latents, other, path=self.path)
            x = ops.read_latents(x, summary, self.gate_av, path=self.path)
        if self.eps[0] is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=self.eps[0])
        z = F.relu(ops.grouped_linear(x, self.down, path=self.path) + self.down_bias)
        z = ops.grouped_linear(z, self.up, path=self.path) + self.up_bias
        return z if self.ln_weight is None else F.layer_norm(z, z.shape[-1:], self.ln_weight, self.ln_bias, self.eps[1])


def _fold_batch_norm(norm: nn.BatchNorm1d | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if norm is None:
        return weight, bias
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None], (bias - norm.running_mean.double()) * scale + norm.bias.double()


class Block(nn.Module):
    """A frozen block with its adapters, on both streams as one batch (2n, N, C), audio first."""

    def __init__(self, frozen: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.frozen, self.adapters = frozen, adapters

    def forward(self, x: Tensor) -> Tensor:
        for place, branch in (("p1", self.frozen.attention_branch), ("p2", self.frozen.mlp_branch)):
            audio, video = x.chunk(2)
            x = x + branch(x)
            if f"audio_{place}" in self.adapters:
                out = self.adapters[f"audio_{place}"](audio, video), self.adapters[f"video_{place}"](video, audio)
                x = x + torch.cat(out)
        return x


class Inference(nn.Module):
    """The same function as `model` in evaluation, called as it is.

    Args:
        model: a Swin-V2 with both streams; it stays as it is, its weights are copied.
        fold: whether constants are folded into the weights.
        path: of every op, as for `lavish_fast.ops`. attention: of the window attention, if another.

    Raises: ValueError for other models.
    """

    def __init__(self, model: Model, *, fold: bool = True, path: str = "auto", attention: str | None = None) -> None:
        super().__init__()
        got = model.config.backbone.kind, model.config.modality
        if got != ("swinv2", "audio+video"):
            raise ValueError(f"inference: expected a swinv2 with audio+video, got {' with '.join(got)}")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model = model
        for adapters in model.adapters:
            for name, adapter in adapters.items():
                adapter.path = path
                adapters[name] = FoldedAdapter(adapter) if fold else adapter
        for block in model.backbone.blocks:
            block.attn.path = attention or path
        self.blocks = nn.ModuleList(Block(*pair) for pair in zip(model.backbone.blocks, model.adapters, strict=True))
        self.eval()

    def train(self, mode: bool = True) -> Inference:
        """Stays in evaluation, so that no BatchNorm takes a batch's own statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """(B, T, frames, mel bins) or a list that starts with it, (B, T, 3, S, S) -> class probabilities (B * T, K)."""
        images, backbone = self.model._images(audio, video), self.model.backbone
        x = backbone.embed(torch.cat((images["audio"], images["video"])))
        for i, block in enumerate(self.blocks):
            x = block(backbone.enter(i, x))
        sound, sight = backbone.pool(x).chunk(2)
        return self.model.head(torch.cat((sight, sound), -1))
