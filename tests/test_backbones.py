"""The frozen backbones against timm's, on the same weights."""

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from lavish_fast import Config, Model, backbones
from lavish_fast.backbones import PLACES
from lavish_fast.config import ResNetConfig, SwinV2Config, VideoMAEConfig, ViTConfig
from parity import randomise, relative_error, tiny_config

SWIN = [
    {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
    {"img_size": 96, "embed_dim": 16, "depths": (2, 1, 2), "num_heads": (2, 2, 4), "window_size": 6},
    {"img_size": 96, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 12, "patch_size": 2,
     "pretrained_window_sizes": (8, 8)},
    {"img_size": 192, "embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 12},
]  # fmt: skip


@pytest.mark.parametrize("arguments", SWIN)
def test_swin_v2_is_timms(arguments):
    torch.manual_seed(0)
    theirs = randomise(SwinTransformerV2(num_classes=0, **arguments)).eval()
    depths = arguments["depths"]
    ours = backbones.build(SwinV2Config(**({"pretrained_window_sizes": (0,) * len(depths)} | arguments))).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 2e-6
        assert relative_error(ours.double()(images.double()), theirs(images)) < 2e-6


def test_vit_is_timms():
    torch.manual_seed(0)
    arguments = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    theirs = randomise(VisionTransformer(num_classes=0, **arguments)).eval()
    ours = backbones.build(ViTConfig(**arguments)).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 2e-6


@pytest.mark.parametrize("name", [name for name in Config.presets() if "videomae" not in name])
def test_presets_take_the_weights_they_name(name):
    config = Config.from_preset(name)
    with torch.device("meta"):
        ours = backbones.build(config.backbone).state_dict()
        theirs = timm.create_model(config.backbone_weights, num_classes=0).state_dict()
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (SwinV2Config(32, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4), (3, 32, 32)),
        (ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2), (3, 32, 32)),
        (VideoMAEConfig(32, 8, 4, embed_dim=16, depth=1, num_heads=2), (3, 4, 32, 32)),
        (VideoMAEConfig(32, 8, 4, embed_dim=16, depth=1, num_heads=2), (3, 32, 32)),
        (ResNetConfig(64, layers=(1, 1), channels=(16, 32)), (3, 64, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_are_as_kernels_want_them(backbone, shape, dtype):
    backbone = backbones.build(backbone).to(dtype).eval()
    with torch.no_grad():
        x = backbone.embed(torch.randn(2, *shape, dtype=dtype))
        for i, block in enumerate(backbone.blocks):
            x = backbone.enter(i, x)
            assert x.is_contiguous()
            for place in PLACES:
                x = x + block.finish(place, block.branch(place, x))
                assert x.is_contiguous()


def test_no_random_backbone_is_the_identity():
    for config in (SwinV2Config(**SWIN[0], pretrained_window_sizes=(0, 0)), ViTConfig(48, 8, 3, 24, 2, 3)):
        backbone = backbones.build(config)
        x = torch.randn(
            1, backbone.embed(torch.zeros(1, 3, config.img_size, config.img_size)).shape[1], config.embed_dim
        )
        assert backbone.blocks[0].branch("p1", x).abs().mean() > 1e-4
        assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(("img_size", "window_size"), [(30, 4), (40, 4), (32, 7)])
def test_sizes_that_do_not_divide_are_refused(img_size, window_size):
    with pytest.raises(ValueError, match=f"got img_size {img_size}, patch_size 4, window_size {window_size}"):
        backbones.build(SwinV2Config(img_size=img_size, window_size=window_size))


def test_backbone_weights_from_files(tmp_path):
    from safetensors.torch import save_file

    model = Model(tiny_config())
    state = randomise(Model(tiny_config()), seed=3).backbone.state_dict()
    save_file(state, tmp_path / "backbone.safetensors")
    torch.save({"model": state}, tmp_path / "backbone.pt")
    old_names = {k.replace("layers.1.downsample", "layers.0.downsample"): v for k, v in state.items()}
    old_names["layers.0.blocks.1.attn_mask"] = torch.zeros(3)
    old_names["head.weight"] = torch.zeros(3)
    for source in (tmp_path / "backbone.safetensors", str(tmp_path / "backbone.pt"), state, old_names):
        model.load_backbone(source)
        assert all(torch.equal(t, state[name]) for name, t in model.backbone.state_dict().items())
        with torch.no_grad():
            next(model.backbone.parameters()).zero_()


def test_backbone_weights_that_do_not_fit(tmp_path):
    model = Model(tiny_config())
    state = model.backbone.state_dict()
    with pytest.raises(ValueError, match=r"backbone: .*missing norm.weight.*unexpected extra"):
        model.load_backbone({k: v for k, v in state.items() if k != "norm.weight"} | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"norm.weight: expected shape \(32,\), got \(2,\)"):
        model.load_backbone(state | {"norm.weight": torch.zeros(2)})
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: expected a file of weights"):
        model.load_backbone(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="got 'no_such_model'"):
        model.load_backbone("no_such_model")
    with pytest.raises(ValueError, match="backbone: expected a timm model's name"):
        model.load_backbone()
