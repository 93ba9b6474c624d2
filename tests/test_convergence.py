"""Thirty-two steps of Adam through the kernels, beside the model's own."""

import copy

import pytest
import torch

from kernel_parity import DEVICE, small_backbone
from lavish_fast import Model, ops, optimize
from lavish_fast.tasks import ave
from parity import randomise, relative_error, tiny_config, tiny_inputs

STEPS, CLIPS, BATCHES = 32, 4, 8


def steps(module, parameters, device=DEVICE) -> torch.Tensor:
    """Losses of the steps, on eight batches by turns whose labels are drawn: what can be learnt of them is slow."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for step in range(STEPS):
        audio, video = (x.to(device) for x in tiny_inputs(CLIPS, seed=step % BATCHES))
        labels = torch.randint(3, (CLIPS, 3), generator=torch.Generator().manual_seed(step % BATCHES))
        optimizer.zero_grad()
        loss = ave.loss(module(audio, video), labels.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_32_steps_through_the_kernels(dtype, limit):
    # Wide enough for every kernel, with a shifted block.
    backbone = small_backbone(dtype)
    torch.manual_seed(0)
    model = randomise(Model(tiny_config(backbone=backbone))).to(DEVICE).train()
    other = copy.deepcopy(model)
    with ops.recording() as choices:
        expected = steps(model.set_path("reference"), [p for _, p in model.trainable_parameters()])
    assert {choice.path for choice in choices} == {"reference"}
    fast = optimize(other, training=True, dtype=dtype, path="fused", compile=False)
    with ops.recording() as choices:
        got = steps(fast, [p for p in fast.parameters() if p.requires_grad])
    assert {choice.path for choice in choices} == {"fused"}
    assert expected[-BATCHES:].mean() < 0.95 * expected[:BATCHES].mean(), "it must learn something"
    assert ((got - expected).abs() / expected).max() <= limit
    if dtype == torch.float32:
        parameters = zip(model.trainable_parameters(), other.trainable_parameters(), strict=True)
        errors = {name: relative_error(q, p) for (name, p), (_, q) in parameters}
        # BN1 takes away what LN_before's bias adds: its gradient is rounding, which Adam makes into whole steps.
        errors = {name: error for name, error in errors.items() if not name.endswith("ln_before.bias")}
        assert max(errors.values()) <= 5e-3, errors
