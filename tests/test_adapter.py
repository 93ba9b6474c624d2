"""The adapter against the released layout, and the laws it must obey."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lavish_fast.adapter import LavishAdapter
from lavish_fast.config import AdapterConfig
from parity import randomise, relative_error


def released(adapter: LavishAdapter, x, other):
    """The adapter's equations on (n, C, N, 1) maps with grouped convolutions, as the released code lays them out."""
    if adapter.latents is not None:
        gathered = adapter.latents + torch.softmax(adapter.latents @ other.mT, -1) @ other
        x = x + adapter.gate_av * (torch.softmax(x @ gathered.mT, -1) @ gathered)
    if adapter.ln_before is not None:
        x = adapter.ln_before(x)
    z = x.mT.unsqueeze(-1)
    for weight, norm, activation in ((adapter.down, adapter.bn1, F.relu), (adapter.up, adapter.bn2, lambda t: t)):
        groups = z.shape[1] // weight.shape[1]
        z = F.conv2d(z, weight[:, :, None, None], groups=groups)
        if norm is not None:
            # A contiguous gradient: torch's CPU BatchNorm backward is wrong for mixed memory layouts.
            z = norm(z.squeeze(-1).mT.reshape(-1, z.shape[1])).view(len(z), -1, z.shape[1]).mT.unsqueeze(-1)
        z = activation(z)
    z = z.squeeze(-1).mT
    if adapter.ln_after is not None:
        z = adapter.ln_after(z)
    return z if adapter.gate is None else adapter.gate * z


def make(seed=0, width=32, **options):
    gate, cross_modal = options.pop("gate", True), options.pop("cross_modal", True)
    torch.manual_seed(seed)
    config = AdapterConfig(**({"reduction": 4} | options))
    return randomise(LavishAdapter(width, config, gate=gate, cross_modal=cross_modal), seed).double()


def streams(n=3, tokens=7, others=5, width=32):
    generator = torch.Generator().manual_seed(1)
    shape = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    return torch.randn(n, tokens, width, **shape), torch.randn(n, others, width, **shape)


@pytest.mark.parametrize(
    ("batch_norm", "ln_before", "ln_after", "gate", "cross_modal", "train"),
    list(itertools.product([True, False], repeat=6)),
)
def test_every_option_combination(batch_norm, ln_before, ln_after, gate, cross_modal, train):
    adapter = make(batch_norm=batch_norm, ln_before=ln_before, ln_after=ln_after, gate=gate, cross_modal=cross_modal)
    adapter.train(train)
    x, other = streams()
    got, expected = adapter(x, other), released(adapter, x, other)
    assert relative_error(got, expected) < 1e-12
    inputs = [x, *adapter.parameters()] + ([other] if cross_modal else [])
    direction = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("latents", "reduction", "groups"), [(1, 2, 1), (2, 8, 2), (16, 4, 4), (64, 4, 2)])
def test_sizes(latents, reduction, groups):
    adapter = make(latents=latents, reduction=reduction, groups=groups).eval()
    x, other = streams(tokens=1, others=13)
    assert relative_error(adapter(x, other), released(adapter, x, other)) < 1e-12


def test_a_fresh_adapter_adds_nothing():
    x, other = streams()
    assert torch.equal(LavishAdapter(32, AdapterConfig()).double()(x, other), torch.zeros_like(x))


def test_a_clip_alone_equals_the_clip_in_a_batch():
    adapter, (x, other) = make().eval(), streams(n=5)
    torch.testing.assert_close(adapter(x, other)[2:3], adapter(x[2:3], other[2:3]), rtol=1e-12, atol=1e-12)


def test_an_image_of_nan_stays_alone():
    adapter, (x, other) = make().eval(), streams(n=3)
    x, other = x.detach().clone(), other.detach().clone()
    x[1] = other[1] = float("nan")
    out = adapter(x, other)
    assert torch.isfinite(out[[0, 2]]).all()
    assert out[1].isnan().all()


def test_strided_inputs_and_empty_batches():
    adapter, (x, other) = make().eval(), streams(n=6)
    torch.testing.assert_close(adapter(x[::2], other[::2]), adapter(x[::2].clone(), other[::2].clone()))
    assert adapter(x[:0], other[:0]).shape == (0, 7, 32)


def test_batch_norm_buffers_follow_torch():
    adapter, (x, other) = make().train(), streams()
    before = adapter.bn1.running_mean.clone()
    adapter(x, other)
    seen = adapter.ln_before(x + adapter.gate_av * _read(adapter, x, other))
    z = F.conv2d(seen.mT[..., None], adapter.down[:, :, None, None], groups=2).squeeze(-1).mT.flatten(0, 1)
    torch.testing.assert_close(adapter.bn1.running_mean, 0.9 * before + 0.1 * z.mean(0))
    assert adapter.bn1.num_batches_tracked == 1


def _read(adapter, x, other):
    gathered = adapter.latents + torch.softmax(adapter.latents @ other.mT, -1) @ other
    return torch.softmax(x @ gathered.mT, -1) @ gathered
