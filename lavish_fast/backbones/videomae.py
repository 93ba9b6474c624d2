"""VideoMAE's ViT, frozen: tubelets of two frames to tokens, without a cls token (Tong et al., arXiv 2203.12602).

LAVISH runs its action recognition on a ViT-B that VideoMAE trained on Kinetics-400, and both streams through one
backbone. There is no released code for how a spectrogram enters a network of video tubelets. Our reading: it is a
still picture, that is two equal frames, and makes one layer of tubelets, at the first one's place in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast.backbones import Backbone, drop_path_rates
from lavish_fast.backbones.vit import Block
from lavish_fast.config import VideoMAEConfig


class PatchEmbed(nn.Module):
    """Tubelets to tokens: clips (n, 3, T, H, W) in order of time, row and column; pictures (n, 3, H, W)."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        size = config.tubelet, config.patch_size, config.patch_size
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, size, size)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 5:
            return _tokens(self.proj(images))
        # A tubelet of equal frames: its product with each frame's weights is the frame's product with their sum.
        weight = self.proj.weight.sum(2)
        return _tokens(F.conv2d(images, weight, self.proj.bias, stride=self.proj.stride[1:]))


def _tokens(x: Tensor) -> Tensor:
    """(n, C, *) as (n, N, C), with contiguous channels: the layout of the whole stream follows from it."""
    return x.flatten(2).mT.contiguous()


class VideoMAE(Backbone):
    """The frozen VideoMAE: clips (n, 3, T, S, S), or pictures (n, 3, H, W) of sides that patches divide, to (n, C)."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        if config.frames % config.tubelet or config.img_size % config.patch_size:
            raise ValueError(
                f"backbone: expected frames and sides that tubelets and patches divide, got {config.frames} frames, "
                f"tubelet {config.tubelet}, img_size {config.img_size}, patch_size {config.patch_size}"
            )
        self.config = config
        self.grid = config.img_size // config.patch_size
        self.patch_embed = PatchEmbed(config)
        tokens = config.frames // config.tubelet * self.grid**2
        self.register_buffer("pos_embed", positions(tokens, config.embed_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config, r) for r in drop_path_rates(config.drop_path_rate, config.depth))
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.apply(_init)

    def embed(self, images: Tensor) -> Tensor:
        """A clip to (n, T / tubelet * grid², C), a picture to (n, H / patch * W / patch, C).

        Raises: ValueError for a clip of another size than the configuration's, or sides that patches do not divide.
        """
        c = self.config
        clip = c.in_chans, c.frames, c.img_size, c.img_size
        shape = tuple(images.shape[1:])
        picture = len(shape) == 3 and shape[0] == c.in_chans and all(s and not s % c.patch_size for s in shape[1:])
        if shape != clip and not picture:
            raise ValueError(
                f"images: expected clips (n, {', '.join(map(str, clip))}) or pictures (n, {c.in_chans}, H, W) of sides "
                f"that {c.patch_size} divides, got {tuple(images.shape)}"
            )
        x = self.patch_embed(images)
        if images.ndim == 5:
            return x + self.pos_embed
        return x + self._picture_positions(shape[1] // c.patch_size, shape[2] // c.patch_size)

    def _picture_positions(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, C): the first layer's positions, between them bilinearly where the grid is another."""
        first = self.pos_embed[:, : self.grid**2]
        if (rows, columns) == (self.grid, self.grid):
            return first
        square = first.mT.unflatten(2, (self.grid, self.grid))
        return F.interpolate(square, (rows, columns), mode="bilinear", align_corners=False).flatten(2).mT

    def enter(self, i: int, x: Tensor) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        """(n, N, C) as it is: the norm comes after the mean."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """(n, N, C) -> (n, C): the norm of the mean over tokens."""
        return self.fc_norm(x.mean(1))


def positions(tokens: int, width: int) -> Tensor:
    """The fixed position embedding (1, tokens, width), float32, over all tubelets in a row.

    Channel 2j of position p is sin(p / 10000^(2j / width)), channel 2j + 1 the cosine.
    """
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[None, :, :width].float()


_HUGGING_FACE = {
    "videomae.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trained VideoMAE's weights under the names of `VideoMAE`, its classifier left out.

    Taken are the fine-tuned networks of the authors (`blocks.0.attn.q_bias`, `fc_norm.weight` ...) and of Hugging
    Face (`videomae.encoder.layer.0.attention.attention.query.weight` ...), and our own names. Both have biases of
    queries and values alone; ours has a zero one for the keys. Other names stay as they are, so that a strict load
    names them.

    Raises: ValueError for the network of the pre-training, whose encoder pools nothing; or naming a query, key or
        value, or its bias, that lacks the others or has another shape.
    """
    if other := [name for name in state_dict if re.match(r"(encoder|decoder|encoder_to_decoder|mask_token)\b", name)]:
        raise ValueError(f"state dict: expected a fine-tuned VideoMAE, got the one of the pre-training: {other[0]}")
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        if re.match(r"(head|classifier)\.(weight|bias)$", name):
            continue
        name = re.sub(r"^videomae\.encoder\.layer\.", "blocks.", name)
        block, inner, rest = re.match(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias|)$", name).groups("")
        inner = _HUGGING_FACE.get(inner, inner) if block or inner.startswith("videomae.") else inner
        if match := re.fullmatch(r"(?:attn|attention\.attention)\.(query|key|value|q_bias|v_bias)", inner):
            parts.setdefault(f"{block}attn.qkv", {})[match[1]] = value
        else:
            renamed[block + inner + rest] = value
    for name, found in parts.items():
        renamed |= _joined(name, found)
    return renamed


def _joined(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for kind, wanted in (("weight", ("query", "key", "value")), ("bias", ("q_bias", "v_bias"))):
        given = {part: found[part] for part in wanted if part in found}
        if not given:
            continue
        if len(given) < len(wanted) or len({tuple(part.shape) for part in given.values()}) > 1:
            got = ", ".join(f"{part} {tuple(value.shape)}" for part, value in given.items())
            raise ValueError(f"{name}.{kind}: expected {', '.join(wanted)} of one shape, got {got}")
        values = list(given.values())
        if kind == "bias":
            values.insert(1, torch.zeros_like(values[0]))
        joined[f"{name}.{kind}"] = torch.cat(values)
    return joined


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
