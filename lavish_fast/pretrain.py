"""How the demo's frozen backbone was made: a tiny Swin-V2 that learned to tell pictures apart, and never saw a sound.

    python -m lavish_fast.pretrain lavish_fast/data/tiny_swin_v2.safetensors

The pictures are drawn as they are needed: the shapes of `lavish_fast.synthetic` on their backgrounds, and textures
(stripes, rings, dots, checks). Two linear heads, thrown away afterwards, name the shape and the texture. Spectrograms
are left to the adapters, as in the paper, whose backbones were trained on images alone.
"""

from __future__ import annotations

import argparse
import math
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from lavish_fast import checkpoint, synthetic
from lavish_fast.backbones.swin_v2 import SwinV2
from lavish_fast.config import Config
from lavish_fast.media import resize

TEXTURES = 12  # 0-7 stripes of four directions in two widths, 8 rings, 9 rays, 10 checks, 11 dots
SHAPES = len(synthetic.SHAPES) + 1  # the last: no shape

DIAMETERS = (0.42, 0.6)  # of the shapes, as fractions of the picture's side


def texture(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one of the TEXTURES in two random colours, with noise."""
    y, x = np.meshgrid(*2 * [np.linspace(-1, 1, size)], indexing="ij")
    phase = rng.uniform(0, 2 * math.pi)
    cx, cy = rng.uniform(-0.7, 0.7, 2)
    wave = rng.uniform(4, 8)
    if kind < 8:
        angle = (kind % 4) * math.pi / 4 + rng.uniform(-0.2, 0.2)
        wave = rng.uniform(5, 12) if kind < 4 else rng.uniform(16, 32)
        pattern = np.sin(wave * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    elif kind == 8:
        pattern = np.sin(2.5 * wave * np.hypot(x - cx, y - cy) + phase)
    elif kind == 9:
        pattern = np.sin(round(wave) * np.arctan2(y - cy, x - cx) + phase)
    else:
        a, b = np.sin(2 * wave * x + phase), np.sin(2 * wave * y - phase)
        pattern = a * b if kind == 10 else np.maximum(a, 0) * np.maximum(b, 0) * 2 - 1
    if rng.random() < 0.5:
        pattern = np.tanh(4 * pattern)
    low, high = rng.uniform(0, 255, (2, 3))
    share = (pattern[..., None] + 1) / 2 * rng.uniform(0.3, 1)
    noise = rng.normal(0, rng.uniform(2, 25), (size, size, 1))
    return np.clip(low + share * (high - low) + noise, 0, 255).astype(np.uint8)


def batch(seed: int, step: int, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (count, 3, size, size), normalised, with their shapes and textures (count,).

    They are drawn at the size of the demo's videos and made smaller in the same way as those.
    """
    rng = np.random.default_rng((seed, step))
    pictures, shapes, textures = [], [], []
    for _ in range(count):
        if rng.random() < 0.75:
            shapes.append(int(rng.integers(SHAPES)))
            textures.append(TEXTURES)
            index = None if shapes[-1] == SHAPES - 1 else shapes[-1]
            pictures.append(synthetic.random_image(rng, index, diameters=DIAMETERS))
        else:
            shapes.append(SHAPES - 1)
            textures.append(int(rng.integers(TEXTURES)))
            pictures.append(texture(rng, textures[-1], synthetic.SIZE))
    images = torch.stack([resize(picture, size) for picture in pictures])
    return images, torch.tensor(shapes), torch.tensor(textures)


def _batch(arguments: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(1)
    return batch(*arguments)


def pretrain(config: Config, *, steps: int, batch_size: int = 64, seed: int = 0) -> tuple[SwinV2, float]:
    """The trained backbone, and the share of new pictures whose shape and texture it names right."""
    torch.manual_seed(seed)
    backbone = SwinV2(config.backbone)
    for block in backbone.blocks:
        # Swin-V2 is trained from blocks that are the identity (its section 3.2).
        nn.init.zeros_(block.norm1.weight)
        nn.init.zeros_(block.norm2.weight)
    heads = nn.ModuleList([nn.Linear(config.width, SHAPES), nn.Linear(config.width, TEXTURES + 1)])
    optimiser = torch.optim.AdamW([*backbone.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    size = config.backbone.img_size

    def predict(images: Tensor) -> list[Tensor]:
        for block in backbone.blocks:  # constants of a frozen backbone, but not here
            attn = block.attn
            attn.qkv_bias, attn.scale, attn.table, attn.bias = attn.derived()
        features = backbone(images)
        return [head(features) for head in heads]

    with get_context("spawn").Pool(1) as pool:
        work = pool.imap(_batch, ((seed, step, batch_size, size) for step in range(steps)), chunksize=4)
        for step, (images, *labels) in enumerate(track(work, "pretraining", total=steps)):
            loss = sum(F.cross_entropy(logits, label) for logits, label in zip(predict(images), labels))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if not step % 100:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
    images, *labels = batch(seed + 1, 0, 512, size)
    with torch.no_grad():
        right = [logits.argmax(-1) == label for logits, label in zip(predict(images), labels)]
    return backbone, (right[0] & right[1]).float().mean().item()


def main() -> None:
    """Pretrains the demo's backbone and writes it in float16."""
    from lavish_fast.demos.ave import CONFIG

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    backbone, accuracy = pretrain(CONFIG, steps=arguments.steps)
    print(f"shape and texture right on new pictures: {accuracy:.1%}")
    tensors = {name: tensor.half() for name, tensor in backbone.state_dict().items()}
    checkpoint.write_tensors(arguments.out, tensors, {"format": "pt", "accuracy": f"{accuracy:.4f}"})


if __name__ == "__main__":
    main()
