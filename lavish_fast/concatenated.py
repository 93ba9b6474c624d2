"""A model with both streams in one batch through each frozen block: the same function, half the launches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops
from lavish_fast.adapter import LavishAdapter, arithmetic
from lavish_fast.backbones import PLACES, Encoded
from lavish_fast.backbones.swin_v2 import CONSTANTS, WindowAttention
from lavish_fast.model import Model, Network


def sharing(module: nn.Module) -> nn.Module:
    """A copy of a module, with a mode and paths of its own, that has the module's very parameters and buffers."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


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


class Step(nn.Module):
    """What follows a frozen branch: its post-norm, the adapters and the residual sums, all streams at once."""

    def __init__(self, norm: nn.LayerNorm, adapters: Sequence[LavishAdapter], drop_path: nn.Module, path: str) -> None:
        super().__init__()
        self.norm, self.adapters, self.drop_path, self.path = norm, nn.ModuleList(adapters), drop_path, path

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x, branch (streams, n, N, C) -> the same."""
        if not self.adapters:
            return x + self.drop_path(self.norm(branch).flatten(0, 1)).view_as(x)
        with arithmetic(self.adapters, x):
            out = ops.adapter(x.unbind(), branch.unbind(), self.adapters, self.norm, self.drop_path, path=self.path)
        # Autocast leaves norms, and with them the sum, in float32.
        return (out if isinstance(out, Tensor) else torch.stack(out)).to(x.dtype)


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

    def frozen(self, x: Tensor) -> Tensor:
        """(n, N, C), without the adapters."""
        x = self.enter(x)
        x = x + self.p1.drop_path(self.p1.norm(self.proj(self.attention(self.qkv(x)))))
        return x + self.p2.drop_path(self.p2.norm(self.fc2(self.fc1(x))))

    def _after(self, step: Step, x: Tensor, branch: Tensor) -> Tensor:
        return step(*(t.unflatten(0, (self.streams, -1)) for t in (x, branch))).flatten(0, 1)


class Concatenated(Network):
    """The same function as `model` on a Swin-V2, in training and in evaluation, called as it is.

    Adapters and head have the model's own tensors: training this trains the model. The frozen weights are copies.

    Args:
        model: with one stream or both, on the device that it is to run on.
        dtype: of the frozen weights and of the streams; that of the model without it. Where it is narrower than the
            trained parameters, adapters and head run under autocast.
        path: of every op, as for `lavish_fast.ops`. attention: of the window attention, if another.

    Raises: ValueError for models on another backbone.
    """

    def __init__(
        self, model: Model, *, dtype: torch.dtype | None = None, path: str = "auto", attention: str | None = None
    ) -> None:
        super().__init__()
        if model.config.backbone.kind != "swinv2":
            name = type(self).__name__.lower()
            raise ValueError(f"{name}: expected a model on a swinv2, got one on a {model.config.backbone.kind}")
        self.config, self.path = model.config, path
        backbone = model.backbone
        self.dtype = dtype or backbone.norm.weight.dtype
        blocks, first = [], self.config.adapter.first_block
        for i, (frozen, adapters) in enumerate(zip(backbone.blocks[first:], model.adapters, strict=True), first):
            linears = {"qkv": self._linear(frozen.attn.qkv.weight, frozen.attn.qkv_bias)}
            linears["proj"] = self._linear(frozen.attn.proj.weight, frozen.attn.proj.bias)
            linears["fc1"] = self._linear(frozen.mlp.fc1.weight, frozen.mlp.fc1.bias, gelu=True)
            linears["fc2"] = self._linear(frozen.mlp.fc2.weight, frozen.mlp.fc2.bias)
            steps = [self._step(frozen.norm(p), adapters.at(p), copy.deepcopy(frozen.drop_path)) for p in PLACES]
            constants = Attention(copy.deepcopy(frozen.attn), attention or path)
            entrance = self._entrance(backbone.entrance(i))
            blocks.append(Block(entrance, constants, linears, steps, len(self.config.streams)))
        self.embed, self.blocks = self._frozen(backbone.patch_embed), nn.ModuleList(blocks)
        self.norm, self.head = self._frozen(backbone.norm), self._trained(model.head)
        self.vggish = None if model.vggish is None else self._frozen(model.vggish)
        self.train(model.training)

    def _frozen(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to(self.dtype).requires_grad_(False)

    def _trained(self, module: nn.Module) -> nn.Module:
        return sharing(module)

    def _linear(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Linear:
        weight, bias = (t if t is None else t.detach().to(self.dtype, copy=True) for t in (weight, bias))
        return Linear(weight, bias, gelu)

    def _entrance(self, merging: nn.Module | None) -> nn.Module:
        if merging is None:
            return nn.Identity()
        merging = self._frozen(merging)
        merging.reduction = self._linear(merging.reduction.weight, None)
        return merging

    def _step(self, norm: nn.LayerNorm, adapters: list[LavishAdapter], drop_path: nn.Module) -> nn.Module:
        adapters = [self._trained(adapter) for adapter in adapters]
        return Step(self._frozen(norm), adapters, drop_path, self.path)

    def encode(self, *streams: Tensor) -> Encoded:
        """As `Model.encode`."""
        # Stacked, as streams of different lengths would be told apart wrongly.
        x, stages, ends = self.embed(torch.stack(streams).flatten(0, 1).to(self.dtype)), [], self._ends()
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in ends:
                stages.append(x)
        stages[-1] = self.norm(stages[-1])
        pooled = stages[-1].mean(1)
        return Encoded([list(x.chunk(len(streams))) for x in stages], list(pooled.chunk(len(streams))))

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """As `Model.frozen`."""
        x = self.embed(images.to(self.dtype))
        for block in self.blocks:
            x = block.frozen(x)
        return self.norm(x)
