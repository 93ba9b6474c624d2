"""LAVISH's AVE network in the released code's order of operations: what a user of it runs today.

The streams go through the frozen blocks one after the other; an adapter works on (n, C, N, 1), so every LayerNorm is
wrapped in permutes; the 1x1 convolutions are grouped `Conv2d`s; timm's blocks make the position bias anew, through
its MLP, on every forward. Nothing is fused, cached or skipped. Written from the equations and layouts, not from code.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import Model
from lavish_fast.config import AdapterConfig, Config

FORMS = ("conv", "bmm")


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is laid out as its input.

    torch's CPU batch norm gives wrong gradients for a contiguous input and a channels-last gradient, just what the
    (n, C, N, 1) layout brings. Without this copy of one gradient the released order cannot be right on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class ReleasedAdapter(nn.Module):
    """One adapter on x (n, C, N, 1) and other (n, C, M, 1), as `LavishAdapter` on (n, N, C).

    form "conv" has grouped convolutions; "bmm" writes the same as batched matrix products, for cards on which
    cuDNN's grouped convolutions are slow.
    """

    def __init__(self, width: int, config: AdapterConfig, *, gate: bool, form: str) -> None:
        super().__init__()
        bottleneck, groups = width // config.reduction, config.groups
        self.form = form
        self.latents = nn.Parameter(torch.rand(config.latents, width)) if config.cross_modal else None
        self.gate_av = nn.Parameter(torch.zeros(1)) if config.cross_modal else None
        self.ln_before = nn.LayerNorm(width) if config.ln_before else None
        self.down = nn.Conv2d(width, bottleneck, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck) if config.batch_norm else None
        self.up = nn.Conv2d(bottleneck, width, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width) if config.batch_norm else None
        self.ln_after = nn.LayerNorm(width) if config.ln_after else None
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.latents is not None:
            y = other.squeeze(-1)  # (n, C, M)
            latents = self.latents.expand(len(x), -1, -1)
            latents = latents + torch.bmm(torch.bmm(latents, y).softmax(-1), y.permute(0, 2, 1))
            weights = torch.bmm(x.squeeze(-1).permute(0, 2, 1), latents.permute(0, 2, 1)).softmax(-1)  # (n, N, m)
            x = x + self.gate_av * torch.bmm(weights, latents).permute(0, 2, 1).unsqueeze(-1)
        z = _layer_norm(self.ln_before, x)
        z = self._convolution(self.down, z)
        z = F.relu(z if self.bn1 is None else self.bn1(z))
        z = self._convolution(self.up, z)
        if self.bn2 is not None:
            z = self.bn2(z)
            if z.device.type == "cpu" and z.requires_grad:
                z = _ContiguousGradient.apply(z)
        z = _layer_norm(self.ln_after, z)
        return z if self.gate is None else self.gate * z

    def _convolution(self, convolution: nn.Conv2d, x: Tensor) -> Tensor:
        if self.form == "conv":
            return convolution(x)
        weight = convolution.weight.view(convolution.groups, -1, convolution.weight.shape[1])  # (G, D / G, C / G)
        return (weight @ x.squeeze(-1).unflatten(1, (convolution.groups, -1))).flatten(1, 2).unsqueeze(-1)


class ReleasedBlock(nn.Module):
    """One of timm's blocks with its four adapters: both streams (n, N, C) -> the same."""

    def __init__(self, frozen: nn.Module, width: int, config: AdapterConfig, form: str) -> None:
        super().__init__()
        self.frozen = frozen
        for place in ("p1", "p2"):
            for stream, gate in (("audio", config.audio_gate), ("video", True)):
                adapter = ReleasedAdapter(width, config, gate=gate, form=form) if getattr(config, place) else None
                self.add_module(f"{stream}_{place}", adapter)

    def forward(self, audio: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        block = self.frozen
        side = block.input_resolution
        for place in ("p1", "p2"):
            residuals = None
            if (video_adapter := getattr(self, f"video_{place}")) is not None:
                x, y = video.permute(0, 2, 1).unsqueeze(-1), audio.permute(0, 2, 1).unsqueeze(-1)
                audio_adapter = getattr(self, f"audio_{place}")
                residuals = [a.squeeze(-1).permute(0, 2, 1) for a in (audio_adapter(y, x), video_adapter(x, y))]
            if place == "p1":
                video = video + block.norm1(block._attn(video.unflatten(1, side)).flatten(1, 2))
                audio = audio + block.norm1(block._attn(audio.unflatten(1, side)).flatten(1, 2))
            else:
                video = video + block.norm2(block.mlp(video))
                audio = audio + block.norm2(block.mlp(audio))
            if residuals is not None:
                audio, video = audio + residuals[0], video + residuals[1]
        return audio, video


class ReleasedAVE(nn.Module):
    """The AVE network on Swin-V2, called as `Model` is: (B, T, S, S), (B, T, 3, S, S) -> probabilities (B * T, K)."""

    def __init__(self, config: Config, form: str = "conv") -> None:
        super().__init__()
        from timm.models.swin_transformer_v2 import SwinTransformerV2

        if form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        if config.backbone.kind != "swinv2" or len(config.streams) != 2:
            raise ValueError("released order: expected a Swin-V2 and both streams")
        self.swin = SwinTransformerV2(**vars(config.backbone), num_classes=0).requires_grad_(False)
        frozen = [block for stage in self.swin.layers for block in stage.blocks]
        widths = config.backbone.block_widths
        self.blocks = nn.ModuleList(
            ReleasedBlock(block, width, config.adapter, form) for block, width in zip(frozen, widths)
        )
        self.mlp_class = nn.Linear(2 * config.width, 512)
        self.mlp_class_2 = nn.Linear(512, len(config.classes))

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        audio = audio.unsqueeze(2).repeat(1, 1, 3, 1, 1).flatten(0, 1)
        video = video.flatten(0, 1)
        # timm's patch embedding gives (n, H, W, C) and its patch merging takes it.
        audio, video = self.swin.patch_embed(audio), self.swin.patch_embed(video)
        blocks = iter(self.blocks)
        for stage in self.swin.layers:
            audio, video = stage.downsample(audio), stage.downsample(video)
            side = audio.shape[1:3]
            audio, video = audio.flatten(1, 2), video.flatten(1, 2)
            for _ in stage.blocks:
                audio, video = next(blocks)(audio, video)
            audio, video = audio.unflatten(1, side), video.unflatten(1, side)
        features = torch.cat([self.swin.norm(x).mean((1, 2)) for x in (video, audio)], -1)
        return self.mlp_class_2(self.mlp_class(features)).softmax(-1)

    @classmethod
    def from_model(cls, model: Model, form: str = "conv") -> ReleasedAVE:
        """The same network as `model`, with its weights."""
        released = cls(model.config, form)
        released.swin.load_state_dict(model.backbone.state_dict())
        theirs = model.state_dict()
        with torch.no_grad():
            for name, tensor in released.state_dict().items():
                if not name.startswith("swin.") and ".frozen." not in name:
                    tensor.copy_(theirs[parameter_name(name)].view_as(tensor))
        return released.train(model.training)


def parameter_name(name: str) -> str:
    """What `Model` calls a trainable parameter, or a buffer, of `ReleasedAVE`."""
    name = re.sub(r"^blocks\.", "adapters.", name)
    name = re.sub(r"\.(down|up)\.weight$", r".\1", name)
    return re.sub(r"^mlp_class(_2)?\.", lambda match: "head.fc2." if match[1] else "head.fc1.", name)


def _layer_norm(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x.squeeze(-1).permute(0, 2, 1)).permute(0, 2, 1).unsqueeze(-1)
