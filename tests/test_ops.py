"""The choice of a path, and what importing the package may touch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavish_fast import ops, reference
from parity import ROOT


def test_auto_on_a_cpu_is_the_reference():
    latents, other = torch.rand(2, 8), torch.randn(3, 5, 8)
    for path in ("auto", "reference"):
        got = ops.gather_latents(latents, other, path=path)
        assert torch.equal(got, reference.gather_latents(latents, other))
        assert ops.choose("gather_latents", path, latents, other)[0] == "reference"


@pytest.mark.parametrize("op", ops.OPS)
def test_fused_raises_with_every_reason(op):
    with pytest.raises(ValueError, match=f"{op}: .*no fused kernel yet; expected CUDA tensors, got cpu"):
        ops.choose(op, "fused", torch.zeros(1))


def test_an_unknown_path_is_named():
    with pytest.raises(ValueError, match="path: expected 'auto', 'fused' or 'reference', got 'fast'"):
        ops.gather_latents(torch.rand(2, 8), torch.randn(3, 5, 8), path="fast")


def test_the_package_imports_without_its_optional_parts():
    # triton, xformers and the rest may be missing or unable to load: import and forward must work all the same.
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in 'triton xformers timm torchaudio torchvision torchcodec av h5py'.split():
            raise ImportError(f'{name} is not here')
sys.meta_path.insert(0, Refuse())
import torch
from lavish_fast import Config, Model
from parity import tiny_config, tiny_inputs
print(tuple(Model(tiny_config())(*tiny_inputs()).shape), torch.cuda.is_initialized())
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # parity draws its weights as the benchmarks do
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "(6, 3) False", result.stderr
