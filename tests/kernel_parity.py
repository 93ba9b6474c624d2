"""What the kernels' tests share: where they run, inputs with traps around them, and how far from the truth they may be.

On a machine with a card the kernels run on it; without one Triton's interpreter runs them on the CPU, where bfloat16
is silently wrong and is left to the card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lavish_fast.config import SwinV2Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Bytes that one program may have. sm_80 has 163 KiB, but gets what sm_86 and sm_89 get (_tuning.DEFAULTS).
SHARED = {80: 99 * 1024, 86: 99 * 1024, 90: 227 * 1024}
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def small_backbone(dtype: torch.dtype) -> SwinV2Config:
    """Wide enough for every kernel on streams of this type, with a shifted block and 4 windows in the first stage."""
    width = 48 if DEVICE == "cpu" else 96 if dtype == torch.float32 else 192
    return SwinV2Config(
        img_size=32,
        embed_dim=width,
        depths=(2, 1),
        num_heads=(3, 6),
        window_size=4,
        pretrained_window_sizes=(0, 0),
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty and its kin give NaN, so that what a kernel does not write shows."""

    def poison(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, exact in `dtype`, the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)


def guarded(x: Tensor) -> Tensor:
    """The same numbers with the same strides, cut out of a buffer of NaN."""
    margin = 64
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    buffer = torch.full((extent + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, x.stride(), margin).copy_(x)


def every_second(x: Tensor) -> Tensor:
    """Every second image of a larger batch."""
    return guarded(x.repeat_interleave(2, 0)[::2])


def padded_rows(x: Tensor) -> Tensor:
    """Tokens cut out of wider rows."""
    return guarded(torch.cat([x, x], -1)[..., : x.shape[-1]])


def tokens_outside(x: Tensor) -> Tensor:
    """Tokens before images."""
    return guarded(x.transpose(0, 1).contiguous().transpose(0, 1))


def misaligned(x: Tensor) -> Tensor:
    """One element off any alignment."""
    return guarded(torch.cat([x.new_full((1,), float("nan")), x.flatten()]))[1:].view_as(x)


def assert_within_budget(got: Tensor, reference: Tensor, truth: Tensor, cap: float = 0.005) -> None:
    """`got` against the truth in float64: at most twice as far as the reference in the same type, and 4 ulp.

    The worst element and the RMS; and in any case a relative RMS of `cap`, in float32 of 1e-5. On a card, where a
    product of float32 is three of TF32, it is 8 ulp.
    """
    assert got.shape == truth.shape
    assert got.dtype == reference.dtype
    assert torch.isfinite(got).all()
    cap = 1e-5 if got.dtype == torch.float32 else cap
    ulp = torch.finfo(got.dtype).eps * truth.abs().max().item()
    errors = [(x.double().to(truth.device) - truth).abs() for x in (got, reference)]
    worst, rms = ([e.max().item() for e in errors], [e.square().mean().sqrt().item() for e in errors])
    ulps = 8 if got.is_cuda and got.dtype == torch.float32 else 4
    assert worst[0] <= 2 * worst[1] + ulps * ulp, f"worst element: {worst[0]:.3g}, reference {worst[1]:.3g}"
    assert rms[0] <= 2 * rms[1] + ulp / 4, f"RMS: {rms[0]:.3g}, reference {rms[1]:.3g}"
    relative = rms[0] / truth.square().mean().sqrt().item()
    assert relative <= cap, f"relative RMS: {relative:.3g}, at most {cap}"


@cache
def build(op: str) -> list[dict]:
    """What tests/build_kernels.py says of each launch of this kernel file, built for each of SHARED's cards at once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("build_kernels.py")
    with ThreadPoolExecutor() as pool:
        commands = [[sys.executable, script, op, str(architecture)] for architecture in SHARED]
        options = {"capture_output": True, "text": True, "env": environment, "timeout": 900, "check": False}
        runs = list(pool.map(lambda command: subprocess.run(command, **options), commands))
    for done in runs:
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for done in runs for line in done.stdout.splitlines()]


def built(op: str, script: str) -> list:
    """What a script prints of launches that it builds for sm_90, a line of JSON each, in a process of its own."""
    preamble = f"""
import json, re, triton
from build_kernels import Card
from lavish_fast.kernels import {op}

triton.runtime.driver.set_active(Card(90))
cases = [(case, launch) for case, launches in {op}.builds(90) for launch in launches]
build = lambda launch: launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants).asm
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", preamble + script],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parent, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_built(op: str, spills: dict[str, int] | None = None, *without_product: tuple[str, str]) -> None:
    """Every launch keeps to registers and to SHARED; products of 16-bit types are on tensor cores.

    spills: bytes a thread that a case may spill after all. without_product: kernels that have none in a case.
    """
    spills = spills or {}
    rows = build(op)
    assert {row["architecture"] for row in rows} == set(SHARED)
    for row in rows:
        assert row["stack"] <= spills.get(row["case"], 0), f"spills: {row}"
        assert row["unset"] == [], f"the assembler left registers unset: {row}"
        assert row["overwritten"] == [], f"a product may read what the next turn loads: {row}"
        assert row["shared"] <= SHARED[row["architecture"]], f"shared memory: {row}"
    # A kernel without a product, such as one that adds partial sums, has none in any build.
    for row in rows:
        if (row["kernel"], row["case"]) in without_product:
            assert not row["mma"]
        elif "float32" not in row["case"] and any(r["mma"] for r in rows if r["kernel"] == row["kernel"]):
            assert row["mma"], f"no tensor-core instruction: {row}"
    assert any(row["mma"] for row in rows)
