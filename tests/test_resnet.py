"""The frozen ResNet against timm's, and where its adapters stand."""

import pytest
import timm
import torch
import torchvision
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet

from lavish_fast import checkpoint
from lavish_fast.adapter import BlockAdapters, LavishAdapter
from lavish_fast.backbones.resnet import ResNet, ResNetConfig, own_names
from lavish_fast.config import AdapterConfig
from parity import randomise, relative_error

SMALL = ResNetConfig(img_size=64, layers=(1, 2, 3, 1), channels=(8, 8, 16, 24))


def pair(config=SMALL):
    """Ours and timm's on the same weights, with BatchNorms that are not the identity."""
    theirs = TimmResNet(Bottleneck, config.layers, num_classes=0, channels=config.channels)
    randomise(theirs).eval()
    ours = ResNet(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("side", [64, 96, 75])
def test_resnet_is_timms(side):
    ours, theirs = pair()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5
        assert relative_error(ours.double()(images.double()), theirs.double()(images.double())) < 1e-12


def test_each_stage_is_timms():
    ours, theirs = pair()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = ours.embed(images)
        y = theirs.maxpool(theirs.act1(theirs.bn1(theirs.conv1(images))))
        for i, width in enumerate(SMALL.block_widths):
            x = ours.enter(i, x)
            y = getattr(theirs, f"layer{i + 1}")(y)
            assert x.shape == (2, (16 // 2**i) ** 2, width)
            assert x.is_contiguous()  # a map in channels-last order, which the fused kernels take
            assert relative_error(x, y.flatten(2).mT) < 1e-5


@torch.no_grad()
def test_resnet_152_is_timms():
    torch.manual_seed(0)
    theirs = randomise(timm.create_model("resnet152", num_classes=0)).eval()
    ours = ResNet(ResNetConfig())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    features = theirs(images)
    assert features.std() > 1e-3
    assert relative_error(ours(images), features) < 1e-5


def test_names_and_number_of_parameters():
    with torch.device("meta"):
        ours = ResNet(ResNetConfig())
        theirs = timm.create_model("resnet152.tv_in1k", num_classes=0)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 58_143_808
    assert ours.config.block_widths == ours.config.stage_widths == (256, 512, 1024, 2048)
    assert len(ours.blocks) == 4


def test_training_leaves_the_frozen_statistics_alone():
    ours, _ = pair()
    images = torch.randn(2, 3, 64, 64)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with torch.no_grad():
        expected = ours.eval()(images)
        assert torch.equal(torch.nn.ModuleList([ours]).train()[0](images), expected)
    assert not any(module.training for module in ours.modules())
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def adapted(backbone, adapters, *images):
    xs = [backbone.embed(x) for x in images]
    for i, (block, at) in enumerate(zip(backbone.blocks, adapters, strict=True)):
        xs = at(block, [backbone.enter(i, x) for x in xs])
    return xs


def make_adapters(places=("p1",)):
    config = AdapterConfig(reduction=4)
    names = [f"{stream}_{place}" for place in places for stream in ("audio", "video")]
    return [BlockAdapters({n: LavishAdapter(width, config) for n in names}) for width in SMALL.block_widths]


def test_adapters_stand_behind_each_stage():
    """X <- stage(X) + LAV(stage(X), stage(Y)), written out; streams of different sizes."""
    ours, _ = pair()
    adapters = [randomise(at, seed=i).eval() for i, at in enumerate(make_adapters())]
    images = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = adapted(ours, adapters, *images)
        maps = [ours.maxpool(ours.act1(ours.bn1(ours.conv1(x)))) for x in images]
        for i, at in enumerate(adapters):
            a, v = (getattr(ours, f"layer{i + 1}")(x) for x in maps)
            a_tokens, v_tokens = a.flatten(2).mT, v.flatten(2).mT
            lav_a, lav_v = at["audio_p1"](a_tokens, v_tokens), at["video_p1"](v_tokens, a_tokens)
            assert min(lav_a.norm() / a.norm(), lav_v.norm() / v.norm()) > 1e-3
            maps = [x + lav.mT.reshape(x.shape) for x, lav in ((a, lav_a), (v, lav_v))]
        for x, y in zip(got, maps, strict=True):
            assert relative_error(x, y.flatten(2).mT) < 1e-5


@pytest.mark.parametrize("places", [("p1",), ("p1", "p2")])
def test_fresh_adapters_change_nothing_and_all_of_them_train(places):
    ours, _ = pair()
    ours.requires_grad_(False)
    adapters = [at.eval() for at in make_adapters(places)]
    images = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        frozen = [ours(x) for x in images]
    features = [ours.pool(x) for x in adapted(ours, adapters, *images)]
    assert all(torch.equal(x, y) for x, y in zip(features, frozen, strict=True))
    for at in adapters:
        randomise(at.train())
    sum(ours.pool(x).square().sum() for x in adapted(ours, adapters, *images)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for at in adapters for p in at.parameters())
    assert all(p.grad is None for p in ours.parameters())


def test_weights_of_torchvision():
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.resnet50()).eval()
    old = {k: t for k, t in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(theirs.children())[:-1])(images).flatten(1)
        for state_dict in (theirs.state_dict(), old):
            ours = ResNet(ResNetConfig(layers=(3, 4, 6, 3)))
            checkpoint.load_strict(ours, own_names(state_dict), "backbone")
            assert relative_error(ours(images), expected) < 1e-5
    with pytest.raises(ValueError, match=r"missing layer3\.10\.bn1\.bias"):
        checkpoint.load_strict(ResNet(ResNetConfig(layers=(3, 4, 23, 3))), own_names(old), "backbone")


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match=r"images: expected square ones \(n, 3, S, S\), got \(1, 3, 64, 32\)"):
        pair()[0].embed(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"as many layers as channels, got \(1, 2\) and \(8,\)"):
        ResNet(ResNetConfig(layers=(1, 2), channels=(8,)))
