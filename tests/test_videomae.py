"""The frozen VideoMAE against its definition, written out plainly, and the names its weights come under."""

import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block as TimmBlock

from lavish_fast import Config, backbones, checkpoint
from lavish_fast.adapter import LavishAdapter
from lavish_fast.backbones.videomae import VideoMAE, VideoMAEConfig, own_names, positions
from lavish_fast.config import AdapterConfig
from parity import randomise, relative_error

SMALL = VideoMAEConfig(img_size=32, patch_size=8, frames=4, embed_dim=24, depth=2, num_heads=3)


def official(config=SMALL, seed=0):
    """A state dict under the names of the authors' fine-tuned network, nothing in it zero or one."""
    generator = torch.Generator().manual_seed(seed)
    c, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    shapes = {"patch_embed.proj.weight": (c, 3, config.tubelet, config.patch_size, config.patch_size)}
    shapes |= {"patch_embed.proj.bias": (c,), "fc_norm.weight": (c,), "fc_norm.bias": (c,)}
    shapes |= {"head.weight": (5, c), "head.bias": (5,)}
    block = {"norm1.weight": (c,), "norm1.bias": (c,), "attn.q_bias": (c,), "attn.v_bias": (c,)}
    block |= {"attn.qkv.weight": (3 * c, c), "attn.proj.weight": (c, c), "attn.proj.bias": (c,)}
    block |= {"norm2.weight": (c,), "norm2.bias": (c,), "mlp.fc1.weight": (hidden, c), "mlp.fc1.bias": (hidden,)}
    block |= {"mlp.fc2.weight": (c, hidden), "mlp.fc2.bias": (c,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in block.items()}
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def hugging_face(state_dict):
    """The same weights under the names of Hugging Face's VideoMAEForVideoClassification."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {"attn.q_bias": "attention.attention.q_bias", "attn.v_bias": "attention.attention.v_bias"}
    renamed = {}
    for name, value in state_dict.items():
        if name.endswith("attn.qkv.weight"):
            start = name.replace("blocks.", "videomae.encoder.layer.").removesuffix("attn.qkv.weight")
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                renamed[f"{start}attention.attention.{part}.weight"] = rows
            continue
        name = name.replace("patch_embed.proj", "videomae.embeddings.patch_embeddings.projection")
        name = name.replace("blocks.", "videomae.encoder.layer.").replace("head.", "classifier.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def plainly(state_dict, clip, config=SMALL):
    """The published network, step by step, on weights under the authors' names: (n, 3, T, H, W) -> (n, C)."""
    w = {name: value.to(clip.dtype) for name, value in state_dict.items()}
    p, t, c = config.patch_size, config.tubelet, config.embed_dim
    n, _, frames, height, width = clip.shape
    tubelets = clip.reshape(n, 3, frames // t, t, height // p, p, width // p, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
    x = tubelets.flatten(4).flatten(1, 3) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = x + torch.tensor(table(x.shape[1], c), dtype=torch.float64).to(clip.dtype)
    for i in range(config.depth):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (c,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = (y @ rows.T for rows in b["attn.qkv.weight"].chunk(3))
        q, v = q + b["attn.q_bias"], v + b["attn.v_bias"]
        heads = []
        for head in torch.arange(c).chunk(config.num_heads):
            weights = (q[..., head] @ k[..., head].mT / math.sqrt(c // config.num_heads)).softmax(-1)
            heads.append(weights @ v[..., head])
        x = x + torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = F.layer_norm(x, (c,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return F.layer_norm(x.mean(1), (c,), w["fc_norm.weight"], w["fc_norm.bias"], 1e-6)


def table(tokens, width):
    angle = [[p / 10000 ** (2 * (j // 2) / width) for j in range(width)] for p in range(tokens)]
    return [[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in angle]


def loaded(state_dict, config=SMALL):
    backbone = VideoMAE(config).eval()
    checkpoint.load_strict(backbone, own_names(state_dict), "backbone")
    return backbone


@pytest.mark.parametrize("names", [official, lambda: hugging_face(official())], ids=["authors", "hugging face"])
def test_videomae_is_its_definition(names):
    clip = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    backbone = loaded(names())
    with torch.no_grad():
        expected = plainly(official(), clip.double())
        assert relative_error(backbone(clip), expected) < 1e-6
        assert relative_error(backbone.double()(clip.double()), expected) < 1e-7  # the position table is float32


def test_the_order_of_the_frames_matters():
    backbone = loaded(official())
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert relative_error(backbone(clip.flip(2)), backbone(clip)) > 1e-3


def test_blocks_are_timms():
    ours = randomise(VideoMAE(SMALL).blocks[0])
    theirs = TimmBlock(24, 3, qkv_bias=True, norm_layer=partial(LayerNorm, eps=1e-6))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 11, 24)
    with torch.no_grad():
        got = x + ours.branch("p1", x)
        got = got + ours.branch("p2", got)
        assert relative_error(got, theirs(x)) < 1e-6


@pytest.mark.parametrize(("tokens", "width"), [(1568, 768), (7, 5)])
def test_positions_are_sines_and_cosines(tokens, width):
    expected = torch.tensor(table(tokens, width), dtype=torch.float64)
    assert positions(tokens, width).shape == (1, tokens, width)
    assert (positions(tokens, width)[0] - expected).abs().max() < 1e-7


# Spectrograms


def test_a_picture_is_a_clip_of_two_equal_frames():
    backbone = loaded(official())
    short = loaded(official(), VideoMAEConfig(**vars(SMALL) | {"frames": 2}))  # whose clips have one layer of tubelets
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(backbone.embed(picture), short.embed(picture[:, :, None].repeat(1, 1, 2, 1, 1))) < 1e-6
        assert relative_error(backbone(picture), plainly(official(), picture[:, :, None].repeat(1, 1, 2, 1, 1))) < 1e-5


def test_pictures_of_another_grid_have_positions_in_between():
    backbone = loaded(official())
    with torch.no_grad():
        backbone.patch_embed.proj.weight.zero_()
        backbone.patch_embed.proj.bias.zero_()
        square = backbone.embed(torch.zeros(1, 3, 32, 32)).unflatten(1, (4, 4))
        tall = backbone.embed(torch.zeros(1, 3, 64, 16)).unflatten(1, (8, 2))
    assert torch.equal(square.flatten(1, 2), positions(32, 24)[:, :16])
    # Half as many columns: each in the middle of two. Twice as many rows: a quarter of a row off.
    columns = square.unflatten(2, (2, 2)).mean(3)
    torch.testing.assert_close(tall[:, 0], columns[:, 0])
    torch.testing.assert_close(tall[:, 1], 0.75 * columns[:, 0] + 0.25 * columns[:, 1])
    torch.testing.assert_close(tall[:, 4], 0.25 * columns[:, 1] + 0.75 * columns[:, 2])


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 32, 40), (1, 3, 2, 32, 32), (1, 1, 4, 32, 32), (1, 3, 32, 36), (1, 3, 0, 32), (1, 1, 32, 32)]
)
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images: expected clips \(n, 3, 4, 32, 32\) or pictures .* 8 divides, got "):
        VideoMAE(SMALL).embed(torch.zeros(shape))


def test_sizes_that_do_not_divide_are_refused():
    for changes in ({"frames": 3}, {"img_size": 36}):
        with pytest.raises(ValueError, match="backbone: expected frames and sides that tubelets and patches divide"):
            VideoMAE(VideoMAEConfig(**vars(SMALL) | changes))


# Weights


def test_own_names_are_kept():
    backbone = randomise(VideoMAE(SMALL))
    again = own_names(backbone.state_dict())
    assert all(torch.equal(again.pop(name), value) for name, value in backbone.state_dict().items())
    assert not again


def test_weights_that_do_not_fit_are_refused_by_name():
    backbone, weights = VideoMAE(SMALL), official()

    def load(state_dict):
        checkpoint.load_strict(backbone, own_names(state_dict), "backbone x")

    with pytest.raises(ValueError, match=r"attn.qkv.bias: expected q_bias, v_bias of one shape, got v_bias \(24,\)"):
        load({name: value for name, value in weights.items() if name != "blocks.1.attn.q_bias"})
    theirs = hugging_face(weights)
    key = "videomae.encoder.layer.0.attention.attention.key.weight"
    with pytest.raises(ValueError, match=r"qkv.weight: .*query \(24, 24\), key \(24, 23\), value \(24, 24\)"):
        load(theirs | {key: theirs[key][:, :-1]})
    with pytest.raises(ValueError, match=r"qkv.weight: expected query, key, value .* got query \(24, 24\), value"):
        load({name: value for name, value in theirs.items() if name != key})
    with pytest.raises(ValueError, match=r"backbone x: .*unexpected videomae.layernorm.weight"):
        load(theirs | {"videomae.layernorm.weight": torch.zeros(24)})
    with pytest.raises(ValueError, match=r"proj.weight: expected shape \(24, 3, 2, 8, 8\), got \(24, 3, 8, 8\)"):
        load(weights | {"patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)})
    # The network of the pre-training: an encoder that pools nothing, and a decoder.
    pretraining = {f"encoder.{name}": value for name, value in weights.items() if not name.startswith(("fc_", "head"))}
    with pytest.raises(ValueError, match=r"expected a fine-tuned VideoMAE, got .* encoder.patch_embed.proj.weight"):
        load(pretraining | {"mask_token": torch.zeros(1)})
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, num_classes=0)
    with pytest.raises(ValueError, match=r"missing fc_norm.bias.*unexpected cls_token"):
        load(vit.state_dict())


# Numbers of parameters


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_videomae_base_has_86_2_million_parameters():
    with torch.device("meta"):
        backbone = VideoMAE(VideoMAEConfig())
    # 86,227,200 of the authors' network without its classifier, and the keys' zero biases.
    assert count(backbone) == 86_227_200 + 12 * 768
    assert backbone.config.block_widths == (768,) * 12
    assert backbone.config.stage_widths == (768,)


def test_its_adapters_have_7_39_million_parameters():
    """The paper's action recognition: r = 4, m = 2, G = 2, two streams, beside attention and MLP of twelve blocks."""
    adapter = LavishAdapter(768, AdapterConfig(latents=2, reduction=4, groups=2))
    assert 4 * 12 * count(adapter) == 7_391_328


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("ave-swinv2-tiny", 27.6),
        ("ave-swinv2-small", 49.0),
        ("ave-swinv2-base", 86.9),
        ("ave-swinv2-large", 195.2),
        ("ave-vit-tiny", 5.5),
        ("ave-vit-small", 21.7),
        ("ave-vit-base", 85.8),
        ("ave-vit-large", 303.3),
    ],
)
def test_other_backbones_have_timms_number_of_parameters(preset, millions):
    config = Config.from_preset(preset)
    with torch.device("meta"):
        ours = count(backbones.build(config.backbone))
        theirs = count(timm.create_model(config.backbone_weights, num_classes=0))
    assert ours == theirs
    assert ours / 1e6 == pytest.approx(millions, abs=0.05)
