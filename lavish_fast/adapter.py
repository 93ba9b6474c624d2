"""The LAVISH adapter: its parameters, and a forward as short as the figure in the paper; and those of one block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import ops, reference
from lavish_fast.backbones import PLACES, Block
from lavish_fast.config import AdapterConfig


def is_narrow(x: Tensor, trained: nn.Module) -> bool:
    """Whether a stream is narrower than the trained parameters beside it, and no caller has autocast on."""
    return x.dtype != next(trained.parameters()).dtype and not torch.is_autocast_enabled(x.device.type)


def arithmetic(trained: nn.Module, x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast to the type of x where `is_narrow`, for what is trained alone.

    A frozen norm would come out of it in float32, and with it the whole stream.
    """
    if not is_narrow(x, trained):
        return contextlib.nullcontext()
    # A CUDA graph must not read casts that autocast would keep for later.
    return torch.autocast(x.device.type, x.dtype, cache_enabled=False)


class LavishAdapter(nn.Module):
    """One stream's adapter at one place of one block (paper, section 3.2).

    Args:
        width: C, the stream's channels.
        config: latents, reduction, groups and which norms there are.
        gate: whether the output is scaled by a trainable gate, 0 at the start.
        cross_modal: whether the stream reads the other one through the latent tokens.

    A fresh adapter with a gate returns exactly zero.
    """

    path = "auto"  # of gather_latents, where the adapter is called by itself

    def __init__(self, width: int, config: AdapterConfig, *, gate: bool = True, cross_modal: bool = True) -> None:
        super().__init__()
        bottleneck, groups = width // config.reduction, config.groups
        draw = torch.zeros if config.zero_latents else torch.rand
        self.latents = nn.Parameter(draw(config.latents, width)) if cross_modal else None
        self.gate_av = nn.Parameter(torch.zeros(1)) if cross_modal else None
        self.ln_before = nn.LayerNorm(width) if config.ln_before else None
        self.down = nn.Parameter(_conv_init(bottleneck, width // groups))
        self.bn1 = nn.BatchNorm1d(bottleneck) if config.batch_norm else None
        self.up = nn.Parameter(_conv_init(width, bottleneck // groups))
        self.bn2 = nn.BatchNorm1d(width) if config.batch_norm else None
        self.ln_after = nn.LayerNorm(width) if config.ln_after else None
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None
        self.gate_first = config.gate_first

    def forward(self, x: Tensor, other: Tensor | None = None, path: str | None = None) -> Tensor:
        """g LN(BN(up(ReLU(BN(down(LN(X'))))))). x (n, N, C), other (n, M, C) or None -> (n, N, C).

        With `gate_first` LN(g BN(...)). path: of gather_latents, if another than the adapter's.
        """
        if self.latents is not None:
            summary = ops.gather_latents(self.latents, other, path=path or self.path)
            x = reference.read_latents(x, summary, self.gate_av)
        if self.ln_before is not None:
            x = self.ln_before(x)
        z = reference.grouped_linear(x, self.down)
        z = F.relu(_channelwise(self.bn1, z))
        z = reference.grouped_linear(z, self.up)
        z = _channelwise(self.bn2, z)
        if self.gate is not None and self.gate_first:
            z = self.gate * z
        if self.ln_after is not None:
            z = self.ln_after(z)
        return z if self.gate is None or self.gate_first else self.gate * z


class BlockAdapters(nn.ModuleDict):
    """The adapters of one block, "audio_p1", "video_p1", "audio_p2" and "video_p2" or some of them."""

    path = "auto"

    def at(self, place: str) -> list[LavishAdapter]:
        """Those beside one branch, audio first; none if the model has none there."""
        return [adapter for name, adapter in self.items() if name.endswith(place)]

    def forward(self, block: Block, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The streams after the frozen block and these adapters: at each place X + norm(B) + LAV(X, Y).

        Where there is no adapter, X + norm(B). xs: the block's streams, (n, N, C) each, audio first.
        """
        for place in PLACES:
            branches = [block.branch(place, x) for x in xs]
            if adapters := self.at(place):
                with arithmetic(self, xs[0]):
                    outs = ops.adapter(xs, branches, adapters, block.norm(place), block.drop_path, path=self.path)
                # Autocast leaves norms, and with them the sum, in float32. What a caller's makes stays as it is.
                if is_narrow(xs[0], self):
                    outs = [out.to(x.dtype) for out, x in zip(outs, xs, strict=True)]
                xs = outs
            else:
                xs = [x + block.finish(place, branch) for x, branch in zip(xs, branches, strict=True)]
        return xs


def _channelwise(norm: nn.Module | None, x: Tensor) -> Tensor:
    # Statistics per channel over all tokens of all images, as BatchNorm2d has them on the released (n, C, N, 1).
    return x if norm is None else norm(x.flatten(0, 1)).view_as(x)


def _conv_init(out_features: int, in_features: int) -> Tensor:
    weight = torch.empty(out_features, in_features)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
