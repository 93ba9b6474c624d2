"""The choice of a path, and what importing the package may touch."""

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lavish_fast.kernels import _checks, _launch, _tuning

from kernel_parity import DEVICE
from lavish_fast import ops, reference
from lavish_fast.adapter import LavishAdapter
from lavish_fast.backbones import DropPath
from lavish_fast.config import AdapterConfig
from parity import ROOT, randomise


def test_auto_on_a_cpu_is_the_reference():
    # Though the interpreter could run the kernel there.
    latents, other = torch.rand(2, 64), torch.randn(3, 5, 64)
    for path, reason in (("auto", "expected CUDA tensors, got cpu"), ("reference", "asked for")):
        with ops.recording() as choices:
            got = ops.gather_latents(latents, other, path=path)
        assert torch.equal(got, reference.gather_latents(latents, other))
        assert choices == [("gather_latents", (3, 5, 64), torch.float32, "reference", [reason], 64, "")]


def test_fused_raises_with_every_reason():
    x = torch.randn(3, 5, 64, dtype=torch.float64, device="meta")
    with pytest.raises(ValueError, match=r"gather_latents: .*CUDA tensors, got meta; .*float64; .*m: expected"):
        ops.gather_latents(torch.rand(65, 64, dtype=torch.float64, device="meta"), x, path="fused")
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"attention: .*got: there is no fused kernel for it"):
        ops.attention(q, q, q, 1.0, path="fused")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_takes_pytorchs_kernel_unless_told_otherwise(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x.to(dtype).requires_grad_() for x in torch.randn(3, 2, 3, 37, 8, generator=generator) * 3)
    found = {}
    for path in ("auto", "reference"):
        with ops.recording() as choices, torch.autocast("cpu", torch.bfloat16):
            out = ops.attention(q, k, v, 0.5, path=path)
        assert [choice.path for choice in choices] == [{"auto": "sdpa"}.get(path, path)]
        assert out.dtype == dtype
        found[path] = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, expected in zip(*found.values()):
        assert (got - expected).norm() <= limit * expected.norm()


def test_without_triton_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(_checks, "_INSTALLED", False)
    for name in ("gather_kernel", "adapter_kernel", "window_kernel"):
        monkeypatch.setattr(ops, name, None)
    with pytest.raises(ValueError, match=r"gather_latents: .*expected triton to be installed, got none"):
        ops.gather_latents(torch.rand(2, 64), torch.randn(3, 5, 64), path="fused")


def test_recordings_nest_and_end():
    latents, other = torch.rand(2, 8), torch.randn(3, 5, 8)
    with ops.recording() as outer:
        ops.gather_latents(latents, other)
        with ops.recording() as inner:
            ops.gather_latents(latents, other)
    ops.gather_latents(latents, other)
    assert (len(outer), len(inner)) == (2, 1)
    with ops.recording() as outer:
        with ops.recording() as inner:
            pass  # equal to the outer one
        ops.gather_latents(latents, other)
    assert (len(outer), len(inner)) == (1, 0)


def test_recordings_are_a_threads_own():
    latents, other, meeting = torch.rand(2, 8), torch.randn(3, 5, 8), threading.Barrier(4)

    def record(count):
        with ops.recording() as choices:
            meeting.wait()
            for _ in range(count):
                ops.gather_latents(latents, other)
            meeting.wait()
        return len(choices)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(record, range(4))) == [0, 1, 2, 3]


def adapters():
    """Two streams' adapters in evaluation, their streams, and a post-norm that is not trained."""
    found = [randomise(LavishAdapter(64, AdapterConfig(reduction=4)), seed).eval() for seed in (0, 1)]
    xs = list(torch.randn(2, 2, 8, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE).unbind())
    norm = torch.nn.LayerNorm(64).requires_grad_(False)
    return xs, xs, [adapter.to(DEVICE) for adapter in found], norm.to(DEVICE), DropPath(0.0)


