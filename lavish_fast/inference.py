"""A trained model rearranged for inference: both streams in one batch through the frozen blocks, constants folded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops, reference
from lavish_fast.adapter import LavishAdapter
from lavish_fast.concatenated import Concatenated, Linear
from lavish_fast.model import Model


class PackedLinear(Linear):
    """The same on a CPU by oneDNN, its weight in the order that oneDNN's product reads, GELU in the product's epilogue.

    The compiler leaves it as it is: Inductor would take MKL for float32, which is slower on some processors.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(linear.weight), linear.bias, linear.gelu)

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
        x = x.to(self.weight.dtype)  # autocast, which does not know this product, may have made it another
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], algorithm)


_FOLDED = "expected adapters as they were trained, got folded ones"


class FoldedStep(nn.Module):
    """`Step` without a kernel: one product for the adapters of all streams, with what only scales and shifts in it.

    LN_before's weights and BN1 go into down, BN2 into up; the outer gate into LN_after's weights, or, without LN_after,
    into up, where it also goes if it comes before LN_after.
    """

    def __init__(self, norm: nn.LayerNorm, adapters: list[LavishAdapter], path: str) -> None:
        super().__init__()
        self.norm, self.path, self.drop_path = norm, path, nn.Identity()
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
        ops.choose("adapter", self.path, x[0], x.shape[-1], lambda: [_FOLDED])
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
    if adapter.ln_after is None or adapter.gate_first:
        up, up_bias, gate = up * gate, up_bias * gate, 1.0
    if adapter.ln_after is not None:
        ln_weight, ln_bias = (p.double()[None, None] * gate for p in (adapter.ln_after.weight, adapter.ln_after.bias))
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
    if norm.running_mean is None:
        raise ValueError("model: expected running statistics of each BatchNorm, got none, which cannot be folded")
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None], (bias - norm.running_mean.double()) * scale + norm.bias.double()


class Inference(Concatenated):
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
        self.__dict__.update(fold=fold, pack=pack)  # before there is a module
        super().__init__(model, dtype=dtype, path=path, attention=attention)

    def _trained(self, module: nn.Module) -> nn.Module:
        return self._frozen(module)

    def _linear(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Linear:
        linear = super()._linear(weight, bias, gelu)
        return PackedLinear(linear) if self.pack and PackedLinear.takes(linear.weight) else linear

    def _step(self, norm: nn.LayerNorm, adapters: list[LavishAdapter], drop_path: nn.Module) -> nn.Module:
        if self.fold and adapters:
            return self._frozen(FoldedStep(norm, adapters, self.path))
        return super()._step(norm, adapters, drop_path)

    def train(self, mode: bool = True) -> Inference:
        """Stays in evaluation, so that no BatchNorm takes a batch's own statistics."""
        return super().train(False)

    @torch.no_grad()
    def classify(self, *inputs: Tensor) -> Any:
        """As `Model.classify`."""
        return super().classify(*inputs)
