"""Helpers for parity tests: the goldens, relative errors, and models in which nothing is zero or the identity."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.cases import randomise as randomise
from lavish_fast import Config, Model
from lavish_fast.config import AdapterConfig, SpectrogramConfig, SwinV2Config, ViTConfig

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
GOLDENS = Path(os.environ.get("LAVISH_GOLDENS", ROOT.parent / "shared" / "goldens"))
AVE_GOLDENS = ("ave_swin_small", "ave_swin_paper", "ave_swin_16tokens_nobn", "ave_vit")
VIT = ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)


class Golden:
    """A run of the released code: its configuration, state dict, inputs and what it gave."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = {key: value for key, value in file.metadata().items() if key != "note"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = {key: json.loads(value) for key, value in facts.items()}
        backbone = {"kind": facts["backbone"], **facts["vit" if facts["backbone"] == "vit" else "swin"]}
        self.opt, self.backbone = facts["opt"], backbone
        self.config = Config.from_official(facts["opt"], task=facts["task"], backbone=backbone)
        self.state_dict = _below(tensors, "state_dict/")
        self.input = _below(tensors, "input/")
        self.expect = _below(tensors, "expect/")
        self.gradients = _below(self.expect, "grad/")
        self.after_train = _below(self.expect, "after_train/")

    def model(self, dtype: torch.dtype) -> Model:
        return Model.from_official(self.state_dict, self.config).to(dtype)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.input["audio"].to(dtype), self.input["vis"].to(dtype)


@cache
def golden(name: str) -> Golden:
    """The golden of this name; the test is skipped where neither tests/data nor LAVISH_GOLDENS has it."""
    for folder in (DATA, GOLDENS):
        if (path := folder / f"{name}.safetensors").is_file():
            return Golden(path)
    pytest.skip(f"{name}.safetensors is neither in tests/data nor in LAVISH_GOLDENS ({GOLDENS})")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; infinite where anything is not finite."""
    got, expected = got.detach().double(), expected.detach().double()
    error = ((got - expected).norm() / expected.norm()).item()
    return error if torch.isfinite(got).all() else float("inf")


def tiny_config(**changes) -> Config:
    """A two-stage Swin-V2 on 32 x 32 images with a shifted, masked block: everything in milliseconds."""
    values = {
        "backbone": SwinV2Config(
            img_size=32,
            embed_dim=16,
            depths=(2, 1),
            num_heads=(1, 2),
            window_size=4,
            pretrained_window_sizes=(0, 0),
        ),
        "adapter": AdapterConfig(reduction=4),
        "spectrogram": SpectrogramConfig(mel_bins=32, frames=32, frame_shift_ms=31.0),
        "classes": ("bell", "drum", "background"),
        "frames": 3,
    }
    return Config(**(values | changes))


def tiny_model() -> Model:
    """Of `tiny_config`, in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return randomise(Model(tiny_config())).eval()


def tiny_inputs(batch: int = 2, frames: int = 3, seed: int = 0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(batch, frames, 32, 32, generator=generator).to(dtype)
    return audio, torch.randn(batch, frames, 3, 32, 32, generator=generator).to(dtype)


class Ear(torch.nn.Module):
    """Of VGGish's inputs and outputs, without its 72 million parameters."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(96 * 64, 128)

    def forward(self, patches):
        return self.fc(patches.flatten(1)).relu()
