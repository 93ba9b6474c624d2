"""What every task has from the model, its faster forms and the training step, on networks of a few kilobytes."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch

from lavish_fast import Config, Model, TrainingStep, checkpoint, explain, ops, optimize, tasks
from lavish_fast.adapter import LavishAdapter
from lavish_fast.config import (
    HEADS,
    MODALITIES,
    TASKS,
    AdapterConfig,
    AVEConfig,
    AVQAConfig,
    AVSConfig,
    ResNetConfig,
    SpectrogramConfig,
    SwinV2Config,
    TrainConfig,
    ViTConfig,
)
from parity import Ear, randomise, relative_error

SWIN = SwinV2Config(img_size=32, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)
ADAPTER = AdapterConfig(reduction=4, batch_norm=False)
FRAMES, CLIPS, SIDE = 2, 3, 32
GATE_FIRST = replace(ADAPTER, ln_before=False, gate_first=True, zero_latents=True)
SECTIONS = {
    "ave": {"classes": ("bell", "drum", "background")},
    "avs": {"head": AVSConfig(channels=4, tpavi_stages=(1, 3), size=SIDE), "adapter": GATE_FIRST},
    "avqa": {"head": AVQAConfig(words=("<pad>", "what", "is"), length=4, width=16), "classes": ("one", "two")},
    "action": {"classes": ("jump", "run", "sit", "walk")},
}


def make_config(task, **changes):
    spectrogram = SpectrogramConfig(mel_bins=SIDE, frames=SIDE, frame_shift_ms=31.0)
    values = {"backbone": SWIN, "task": task, "adapter": ADAPTER, "spectrogram": spectrogram, "frames": FRAMES}
    return Config(**values | SECTIONS[task] | changes)


def make_inputs(task, clips=CLIPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(clips, FRAMES, SIDE, SIDE, generator=generator)
    video, other = torch.randn(2, clips, FRAMES, 3, SIDE, SIDE, generator=generator)
    if task == "avqa":
        question = torch.randint(3, (clips, 4), generator=generator)
        return {"audio": audio, "positive": video, "negative": other, "question": question}
    return {"audio": audio, "video": video}


def make_labels(task, clips=CLIPS):
    if task == "avs":
        return (torch.arange(clips * SIDE * SIDE).view(clips, 1, SIDE, SIDE) % 3 == 0).float()
    return torch.arange(clips * FRAMES).view(clips, FRAMES) % 3 if task == "ave" else torch.arange(clips) % 2


def tensors(outputs):
    """All that a network returns, as one vector."""
    flat = torch.utils._pytree.tree_leaves(outputs)
    return torch.cat([x.detach().double().flatten() for x in flat if isinstance(x, torch.Tensor)])


def test_every_task_has_what_the_package_calls():
    names = ["Head", "inputs", "loss", "Metric", "Dataset", "kept", "settle", "verify", "fitted", "HEAD_NAMES"]
    assert set(TASKS) == set(HEADS)
    for task in TASKS:
        module = tasks.load(task)
        assert not [name for name in names if not hasattr(module, name)], task
        TrainConfig.of_task(task)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("task", TASKS)
def test_a_model_its_fast_forms_and_its_checkpoint_agree(task, modality, tmp_path):
    model = randomise(Model(make_config(task, modality=modality))).eval()
    given = make_inputs(task)
    with torch.no_grad():
        expected = tensors(model(**given))
        assert expected.isfinite().all()
        assert expected.std() > 0
        fast = optimize(model, compile=False)
        assert relative_error(tensors(fast(**given)), expected) < 1e-5
        narrow = tensors(optimize(model, compile=False, dtype=torch.bfloat16)(**given))
        assert relative_error(narrow, expected) < 0.1
        alone = tensors(model(**{name: x[:1] for name, x in given.items()}))
        assert alone.numel() * CLIPS == expected.numel()
        model.save_pretrained(tmp_path)
        again = Model.from_pretrained(tmp_path, backbone=model.backbone.state_dict())
        assert again.config == model.config
        assert torch.equal(tensors(again(**given)), expected)
    paths = {row["path"] for row in explain(fast) if row["op"] == "adapter"}
    assert paths == {"reference"}


@pytest.mark.parametrize("task", TASKS)
def test_a_step_of_training_equals_the_models_own(task):
    module, given, labels = tasks.load(task), make_inputs(task), make_labels(task)
    own = randomise(Model(make_config(task))).double().train()
    if task == "avqa":
        own.head.eval()  # its dropout draws
    other = copy.deepcopy(own)
    given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    module.loss(own(**given), labels).backward()
    fast = optimize(other, training=True, compile=False, cuda_graphs=False)
    if task == "avqa":
        fast.network.head.eval()
    adam = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], lr=1e-3, fused=True)
    step = TrainingStep(fast, module.loss, adam)
    before = {name: p.detach().clone() for name, p in other.trainable_parameters()}
    assert step.accumulate(**given, labels=labels).tolist() == [True] * CLIPS
    outcome = step.finish()
    assert (outcome.clips, outcome.failed, outcome.overflow) == (CLIPS, 0, 0)
    for (name, mine), (_, theirs) in zip(own.trainable_parameters(), other.trainable_parameters(), strict=True):
        if mine.grad is None:  # of a linear map that only TPAVI would read, say
            continue
        # Those of single gates are small differences of large sums.
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-6, atol=1e-9 + 1e-7 * float(mine.grad.norm()))
        assert mine.grad.abs().sum() == 0 or not torch.equal(theirs.detach(), before[name]), name

    given = {name: x.clone() for name, x in given.items()}
    list(given.values())[1][1] = float("nan")
    assert step.accumulate(**given, labels=labels).tolist() == [True, False, True]
    assert step.finish().failed == 1


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        (replace(GATE_FIRST, batch_norm=True), (16, 16)),
        (GATE_FIRST, (16, 16)),
        (replace(ADAPTER, batch_norm=True), (9, 16)),
    ],
    ids=["gate before LN_after", "gate before LN_after, no BatchNorm", "streams of two lengths"],
)
def test_what_the_other_tasks_ask_of_the_adapters_kernels(settings, lengths):
    """In the interpreter. The kernels' own gate comes last, and a launch of theirs takes streams of one length."""
    torch.manual_seed(0)
    width = 64
    adapters = [randomise(LavishAdapter(width, settings), seed=i).double() for i in range(2)]
    norm = randomise(torch.nn.LayerNorm(width), seed=3).double().requires_grad_(False)
    xs, branches = ([torch.randn(2, N, width, dtype=torch.float64) for N in lengths] for _ in range(2))

    def run(dtype, path, training):
        own = [copy.deepcopy(a).to(dtype).train(training) for a in adapters]
        given = [x.detach().to(dtype, copy=True).requires_grad_(training) for x in xs]
        arguments = given, [b.to(dtype) for b in branches], own, copy.deepcopy(norm).to(dtype), torch.nn.Identity()
        with torch.set_grad_enabled(training):
            outs = [out.flatten() for out in ops.adapter(*arguments, path=path)]
            if training:
                sum((out * torch.arange(out.numel()).sin()).sum() for out in outs).backward()
        buffers = [b.double() for a in own for b in a.buffers()]
        gradients = [p.grad for p in (*given, *(p for a in own for p in a.parameters()))] if training else []
        return [out.detach() for out in outs] + buffers + gradients

    for training in (False, True):
        truth, got = run(torch.float64, "reference", training), run(torch.float32, "fused", training)
        for i, (expected, x) in enumerate(zip(truth, got, strict=True)):
            # Before a LayerNorm the gate's own gradient is zero but for eps.
            assert (x.double() - expected).norm() <= 1e-4 * expected.norm() + 1e-4, (training, i)
    assert not torch.allclose(truth[0], (xs[0] + branches[0]).flatten()), "the adapters must show"


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        (ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2), {}),
        (ResNetConfig(img_size=32, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8)), {"p2": False}),
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_other_backbones_run_every_task_that_they_can(task, backbone, changes):
    adapter = replace(SECTIONS[task].get("adapter", ADAPTER), **changes)
    if task == "avs" and len(backbone.stages) == 1:
        with pytest.raises(ValueError, match=r"backbone: expected .* stages"):
            make_config(task, backbone=backbone, adapter=adapter)
        return
    model = randomise(Model(make_config(task, backbone=backbone, adapter=adapter))).eval()
    given = make_inputs(task)
    with torch.no_grad():
        expected = tensors(model(**given))
        assert expected.isfinite().all()
        assert relative_error(tensors(optimize(model, compile=False)(**given)), expected) < 1e-5
    fast = optimize(model, training=True, compile=False)
    module, labels = tasks.load(task), make_labels(task)
    module.loss(fast(**given), labels).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for _, p in model.trainable_parameters())


