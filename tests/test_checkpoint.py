"""Checkpoints: exact round trips, released names, and files that must be refused."""

import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from lavish_fast import Model, checkpoint
from lavish_fast.tasks import ave
from parity import AVE_GOLDENS, golden, randomise, tiny_config, tiny_inputs


@pytest.fixture
def saved(tmp_path):
    model = randomise(Model(tiny_config(modality="audio+video"))).eval()
    model.save_pretrained(tmp_path / "run")
    return model, tmp_path / "run"


def test_round_trip(saved):
    model, path = saved
    loaded = Model.from_pretrained(path, backbone=model.backbone.state_dict())
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert torch.equal(loaded(*tiny_inputs()), model(*tiny_inputs()))


def test_only_adapters_and_head_are_written(saved):
    _, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"adapters", "head"}  # noqa: SIM118


def test_another_backbone_is_refused(saved):
    _, path = saved
    other = randomise(Model(tiny_config()), seed=9).backbone.state_dict()
    with pytest.raises(ValueError, match=r"expected the backbone it was trained on \(checksum [0-9a-f]{12}\)"):
        Model.from_pretrained(path, backbone=other)
    with pytest.raises(ValueError, match="backbone: expected a timm model's name, a file or a state dict, got none"):
        Model.from_pretrained(path)


def test_the_checksum_ignores_the_dtype(saved):
    model, path = saved
    before = checkpoint.fingerprint(model.backbone)
    assert checkpoint.fingerprint(model.double().backbone) == before
    model.bfloat16().save_pretrained(path)
    reloaded = Model.from_pretrained(path, backbone=model.float().backbone.state_dict())
    assert checkpoint.fingerprint(reloaded.backbone) == before


@pytest.mark.parametrize("name", AVE_GOLDENS)
def test_released_names_there_and_back(name):
    run = golden(name)
    state = run.model(torch.float32).state_dict()
    official = checkpoint.to_official(state, run.config.backbone.kind, ave.HEAD_NAMES)
    for key, tensor in official.items():
        assert torch.equal(tensor, run.state_dict[key].float().to(tensor.dtype)), key
    again = checkpoint.from_official(official, ave.HEAD_NAMES)
    assert all(torch.equal(again[key], state[key]) for key in state)
    wrapped = {f"module.{key}": tensor for key, tensor in run.state_dict.items()}
    assert checkpoint.from_official(wrapped, ave.HEAD_NAMES).keys() == state.keys()


def test_official_state_dicts_that_do_not_fit():
    run = golden("ave_swin_small")
    key = "audio_adapter_blocks_p1.0.my_tokens"
    with pytest.raises(ValueError, match=r"missing adapters\.0\.audio_p1\.latents"):
        Model.from_official({k: v for k, v in run.state_dict.items() if k != key}, run.config)
    with pytest.raises(ValueError, match=r"adapters\.0\.audio_p1\.latents: expected shape \(2, 32\), got \(5, 32\)"):
        Model.from_official(run.state_dict | {key: torch.zeros(5, 32)}, run.config)
    with pytest.raises(ValueError, match=r"unexpected something\.else"):
        Model.from_official(run.state_dict | {"something.else": torch.zeros(1)}, run.config)
    dead = {"swin.head.weight": torch.zeros(3), "vis_adapter_blocks_p1.0.gate_tk": torch.zeros(1)}
    Model.from_official(run.state_dict | dead, run.config)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in (
        ("a.pt", lambda p: torch.save({"x": Evil()}, p)),
        ("b.pt", lambda p: p.write_bytes(pickle.dumps(Evil()))),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: expected safetensors or a plain state dict"):
            checkpoint.read_tensors(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_torch_files_are_read_as_plain_tensors(tmp_path):
    state = {"a": torch.ones(2)}
    torch.save(state, tmp_path / "x.pth")
    assert torch.equal(checkpoint.read_tensors(tmp_path / "x.pth")["a"], state["a"])
    torch.save({"a": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        checkpoint.read_tensors(tmp_path / "x.pth")


def test_a_backbones_file_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vit.ckpt", "weights", "hub:vit.pt"):
        torch.save({"a": torch.ones(2)}, name)
        assert torch.equal(checkpoint.backbone_tensors(name)["a"], torch.ones(2))
    with pytest.raises(FileNotFoundError, match=r"other\.pt: expected a file of weights, got none"):
        checkpoint.backbone_tensors("other.pt")
    with pytest.raises(FileNotFoundError, match=r"expected a file, or a timm model's name, got 'other\.ckpt'"):
        checkpoint.backbone_tensors("other.ckpt")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5])
def test_truncated_weights_are_refused(saved, keep):
    model, path = saved
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected safetensors"):
        Model.from_pretrained(path, backbone=model.backbone.state_dict())


def test_extra_missing_and_misshapen_tensors_are_named(saved):
    model, path = saved
    tensors = model.trainable_state_dict()
    cases = {
        "missing head.fc2.bias": {k: v for k, v in tensors.items() if k != "head.fc2.bias"},
        "unexpected extra": tensors | {"extra": torch.zeros(1)},
        r"head.fc2.bias: expected shape \(3,\), got \(4,\)": tensors | {"head.fc2.bias": torch.zeros(4)},
    }
    for message, wrong in cases.items():
        checkpoint.write_tensors(path / "model.safetensors", wrong, {})
        with pytest.raises(ValueError, match=message):
            Model.from_pretrained(path, backbone=model.backbone.state_dict())


def test_half_precision_files_load(saved):
    model, path = saved
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.trainable_state_dict().items()}
    metadata = checkpoint.read_metadata(path / "model.safetensors")
    checkpoint.write_tensors(path / "model.safetensors", half, metadata)
    loaded = Model.from_pretrained(path, backbone=model.backbone.state_dict())
    assert torch.equal(loaded.head.fc1.weight, model.head.fc1.weight.half().float())
    assert loaded.head.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "expected JSON"), ("[]", "expected a JSON object, got list"), ("{}", "configuration, got"),
     (json.dumps({"nonsense": 1, "backbone": {"kind": "vit"}}), "got nonsense")],
)  # fmt: skip
def test_damaged_configs_are_refused(saved, text, message):
    _, path = saved
    (path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(path)


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected a checkpoint's config\.json"):
        Model.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a directory or a Hub repository, got neither"):
        Model.from_pretrained(tmp_path / "not" / "there")


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    model, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with torch.no_grad():
        model.head.fc1.weight.add_(1)
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == "model.safetensors":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_kill_while_saving_leaves_a_loadable_checkpoint(saved):
    _, path = saved
    code = (
        "import sys, itertools, torch; from lavish_fast import checkpoint\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    checkpoint.write_tensors(sys.argv[1], {'x': torch.full((200_000,), float(i))}, {})\n"
    )
    file = path / "loop.safetensors"
    for delay in (0.01, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
        process.stdout.readline()
        while not file.exists():
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
        x = checkpoint.read_tensors(file)["x"]
        assert (x == x[0]).all()
