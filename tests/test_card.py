"""What networks take on a card, seen without one: tensors of a stand-in for it have types and shapes, and no memory.

Autocast of CUDA, layouts and types of streams are a card's; nothing is computed.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lavish_fast.kernels import _launch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lavish_fast import Config, Model, ops, optimize
from lavish_fast.inference import Inference
from lavish_fast.vggish import PATCH

PRESETS = [
    "ave-swinv2-large",
    "ave-swinv2-large-vggish",
    "ave-vit-large",
    "avs-swinv2-large",
    "avqa-swinv2-large",
    "action-videomae-base",
]


@pytest.fixture
def card(monkeypatch):
    """Where there is no card, what is asked of an H100."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(_launch, "architecture", lambda _: 90)


def shallow(name: str) -> Config:
    """A preset with a block a stage, two in the first."""
    config = Config.from_preset(name)
    depth = {"depths": (2, 1, 1, 1)} if config.backbone.kind == "swinv2" else {"depth": 1}
    return replace(config, backbone=replace(config.backbone, **depth))


def move(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                    is_parameter = isinstance(t, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, requires_grad=t.requires_grad) if is_parameter else moved
    return network


def inputs(config: Config, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of `Model.classify`, for one clip."""
    n, side, sound = config.images, config.backbone.img_size, config.spectrogram
    frames = (config.frames,) if n == 1 else ()
    shapes = [(n, 3, sound.frames, sound.mel_bins), (n, 3, *frames, side, side)]
    if config.task == "ave" and config.head.vggish:
        shapes.append((n, *PATCH))
    if config.task == "avqa":
        shapes.append(shapes[1])
    given = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
    if config.task == "avqa":
        given.append(torch.zeros(1, config.head.length, dtype=torch.long, device="cuda"))
    return given


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_every_op_takes_its_kernel_in_16_bits(card, name, training):
    config, dtype = shallow(name), torch.bfloat16
    model = Model(config)
    if training:
        network = optimize(model, training=True, dtype=dtype, compile=False).network
    elif config.backbone.kind == "swinv2":
        network = Inference(model, dtype=dtype, fold=False)
    else:
        network = model.to(dtype).eval()
    with FakeTensorMode(), torch.set_grad_enabled(training), ops.recording() as choices:
        move(network).classify(*inputs(config, dtype))
    assert {(choice.op, choice.path) for choice in choices} <= {("attention", "sdpa")} | {
        (op, "fused") for op in ops.OPS
    }
    assert {choice.dtype for choice in choices} == {dtype}
    places = 2 * (5 if config.backbone.kind == "swinv2" else 1)
    assert sum(choice.op == "adapter" for choice in choices) == places


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_the_model_itself_takes_in_float32(card, training, autocast):
    """Rows of the last stage do not fit in the registers of the adapter's kernel."""
    config = shallow("ave-swinv2-large")
    model = Model(config).train(training)
    with FakeTensorMode(), torch.set_grad_enabled(training), ops.recording() as choices:
        move(model)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model.classify(*inputs(config, torch.float32))
    refused = {(choice.op, choice.width) for choice in choices if choice.path != "fused"}
    assert refused == {("adapter", 1536)}