def test_the_path_of_an_adapter_is_its_gatherings():
    given = adapters()
    for adapter in given[2]:
        adapter.path = "fused"
    with torch.no_grad(), ops.recording() as choices:
        ops.adapter(*given, path="reference")
    assert [(choice.op, choice.path) for choice in choices] == [
        ("adapter", "reference"), ("gather_latents", "reference"), ("gather_latents", "reference"),
    ]  # fmt: skip


def test_norms_of_another_eps_are_refused_by_the_kernels():
    # They take one eps for both streams.
    given = adapters()
    given[2][1].bn1.eps = 0.5
    with torch.no_grad(), pytest.raises(ValueError, match="expected norms of the same eps in both streams, got others"):
        ops.adapter(*given, path="fused")


def test_norms_without_running_statistics_are_refused_by_the_kernels():
    # Such a norm goes by the batch's own statistics in evaluation too.
    given = adapters()
    with torch.no_grad():
        ops.adapter(*given, path="fused")
        for norm in (adapter.bn2 for adapter in given[2]):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        with pytest.raises(ValueError, match="expected running statistics of each BatchNorm, got none"):
            ops.adapter(*given, path="fused")
        with ops.recording() as choices:
            ops.adapter(*given)
    assert {choice.path for choice in choices if choice.op == "adapter"} == {"reference"}


def test_running_statistics_are_batch_norms():
    """Each norm's own, by a momentum of its own."""
    given, tokens = adapters()[2], 7
    norms = [[getattr(a, name) for a in given] for name in ("bn1", "bn2")]
    for i, norm in enumerate(norm for pair in norms for norm in pair):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
        norm.momentum = 0.1 * (i + 1)
    expected, statistics = copy.deepcopy(norms), []
    for pair in expected:
        xs = [torch.randn(tokens, norm.num_features, device=DEVICE) for norm in pair]
        for norm, x in zip(pair, xs):
            norm.train()(x)
        statistics.append(torch.stack([torch.stack((x.mean(0), x.var(0, correction=0))) for x in xs]))
    ops._track(given, statistics, tokens)
    for got, wanted in zip((n for pair in norms for n in pair), (n for pair in expected for n in pair)):
        for name, t in wanted.named_buffers():
            torch.testing.assert_close(getattr(got, name), t)


def test_constants_are_those_of_what_is_launched(monkeypatch):
    xs, branches, own, norm, drop_path = adapters()
    architecture = _launch.architecture(xs[0].device)
    for op in ("adapter", "adapter_training_up"):
        constants = _tuning.row(op, architecture, xs[0].dtype, 64)[0]
        monkeypatch.setitem(_tuning.ROWS, (op, architecture, "float32", 64), constants)
    with ops.recording() as choices:
        ops.adapter(xs, branches, own, norm, drop_path, path="fused")
        with torch.no_grad():
            ops.adapter(xs, branches, own, norm, drop_path, path="fused")
    training, inference = (choice.constants for choice in choices if choice.op == "adapter")
    measured = f"measured on sm_{architecture}, float32, width 64"
    assert inference == measured
    default = "default up to width 384"
    assert training == (
        f"adapter_training_down: {default}; adapter_training_up: {measured}; "
        f"adapter_training_bwd_up: {default}; adapter_training_bwd_down: {default}"
    )


def test_constants_of_a_backward_are_named_where_there_will_be_one(monkeypatch):
    latents, other = torch.rand(2, 64, device=DEVICE), torch.randn(3, 5, 64, device=DEVICE)
    architecture = _launch.architecture(other.device)
    constants = _tuning.row("gather_latents_bwd", architecture, other.dtype, 64)[0]
    monkeypatch.setitem(_tuning.ROWS, ("gather_latents_bwd", architecture, "float32", 64), constants)
    with ops.recording() as choices:
        ops.gather_latents(latents, other, path="fused")
        ops.gather_latents(latents, other.requires_grad_(), path="fused")
    inference, training = (choice.constants for choice in choices)
    assert inference == "default up to width 2048"
    measured = f"measured on sm_{architecture}, float32, width 64"
    assert training == f"gather_latents: {inference}; gather_latents_bwd: {measured}"


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
