"""A trained model rearranged for inference: both streams in one batch through the frozen blocks, constants folded."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops, reference
from lavish_fast.adapter import LavishAdapter
from lavish_fast.backbones import PLACES
from lavish_fast.backbones.swin_v2 import CONSTANTS, WindowAttention
from lavish_fast.model import Model, images


class Linear(nn.Module):
    """A frozen linear layer, with GELU behind it if asked for; x (..., C) -> (..., D)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


class PackedLinear(Linear):
    """The same on a CPU by oneDNN, its weight in the order that oneDNN's product reads, GELU in the product's epilogue.

    The compiler leaves it as it is: Inductor would take MKL for float32, which is slower on some processors.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight), bias, gelu)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether oneDNN has a product for this weight on this processor."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        supported = {
            torch.float32: lambda: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return weight.dtype in supported and supported[weight.dtype]()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        attribute, algorithm = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], algorithm)


class Attention(nn.Module):
    """`WindowAttention` between its two products, its constants as they are."""

    def __init__(self, frozen: WindowAttention, path: str) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.path = frozen.size, frozen.window, frozen.shift, path
        for name in CONSTANTS:
            self.register_buffer(name, getattr(frozen, name))

    def forward(self, qkv: Tensor) -> Tensor:
        """(n, T, 3C) -> (n, T, C)."""
        constants = (getattr(self, name) for name in CONSTANTS)
        return ops.window_attention(qkv, *constants, window=self.window, shift=self.shift, path=self.path)


_FOLDED = "expected adapters as they were trained, got folded ones"


class Step(nn.Module):
    """What follows a frozen branch: its post-norm, the adapters and the residual sums, all streams at once."""

    def __init__(self, norm: nn.LayerNorm, adapters: list[LavishAdapter], path: str) -> None:
        super().__init__()
        self.norm, self.adapters, self.path = norm, nn.ModuleList(adapters), path

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x, branch (streams, n, N, C) -> the same."""
        if not self.adapters:
            return x + self.norm(branch)
        out = ops.adapter(x.unbind(), branch.unbind(), self.adapters, self.norm, nn.Identity(), path=self.path)
        return out if isinstance(out, Tensor) else torch.stack(out)


class FoldedStep(nn.Module):
    """`Step` without a kernel: one product for the adapters of all streams, with what only scales and shifts in it.

    LN_before's weights and BN1 go into down, BN2 into up; the outer gate into LN_after's weights, or, without LN_after,
    into up.
    """

    def __init__(self, norm: nn.LayerNorm, adapters: list[LavishAdapter], path: str) -> None:
        super().__init__()
        self.norm, self.path = norm, path
        first = adapters[0]
        self.eps = [None if ln is None else ln.eps for ln in (first.ln_before, first.ln_after)]
        self.groups = len(first.up) // first.down.shape[1]
        folded = [_fold(adapter, self.groups) for adapter in adapters]
        for name, tensor in folded[0].items():
            stacked = tensor if tensor is None else torch.stack([tensors[name] for tensors in folded])
            self.register_buffer(name, None if stacked is None else stacked.detach().to(first.down.dtype))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x, branch (streams, n, N, C) -> the same."""
        z = x
        ops.choose("adapter", self.path, x[0], self.down.shape[1], lambda: [_FOLDED])
        if self.latents is not None:
            # Each stream is gathered from by the latents of the other.
            summary = reference.gather_latents(self.latents.flip(0), z).flip(0)
            z = reference.read_latents(z, summary, self.gate_av)
        if self.eps[0] is not None:
            z = F.layer_norm(z, z.shape[-1:], eps=self.eps[0])
        z = F.relu(self._product(z, self.down) + self.down_bias)
        z = self._product(z, self.up) + self.up_bias
        if self.eps[1] is not None:
            z = F.layer_norm(z, z.shape[-1:], eps=self.eps[1]) * self.ln_weight + self.ln_bias
        return x + self.norm(branch) + z

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (streams, n, N, C), weight (streams, D, C / groups) -> (streams, n, N, D)."""
        rows = x.unflatten(-1, (self.groups, -1)).flatten(1, 2).transpose(1, 2)  # (streams, groups, n N, C / groups)
        out = rows @ weight.unflatten(1, (self.groups, -1)).mT
        return out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])


