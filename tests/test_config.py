"""Configurations: presets, the released options, and errors that name the field."""

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavish_fast import Config
from lavish_fast.config import AVE_CLASSES, AdapterConfig, AVEConfig, SpectrogramConfig, SwinV2Config, ViTConfig
from parity import tiny_config

OPT = {"num_tokens": 2, "Adapter_downsample": 8, "num_conv_group": 2}
SWIN = {"kind": "swinv2", "img_size": 192, "window_size": 12, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2]}


def test_the_papers_preset():
    config = Config.from_preset("ave-swinv2-large")
    assert config.backbone == SwinV2Config(192, 4, 3, 192, (2, 2, 18, 2), (6, 12, 24, 48), 12)
    assert config.adapter == AdapterConfig(latents=2, reduction=8, groups=2)
    assert (config.width, len(config.classes), config.frames, config.classes) == (1536, 29, 10, AVE_CLASSES)
    assert config.backbone.block_widths == (192,) * 2 + (384,) * 2 + (768,) * 18 + (1536,) * 2


@pytest.mark.parametrize("name", Config.presets())
def test_presets_survive_json(name):
    config = Config.from_preset(name, modality="audio")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("wrap", [dict, lambda opt: argparse.Namespace(**opt)])
def test_official_options(wrap):
    opt = OPT | {"is_gate": 0, "is_bn": 0, "is_before_layernorm": 0, "start_tune_layers": 3, "seed": 43}
    config = Config.from_official(wrap(opt), task="ave", backbone=SWIN, modality="audio")
    assert config.adapter == AdapterConfig(2, 8, 2, batch_norm=False, ln_before=False, audio_gate=False)
    assert config.modality == "audio"
    assert config.backbone.drop_path_rate == 0, "off unless asked for, whatever timm's default"
    asked = Config.from_official(opt, task="ave", backbone=SWIN | {"drop_path_rate": 0.2})
    assert asked.backbone.drop_path_rate == 0.2
    vit = Config.from_official(opt, task="ave", backbone={"kind": "vit", "depth": 6, "num_classes": 0})
    assert (vit.backbone, vit.adapter.first_block) == (ViTConfig(depth=6), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opt": {}}, r"opt.num_tokens: expected the released option"),
        ({"backbone": SWIN | {"kind": "alexnet"}}, r"backbone.kind: expected one of swinv2, vit, .*, got 'alexnet'"),
        ({"backbone": SWIN | {"drop_rate": 0.1}}, r"backbone.drop_rate: expected 0.0, got 0.1"),
        ({"backbone": SWIN | {"depth": 3}}, r"backbone: expected fields among .*, got depth"),
        ({"backbone": SWIN | {"img_size": (192, 96)}}, r"backbone.img_size: expected a square"),
        ({"task": "avx"}, r"task: expected one with released code, ave, avs or avqa, got 'avx'"),
        ({"opt": OPT | {"Adapter_downsample": 5}}, r"reduction \* groups to divide every width, got 5 \* 2"),
        ({"opt": OPT | {"num_tokens": 0}}, r"adapter.latents: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_honoured_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Config.from_official(**({"opt": OPT, "task": "ave", "backbone": SWIN} | arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "sound"}, "modality: expected one of"),
        ({"classes": ("one",)}, "classes: expected at least one class and background"),
        ({"frames": 0}, "frames: expected at least 1"),
        ({"adapter": AdapterConfig(reduction=4, first_block=1)}, "adapter.first_block: expected 0 for swinv2"),
        (
            {"backbone": ViTConfig(32, 8, 3, 16, 2, 2), "adapter": AdapterConfig(reduction=4, first_block=2)},
            "less than 2 blocks",
        ),
        (
            {"head": AVEConfig(vggish=True), "spectrogram": SpectrogramConfig(sample_rate=44100)},
            r"head\.vggish: expected its own spectrogram\.sample_rate of 16000, got 44100",
        ),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"expected one of ave-swinv2-large, .* got 'ave-swin'"):
        Config.from_preset("ave-swin")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda values: st.lists(values) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=4,
)


@given(
    field=st.sampled_from(["adapter", "backbone", "spectrogram", "modality", "task", "head", "classes", "nonsense"]),
    value=json_values,
)
def test_a_damaged_config_is_refused_by_name(field, value):
    values = tiny_config().to_dict() | {field: value}
    try:
        Config.from_dict(values)
    except ValueError as error:
        assert field in str(error)  # noqa: PT017
    else:
        assert isinstance(value, dict) or (field in ("head", "classes") and value is None) or field == "classes"
        assert not value or field == "classes", "only an empty section may fall back to its defaults"