def test_vggish_beside_event_localisation(monkeypatch, tmp_path):
    monkeypatch.setattr("lavish_fast.model.VGGish", Ear)
    torch.manual_seed(0)
    model = randomise(Model(make_config("ave", head=AVEConfig(vggish=True)))).eval()
    assert model.head.fc2.in_features == 512 + 128
    assert not any("vggish" in name for name, _ in model.trainable_parameters())
    given = make_inputs("ave") | {"patches": torch.randn(CLIPS, FRAMES, 96, 64)}
    with torch.no_grad():
        expected = model(**given)
        hidden = model.head.fc1(model.features(**given))
        heard = model.vggish(given["patches"].flatten(0, 1)[:, None])
        torch.testing.assert_close(expected, model.head.fc2(torch.cat((hidden, heard), 1)).softmax(1))
        for fast in (optimize(model, compile=False), optimize(model, training=True, compile=False)):
            torch.testing.assert_close(fast(**given), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    frozen = {"backbone": model.backbone.state_dict(), "vggish": model.vggish.state_dict()}
    with torch.no_grad():
        again = Model.from_pretrained(tmp_path, **frozen)(**given)
    torch.testing.assert_close(again, expected)
    other = {name: tensor + 1 for name, tensor in frozen["vggish"].items()}
    with pytest.raises(ValueError, match="expected the vggish it was trained on"):
        Model.from_pretrained(tmp_path, **frozen | {"vggish": other})
    with pytest.raises(ValueError, match=r"vggish: expected a file of its weights, .* got none"):
        Model.from_pretrained(tmp_path, backbone=frozen["backbone"])
    with pytest.raises(ValueError, match=r"patches: expected a floating tensor \(B, T, 96, 64\), got NoneType"):
        model(**make_inputs("ave"))
    with pytest.raises(ValueError, match=r"head\.vggish: expected it with the sound, got video"):
        make_config("ave", head=AVEConfig(vggish=True), modality="video")
    with pytest.raises(ValueError, match="vggish: expected a configuration with it beside"):
        Model(make_config("ave")).load_vggish(frozen["vggish"])


def test_presets_name_their_task_and_survive_a_file():
    for name in Config.presets():
        config = Config.from_preset(name)
        assert name.startswith(f"{config.task}-")
        assert Config.from_dict(config.to_dict()) == config
        assert config.backbone_weights


def test_a_section_of_another_task_is_refused():
    with pytest.raises(ValueError, match="head: expected AVSConfig, got AVQAConfig"):
        make_config("avs", head=AVQAConfig())
    with pytest.raises(ValueError, match=r"adapter\.p2: expected False for resnet"):
        make_config("ave", backbone=ResNetConfig(img_size=32), adapter=ADAPTER)
    with pytest.raises(
        ValueError, match=r"head: expected fields among channels, hidden, size, tpavi_stages, got depth"
    ):
        Config.from_dict(make_config("avs").to_dict() | {"head": {"depth": 3}})
    values = dataclasses.asdict(make_config("avs").head)
    assert Config.from_dict(make_config("avs").to_dict() | {"head": values}) == make_config("avs")
    with pytest.raises(ValueError, match="expected one with a released network"):
        Model.from_official({}, make_config("action"))
    with pytest.raises(ValueError, match="official state dict: expected the"):
        Model.from_official(checkpoint.to_official({}, "swinv2", {}), make_config("ave"))