def _fold(adapter: LavishAdapter, groups: int) -> dict[str, Tensor | None]:
    """What `FoldedStep` computes with: the products' weights, the rest shaped to go with (n, N, C)."""
    down, up = adapter.down.double(), adapter.up.double()
    down_bias, up_bias = down.new_zeros(len(down)), up.new_zeros(len(up))
    gate = 1.0 if adapter.gate is None else adapter.gate.double()
    if adapter.ln_before is not None:
        scale, shift = (
            p.double().view(groups, 1, -1).expand(-1, len(down) // groups, -1).reshape(down.shape)
            for p in (adapter.ln_before.weight, adapter.ln_before.bias)
        )
        down, down_bias = down * scale, (down * shift).sum(1)
    down, down_bias = _fold_batch_norm(adapter.bn1, down, down_bias)
    up, up_bias = _fold_batch_norm(adapter.bn2, up, up_bias)
    ln_weight = ln_bias = None
    if adapter.ln_after is not None:
        ln_weight, ln_bias = (p.double()[None, None] * gate for p in (adapter.ln_after.weight, adapter.ln_after.bias))
    else:
        up, up_bias = up * gate, up_bias * gate
    return {
        "latents": None if adapter.latents is None else adapter.latents[None],
        "gate_av": None if adapter.latents is None else adapter.gate_av[None, None],
        "down": down,
        "down_bias": down_bias[None, None],
        "up": up,
        "up_bias": up_bias[None, None],
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
    }


def _fold_batch_norm(norm: nn.BatchNorm1d | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if norm is None:
        return weight, bias
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None], (bias - norm.running_mean.double()) * scale + norm.bias.double()


class Block(nn.Module):
    """A frozen block with its adapters, on all streams as one batch (streams * n, N, C), audio first."""

    def __init__(
        self, enter: nn.Module, attention: Attention, linears: dict[str, Linear], steps: list[Step], streams: int
    ) -> None:
        super().__init__()
        self.enter, self.attention = enter, attention
        self.qkv, self.proj, self.fc1, self.fc2 = (linears[name] for name in ("qkv", "proj", "fc1", "fc2"))
        self.p1, self.p2 = steps
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = self._after(self.p1, x, self.proj(self.attention(self.qkv(x))))
        return self._after(self.p2, x, self.fc2(self.fc1(x)))

    def _after(self, step: Step, x: Tensor, branch: Tensor) -> Tensor:
        return step(*(t.unflatten(0, (self.streams, -1)) for t in (x, branch))).flatten(0, 1)


class Inference(nn.Module):
    """The same function as `model` in evaluation, called as it is.

    Args:
        model: on a Swin-V2, with one stream or both; it stays as it is, its weights are copied.
        dtype: of the weights and of what runs between them; that of the model without it. Folding is done before.
        fold: whether constants are folded into the weights. The fused adapter applies them as they are.
        path: of every op, as for `lavish_fast.ops`. attention: of the window attention, if another.
        pack: whether linear layers keep their weights in oneDNN's order, on a CPU that has products for it.

    Raises: ValueError for other models.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: torch.dtype | None = None,
        fold: bool = True,
        path: str = "auto",
        attention: str | None = None,
        pack: bool = False,
    ) -> None:
        super().__init__()
        if model.config.backbone.kind != "swinv2":
            raise ValueError(f"inference: expected a model on a swinv2, got one on a {model.config.backbone.kind}")
        self.config = model.config
        backbone = model.backbone
        self.dtype = dtype or backbone.norm.weight.dtype

        def own(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module).to(self.dtype).eval().requires_grad_(False)

        def linear(weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Linear:
            weight, bias = (t if t is None else t.detach().to(self.dtype, copy=True) for t in (weight, bias))
            return (PackedLinear if pack and PackedLinear.takes(weight) else Linear)(weight, bias, gelu)

        def entrance(i: int) -> nn.Module:
            if (merging := backbone.entrance(i)) is None:
                return nn.Identity()
            merging = own(merging)
            merging.reduction = linear(merging.reduction.weight, None)
            return merging

        blocks, first = [], self.config.adapter.first_block
        for i, (frozen, adapters) in enumerate(zip(backbone.blocks[first:], model.adapters, strict=True), first):
            linears = {"qkv": linear(frozen.attn.qkv.weight, frozen.attn.qkv_bias)}
            linears["proj"] = linear(frozen.attn.proj.weight, frozen.attn.proj.bias)
            linears["fc1"] = linear(frozen.mlp.fc1.weight, frozen.mlp.fc1.bias, gelu=True)
            linears["fc2"] = linear(frozen.mlp.fc2.weight, frozen.mlp.fc2.bias)
            steps = []
            for place in PLACES:
                mine = adapters.at(place)
                step = own((FoldedStep if fold and mine else Step)(frozen.norm(place), mine, path))
                for adapter in getattr(step, "adapters", ()):
                    adapter.path = path
                steps.append(step)
            constants = Attention(copy.deepcopy(frozen.attn), attention or path)
            blocks.append(Block(entrance(i), constants, linears, steps, len(self.config.streams)))
        self.embed, self.blocks = own(backbone.patch_embed), nn.ModuleList(blocks)
        self.norm, self.head = own(backbone.norm), own(model.head)
        self.eval()

    def train(self, mode: bool = True) -> Inference:
        """Stays in evaluation, so that no BatchNorm takes a batch's own statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """(B, T, frames, mel bins) or a list that starts with it, (B, T, 3, S, S) -> class probabilities (B * T, K)."""
        return self.classify(*images(self.config, audio, video).values())

    @torch.no_grad()
    def classify(self, *streams: Tensor) -> Tensor:
        """Images of each stream, (n, 3, S, S), audio first, to class probabilities (n, K)."""
        x = self.embed(torch.cat(streams).to(self.dtype))
        for block in self.blocks:
            x = block(x)
        # Video first, as in `Model.features`.
        return self.head(torch.cat(self.norm(x).mean(1).chunk(len(streams))[::-1], -1))
