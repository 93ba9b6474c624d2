"""The released order of operations against the reference, whose goldens are runs of the released code."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines.released import FORMS, ReleasedAVE
from lavish_fast import Model
from lavish_fast.config import AdapterConfig
from lavish_fast.tasks import ave
from parity import golden, randomise, relative_error, tiny_config, tiny_inputs

OPTIONS = {
    "paper": AdapterConfig(reduction=4),
    "16 latents, no norms": AdapterConfig(latents=16, reduction=4, batch_norm=False, ln_before=False, ln_after=False),
    "no audio gate, p1 alone": AdapterConfig(reduction=2, groups=4, audio_gate=False, p2=False),
    "one-modality adapters": AdapterConfig(reduction=4, cross_modal=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ave_swin_small", "ave_swin_paper", "ave_swin_16tokens_nobn"])
def test_golden(name, form):
    case = golden(name)
    released = ReleasedAVE.from_model(case.model(torch.float32).eval(), form)
    with torch.no_grad():
        assert relative_error(released(*case.inputs(torch.float32)), case.expect["eval_probs"]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_the_references(options, form):
    torch.manual_seed(0)
    model = randomise(Model(tiny_config(adapter=OPTIONS[options]))).double().train()
    released = ReleasedAVE.from_model(model, form).double()
    assert sum(p.numel() for p in released.parameters() if p.requires_grad) == sum(
        p.numel() for _, p in model.trainable_parameters()
    )
    inputs, labels = tiny_inputs(dtype=torch.float64), torch.tensor([[0, 1, 2], [2, 2, 0]])
    for network in (model, released):
        ave.loss(network(*inputs), labels).backward()
    theirs = {name.removesuffix(".weight"): p.grad for name, p in released.named_parameters()}
    for name, parameter in model.adapters.named_parameters():
        gradient = theirs[f"blocks.{name}".removesuffix(".weight")]
        # Not relative: before a BatchNorm some gradients are zero but for rounding.
        assert torch.allclose(gradient.reshape(parameter.shape), parameter.grad, rtol=1e-9, atol=1e-14), name
    for name, buffer in model.adapters.named_buffers():
        assert torch.allclose(released.get_buffer(f"blocks.{name}"), buffer), name


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="form: expected one of conv, bmm, got 'einsum'"):
        ReleasedAVE(tiny_config(), "einsum")
    with pytest.raises(ValueError, match="expected a Swin-V2 and both streams"):
        ReleasedAVE(replace(tiny_config(), modality="video"))
